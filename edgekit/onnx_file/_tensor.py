"""TensorProto: where one tensor lies, and whether its size is what its shape and type say. Reads no weight.

Field numbers and rules: onnx.proto `TensorProto`; keys of external data: ONNX docs, ExternalData.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from edgekit.onnx_file._wire import Message, Span

DTYPES: dict[int, tuple[str, int]] = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    8: ("string", 0),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8),
    19: ("float8e5m2", 8),
    20: ("float8e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4e2m1", 4),
    24: ("float8e8m0", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
    27: ("float6e2m3", 6),
    28: ("float6e3m2", 6),
}
"""TensorProto.DataType -> (name, bits an element). Below a byte elements are packed, the first in the low bits."""

RAW, EXTERNAL, TYPED = "raw", "external", "typed"

_FLOAT_DATA, _INT32_DATA, _STRING_DATA, _INT64_DATA, _DOUBLE_DATA, _UINT64_DATA = 4, 5, 6, 7, 10, 11
_FIELD_OF = {
    "float32": _FLOAT_DATA,
    "complex64": _FLOAT_DATA,
    "float64": _DOUBLE_DATA,
    "complex128": _DOUBLE_DATA,
    "int64": _INT64_DATA,
    "uint64": _UINT64_DATA,
    "uint32": _UINT64_DATA,
    "string": _STRING_DATA,
}  # every other type is sent as int32_data
_TYPED_FIELDS = (_FLOAT_DATA, _INT32_DATA, _STRING_DATA, _INT64_DATA, _DOUBLE_DATA, _UINT64_DATA)
_FIXED_BYTES = {_FLOAT_DATA: 4, _DOUBLE_DATA: 8}
_MAX_BYTES = 1 << 48
_COST = 8
_KEYS = {"location", "offset", "length", "checksum", "basepath"}


@dataclass(frozen=True, slots=True)
class Initializer:
    """One tensor. `nbytes`: its size as raw data (of a string tensor, of its texts).

    `storage`: "raw", `length` bytes at `offset` of the model file; "external", at `offset` of `file`, a path as the
    model names it, relative to its folder; "typed", spread over numbers in the model file, `offset` and `length` 0.
    `checksum`: SHA-1 of the whole external file, where the model states one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str | None
    offset: int
    length: int
    storage: str
    checksum: str = ""
    typed: tuple[int | Span, ...] = ()

    @property
    def elements(self) -> int:
        return prod(self.shape)


def read_tensor(m: Message) -> Initializer:
    """Raises CorruptCheckpoint where shape, type and data contradict each other."""
    m.source.spend(_COST)
    name = m.text(8)
    m.what = f"tensor {name[:200]!r}"
    shape, (dtype, bits) = tuple(m.integers(1)), _dtype(m)
    if 3 in m:
        m.fail("comes in segments, which no runtime reads")
    if shape and (min(shape) < 0 or max(shape) > _MAX_BYTES or len(shape) > 64):
        m.fail(f"impossible shape {shape[:8]}")
    elements = prod(shape)
    nbytes = (elements * bits + 7) // 8
    if nbytes > _MAX_BYTES:
        m.fail(f"{nbytes} bytes of {dtype} {shape[:8]}")
    given = [n for n in _TYPED_FIELDS if n in m]
    if m.integer(14) == 1:
        if given or 9 in m:
            m.fail("has data both in the model file and outside")
        return _external(m, name, shape, dtype, nbytes)
    if 9 in m:
        return _raw(m, name, shape, dtype, nbytes, given)
    return _typed(m, name, shape, dtype, nbytes, given)


def _dtype(m: Message) -> tuple[str, int]:
    code = m.integer(2)
    if code not in DTYPES:
        m.fail(f"data type {code}; known: 1 to {max(DTYPES)}", "made by a newer ONNX than this reader knows")
    return DTYPES[code]


def _raw(
    m: Message, name: str, shape: tuple[int, ...], dtype: str, nbytes: int, given: Sequence[int]
) -> Initializer:  # fmt: skip
    span = m.span(9)
    assert span is not None
    if given or dtype == "string":
        m.fail("raw data and typed data in one tensor" if given else "texts as raw data")
    if span[1] - span[0] != nbytes:
        m.fail(f"{dtype} {shape} takes {nbytes} bytes, its data has {span[1] - span[0]}")
    return Initializer(name, shape, dtype, nbytes, None, span[0], nbytes, RAW)


def _external(m: Message, name: str, shape: tuple[int, ...], dtype: str, nbytes: int) -> Initializer:
    entries = [(e.text(1), e.text(2)) for e in m.messages(13, m.what)]
    keys = dict(entries)
    if len(keys) != len(entries):
        m.fail("names a key of its external data twice")
    if unknown := keys.keys() - _KEYS:
        m.fail(f"external data with the unknown key {min(unknown)[:80]!r}")
    if not keys.get("location"):
        m.fail("external data without a location")
    if dtype == "string":
        m.fail("texts as external data")
    offset = _count(m, keys.get("offset", "0"), "offset")
    length = _count(m, keys.get("length", str(nbytes)), "length")
    if length != nbytes:
        m.fail(f"{dtype} {shape} takes {nbytes} bytes, its external data has {length}")
    return Initializer(
        name, shape, dtype, nbytes, keys["location"], offset, length, EXTERNAL, keys.get("checksum", "").lower()
    )


def _count(m: Message, text: str, key: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        m.fail(f"external data with {key} {text[:40]!r}")
    return int(text)


def _typed(
    m: Message, name: str, shape: tuple[int, ...], dtype: str, nbytes: int, given: Sequence[int]
) -> Initializer:  # fmt: skip
    field = _FIELD_OF.get(dtype, _INT32_DATA)
    if set(given) - {field}:
        m.fail(f"{dtype} does not lie in field {given[0]}")
    values: tuple[int | Span, ...] = tuple(m.values(field))
    wanted = _wanted(dtype, prod(shape))
    if field == _STRING_DATA:
        found = len(m.spans(field))
        nbytes = sum(stop - start for start, stop in m.spans(field))
    elif field in _FIXED_BYTES:
        width = _FIXED_BYTES[field]
        size = sum(stop - start for start, stop in m.spans(field))
        found = size // width if size % width == 0 else -1
    else:
        found = sum(1 if isinstance(v, int) else m.source.count_varints(v, m.what) for v in values)
    if found != wanted:
        m.fail(f"{dtype} {shape} takes {wanted} values, its data has {found if found >= 0 else 'half ones'}")
    return Initializer(name, shape, dtype, nbytes, None, 0, 0, TYPED, typed=values)


def _wanted(dtype: str, elements: int) -> int:
    """Numbers in the typed field: complex ones are two, several small ones share one (onnx.proto, int32_data)."""
    if dtype.startswith("complex"):
        return 2 * elements
    per = {"uint4": 2, "int4": 2, "float4e2m1": 2, "uint2": 4, "int2": 4}.get(dtype, 1)
    return -(-elements // per)
