"""The safetensors container: which tensor lies where in a file. Reads and checks headers, never a weight.

Format: https://github.com/huggingface/safetensors (README, "Format"): a little-endian u64, that many bytes of JSON,
then the tensors' bytes without a gap.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from edgekit.errors import CorruptCheckpoint, UnsupportedModel

MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors library itself

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


_AGAIN = "truncated or gone? fetch it again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: `start` and `stop` are absolute byte offsets."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A file whose header has been checked. `size` and `mtime_ns` are what they were then."""

    path: Path
    entries: dict[str, Entry]
    data_start: int
    size: int
    mtime_ns: int


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check the header of `path`. Raises CorruptCheckpoint; UnsupportedModel for a dtype not in the table."""
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if stat.st_size < 8 or length > stat.st_size - 8:
                _fail(path, f"the header needs {8 + length} bytes, the file has {stat.st_size}", _AGAIN)
            if not 2 <= length <= MAX_HEADER_BYTES:
                _fail(path, f"a header of {length} bytes; 2 to {MAX_HEADER_BYTES} are allowed")
            header = file.read(length)
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {path}: {e.strerror}", _AGAIN) from None
    if len(header) != length:
        _fail(path, "the file shrank while it was open", _AGAIN)
    entries = _entries(path, _parse(path, header), 8 + length)
    _check_layout(path, entries, 8 + length, stat.st_size)
    return SafetensorsFile(path, entries, 8 + length, stat.st_size, stat.st_mtime_ns)


def _fail(path: Path, message: str, hint: str = "") -> NoReturn:
    raise CorruptCheckpoint(f"{path}: {message}", hint)


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(n for n in names if names.count(n) > 1)
            _fail(path, f"the header has {twice!r} twice")
        return out

    try:
        parsed = json.loads(header, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        _fail(path, f"the header is not JSON: {e}", "a Git LFS pointer or a web page? fetch it again")
    if not isinstance(parsed, dict):
        _fail(path, f"the header is a JSON {type(parsed).__name__}, not an object")
    parsed.pop("__metadata__", None)
    return parsed


def _entries(path: Path, parsed: dict[str, Any], data: int) -> dict[str, Entry]:
    out = {}
    for name, fields in parsed.items():
        if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
            _fail(path, f"tensor {name}: the entry is not dtype, shape and data_offsets")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
            _fail(path, f"tensor {name}: shape {shape!r} or offsets {offsets!r} are not whole numbers")
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise UnsupportedModel(f"{path}: tensor {name} has dtype {dtype!r}", f"known: {', '.join(ITEM_BYTES)}")
        size = prod(shape) * ITEM_BYTES[dtype]
        if offsets[1] - offsets[0] != size:
            _fail(path, f"tensor {name}: {shape} of {dtype} takes {size} bytes, its offsets {offsets} say otherwise")
        out[name] = Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])
    return out


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_layout(path: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    """No gap, no overlap, nothing behind the last tensor: what the format asks for, so that no byte hides."""
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > size:
            _fail(path, f"tensor {name} ends at byte {entry.stop}, the file at {size}", _AGAIN)
        if entry.start != end:
            word = "overlaps" if entry.start < end else "leaves a gap after"
            _fail(path, f"tensor {name} {word} the one before it: starts at {entry.start}, expected {end}")
        end = entry.stop
    if end != size:
        _fail(path, f"{size - end} bytes follow the last tensor")
