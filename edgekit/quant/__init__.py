"""Number formats: how many bytes a tensor takes in each. Knows sizes; the encoders live one file a family."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Format:
    """A ggml block format: `block` consecutive weights of a row in `size` bytes; `code` is its ggml_type."""

    name: str
    code: int
    block: int
    size: int
    needs_importance: bool = False

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.size / self.block

    def row_bytes(self, cols: int) -> int:
        return cols // self.block * self.size

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape` (numpy order: the last axis is the row)."""
        return prod(shape[:-1]) * self.row_bytes(shape[-1])

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether rows of `shape` divide into blocks."""
        return bool(shape) and shape[-1] % self.block == 0
