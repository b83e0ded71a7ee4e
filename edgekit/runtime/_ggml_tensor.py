"""ggml's tensor structure as memory lays it out, proven against the library before it is believed.

Knows fields, strides and buffers; knows no model.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import RuntimeFailed
from edgekit.runtime._llama_library import library

F32, I32 = 0, 26  # ggml_type, ggml.h


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h, with its GGML_MAX_DIMS 4, _OP_PARAMS 64 bytes, _SRC 10, _NAME 64."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def read(address: int) -> Tensor:
    """A view of the structure at `address`; valid as long as the graph it belongs to."""
    return Tensor.from_address(address)


def values(address: int, dtype: type[np.float32] | type[np.int32]) -> npt.NDArray[Any]:
    """A tensor of 4-byte elements as an array in numpy order (ne reversed), whatever its strides.

    In host memory a view, which the next node of the graph may overwrite; elsewhere a copy (ggml_backend_tensor_get).
    """
    tensor = read(address)
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    if 0 in shape:
        return np.empty(shape, dtype)
    span = 4 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    raw = functions()
    # a view has no buffer of its own before ggml-alloc gives it that of its source
    if tensor.buffer and not raw.ggml_backend_buffer_is_host(tensor.buffer):
        store = np.empty(span, np.uint8)
        raw.ggml_backend_tensor_get(address, store.ctypes.data, 0, span)
    else:
        store = np.ctypeslib.as_array(ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_uint8)), (span,))
    return np.ndarray(shape, dtype, buffer=store.data, strides=strides)


@cache
def operations() -> dict[str, int]:
    """ggml_op numbers by name, as this library numbers them (they move between versions)."""
    raw = functions()
    return {name: i for i in range(64) if (name := (raw.ggml_op_name(i) or b"").decode("ascii", "replace"))}


@cache
def functions() -> Any:
    """The library with the functions used here declared, after `Tensor` has been proven. Raises RuntimeFailed."""
    raw = library().raw
    try:
        _declare(raw)
    except AttributeError as error:
        raise _unknown_layout(str(error)) from None
    _prove(raw)
    return raw


def _declare(raw: Any) -> None:
    address, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    wide = ctypes.c_int64
    table: tuple[tuple[str, tuple[Any, ...], Any], ...] = (
        ("ggml_init", (_InitParams,), address),
        ("ggml_free", (address,), None),
        ("ggml_new_tensor_3d", (address, integer, wide, wide, wide), address),
        ("ggml_view_2d", (address, address, wide, wide, size, size), address),
        ("ggml_mul_mat", (address, address, address), address),
        ("ggml_set_name", (address, ctypes.c_char_p), address),
        ("ggml_get_data", (address,), address),
        ("ggml_op_name", (integer,), ctypes.c_char_p),
        ("ggml_backend_buffer_is_host", (address,), ctypes.c_bool),
        ("ggml_backend_tensor_get", (address, address, size, size), None),
    )
    for name, arguments, result in table:
        function = getattr(raw, name)
        function.argtypes, function.restype = arguments, result


def _prove(raw: Any) -> None:
    """Build a small graph with the library and find every field where `Tensor` says it is. Raises RuntimeFailed."""
    context = raw.ggml_init(_InitParams(1 << 20, None, False))
    if not context:
        raise _unknown_layout("ggml_init gave nothing")
    try:
        weight = raw.ggml_new_tensor_3d(context, F32, 32, 5, 3)
        whole = raw.ggml_new_tensor_3d(context, F32, 48, 7, 3)
        part = raw.ggml_view_2d(context, whole, 32, 7, 48 * 4, 64)
        raw.ggml_set_name(weight, b"blk.7.probe.weight")
        product = raw.ggml_mul_mat(context, raw.ggml_view_2d(context, weight, 32, 5, 128, 0), part)
        w, x, p = read(weight), read(part), read(product)
        found = {
            "type": (w.type, read(raw.ggml_new_tensor_3d(context, I32, 1, 1, 1)).type) == (F32, I32),
            "ne": tuple(w.ne) == (32, 5, 3, 1) and tuple(p.ne) == (5, 7, 1, 1),
            "nb": tuple(w.nb) == (4, 128, 640, 1920) and tuple(x.nb)[:2] == (4, 192),
            "op": raw.ggml_op_name(p.op) == b"MUL_MAT" and raw.ggml_op_name(w.op) == b"NONE",
            "src": p.src[1] == part and p.src[2] is None and x.src[0] == whole,
            "view": (x.view_src, x.view_offs, w.view_src) == (whole, 64, None),
            "data": w.data == raw.ggml_get_data(weight) and x.data == read(whole).data + 64,
            "name": w.name == b"blk.7.probe.weight",
        }
    finally:
        raw.ggml_free(context)
    if wrong := [field for field, right in found.items() if not right]:
        raise _unknown_layout(f"not where expected: {', '.join(wrong)}")


def _unknown_layout(why: str) -> RuntimeFailed:
    return RuntimeFailed(
        f"this llama-cpp-python lays tensors out in a way edgekit does not know ({why})",
        "pip install 'llama-cpp-python==0.3.36', or convert without calibration",
    )
