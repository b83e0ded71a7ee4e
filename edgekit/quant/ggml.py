"""ggml's number formats: a table of sizes that needs no library, and encoders that call llama-cpp-python's kernels.

Knows blocks, bytes and the C entry points; knows nothing of models, presets or files.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, MissingExtra, RuntimeFailed
from edgekit.quant import Format
from edgekit.shelf import unknown

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# name, ggml_type, weights a block, bytes a block (ggml/include/ggml.h and the structs of ggml/src/ggml-common.h)
_TABLE = (
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("BF16", 30, 1, 2),
    ("Q8_0", 8, 32, 34),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("IQ1_S", 19, 256, 50),
    ("IQ1_M", 29, 256, 56),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ2_S", 22, 256, 82),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ3_S", 21, 256, 110),
    ("IQ4_NL", 20, 32, 18),
    ("IQ4_XS", 23, 256, 136),
    ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66),
    ("MXFP4", 39, 32, 17),
    ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18),
    ("Q2_0", 42, 64, 18),
)
# ggml_quantize_requires_imatrix names three; without importance IQ1_M encodes to noise, and llama-quantize refuses it.
_NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"})

FORMATS: dict[str, Format] = {
    name: Format(name, code, block, size, needs_importance=name in _NEED_IMPORTANCE)
    for name, code, block, size in _TABLE
}
"""Every format that `encode` writes, by its ggml name."""

_BY_CODE = {f.code: f for f in FORMATS.values()}

_CHUNK = 1 << 20  # weights a native call: a slow format still answers Ctrl-C within a second
# The kernels of these search a lattice and abort the process when their sums are not finite.
_LATTICE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"})
_LATTICE_WEIGHT = 1e6  # largest |weight| they take: 256 squares, and a 16-bit scale of a 15th, stay far below overflow
_LATTICE_TERM = 1e15  # largest weight times its emphasis: the square of 32 such terms times 15 stays below 3e38

# relative error of a sine wave sent there and back that the self-test lets pass
_FINEST = {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.01, "Q4_0": 0.15, "Q4_K": 0.1, "Q6_K": 0.03, "IQ4_NL": 0.15}
# floats up to these stay finite: reading them again (ggml_validate_row_data) would only cost time
_FLOAT_LIMIT = {"F32": np.inf, "BF16": 3e38, "F16": 65504.0}
_NEEDED = (
    "ggml_blck_size",
    "ggml_type_size",
    "ggml_quantize_requires_imatrix",
    "ggml_quantize_init",
    "ggml_quantize_chunk",
    "ggml_validate_row_data",
)


def get(name: str) -> Format:
    """The format of that name, whatever its case. Raises UnknownName."""
    found = FORMATS.get(name.upper())
    if found is None:
        raise unknown("number format", name, FORMATS)
    return found


def by_code(code: int) -> Format:
    """The format of a ggml_type number as GGUF files store it. Raises UnknownName."""
    found = _BY_CODE.get(code)
    if found is None:
        raise unknown("number format", f"ggml_type {code}", FORMATS)
    return found


def encode(rows: Array, fmt: Format | str, importance: Array | None = None, threads: int = 1) -> Bytes:
    """float32 (r, c) -> uint8 (r, row_bytes), the bytes ggml_quantize_chunk gives, whatever `threads` is.

    `importance`: float32 (c,), how much an error in each column costs, the same for all rows; finite, not negative.
    Raises EdgekitError when a row holds NaN, infinity or a value beyond the format, when c does not divide
    into blocks, or when the format needs importance and there is none.
    """
    fmt = get(fmt) if isinstance(fmt, str) else fmt
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if rows.ndim != 2:
        raise ValueError(f"rows must be two-dimensional, not of shape {rows.shape}")
    count, cols = rows.shape
    _check_columns(fmt, cols)
    importance = _check_importance(fmt, cols, importance)
    out = np.empty((count, fmt.row_bytes(cols)), np.uint8)
    library = _ready(fmt.code)
    peak = float(importance.max()) if importance is not None else None

    def work(start: int, stop: int) -> None:
        largest = _check_values(rows[start:stop], start, fmt, peak)
        _call(library, fmt, rows[start:stop], out[start:stop], importance)
        if largest <= _FLOAT_LIMIT.get(fmt.name, -1):
            return
        if not library.ggml_validate_row_data(fmt.code, _address(out[start:stop]), out[start:stop].nbytes):
            raise _unrepresentable(library, fmt, rows[start:stop], out[start:stop], start)

    _each(work, count, cols, threads)
    return out


def decode(data: Bytes | bytes, fmt: Format | str, cols: int, threads: int = 1) -> Array:
    """uint8 (r, row_bytes), or as many bytes in a row -> float32 (r, cols). Raises EdgekitError when sizes disagree."""
    fmt = get(fmt) if isinstance(fmt, str) else fmt
    _check_columns(fmt, cols)
    flat = np.frombuffer(data, np.uint8) if isinstance(data, (bytes, bytearray, memoryview)) else data
    flat = np.ascontiguousarray(flat).reshape(-1).view(np.uint8)
    size = fmt.row_bytes(cols)
    if flat.size % size:
        raise EdgekitError(f"{flat.size} bytes are not whole {fmt.name} rows of {cols} weights ({size} bytes each)")
    packed = flat.reshape(-1, size)
    if fmt.name == "F32":
        return packed.view(np.float32).copy()
    out = np.empty((packed.shape[0], cols), np.float32)
    function = _decoder(_library(), fmt)

    def work(start: int, stop: int) -> None:
        function(_address(packed[start:stop]), _address(out[start:stop]), (stop - start) * cols)

    _each(work, packed.shape[0], cols, threads)
    return out


def library_path() -> Path:
    """Where libggml-base lies: LLAMA_CPP_LIB_PATH, or beside the installed llama_cpp, which is not imported."""
    folders = [Path(override)] if (override := os.environ.get("LLAMA_CPP_LIB_PATH")) else []
    spec = find_spec("llama_cpp")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        package = Path(place)
        # wheels keep libraries in lib/ (bin/ on Windows); distributions in PREFIX/lib, site-packages being three below
        folders += [package / "lib", package / "bin", package, *package.parents[2:3]]
    names = {"darwin": ("libggml-base.dylib", "libggml-base.so"), "win32": ("ggml-base.dll", "libggml-base.dll")}
    for folder in folders:
        for name in names.get(sys.platform, ("libggml-base.so", "libggml-base.so.0")):
            if (path := folder / name).is_file():
                return path
    where = f" in {folders[0]}" if folders else ": it is not installed"
    raise MissingExtra(f"the ggml kernels of llama-cpp-python were not found{where}", _INSTALL)


_INSTALL = "pip install 'llama-cpp-python>=0.3.36'"


@cache
def _library() -> Any:
    """The library, opened and tested once. The dynamic loader gives llama_cpp's own handle when both are loaded."""
    path = library_path()
    if sys.platform == "win32":
        os.add_dll_directory(str(path.parent))
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
        _self_test(library)
    except (OSError, AttributeError, RuntimeFailed) as error:
        raise RuntimeFailed(
            f"{path} does not behave as ggml should ({error}); llama-cpp-python {_version()}, ggml {_ggml(path)}",
            f"reinstall it: {_INSTALL.replace('install', 'install --force-reinstall')}",
        ) from error
    return library


