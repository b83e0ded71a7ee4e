"""The number format of ONNX Runtime's MatMulNBits and GatherBlockQuantized: blocks of 4- or 8-bit integers, each block
with a float32 scale and perhaps an integer zero point.

Knows one matrix, as rows (outputs) of weights; knows nothing of graphs or files. The layout is that of the operators'
page (com.microsoft in ONNX Runtime's ContribOperators.md): value = (q - zero) · scale, low nibble first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from edgekit.quant.gptq import Curvature

Bytes = npt.NDArray[Any]  # uint8; numpy's types widen every shift and mask
Floats = npt.NDArray[np.float32]
Quantised = tuple[Bytes, Floats, Bytes]
"""q uint8 (rows, blocks, block), scales float32 (rows, blocks), zeros uint8 (rows, blocks)."""

BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that MatMulNBits computes with."""

ALIGN = 64
"""Every tensor of a data file starts at a multiple of this many bytes (a cache line; ONNX Runtime's own buffers do so
too), and the file ends at one."""

INLINE = 1024
"""Tensors of fewer bytes stay inside the graph, in model.onnx itself."""

MIN_SIDE = 32
"""Matrices with fewer rows or columns stay float32: classifier heads and gates weigh nothing and decide much."""

TINY = np.float32(1e-36)
"""Scales up to here mean zero: their reciprocals may be beyond float32."""

_PIECE = 1 << 20  # weights a task takes: a few MB of temporary arrays
_FEEDBACK_ROWS = 512  # rows a task takes with error feedback: fixed, so that no sum depends on the number of threads


