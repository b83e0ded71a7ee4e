"""llama.cpp's importance matrix files: `imatrix.gguf` read and written, the older `.dat` read.

Knows sums of squares by tensor name; knows no model, measures nothing and quantises nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint, EdgekitError
from edgekit.gguf_file import GgufFile, MetaValue, Typed, encode_header, open_gguf

Vector = npt.NDArray[np.float32]

_F32 = 0
_MAX_ENTRIES, _MAX_NAME, _MAX_VALUES = 1 << 20, 4096, 1 << 28
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """For each matrix: `sums` of squares of its input columns, float32 (experts, cols), and the `counts` of tokens that
    each expert saw, float32 (experts,); a matrix that is no expert stack has one row.

    `chunks` and `chunk_size` say how much text was read; `datasets` what it was called.
    """

    sums: Mapping[str, Vector]
    counts: Mapping[str, Vector]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    source: str = field(default="", compare=False)

    def importance(self) -> dict[str, Vector]:
        """Mean squares as llama-quantize takes them: float32 (cols,), or (experts, cols) for a stack of experts.

        An expert that saw no token has ones, so that its rows are quantized plainly.
        """
        found = {}
        for name, sums in self.sums.items():
            counts = self.counts[name][:, None]
            means = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
            found[name] = means[0] if len(means) == 1 else means
        return found

    def require(self, widths: Mapping[str, tuple[int, int]]) -> None:
        """Check against a model: tensor name -> (experts or 1, cols). Raises EdgekitError naming the first difference.

        Names that the model does not have are an error: the file is another model's. Matrices without an entry are
        fine here; see `missing`.
        """
        for name, sums in self.sums.items():
            if name not in widths:
                raise EdgekitError(
                    f"{self.source or 'the importance matrix'} has an entry for {name}, which this model does not have",
                    "give the importance matrix of this model, or leave it out: --calibration self",
                )
            if sums.shape != widths[name]:
                raise EdgekitError(
                    f"{self.source or 'the importance matrix'}: {name} has {_shape(sums.shape)}, "
                    f"this model's has {_shape(widths[name])}",
                    "it was made from another model of the same family",
                )

    def missing(self, widths: Mapping[str, tuple[int, int]]) -> list[str]:
        """Matrices of the model without an entry, in the model's order."""
        return [name for name in widths if name not in self.sums]


def _shape(shape: Sequence[int]) -> str:
    return f"{shape[1]} columns" + (f" for {shape[0]} experts" if shape[0] > 1 else "")


def open_imatrix(path: str | Path) -> Imatrix:
    """Read either kind. Raises CorruptCheckpoint for a damaged file, for values that are not finite or negative."""
    path = Path(path)
    try:
        with path.open("rb") as f:
            magic = f.read(4)
    except OSError as e:
        raise EdgekitError(f"cannot read {path}: {e.strerror}", "give an imatrix.gguf of llama-imatrix") from None
    found = _from_gguf(path) if magic == b"GGUF" else _from_dat(path)
    for name, sums in found.sums.items():
        if not np.isfinite(sums).all() or (sums < 0).any():
            raise CorruptCheckpoint(f"{path}: {name} has values that are no mean squares", "make it again")
    return found