def _declare(library: Any) -> None:
    """Argument and result types of the C functions; AttributeError when one is gone."""
    address, size, code = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    count = ctypes.c_int64
    types: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "ggml_blck_size": (count, (code,)),
        "ggml_type_size": (size, (code,)),
        "ggml_quantize_requires_imatrix": (ctypes.c_bool, (code,)),
        "ggml_quantize_init": (None, (code,)),
        "ggml_quantize_chunk": (size, (code, address, address, count, count, count, address)),
        "ggml_validate_row_data": (ctypes.c_bool, (code, address, size)),
    }
    for name in _NEEDED:
        function = getattr(library, name)
        function.restype, function.argtypes = types[name]


def _self_test(library: Any) -> None:
    """Compare the table with the library, then send a known block there and back. Raises RuntimeFailed."""
    for fmt in FORMATS.values():
        # validating nothing is the one call that answers for a type number the library does not have
        if not library.ggml_validate_row_data(fmt.code, None, 0):
            raise RuntimeFailed(f"it has no {fmt.name}")
        found = library.ggml_blck_size(fmt.code), library.ggml_type_size(fmt.code)
        if found != (fmt.block, fmt.size):
            raise RuntimeFailed(f"{fmt.name} has blocks of {found[0]} weights in {found[1]} bytes")
        if library.ggml_quantize_requires_imatrix(fmt.code) and not fmt.needs_importance:
            raise RuntimeFailed(f"{fmt.name} needs importance")
    wave = np.sin(np.arange(512, dtype=np.float32) * np.float32(0.37)).reshape(2, 256)
    for name, bound in _FINEST.items():
        fmt = FORMATS[name]
        packed = np.zeros((2, fmt.row_bytes(256)), np.uint8)
        _call(library, fmt, wave, packed, None)
        back = np.empty_like(wave)
        _decoder(library, fmt)(_address(packed), _address(back), wave.size)
        error = float(np.sqrt(np.mean((back - wave) ** 2) / np.mean(wave**2)))
        if not error <= bound:
            raise RuntimeFailed(f"{name} gives back a test block with a relative error of {error:.3g}, not {bound:g}")


def _call(library: Any, fmt: Format, rows: Array, out: Bytes, importance: Array | None) -> None:
    """One ggml_quantize_chunk over whole rows. Every precondition of the kernel has been checked by the caller."""
    emphasis = _address(importance) if importance is not None else None
    count, cols = rows.shape
    written = library.ggml_quantize_chunk(fmt.code, _address(rows), _address(out), 0, count, cols, emphasis)
    if written != out.nbytes:
        raise RuntimeFailed(f"{fmt.name} wrote {written} bytes for {out.nbytes}")


