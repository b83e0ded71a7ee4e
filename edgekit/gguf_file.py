"""The GGUF container, read and written: keys, values, names, shapes, offsets. Knows no model and decodes no weight.

Facts from the GGUF specification (ggml docs/gguf.md) and from what the runtime accepts (ggml `gguf_init_from_reader`):
little endian, version 3 written, 2 and 3 read (the same layout), tensors one after the other in header order, each
padded with zeros to the alignment, the last one too.
"""

from __future__ import annotations

import builtins
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from edgekit.errors import CorruptCheckpoint, UnsupportedModel

Scalar = bool | int | float | str | bytes


@dataclass(frozen=True, slots=True)
class Typed:
    """A metadata value with its kind spelled out: `uint64`, `int8`, `array:uint32`, ... (see KINDS)."""

    kind: str
    value: Scalar | Sequence[Scalar]


MetaValue = Scalar | Sequence[Scalar] | Typed
"""bool -> BOOL, int -> UINT32, float -> FLOAT32, str and bytes -> STRING; a list of ints -> ARRAY of INT32, of floats
-> FLOAT32, of bools -> BOOL, of str or bytes -> STRING; everything else, an empty list too, through Typed."""

KINDS = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "string": (8, ""),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
"""Kind -> (gguf_type, struct letter). Arrays are type 9 and are called `array:KIND`."""

TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""ggml_type -> (name, weights per block, bytes per block): ggml.h `enum ggml_type`, ggml.c `type_traits`."""

ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less the closing zero
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_METADATA_BYTES = 128 << 20  # ours: eight times the largest vocabulary with merges seen in the wild

_MAGIC = b"GGUF"
_OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")  # ggml, ggmf, ggjt, ggla as little-endian words
_VERSION = 3
_ARRAY = 9
_NAME_OF_KIND = {number: name for name, (number, _) in KINDS.items()}
_PLAIN_SCALARS = {"bool", "uint32", "float32", "string"}
_PLAIN_ARRAYS = {"bool", "int32", "float32", "string"}
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `shape` in numpy order (ggml's `ne` reversed), `code` a ggml_type, `offset` absolute."""

    name: str
    shape: tuple[int, ...]
    code: int
    nbytes: int
    offset: int

    @property
    def type(self) -> str:
        """Name of the number format, as ggml spells it in capitals: `Q4_K`."""
        return TYPES[self.code][0]


@dataclass(frozen=True, slots=True)
class Header:
    """Everything before the first tensor's bytes, padding included, and where each tensor goes.

    `offsets` count from the start of the file, in the order given. `file_size` includes the zeros that pad the last
    tensor: gguf-py and llama-quantize both write them.
    """

    bytes: builtins.bytes
    offsets: tuple[int, ...]
    file_size: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file whose header has been read and checked. `metadata` keeps every kind, `get` drops it."""

    path: Path
    version: int
    metadata: dict[str, MetaValue]
    tensors: dict[str, TensorInfo]
    alignment: int
    data_start: int

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of `key`, whatever its kind."""
        return plain(self.metadata[key]) if key in self.metadata else default


def plain(value: MetaValue) -> Scalar | Sequence[Scalar]:
    """`value` without its kind."""
    return value.value if isinstance(value, Typed) else value


# --- writing -------------------------------------------------------------------------------------------------------


def encode_header(
    metadata: Mapping[str, MetaValue],
    tensors: Sequence[tuple[str, tuple[int, ...], int, int]],
    alignment: int = ALIGNMENT,
) -> Header:
    """The exact first bytes of a file that holds `tensors`: (name, shape in numpy order, ggml_type, nbytes) each.

    `general.alignment` in `metadata` decides the alignment; an `alignment` other than 32 adds that key. Raises
    UnsupportedModel for a value its kind cannot hold and for names and shapes that the runtime would refuse.
    """
    metadata = dict(metadata)
    if alignment != ALIGNMENT:
        metadata.setdefault(ALIGNMENT_KEY, alignment)
    align = plain(metadata.get(ALIGNMENT_KEY, ALIGNMENT))
    if not _is_alignment(align):
        raise UnsupportedModel(f"{ALIGNMENT_KEY} = {align!r} is not a power of two", f"leave it out to get {ALIGNMENT}")
    assert isinstance(align, int)
    out = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _encode_pair(key, value)
    relative, names = [], set[str]()
    end = 0
    for name, shape, code, nbytes in tensors:
        _check_writable(name, shape, code, nbytes, names)
        names.add(name)
        relative.append(end)
        out += _encode_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), code, end)
        end += _pad(nbytes, align)
    out += bytes(_pad(len(out), align) - len(out))
    return Header(bytes(out), tuple(len(out) + r for r in relative), len(out) + end)


