"""How output tensors are made from checkpoint tensors, slab by slab. Knows no names.

A maker takes the source tensors and the model's sizes and gives the output's shape and its stream. Whatever keeps
rows whole streams in slabs of at most the number of values asked for; see each maker for the exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod

import numpy as np

from edgekit.arch._types import Array
from edgekit.checkpoint import TensorRef

Stream = Callable[[int], Iterator[Array]]
Sizes = Callable[[str], int]
"""A size of the model by name: `head`, `heads`, `kv_heads`, `ffn`, ..."""
Maker = Callable[[Sequence[TensorRef], Sizes], tuple[tuple[int, ...], Stream]]
_Span = tuple[TensorRef, int, int]


def as_is(refs: Sequence[TensorRef], size: Sizes) -> tuple[tuple[int, ...], Stream]:
    """One tensor, renamed."""
    (ref,) = refs
    return ref.shape, _spans([(ref, 0, _rows(ref))], ref.shape[-1])


def behind(skipped: str) -> Maker:
    """A matrix without its first rows, as many as the size called `skipped` says."""

    def make(refs: Sequence[TensorRef], size: Sizes) -> tuple[tuple[int, ...], Stream]:
        (ref,) = refs
        rows, cols = ref.shape
        return (rows - size(skipped), cols), _spans([(ref, size(skipped), rows)], cols)

    return make


def stacked(refs: Sequence[TensorRef], size: Sizes) -> tuple[tuple[int, ...], Stream]:
    """Tensors of one shape, stacked along a new first axis; read one after the other."""
    return (len(refs), *refs[0].shape), _spans([(r, 0, _rows(r)) for r in refs], refs[0].shape[-1])


def plus_one(refs: Sequence[TensorRef], size: Sizes) -> tuple[tuple[int, ...], Stream]:
    """A vector with one added: families whose norms multiply by 1 + weight."""
    (ref,) = refs

    def stream(max_values: int) -> Iterator[Array]:
        yield (ref.load() + np.float32(1)).reshape(1, -1)

    return ref.shape, stream


def transposed(refs: Sequence[TensorRef], size: Sizes) -> tuple[tuple[int, ...], Stream]:
    """A matrix, transposed (transformers' Conv1D keeps (in, out)). The source is read whole."""
    (ref,) = refs
    rows, cols = ref.shape

    def stream(max_values: int) -> Iterator[Array]:
        source, step = ref.load(), max(1, max_values // rows)
        for start in range(0, cols, step):
            yield np.ascontiguousarray(source[:, start : start + step].T)

    return (cols, rows), stream


def rotary(heads: str) -> Maker:
    """Rows of each head from halves to pairs: transformers rotates value i with i + d/2, ggml's NORM rope 2i with
    2i + 1. A slab is at least one head."""

    def make(refs: Sequence[TensorRef], size: Sizes) -> tuple[tuple[int, ...], Stream]:
        (ref,) = refs
        if len(ref.shape) == 1:
            return ref.shape, _whole(ref, lambda x: _paired(x.reshape(-1, 1), size("head")).reshape(1, -1))
        cols, head = ref.shape[-1], size("head")

        def stream(max_values: int) -> Iterator[Array]:
            step = max(1, max_values // (head * cols))
            for first in range(0, size(heads), step):
                last = min(first + step, size(heads))
                yield _paired(ref.rows(first * head, last * head), head)

        return ref.shape, stream

    return make


def _paired(rows: Array, head: int) -> Array:
    shaped = rows.reshape(-1, 2, head // 2, rows.shape[-1]).swapaxes(1, 2)
    return np.ascontiguousarray(shaped).reshape(rows.shape)


def part(index: int, parts: int) -> Maker:
    """The `index`-th of `parts` equal row blocks of every expert of a 3-D tensor (experts, rows, cols)."""

    def make(refs: Sequence[TensorRef], size: Sizes) -> tuple[tuple[int, ...], Stream]:
        (ref,) = refs
        experts, rows, cols = ref.shape
        block = rows // parts
        spans = [(ref, e * rows + index * block, e * rows + (index + 1) * block) for e in range(experts)]
        return (experts, block, cols), _spans(spans, cols)

    return make


def head_major_qkv(refs: Sequence[TensorRef], size: Sizes) -> tuple[tuple[int, ...], Stream]:
    """Fused q, k, v: from head by head (q0 k0 v0 q1 k1 ...) to all of q, all of k, all of v."""
    (ref,) = refs
    heads, head = size("heads"), size("head")
    if len(ref.shape) == 1:
        return ref.shape, _whole(ref, lambda x: x.reshape(heads, 3, head).swapaxes(0, 1).reshape(1, -1))
    starts = [(h * 3 + p) * head for p in range(3) for h in range(heads)]
    return ref.shape, _spans([(ref, s, s + head) for s in starts], ref.shape[-1])


def _whole(ref: TensorRef, change: Callable[[Array], Array]) -> Stream:
    def stream(max_values: int) -> Iterator[Array]:
        yield np.ascontiguousarray(change(ref.load()))

    return stream


def _rows(ref: TensorRef) -> int:
    return prod(ref.shape[:-1])


def _spans(spans: Iterable[_Span], cols: int) -> Stream:
    """Row ranges of tensors (seen as 2-D) one after the other; small ones share a slab."""
    ranges = tuple(spans)

    def stream(max_values: int) -> Iterator[Array]:
        room = max(1, max_values // max(1, cols))
        held: list[Array] = []
        count = 0
        for ref, begin, end in ranges:
            start = begin
            while start < end:
                stop = min(end, start + room - count)
                held.append(ref.rows(start, stop))
                count += stop - start
                start = stop
                if count == room:
                    yield _joined(held)
                    held, count = [], 0
        if held:
            yield _joined(held)

    return stream


def _joined(pieces: list[Array]) -> Array:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
