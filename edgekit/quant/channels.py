"""8-bit integers with one float32 scale for each row: the weights of ONNX's MatMulInteger and of 8-bit look-up tables.

Knows numbers and sizes; knows no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

LARGEST = 127
_SHRINKS = (1.0, 0.98, 0.95, 0.91, 0.86, 0.8)


@dataclass(frozen=True, slots=True)
class Rows:
    """`values` int8 (rows, cols) times `scales` float32 (rows)."""

    values: npt.NDArray[np.int8]
    scales: Floats


def sizes(rows: int, cols: int) -> tuple[int, int]:
    """Bytes of the two tensors that a matrix becomes."""
    return rows * cols, 4 * rows


def encode(rows: Floats) -> Rows:
    """float32 (rows, cols) -> integers and the scale of each row that leaves the least squared error.

    A row's largest value may be clipped where that pays; a row of zeros has scale 1.
    """
    top = np.abs(rows).max(axis=1)
    best = np.where(top > 0, top / LARGEST, 1.0).astype(np.float32)
    values = _rounded(rows, best)
    error = _error(rows, values, best)
    for shrink in _SHRINKS[1:]:
        scales = np.where(top > 0, top * (shrink / LARGEST), 1.0).astype(np.float32)
        tried = _rounded(rows, scales)
        found = _error(rows, tried, scales)
        better = found < error
        values[better], best[better], error[better] = tried[better], scales[better], found[better]
    return Rows(values, best)


def decode(packed: Rows) -> Floats:
    """float32 (rows, cols)."""
    return np.asarray(packed.values * packed.scales[:, None], np.float32)


def _rounded(rows: Floats, scales: Floats) -> npt.NDArray[np.int8]:
    return np.asarray(np.clip(np.rint(rows / scales[:, None]), -LARGEST, LARGEST), np.int8)


def _error(rows: Floats, values: npt.NDArray[np.int8], scales: Floats) -> Floats:
    wrong = values * scales[:, None]
    wrong -= rows
    return np.asarray(np.einsum("rc,rc->r", wrong, wrong), np.float32)
