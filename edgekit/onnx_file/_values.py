"""The bytes and elements of one tensor, from the model file or from the file beside it. Follows no path outside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint, UnsupportedModel
from edgekit.onnx_file._tensor import EXTERNAL, TYPED, Initializer
from edgekit.onnx_file._wire import Source

_NUMPY = {
    "bool": "?",
    "bfloat16": "<u2",
    "complex64": "<c8",
    "complex128": "<c16",
    "float8e4m3fn": "u1",
    "float8e4m3fnuz": "u1",
    "float8e5m2": "u1",
    "float8e5m2fnuz": "u1",
    "float8e8m0": "u1",
}
_PACKED = {"uint4": 4, "int4": 4, "float4e2m1": 4, "uint2": 2, "int2": 2}


def external_path(model: Path, name: str) -> Path:
    """Where external data called `name` lies: a file in the model's folder or below.

    A link may only lead into the blobs of a hub cache. Raises CorruptCheckpoint.
    """
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name or ":" in name:
        raise CorruptCheckpoint(f"{model}: external data {name!r} points outside the folder")
    path = model.parent / name
    try:
        if not path.is_file():
            raise CorruptCheckpoint(
                f"{model}: its weights lie in {name}, which is missing", "an ONNX model is a folder: copy all of it"
            )
        step = Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path
        if step.parent.name == "blobs" and step.parent.parent.name.startswith("models--"):
            return path
        if not path.resolve().is_relative_to(model.parent.resolve()):
            raise CorruptCheckpoint(f"{path} is a link that leads outside the folder", "copy the file itself")
    except OSError as e:
        raise CorruptCheckpoint(f"{model}: cannot read external data {name!r}: {e.strerror}") from None
    return path


def read_bytes(model: Path, tensor: Initializer) -> bytes:
    if tensor.storage == TYPED:
        raise UnsupportedModel(f"{model}: tensor {tensor.name!r} is stored number by number, not as raw data")
    path = external_path(model, tensor.file or "") if tensor.storage == EXTERNAL else model
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            f.seek(tensor.offset)
            data = f.read(tensor.length) if tensor.offset + tensor.length <= size else b""
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {path}: {e.strerror}") from None
    if len(data) != tensor.length:
        raise CorruptCheckpoint(f"{path} ends inside tensor {tensor.name!r}", "truncated? fetch it again")
    return data


def read_values(model: Path, tensor: Initializer) -> npt.NDArray[Any]:
    if tensor.dtype in ("string", "float6e2m3", "float6e3m2"):
        raise UnsupportedModel(f"{model}: the values of tensor {tensor.name!r}, {tensor.dtype}, are not read here")
    if tensor.storage == TYPED:
        flat = _typed(model, tensor)
    else:
        data = read_bytes(model, tensor)
        flat = np.frombuffer(data, "u1" if tensor.dtype in _PACKED else _NUMPY.get(tensor.dtype, tensor.dtype))
    if tensor.dtype in _PACKED:
        flat = _unpacked(flat.astype(np.uint8), tensor)
    return flat.reshape(tensor.shape)


def _unpacked(packed: npt.NDArray[np.uint8], tensor: Initializer) -> npt.NDArray[Any]:
    """The first element in the lowest bits; int4 and int2 with their sign."""
    bits = _PACKED[tensor.dtype]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    wide = (packed[:, None] >> shifts & (1 << bits) - 1).reshape(-1)[: tensor.elements]
    if tensor.dtype.startswith("int"):
        return (wide.astype(np.int8) << (8 - bits)).astype(np.int8) >> (8 - bits)
    return wide


def _typed(model: Path, tensor: Initializer) -> npt.NDArray[Any]:
    fixed = {"float32": "<f4", "complex64": "<c8", "float64": "<f8", "complex128": "<c16"}.get(tensor.dtype)
    try:
        with model.open("rb", buffering=0) as f:
            source = Source(f, model)
            what = f"tensor {tensor.name!r}"
            if fixed:
                spans = [v for v in tensor.typed if not isinstance(v, int)]
                return np.frombuffer(b"".join(source.read(s, what) for s in spans), fixed)
            numbers: list[int] = []
            for v in tensor.typed:
                numbers += [v] if isinstance(v, int) else source.varints(v, what)
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {model}: {e.strerror}") from None
    wide = np.array(numbers, np.uint64)
    if tensor.dtype == "int64":
        return wide.astype(np.int64)
    if tensor.dtype == "float16":
        return wide.astype(np.uint16).view(np.float16)
    # negative numbers come as 64-bit two's complement, and a cast to fewer bits keeps the low ones
    kind = "u1" if tensor.dtype in _PACKED else _NUMPY.get(tensor.dtype, tensor.dtype)
    return wide.astype(np.int64).astype(kind)