_LARGE = 1024
_encoded: dict[int, tuple[MetaValue, bytes]] = {}


def _encode_pair(key: str, value: MetaValue) -> bytes:
    """A key and its value. A vocabulary is encoded once, however many plans are made with it: large tuples, which
    cannot change, are remembered (with the tuple itself, so that its id stays its own)."""
    if not isinstance(value, tuple) or len(value) < _LARGE:
        return _encode_string(key) + _encode_value(key, value)
    if id(value) not in _encoded:
        while len(_encoded) >= 8:
            del _encoded[next(iter(_encoded))]
        _encoded[id(value)] = (value, _encode_value(key, value))
    return _encode_string(key) + _encoded[id(value)][1]


def _encode_value(key: str, value: MetaValue) -> bytes:
    kind, plain_value = _kind_of(key, value)
    array = kind.startswith("array:")
    number, letter = KINDS[kind.removeprefix("array:")]
    values: Sequence[Any] = plain_value if array else [plain_value]  # type: ignore[assignment]
    head = struct.pack("<IIQ", _ARRAY, number, len(values)) if array else struct.pack("<I", number)
    if not letter:
        texts = [v.encode() if isinstance(v, str) else v for v in values]
        return head + b"".join([part for text in texts for part in (_LENGTH.pack(len(text)), text)])
    try:
        return head + struct.pack(f"<{len(values)}{letter}", *values)
    except (struct.error, OverflowError) as e:
        shown = repr(plain_value) if not array else f"one of {len(values)} values"
        raise UnsupportedModel(f"metadata {key}: {shown} does not fit {kind} ({e})") from None


def _kind_of(key: str, value: MetaValue) -> tuple[str, Scalar | Sequence[Scalar]]:
    if isinstance(value, Typed):
        if value.kind.removeprefix("array:") not in KINDS:
            raise TypeError(f"metadata {key}: no kind called {value.kind!r}")
        return value.kind, value.value
    scalar = _scalar_kind(value, integer="uint32")
    if scalar:
        return scalar, value
    assert isinstance(value, Sequence)
    # one look at each type, not at each value: vocabularies are long
    samples = {type(v): v for v in value}
    kinds = {_scalar_kind(v, integer="int32") for v in samples.values()}
    if kinds == {"int32", "float32"}:
        kinds = {"float32"}
    if len(kinds) != 1 or None in kinds:
        raise TypeError(f"metadata {key}: a list needs values of one kind (or Typed), not {kinds or 'nothing'}")
    return f"array:{kinds.pop()}", value


def _scalar_kind(value: object, *, integer: str) -> str | None:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return integer
    if isinstance(value, float):
        return "float32"
    return "string" if isinstance(value, str | bytes) else None


def _encode_string(value: str | bytes) -> bytes:
    # surrogates cannot be UTF-8; tokens that are not text must come as bytes
    data = value.encode() if isinstance(value, str) else value
    return _LENGTH.pack(len(data)) + data


def _check_writable(name: str, shape: tuple[int, ...], code: int, nbytes: int, seen: set[str]) -> None:
    size = len(name.encode())
    if not 0 < size <= MAX_NAME_BYTES:
        raise UnsupportedModel(f"tensor name {name!r} has {size} bytes; the runtime takes 1 to {MAX_NAME_BYTES}")
    if name in seen:
        raise UnsupportedModel(f"two tensors would be called {name!r}")
    if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1:
        raise UnsupportedModel(f"tensor {name}: shape {shape} cannot be stored; the runtime takes 1 to {MAX_DIMS} axes")
    kind, block, width = TYPES[code]
    assert shape[-1] % block == 0, f"{name}: rows of {shape[-1]} do not divide into blocks of {kind}"
    assert nbytes == prod(shape) // block * width, f"{name}: {nbytes} bytes is not the size of {shape} in {kind}"


