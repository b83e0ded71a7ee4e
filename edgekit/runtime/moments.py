"""Second moments by tensor name, in memory or in files: summed row by row, and held a few at a time.

Knows arrays and files; knows no model.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint
from edgekit.units import MIB

Moment = npt.NDArray[np.float32]

HELD = 512 * MIB
"""Bytes of files that may stay in memory together; of more, only what was used last."""

_STRIP = 1024  # columns that are summed at once: the product takes 4 * _STRIP * cols bytes beside the sum
_INDEX = "moments.json"


class Moments(Mapping[str, Moment]):
    """Float32 (cols, cols), or (experts, cols, cols), by tensor name; tensors that read the same input share an array.

    With a `folder` every array is a file there, and an array stays the same object as long as this lives. `close` lets
    go of the files; arrays must not be used after it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._arrays: dict[str, Moment] = {}
        self._files: dict[str, str] = {}
        self._maps: dict[int, mmap.mmap] = {}  # by id of the array
        self._total = 0
        self._last: Moment | None = None

    def __getitem__(self, name: str) -> Moment:
        found = self._arrays[name]
        if found is not self._last:
            self._let_go(self._last)
            self._last = found
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def begin(self, name: str, shape: tuple[int, ...]) -> None:
        """Room for the moment of `name`, all zeros."""
        if self._folder is None:
            self._arrays[name] = np.zeros(shape, np.float32)
            return
        file = f"{len(set(self._files.values()))}.f32"
        with (self._folder / file).open("xb") as made:
            made.truncate(4 * prod(shape))
        self._open(name, file, shape, mmap.ACCESS_WRITE)

    def share(self, name: str, with_: str) -> None:
        """`name` reads what `with_` reads."""
        self._arrays[name] = self._arrays[with_]
        if with_ in self._files:
            self._files[name] = self._files[with_]

    def add(self, name: str, part: int, rows: npt.NDArray[np.float32]) -> None:
        """Add RᵀR of `rows` (n, cols) to matrix `part` of `name`: its lower half, of which `finish` makes the whole."""
        cols = rows.shape[1]
        rows = np.ascontiguousarray(rows)
        moment = self[name].reshape(-1, cols, cols)[part]
        for start, stop in _strips(cols):
            strip = rows[:, start:stop]
            moment[start:stop, start:stop] += strip.T @ strip  # the same array twice: numpy calls syrk, half of gemm
            if start:
                moment[start:stop, :start] += strip.T @ rows[:, :start]

    def finish(self) -> None:
        """Make every matrix whole, and note in the folder which file belongs to which tensor."""
        for name in {id(a): n for n, a in self._arrays.items()}.values():
            found = self[name]
            for moment in found.reshape(-1, *found.shape[-2:]):
                for start, stop in _strips(moment.shape[0]):
                    moment[:start, start:stop] = moment[start:stop, :start].T
        self._let_go(self._last)
        if self._folder is not None:
            index = {name: [file, *self._arrays[name].shape] for name, file in self._files.items()}
            (self._folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")

    def close(self) -> None:
        self._arrays, self._maps, self._last = {}, {}, None

    def _open(self, name: str, file: str, shape: Sequence[int], access: int) -> None:
        assert self._folder is not None
        size = 4 * prod(shape)
        with (self._folder / file).open("r+b" if access == mmap.ACCESS_WRITE else "rb") as opened:
            mapped = mmap.mmap(opened.fileno(), size, access=access)
        array = np.frombuffer(mapped, np.float32).reshape(tuple(shape))
        self._arrays[name], self._files[name] = array, file
        self._maps[id(array)] = mapped
        self._total += size

    def _let_go(self, array: Moment | None) -> None:
        """Pages of a file need no memory of the process: they are read again when they are used again."""
        mapped = self._maps.get(id(array))
        if mapped is not None and self._total > HELD and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def open_moments(folder: Path) -> Moments:
    """What a folder holds since `finish`. Raises CorruptCheckpoint for anything else."""
    found = Moments(folder)
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        first: dict[str, str] = {}
        for name, (file, *shape) in index.items():
            if file in first:
                found.share(name, first[file])
            else:
                found._open(name, file, shape, mmap.ACCESS_READ)
                first[file] = name
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise CorruptCheckpoint(f"{folder} holds no second moments: {e}", "calibrate again") from None
    return found


def _strips(cols: int) -> Iterator[tuple[int, int]]:
    for start in range(0, cols, _STRIP):
        yield start, min(start + _STRIP, cols)