def _decoder(library: Any, fmt: Format) -> Callable[[int, int, int], None]:
    """The C function (packed, float32 out, weights) of a format: ggml-quants.h, and ggml.h for the 16-bit floats."""
    special = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}
    # C names are lower case but for the K of the k-quants: dequantize_row_q4_K, dequantize_row_iq4_xs
    stem = fmt.name[:-1].lower() + "K" if fmt.name.endswith("_K") else fmt.name.lower()
    function = library[special.get(fmt.name, f"dequantize_row_{stem}")]
    function.restype, function.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return function  # type: ignore[no-any-return]


_lock = threading.Lock()
_initialised: set[int] = set()


def _ready(code: int) -> Any:
    """The library with the search tables of a format built, once (ggml_quantize_init; seconds for some lattices)."""
    library = _library()
    with _lock:
        if code not in _initialised:
            library.ggml_quantize_init(code)
            _initialised.add(code)
    return library


def _each(work: Callable[[int, int], None], count: int, cols: int, threads: int) -> None:
    """Run `work(start, stop)` over all rows: the C calls free the GIL, and rows do not depend on one another."""
    spans = list(_spans(count, cols, threads))
    if threads <= 1 or len(spans) <= 1:
        for start, stop in spans:
            work(start, stop)
        return
    with ThreadPoolExecutor(min(threads, len(spans)), thread_name_prefix="ggml") as pool:
        for _ in pool.map(lambda span: work(*span), spans):
            pass


def _spans(count: int, cols: int, threads: int) -> Iterator[tuple[int, int]]:
    """Rows cut into native calls of at most `_CHUNK` weights, and small enough that every thread has some."""
    step = max(1, min(_CHUNK // cols, -(-count // (4 * threads)) if threads > 1 else count))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _address(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data


def _check_columns(fmt: Format, cols: int) -> None:
    if cols <= 0 or cols % fmt.block:
        raise EdgekitError(
            f"rows of {cols} weights do not divide into {fmt.name} blocks of {fmt.block}",
            "choose a format with smaller blocks: Q8_0, Q5_0, Q4_0 and IQ4_NL have 32, F16 takes any row",
        )


def _check_importance(fmt: Format, cols: int, importance: Array | None) -> Array | None:
    if importance is None:
        if fmt.needs_importance:
            raise EdgekitError(
                f"{fmt.name} needs an importance vector and there is none", "calibrate first: --calibration FILE"
            )
        return None
    importance = np.ascontiguousarray(importance, dtype=np.float32)
    if importance.shape != (cols,):
        raise EdgekitError(f"importance of shape {importance.shape} for rows of {cols} weights")
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        column = int(np.argmin(np.isfinite(importance) & (importance >= 0)))
        raise EdgekitError(f"importance of column {column} is {importance[column]}", "calibrate again")
    return importance


def _check_values(rows: Array, first: int, fmt: Format, peak: float | None) -> float:
    """Refuse what kernels pass on as garbage or abort at; the largest |weight|. `peak` is the largest importance."""
    low, high = float(rows.min()), float(rows.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        row = int(np.argmin(np.isfinite(rows).all(axis=1)))
        column = int(np.argmin(np.isfinite(rows[row])))
        raise EdgekitError(
            f"row {first + row}, column {column} holds {rows[row, column]}", "the checkpoint is damaged: fetch it again"
        )
    largest = max(-low, high)
    # kernels weigh an error with importance * sqrt(2 mean(x^2) + x^2), or x^2 where there is no importance
    emphasis = largest * largest if peak is None else 2 * peak * largest
    if fmt.name in _LATTICE and (largest > _LATTICE_WEIGHT or emphasis * largest > _LATTICE_TERM):
        row = int(np.argmax(np.abs(rows).max(axis=1)))
        raise EdgekitError(
            f"row {first + row} holds a weight of {largest:g}"
            + (f" with importance up to {peak:g}" if peak is not None else "")
            + f": too large for {fmt.name}",
            "choose Q4_K or finer for this tensor",
        )
    return largest


def _unrepresentable(library: Any, fmt: Format, rows: Array, out: Bytes, first: int) -> EdgekitError:
    """The error for a chunk that ggml_validate_row_data refuses (a scale or value overflowed), with its first row."""
    for i in range(len(rows)):
        if not library.ggml_validate_row_data(fmt.code, _address(out[i : i + 1]), out[i : i + 1].nbytes):
            largest = float(np.abs(rows[i]).max())
            return EdgekitError(
                f"row {first + i} holds values up to {largest:g} in size, which {fmt.name} cannot represent",
                "choose F32, BF16 or Q8_0 for this tensor",
            )
    return EdgekitError(f"rows from {first} cannot be represented in {fmt.name}", "choose F32 for this tensor")


def _version() -> str:
    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return "(not installed as a package)"


def _ggml(path: Path) -> str:
    """ggml's own version string, for messages; older libraries have none."""
    try:
        function = ctypes.CDLL(str(path)).ggml_version
    except (OSError, AttributeError):
        return "of unknown version"
    function.restype = ctypes.c_char_p
    return str(function().decode("ascii", "replace"))
