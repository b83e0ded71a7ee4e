"""Several sequences of one decoder graph side by side, every one at the same position, run by onnxruntime alone.

Nothing is padded and no mask has a hole, so that every graph that takes and gives its cache is right this way: fused
attention, which finds a row's length in the mask, as well as attention that reads the mask as it is. Knows neither text
nor sampling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import RuntimeFailed, UnsupportedModel
from edgekit.ort_library import onnxruntime, open_graph, readable
from edgekit.runtime import Logits
from edgekit.runtime._common import Tokens
from edgekit.runtime._ort_cache import PRESENT
from edgekit.runtime._ort_genai import Settings
from edgekit.units import MIB

MOST = 32
"""Sequences side by side: a matrix product of more rows is hardly faster a row."""

BUDGET = 768 * MIB
"""Bytes of keys and values, all sequences together."""

_PAST = re.compile(r"past(_key_values)?\.")  # genai's builder leaves the middle out for the state of a convolution
_KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_WHOLE = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


@dataclass(frozen=True, slots=True)
class _Cache:
    """An input that holds what a layer has read, and the output that goes on with it. `shape`: of one sequence of
    `length` tokens. `grows`: has an axis of tokens; else it is a state of fixed size."""

    name: str
    output: str
    shape: tuple[int, ...]
    kind: type
    grows: bool

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.kind).itemsize


class Batch:
    """`graph` loaded for sequences of at most `length` tokens; `most` of them go side by side, a number that depends
    on the graph alone.

    `in_place`: its attention (GroupQueryAttention) writes behind the tokens of a cache that is long enough from the
    start; otherwise every step copies the cache to one longer cache. Raises CorruptCheckpoint, RuntimeFailed,
    UnsupportedModel.
    """

    def __init__(
        self, graph: Path, n_vocab: int, settings: Settings, length: int, head_size: int | None, *, in_place: bool
    ) -> None:
        self.graph, self.n_vocab, self.length = graph, n_vocab, length
        self._in_place = in_place
        self._session: Any = open_graph(graph, settings.threads, settings.providers or ())[0]
        self._whole, self._caches = _inputs(graph, self._session.get_inputs(), length, head_size)
        absent = {"logits", *(c.output for c in self._caches)} - {o.name for o in self._session.get_outputs()}
        if absent:
            raise UnsupportedModel(f"{graph} gives no {min(absent)}: its cache cannot go on", _AGAIN)
        a_text = sum(c.nbytes for c in self._caches) * (1 if in_place else 3)
        self.most = int(min(MOST, max(1, BUDGET // max(1, a_text))))
        self.rows = self._read = 0
        self._held: dict[str, npt.NDArray[Any]] = {}

    @property
    def nbytes(self) -> int:
        """Of the cache as it is now."""
        return sum(array.nbytes for array in self._held.values())

    def begin(self, rows: int) -> None:
        """`rows` sequences without a token."""
        self.rows, self._read = rows, 0
        self._held = {
            c.name: np.zeros((rows, *(_cut(c.shape, 0) if c.grows and not self._in_place else c.shape)), c.kind)
            for c in self._caches
        }

    def step(self, tokens: Tokens) -> Logits:
        """Every sequence reads one token more, int32 (rows) -> logits of what comes next, float32 (rows, n_vocab)."""
        if self._read >= self.length:
            raise RuntimeFailed(f"{self.graph} has read {self._read} tokens, as many as there is room for", _AGAIN)
        binding = self._session.io_binding()
        value = onnxruntime().OrtValue.ortvalue_from_numpy  # borrows the memory of the array
        shared = {c.output for c in self._caches if c.grows and self._in_place}
        with readable(self.graph):
            for name, fed in self._feeds(tokens).items():
                binding.bind_cpu_input(name, fed)
            binding.bind_output("logits", "cpu")
            for cache in self._caches:
                held = value(self._held[cache.name])
                binding.bind_ortvalue_input(cache.name, held)
                if cache.output in shared:
                    binding.bind_ortvalue_output(cache.output, held)
                else:
                    binding.bind_output(cache.output, "cpu")
            self._session.run_with_iobinding(binding)
            logits, *given = binding.get_outputs()
            rows = logits.numpy()
        for cache, new in zip(self._caches, given, strict=True):
            if cache.output not in shared:
                self._held[cache.name] = new.numpy()
        self._read += 1
        if rows.shape != (self.rows, 1, self.n_vocab):
            raise RuntimeFailed(f"{self.graph} gives logits of shape {rows.shape} for {self.rows} tokens", _AGAIN)
        found: Logits = np.asarray(rows[:, 0], np.float32)
        return found

    def _feeds(self, tokens: Tokens) -> Mapping[str, npt.NDArray[Any]]:
        values: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.asarray(tokens)[:, None],
            "attention_mask": np.ones((self.rows, self._read + 1)),
            "position_ids": np.full((self.rows, 1), self._read),
        }
        return {name: np.ascontiguousarray(values[name], kind) for name, kind in self._whole.items()}

    def drop(self, row: int) -> None:
        """Sequence `row` ends; the last one takes its place."""
        self.rows -= 1
        for name, held in self._held.items():
            if row < self.rows:
                held[row] = held[self.rows]
            self._held[name] = held[: self.rows]

    def close(self) -> None:
        self._session = None
        self._held = {}


_AGAIN = "convert it again with edgekit convert --format onnx"


def _inputs(
    graph: Path, inputs: Sequence[Any], length: int, head_size: int | None
) -> tuple[dict[str, type], list[_Cache]]:
    """(integer inputs with their types, caches). Raises UnsupportedModel for an input that nobody here could give."""
    whole: dict[str, type] = {}
    caches: list[_Cache] = []
    for i in inputs:
        if i.name in ("input_ids", "attention_mask", "position_ids") and i.type in _WHOLE:
            whole[i.name] = _WHOLE[i.type]
        elif (past := _PAST.match(i.name)) and i.type in _KINDS and len(i.shape) >= 2:
            grows = any("sequence" in str(axis) for axis in i.shape[1:])
            shape = tuple(_size(axis, length, head_size) for axis in i.shape[1:])
            if None in shape:
                raise UnsupportedModel(f"{graph}: {i.name} has the shape {i.shape}, without its width", _AGAIN)
            output = PRESENT + i.name[past.end() :]
            caches.append(_Cache(i.name, output, tuple(map(int, filter(None, shape))), _KINDS[i.type], grows))
        else:
            raise UnsupportedModel(f"{graph} wants {i.name!r} ({i.type}, {i.shape}): no decoder of text", _AGAIN)
    if "input_ids" not in whole:
        raise UnsupportedModel(f"{graph} takes no input_ids", "give a graph that takes token ids")
    return whole, caches


def _size(axis: int | str | None, length: int, head_size: int | None) -> int | None:
    if isinstance(axis, int):
        return axis if axis > 0 else None
    return length if "sequence" in str(axis) else head_size


def _cut(shape: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """A cache of (heads, tokens, width) for another number of tokens."""
    return (shape[0], tokens, *shape[2:])