@dataclass(frozen=True, slots=True)
class NBits:
    """`bits` a weight (4 or 8), `block` weights a scale; `symmetric`: the zero point is the middle of the range and
    not stored, else every block has its own. Raises EdgekitError for what the operators do not know."""

    bits: int = 8
    block: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.block not in BLOCKS:
            raise EdgekitError(
                f"{self.bits} bits in blocks of {self.block}: MatMulNBits has no such format",
                f"use 4 or 8 bits and a block of {', '.join(map(str, BLOCKS))}",
            )

    @property
    def zero(self) -> int:
        """The zero point where none is stored."""
        return 1 << self.bits - 1

    @property
    def top(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1

    @property
    def bpw(self) -> float:
        """Bits per weight, scales and zero points included, where rows divide into blocks."""
        return self.bits + (32 if self.symmetric else 32 + self.bits) / self.block

    def fitted(self, cols: int) -> NBits:
        """This format with the largest block up to its own that divides `cols`; itself where none does: the last block
        of a row is then padded with zeros."""
        return next((replace(self, block=b) for b in reversed(BLOCKS) if b <= self.block and cols % b == 0), self)

    def blocks(self, cols: int) -> int:
        """Blocks of a row; a last one that is not full counts."""
        return -(-cols // self.block)

    def sizes(self, rows: int, cols: int) -> tuple[int, ...]:
        """Bytes of each tensor of a (rows, cols) matrix: integers, scales, and zero points where they are stored."""
        blocks = self.blocks(cols)
        data, scales = rows * blocks * self.block * self.bits // 8, 4 * rows * blocks
        return (data, scales) if self.symmetric else (data, scales, rows * -(-blocks * self.bits // 8))

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a (rows, cols) matrix, everything counted, alignment in the file not."""
        return sum(self.sizes(rows, cols))


def worthwhile(rows: int, cols: int) -> bool:
    """Whether a matrix of this shape is quantised at all."""
    return min(rows, cols) >= MIN_SIDE


def tensor_sizes(rows: int, cols: int, fmt: NBits | None) -> tuple[int, ...]:
    """Bytes of each tensor that a (rows, cols) matrix, or a table of token embeddings, becomes in a graph: in the
    largest fitting block of `fmt`; float32 where `fmt` is None or the matrix is not `worthwhile`."""
    if fmt is None or not worthwhile(rows, cols):
        return (4 * rows * cols,)
    return fmt.fitted(cols).sizes(rows, cols)


def data_bytes(sizes: Iterable[int]) -> int:
    """Size of a data file that holds tensors of these sizes, in whatever order; those below INLINE are not in it."""
    return sum(-(-size // ALIGN) * ALIGN for size in sizes if size >= INLINE)


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix as the operators store it. `data`: uint8 (rows, blocks, block·bits/8); `scales`: float32
    (rows, blocks); `zero_points`: uint8 (rows, ceil(blocks·bits/8)), or None where the format is symmetric."""

    fmt: NBits
    data: Bytes
    scales: Floats
    zero_points: Bytes | None


def encode(
    rows: Floats,
    fmt: NBits,
    *,
    search: bool = True,
    importance: Floats | None = None,
    curvature: Curvature | None = None,
    threads: int = 1,
) -> Packed:
    """float32 (rows, cols) -> its blocks in `fmt`.

    `search` False: the range of a block sets its scale, byte for byte as ONNX Runtime's own quantizer does. True:
    scales of least squares, errors counted by `importance` (float32 (cols,), mean squares of the input's columns; None:
    all alike). With `curvature` (of the input's second moment) rounding errors are pushed on to later columns (GPTQ),
    where that makes a row's output error smaller. The bytes do not depend on `threads`.
    Raises EdgekitError where shapes do not agree or weights are not finite.
    """
    _check(rows, importance, curvature)
    n, k = rows.shape
    blocks = fmt.blocks(k)
    q = np.empty((n, blocks, fmt.block), np.uint8)
    scales = np.empty((n, blocks), np.float32)
    zeros = np.empty((n, blocks), np.uint8)
    quantise = _method(fmt, k, search, importance, curvature)
    step = _FEEDBACK_ROWS if curvature is not None else max(1, _PIECE // (blocks * fmt.block))

    def work(start: int) -> None:
        here = slice(start, start + step)
        q[here], scales[here], zeros[here] = quantise(_padded(rows[here], fmt))

    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="nbits") as pool:
        for _ in pool.map(work, range(0, n, step)):
            pass
    return Packed(fmt, _pack(q, fmt.bits), scales, None if fmt.symmetric else _pack(zeros, fmt.bits))


def decode(packed: Packed, cols: int) -> Floats:
    """What the operators compute with: float32 (rows, cols)."""
    fmt = packed.fmt
    rows, blocks = packed.scales.shape
    q = _unpack(packed.data, fmt.bits).reshape(rows, blocks, fmt.block)
    zeros = _zeros(packed)
    return _values((q, packed.scales, zeros)).reshape(rows, -1)[:, :cols]


def relative_error(rows: Floats, packed: Packed, importance: Floats | None = None) -> float:
    """|decoded - rows| / |rows|, squares weighted by `importance` where it is given."""
    weight = np.float32(1) if importance is None else importance
    wrong = (np.square(decode(packed, rows.shape[1]) - rows) * weight).sum(dtype=np.float64)
    total = (np.square(rows) * weight).sum(dtype=np.float64)
    return float(np.sqrt(wrong / total)) if total > 0 else 0.0


def _check(rows: Floats, importance: Floats | None, curvature: Curvature | None) -> None:
    if rows.ndim != 2 or not rows.size:
        raise EdgekitError(f"an array of shape {rows.shape} is no matrix of weights", "check the model's tensors")
    for what, given in (
        ("importance", importance),
        ("second moment", None if curvature is None else curvature.diagonal),
    ):
        if given is not None and given.shape != rows.shape[1:]:
            raise EdgekitError(
                f"weights of {rows.shape[1]} columns, {what} of shape {given.shape}", "calibrate this model again"
            )
    with np.errstate(invalid="ignore", over="ignore"):
        if not np.isfinite(rows.sum(dtype=np.float64)):
            raise EdgekitError("weights are not finite (NaN or infinity)", "check the checkpoint")


def _method(
    fmt: NBits, cols: int, search: bool, importance: Floats | None, curvature: Curvature | None
) -> Callable[[Floats], Quantised]:
    """How blocks (rows, blocks, block) are quantised."""
    if curvature is not None:
        from edgekit.quant import _nbits_feedback  # it needs this module

        return _nbits_feedback.method(fmt, curvature)
    if not search:
        return lambda w: _round_to_nearest(w, fmt)
    weight = np.ones(cols, np.float32) if importance is None else importance.astype(np.float32)
    padded = _padded(weight[None], fmt)
    # columns that saw nothing still deserve a value
    padded = padded + np.float32(1e-3 * float(weight.mean()) or 1.0)
    return lambda w: _search(w, fmt, padded)


def _padded(rows: Floats, fmt: NBits) -> Floats:
    """(rows, cols) -> (rows, blocks, block), zeros behind the last column."""
    n, k = rows.shape
    width = fmt.blocks(k) * fmt.block
    if width != k:
        rows = np.pad(rows, ((0, 0), (0, width - k)))
    return np.ascontiguousarray(rows, np.float32).reshape(n, -1, fmt.block)


def _values(given: Quantised) -> Floats:
    q, scales, zeros = given
    level = q.astype(np.float32)
    level -= zeros[..., None]
    level *= scales[..., None]
    return level


def _nearest(w: Floats, scales: Floats, zeros: Bytes | None, fmt: NBits) -> Floats:
    """The integers, as float32, whose values lie nearest to `w`; halves go away from zero, as roundf does."""
    reciprocal = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=np.abs(scales) > TINY)
    q = w * reciprocal[..., None]
    q += np.float32(fmt.zero) if zeros is None else zeros[..., None].astype(np.float32)
    whole = np.rint(q)
    whole += q - whole == 0.5
    return np.clip(whole, 0, fmt.top, out=whole)


def _round_to_nearest(w: Floats, fmt: NBits) -> Quantised:
    """As MlasQuantizeBlockwise: symmetric blocks give the weight of largest magnitude the lowest integer, so that the
    scale may be negative; the others span their range and zero."""
    low, high = w.min(axis=2), w.max(axis=2)
    if fmt.symmetric:
        scales = np.where(np.abs(high) > np.abs(low), high, low) / np.float32(-fmt.zero)
        return _nearest(w, scales, None, fmt).astype(np.uint8), scales, np.full(low.shape, fmt.zero, np.uint8)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = (high - low) / np.float32(fmt.top)
    zeros = _zero_for(low, scales, fmt)
    return _nearest(w, scales, zeros, fmt).astype(np.uint8), scales, zeros


def _zero_for(low: Floats, scales: Floats, fmt: NBits) -> Bytes:
    """The zero point with which the integer 0 means about `low`."""
    zero = np.divide(-low, scales, out=np.zeros_like(low), where=scales > TINY)
    return np.clip(np.floor(zero + np.float32(0.5)), 0, fmt.top).astype(np.uint8)


def _search(w: Floats, fmt: NBits, importance: Floats) -> Quantised:
    """The candidate whose integers, with the scale that fits them best, leave the least weighted error."""
    best = np.full(w.shape[:2], -1, np.float32)
    scales, zeros = np.zeros_like(best), np.full(best.shape, fmt.zero, np.uint8)
    for trial, zero in _candidates(w, fmt):
        level = _nearest(w, trial, zero, fmt)
        level -= np.float32(fmt.zero) if zero is None else zero[..., None].astype(np.float32)
        weighted = level * importance
        square = np.einsum("nbk,nbk->nb", weighted, level)
        product = np.einsum("nbk,nbk->nb", weighted, w)
        fit = np.divide(product, square, out=np.zeros_like(square), where=square > 0)
        explained = product * fit  # of Σ importance·w²
        better = explained > best
        np.copyto(best, explained, where=better)
        np.copyto(scales, fit, where=better)
        if zero is not None:
            np.copyto(zeros, zero, where=better)
    q = _nearest(w, scales, None if fmt.symmetric else zeros, fmt).astype(np.uint8)
    return q, scales, zeros


def _candidates(w: Floats, fmt: NBits) -> Sequence[tuple[Floats, Bytes | None]]:
    """Scales (and zero points) around those of the range: clipping a little costs less than a wide step."""
    low, high = w.min(axis=2), w.max(axis=2)
    if fmt.symmetric:
        peak = np.where(np.abs(high) > np.abs(low), high, low)
        ends = (-1.35, -1.2, -1.1, -1.04, -1.0, -0.94, 1.0, 1.15) if fmt.bits == 4 else (-1.03, -1.0, -0.996)
        return [(peak / np.float32(end * fmt.zero), None) for end in ends]
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    shrinks = (1.0, 1.06, 1.13, 1.2, 1.3) if fmt.bits == 4 else (1.0, 1.004, 1.03)
    found: list[tuple[Floats, Bytes | None]] = []
    for shrink in shrinks:
        step = (high - low) / np.float32(fmt.top * shrink)
        middle = _zero_for(low * np.float32(0.5 + 0.5 / shrink), step, fmt)
        found.append((step, middle))
        if fmt.bits == 4 and shrink > 1:
            found.append((step, _zero_for(low, step, fmt)))
            found.append((step, _zero_for(low / np.float32(shrink), step, fmt)))
    return found


def _pack(q: Bytes, bits: int) -> Bytes:
    """uint8 (..., count) -> uint8 (..., ceil(count·bits/8)), the first of two nibbles in the low half."""
    if bits == 8:
        return q
    if q.shape[-1] % 2:
        q = np.concatenate((q, np.full((*q.shape[:-1], 1), 8, np.uint8)), axis=-1)  # as ONNX Runtime fills it
    packed: Bytes = q[..., 0::2] | q[..., 1::2] << 4
    return packed


def _unpack(packed: Bytes, bits: int) -> Bytes:
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)


def _zeros(packed: Packed) -> Bytes:
    """uint8 (rows, blocks)."""
    if packed.zero_points is None:
        return np.full(packed.scales.shape, packed.fmt.zero, np.uint8)
    return _unpack(packed.zero_points, packed.fmt.bits)[:, : packed.scales.shape[1]]
