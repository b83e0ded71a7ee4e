"""8-bit integers with one float32 scale for each row: the weights of ONNX's MatMulInteger and of 8-bit look-up tables.

Knows numbers and sizes; knows no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

LARGEST = 127
NARROW = 63
"""The largest weight for a CPU that adds two products of 8 bits in 16 (VPMADDUBSW): 2 · 255 · 127 would overflow."""


@dataclass(frozen=True, slots=True)
class Rows:
    """`values` int8 (rows, cols) times `scales` float32 (rows)."""

    values: npt.NDArray[np.int8]
    scales: Floats


def sizes(rows: int, cols: int) -> tuple[int, int]:
    """Bytes of the two tensors that a matrix becomes."""
    return rows * cols, 4 * rows


def encode(rows: Floats, largest: int = LARGEST) -> Rows:
    """float32 (rows, cols) -> the nearest integers, a row's largest value at `largest`; a row of zeros has scale 1."""
    top = np.abs(rows).max(axis=1)
    scales = np.where(top > 0, top / largest, 1.0).astype(np.float32)
    return Rows(np.clip(np.rint(rows / scales[:, None]), -largest, largest).astype(np.int8), scales)


def decode(packed: Rows) -> Floats:
    """float32 (rows, cols)."""
    return np.asarray(packed.values * packed.scales[:, None], np.float32)
