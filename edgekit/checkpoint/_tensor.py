"""One tensor in a file: where it lies, how its bytes become float32. Knows no file format and no model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint

Array = npt.NDArray[np.float32]

_STORED = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<u2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
}

_CHUNK = 1 << 18  # values converted at a time: fits a level-2 cache with its result, and bounds the memory beside it


@dataclass(frozen=True, slots=True)
class Scale:
    """What the values of an FP8 tensor are multiplied by: one factor for each `block` (rows, columns) of a matrix.

    `grid` is (matrices, block rows, block columns), the shape `tensor` is read in.
    """

    tensor: TensorRef
    grid: tuple[int, int, int]
    block: tuple[int, int]
    matrix_rows: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies. Nothing is read until `load` or `rows`; a call reads just its own bytes.

    `shape` in numpy order, `dtype` as safetensors spells it, `nbytes` as stored. Both calls raise CorruptCheckpoint
    when the file has changed since it was opened.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path = field(repr=False)
    start: int = field(repr=False)
    stamp: tuple[int, int] = field(repr=False, compare=False)
    scale: Scale | None = field(default=None, repr=False)

    @property
    def values(self) -> int:
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the tensor seen as 2-D: the last axis is the row; a scalar is (1, 1)."""
        return prod(self.shape[:-1]), self.shape[-1] if self.shape else 1

    def load(self) -> Array:
        """The whole tensor, float32, C-contiguous, `shape`."""
        return self.rows(0, self.matrix[0]).reshape(self.shape)

    def rows(self, start: int, stop: int) -> Array:
        """Rows start to stop of the 2-D view: float32 (stop - start, columns), C-contiguous."""
        n, cols = self.matrix
        if not 0 <= start <= stop <= n:
            raise IndexError(f"{self.name}: rows {start}:{stop} of {n}")
        out = np.empty((stop - start, cols), np.float32)
        with self._open() as fd:
            _read_values(self, fd.number, start * cols, out.reshape(-1))
        if self.scale:
            _apply_scale(self.scale, start, out)
        return out

    def _open(self) -> _Open:
        return _Open(self)


class _Open:
    """A file descriptor for as long as one read takes; refuses a file that is not the one opened before."""

    def __init__(self, ref: TensorRef) -> None:
        try:
            self.number = os.open(ref.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as e:
            raise CorruptCheckpoint(f"{ref.file}: tensor {ref.name} cannot be read: {e.strerror}") from None
        stat = os.fstat(self.number)
        if (stat.st_size, stat.st_mtime_ns) != ref.stamp:
            os.close(self.number)
            _changed(ref)

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.number)


def _changed(ref: TensorRef) -> NoReturn:
    raise CorruptCheckpoint(
        f"{ref.file} changed after it was opened; tensor {ref.name} is not safe to read", "start again"
    )


def _read_values(ref: TensorRef, fd: int, first: int, out: Array) -> None:
    """`out.size` values from value `first` on, as float32. 1-D `out`, filled in place."""
    stored = np.dtype(_STORED[ref.dtype])
    at = ref.start + first * stored.itemsize
    if ref.dtype == "F32":
        _fill(ref, fd, at, out)
        return
    raw = np.empty(min(_CHUNK, out.size), stored)
    for i in range(0, out.size, _CHUNK):
        part = out[i : i + _CHUNK]
        piece = raw[: part.size]
        _fill(ref, fd, at + i * stored.itemsize, piece)
        _to_float32(ref.dtype, piece, part)


def _fill(ref: TensorRef, fd: int, at: int, out: npt.NDArray[Any]) -> None:
    """Bytes from `at` on into `out`. By read, not by mmap: a file cut short must not kill the process."""
    if not out.size:
        return
    view = out.view(np.uint8).data
    done = 0
    try:
        while done < len(view):
            count = os.preadv(fd, [view[done:]], at + done)
            if not count:
                _changed(ref)
            done += count
    except OSError as e:
        raise CorruptCheckpoint(f"{ref.file}: tensor {ref.name} cannot be read: {e.strerror}") from None


def _to_float32(dtype: str, raw: npt.NDArray[Any], out: Array) -> None:
    if dtype == "BF16":
        bits = out.view(np.uint32)
        bits[:] = raw
        bits <<= 16
    elif dtype in {"F16", "F8_E4M3", "F8_E5M2"}:
        np.take(_table(dtype), raw, out=out, mode="clip")  # twice as fast as numpy's cast from float16
    else:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which the checks on values see
            out[:] = raw


@cache
def _table(dtype: str) -> Array:
    """Every value of a small float. E4M3 has no infinities (OCP FP8: bias 7, 0x7f is NaN), E5M2 is IEEE (bias 15)."""
    if dtype == "F16":
        with np.errstate(invalid="ignore"):  # signalling NaNs among them
            return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    exponent_bits, bias = (4, 7) if dtype == "F8_E4M3" else (5, 15)
    fraction_bits = 7 - exponent_bits
    out = np.empty(256, np.float32)
    for code in range(256):
        exponent = code >> fraction_bits & ((1 << exponent_bits) - 1)
        fraction = (code & ((1 << fraction_bits) - 1)) / (1 << fraction_bits)
        value = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        if dtype == "F8_E4M3" and code & 0x7F == 0x7F:
            value = float("nan")
        if dtype == "F8_E5M2" and exponent == 31:
            value = float("nan") if fraction else float("inf")
        out[code] = -value if code & 0x80 else value
    return out


def _apply_scale(scale: Scale, first: int, out: Array) -> None:
    """Multiply rows `first`... of the 2-D view, in place."""
    factors = scale.tensor.load().reshape(-1, scale.grid[2])
    height, width = scale.block
    at = first
    while at < first + len(out):
        matrix, row = divmod(at, scale.matrix_rows)
        stop = min(first + len(out), matrix * scale.matrix_rows + min((row // height + 1) * height, scale.matrix_rows))
        line = factors[matrix * scale.grid[1] + row // height]
        if height == 1 and len(line) == 1:  # a factor a row: all rows of this matrix at once
            stop = min(first + len(out), (matrix + 1) * scale.matrix_rows)
            out[at - first : stop - first] *= factors[at : at + stop - at]
        else:
            out[at - first : stop - first] *= np.repeat(line, width)[: out.shape[1]]
        at = stop


def dominant(refs: Iterable[TensorRef]) -> str:
    counts: Counter[str] = Counter()
    for ref in refs:
        counts[ref.dtype] += ref.values
    return counts.most_common(1)[0][0]