def _is_alignment(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value & (value - 1) == 0


def _pad(n: int, alignment: int) -> int:
    return (n + alignment - 1) // alignment * alignment


# --- reading -------------------------------------------------------------------------------------------------------


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read and check the header of a GGUF file; no tensor byte is touched, and the file is closed again.

    Strings come as str, or as bytes where they are not UTF-8. Raises CorruptCheckpoint for a file that is damaged,
    truncated or contradicts itself, UnsupportedModel for versions and types that this reader does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise CorruptCheckpoint(f"cannot read {path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            cursor = _Cursor(file, path)
            version, n_tensors, n_pairs = _read_preamble(cursor)
            metadata = _read_metadata(cursor, n_pairs)
            alignment = _alignment_of(cursor, metadata)
            tensors, start = _read_tensors(cursor, n_tensors, alignment)
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {path}: {e.strerror}") from None
    return GgufFile(path, version, metadata, tensors, alignment, start)


class _Cursor:
    """The start of a file, read as far as needed; never past its end and never more than MAX_METADATA_BYTES."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.buffer = bytearray()
        self.at = 0

    def fail(self, message: str, hint: str = "") -> NoReturn:
        raise CorruptCheckpoint(f"{self.path}: {message}", hint)

    def need(self, stop: int, what: str) -> None:
        """Have the first `stop` bytes in the buffer."""
        if stop <= len(self.buffer):
            return
        if stop > self.size:
            self.fail(f"{what} ends at byte {stop}, the file at {self.size}", "truncated? fetch it again")
        if stop > MAX_METADATA_BYTES:
            self.fail(f"{what} lies beyond {MAX_METADATA_BYTES >> 20} MiB of metadata: no real model has so much")
        self.buffer += self.file.read(max(stop - len(self.buffer), len(self.buffer), 1 << 18))
        if stop > len(self.buffer):
            self.fail(f"{what} could not be read: the file shrank while it was open")

    def take(self, layout: str, what: str) -> tuple[Any, ...]:
        """Values of a struct `layout` (little endian), in order."""
        stop = self.at + struct.calcsize("<" + layout)
        self.need(stop, what)
        values = struct.unpack_from("<" + layout, self.buffer, self.at)
        self.at = stop
        return values

    def string(self, what: str) -> str | bytes:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str | bytes]:
        """`count` length-prefixed strings. The loop that meets every token of a vocabulary: kept flat."""
        self.need(self.at + count * _LENGTH.size, what)
        at, have, buffer, unpack = self.at, len(self.buffer), self.buffer, _LENGTH.unpack_from
        raw = []
        for _ in range(count):
            start = at + 8
            if start > have:
                self.need(start, what)
                have = len(buffer)
            at = start + unpack(buffer, start - 8)[0]
            if at > have:
                self.need(at, what)
                have = len(buffer)
            raw.append(buffer[start:at])
        self.at = at
        try:
            return [r.decode() for r in raw]
        except UnicodeDecodeError:
            return [_text(r) for r in raw]


def _text(raw: bytearray) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return bytes(raw)


def _read_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    magic = bytes(cursor.take("4s", "the magic")[0])
    if magic != _MAGIC:
        hint = "a GGML file of before August 2023: convert from the original" if magic in _OLD_MAGICS else ""
        cursor.fail(f"not a GGUF file: it starts with {magic!r}", hint)
    (version,) = cursor.take("I", "the version")
    if version & 0xFFFF == 0:
        raise UnsupportedModel(f"{cursor.path}: a big-endian GGUF", "convert from the original on this machine")
    if version not in (2, 3):
        raise UnsupportedModel(f"{cursor.path}: GGUF version {version}; known: 2 and 3", "convert from the original")
    n_tensors, n_pairs = cursor.take("QQ", "the counts")
    # the least a tensor (1 axis, no name) and a pair (one byte, no name) take
    if n_tensors * 32 + n_pairs * 13 > cursor.size:
        cursor.fail(f"{n_tensors} tensors and {n_pairs} keys cannot lie in {cursor.size} bytes")
    return version, n_tensors, n_pairs


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetaValue]:
    out: dict[str, MetaValue] = {}
    for i in range(count):
        key = cursor.string(f"key {i}")
        if not isinstance(key, str) or not key:
            cursor.fail(f"key {i} of the metadata is {key!r}, not text")
        if key in out:
            cursor.fail(f"key {key} appears twice")
        out[key] = _read_value(cursor, key)
    return out


def _read_value(cursor: _Cursor, key: str) -> MetaValue:
    what = f"the value of {key}"
    (number,) = cursor.take("I", what)
    if number != _ARRAY:
        kind, letter = _kind_and_letter(cursor, key, number)
        value = cursor.take(letter, what)[0] if letter else cursor.string(what)
        return value if kind in _PLAIN_SCALARS else Typed(kind, value)
    number, count = cursor.take("IQ", what)
    if number == _ARRAY:
        cursor.fail(f"{what} is an array of arrays, which GGUF readers do not take")
    kind, letter = _kind_and_letter(cursor, key, number)
    values: Sequence[Scalar]
    if letter:
        cursor.need(cursor.at + count * struct.calcsize("<" + letter), what)
        values = list(cursor.take(f"{count}{letter}", what))
    else:
        values = cursor.strings(count, what)
    return values if values and kind in _PLAIN_ARRAYS else Typed(f"array:{kind}", values)


def _kind_and_letter(cursor: _Cursor, key: str, number: int) -> tuple[str, str]:
    if number not in _NAME_OF_KIND:
        cursor.fail(f"the value of {key} has type {number}, which does not exist")
    kind = _NAME_OF_KIND[number]
    return kind, KINDS[kind][1]


def _alignment_of(cursor: _Cursor, metadata: Mapping[str, MetaValue]) -> int:
    value = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if not _is_alignment(value):
        cursor.fail(f"{ALIGNMENT_KEY} is {value!r}, not a power of two in a uint32")
    assert isinstance(value, int)
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> tuple[dict[str, TensorInfo], int]:
    """The tensors by name, and where the first one starts."""
    found: dict[str, tuple[tuple[int, ...], int, int, int]] = {}
    end = 0
    for i in range(count):
        name = cursor.string(f"the name of tensor {i}")
        if not isinstance(name, str) or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            cursor.fail(f"the name of tensor {i} is {name!r}; it has to be text of 1 to {MAX_NAME_BYTES} bytes")
        if name in found:
            cursor.fail(f"tensor {name} appears twice")
        shape, code, nbytes, offset = _read_tensor(cursor, name)
        if offset != end:
            # ggml's reader wants the same: no gap, no overlap, header order
            cursor.fail(f"tensor {name} lies at {offset} of the data; after the one before it comes {end}")
        end += _pad(nbytes, alignment)
        found[name] = shape, code, nbytes, offset
    start = _pad(cursor.at, alignment)
    for name, (_, _, nbytes, offset) in found.items():
        if start + offset + nbytes > cursor.size:
            stop = start + offset + nbytes
            cursor.fail(f"tensor {name} ends at byte {stop}, the file at {cursor.size}", "truncated? fetch it again")
    return {n: TensorInfo(n, shape, code, size, start + at) for n, (shape, code, size, at) in found.items()}, start


def _read_tensor(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], int, int, int]:
    """Shape (numpy order), type, bytes, offset in the data section."""
    what = f"the entry of tensor {name}"
    (axes,) = cursor.take("I", what)
    if not 1 <= axes <= MAX_DIMS:
        cursor.fail(f"tensor {name} has {axes} axes; 1 to {MAX_DIMS} are allowed")
    shape = tuple(reversed(cursor.take(f"{axes}Q", what)))
    code, offset = cursor.take("IQ", what)
    if min(shape) < 1 or prod(shape) >= 1 << 63:
        cursor.fail(f"tensor {name} has the impossible shape {shape}")
    if code not in TYPES:
        raise UnsupportedModel(
            f"{cursor.path}: tensor {name} has ggml type {code}, which is unknown here or withdrawn",
            "convert from the original",
        )
    kind, block, width = TYPES[code]
    if shape[-1] % block:
        cursor.fail(f"tensor {name}: rows of {shape[-1]} do not divide into blocks of {block} ({kind})")
    return shape, code, prod(shape) // block * width, offset