def _from_gguf(path: Path) -> Imatrix:
    file = open_gguf(path)
    if file.get("general.type") != "imatrix" and "imatrix.chunk_count" not in file.metadata:
        raise EdgekitError(f"{path} is a GGUF, but no importance matrix", "llama-imatrix or edgekit makes one")
    sums, counts = {}, {}
    for name, info in file.tensors.items():
        if info.code != _F32:
            raise CorruptCheckpoint(f"{path}: {name} is {info.type}, expected F32")
        values = np.fromfile(path, "<f4", info.nbytes // 4, offset=info.offset)
        if name.endswith(_SUMS):
            sums[name.removesuffix(_SUMS)] = values.reshape(-1, info.shape[-1])
        elif name.endswith(_COUNTS):
            counts[name.removesuffix(_COUNTS)] = np.rint(values)
    for name in sums.keys() ^ counts.keys():
        raise CorruptCheckpoint(f"{path}: {name} has only one of sums and counts", "make it again")
    return Imatrix(
        {name: _by_expert(path, name, values, counts[name]) for name, values in sums.items()},
        counts,
        tuple(_texts(file)),
        int(file.get("imatrix.chunk_count", 0)),
        int(file.get("imatrix.chunk_size", 0)),
        str(path),
    )


def _by_expert(path: Path, name: str, sums: Vector, counts: Vector) -> Vector:
    if not counts.size or sums.size % counts.size:
        raise CorruptCheckpoint(f"{path}: {name} has {sums.size} sums for {counts.size} counts", "make it again")
    return sums.reshape(counts.size, -1)


def _texts(file: GgufFile) -> list[str]:
    names = file.get("imatrix.datasets", ())
    return [n if isinstance(n, str) else n.decode("utf-8", "replace") for n in names]


def _from_dat(path: Path) -> Imatrix:
    """n, then for each entry: name length, name, calls, value count, values; then calls and a text name.

    Values are means times calls, so the calls stand in for the counts; experts are not told apart in this format.
    """
    data = path.read_bytes()
    cursor = _Cursor(path, data)
    sums, counts = {}, {}
    for _ in range(cursor.count("entries", 1, _MAX_ENTRIES)):
        name = cursor.text(cursor.count("name length", 1, _MAX_NAME))
        calls = cursor.count("calls", 0, 1 << 31)
        values = cursor.floats(cursor.count("values", 1, _MAX_VALUES))
        if name in sums:
            raise CorruptCheckpoint(f"{path}: {name} occurs twice")
        sums[name] = values.reshape(1, -1)
        counts[name] = np.array([calls or 1], np.float32)
    chunks = cursor.count("chunks", 0, 1 << 31) if cursor.left() else 0
    named = (cursor.text(cursor.count("text name", 0, _MAX_NAME)),) if cursor.left() else ()
    return Imatrix(sums, counts, tuple(n for n in named if n), chunks, 0, str(path))


class _Cursor:
    """Bounds-checked reading of little-endian values."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, data, 0

    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, n: int) -> bytes:
        if n > self.left():
            raise CorruptCheckpoint(f"{self._path} ends at byte {len(self._data)}, inside an entry", "copy it again")
        self._at += n
        return self._data[self._at - n : self._at]

    def count(self, what: str, low: int, high: int) -> int:
        value = int(struct.unpack("<i", self.take(4))[0])
        if not low <= value <= high:
            raise CorruptCheckpoint(
                f"{self._path}: {value} {what} at byte {self._at - 4}", "this is no importance matrix, or a damaged one"
            )
        return value

    def text(self, n: int) -> str:
        return self.take(n).rstrip(b"\0").decode("utf-8", "replace")

    def floats(self, n: int) -> Vector:
        return np.frombuffer(self.take(4 * n), "<f4").astype(np.float32)


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write `imatrix.gguf` as llama-imatrix does, names in order. Written beside and moved into place."""
    metadata: dict[str, MetaValue] = {
        "general.type": "imatrix",
        "imatrix.datasets": list(imatrix.datasets) or Typed("array:string", []),
        "imatrix.chunk_count": imatrix.chunks,
        "imatrix.chunk_size": imatrix.chunk_size,
    }
    parts: list[tuple[str, Vector]] = []
    for name in sorted(imatrix.sums):
        parts.append((name + _SUMS, np.ascontiguousarray(imatrix.sums[name], "<f4")))
        parts.append((name + _COUNTS, np.ascontiguousarray(imatrix.counts[name].reshape(-1, 1), "<f4")))
    header = encode_header(metadata, [(name, values.shape, _F32, values.nbytes) for name, values in parts])
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as f:
            f.write(header.bytes)
            for (_, values), offset in zip(parts, header.offsets, strict=True):
                f.write(bytes(offset - f.tell()))
                f.write(values.tobytes())
            f.write(bytes(header.file_size - f.tell()))
        beside.replace(path)
    except OSError as e:
        raise EdgekitError(f"cannot write {path}: {e.strerror}", "choose another place") from None
    finally:
        beside.unlink(missing_ok=True)
