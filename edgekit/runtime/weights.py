"""The weight matrices of a loaded model, found and overwritten in place, to try another format without writing a file.

Knows tensors, buffers and the file they came from; knows no format but the three floats that it can overwrite.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint, EdgekitError, RuntimeFailed
from edgekit.gguf_file import TensorInfo, open_gguf
from edgekit.quant import Format, ggml
from edgekit.runtime import _ggml_tensor as raw
from edgekit.runtime._llama_library import library
from edgekit.runtime.llama_cpp import Context, ContextSettings, LlamaSession, Model
from edgekit.shelf import unknown

Array = npt.NDArray[np.float32]

_FLOATS = frozenset({"F32", "F16", "BF16"})
_OPERATIONS = ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS")
_SLAB = 4 << 20  # values converted at once: 16 MiB of float32


class Weights:
    """Every matrix that the model behind `session` multiplies with or looks rows up in, by its name in the file.

    A `with` block: at its end, however it ends, all that was replaced is as it was. What was written is used from the
    next `decode` of any context of the model on; a tied embedding is one matrix, used at both ends. Raises
    RuntimeFailed when the weights cannot be written: mapped from the file, quantised, laid out anew for this CPU, or
    not in host memory.
    """

    def __init__(self, session: LlamaSession) -> None:
        model = session.model
        self._api = _functions()
        self._path = model.path
        self._stored = open_gguf(model.path).tensors
        self._addresses = _find(model, session.threads)
        self._file = model.path.open("rb")
        # kept only for tensors of further shards; all others are read from the file again
        self._copies: dict[str, npt.NDArray[np.uint8]] = {}
        self._changed: dict[str, None] = {}
        self._formats: dict[str, Format] = {}
        try:
            for name in self._addresses:
                self._formats[name] = self._writable(name)
        except BaseException:
            self._file.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which the graph uses them."""
        return tuple(self._addresses)

    def shape(self, name: str) -> tuple[int, ...]:
        """In numpy order: (rows, cols), or (experts, rows, cols)."""
        ne = tuple(raw.read(self._address(name)).ne)
        return tuple(ne[: 3 if ne[2] > 1 else 2])[::-1]

    def stored(self, name: str) -> str:
        """The type that `name` is held in: F32, F16 or BF16."""
        self._address(name)
        return self._formats[name].name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """What the model computes with now: float32 of `shape`; with `stop`, rows `start` to `stop` of (-1, cols)."""
        shape = self.shape(name)
        cols, count = shape[-1], prod(shape[:-1])
        first, last = self._span(name, start, count if stop is None else stop)
        row = self._formats[name].row_bytes(cols)
        data = np.empty((last - first, row), np.uint8)
        if data.size:
            self._api.ggml_backend_tensor_get(self._address(name), data.ctypes.data, first * row, data.nbytes)
        rows = ggml.decode(data, self._formats[name], cols)
        return rows if stop is not None or start else rows.reshape(shape)

    def replace(self, name: str, values: Array, start: int = 0) -> None:
        """Overwrite `name` with float32 `values` of `shape`, or rows from `start` on with (rows, cols).

        Rounded to the stored type. Raises EdgekitError for values that do not fit, in shape or in range.
        """
        cols = self.shape(name)[-1]
        if values.ndim < 2 or values.shape[-1] != cols or (values.ndim > 2 and values.shape != self.shape(name)):
            raise EdgekitError(f"values of shape {values.shape} for {name}, which has {self.shape(name)}")
        rows = values.reshape(-1, cols)
        self._span(name, start, start + len(rows))
        if name not in self._changed:
            self._keep(name)
        step = max(1, _SLAB // cols)
        for at in range(0, len(rows), step):
            self._write(name, ggml.encode(rows[at : at + step], self._formats[name]), start + at)

    def restore(self, name: str) -> None:
        """`name` as it was when this was made. Raises RuntimeFailed when its file cannot be read any more."""
        self._address(name)
        if name not in self._changed:
            return
        at = 0
        for data in self._originals(name):
            self._write(name, data, at)
            at += len(data)
        self._copies.pop(name, None)
        del self._changed[name]

    def restore_all(self) -> None:
        for name in tuple(self._changed):
            self.restore(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.restore_all()
        finally:
            self._file.close()

    # --- one tensor ---------------------------------------------------------------------------------------------------

    def _address(self, name: str) -> int:
        found = self._addresses.get(name)
        if found is None:
            raise unknown("weight matrix", name, self._addresses)
        return found

    def _span(self, name: str, start: int, stop: int) -> tuple[int, int]:
        count = prod(self.shape(name)[:-1])
        if not 0 <= start <= stop <= count:
            raise EdgekitError(f"rows {start} to {stop} of {name}, which has {count}")
        return start, stop

    def _write(self, name: str, data: npt.NDArray[np.uint8], row: int) -> None:
        size = self._formats[name].row_bytes(self.shape(name)[-1])
        self._api.ggml_backend_tensor_set(self._address(name), data.ctypes.data, row * size, data.nbytes)

    def _writable(self, name: str) -> Format:
        """The stored type of `name`, once it is known that its data may be overwritten. Raises RuntimeFailed."""
        tensor = raw.read(self._address(name))
        place = (self._api.ggml_backend_buffer_name(tensor.buffer) or b"").decode() if tensor.buffer else "no buffer"
        try:
            fmt = ggml.by_code(tensor.type)
        except EdgekitError:
            fmt = None
        if fmt is None or fmt.name not in _FLOATS:
            kind = fmt.name if fmt else f"type {tensor.type}"
            raise RuntimeFailed(f"{self._path.name}: {name} is {kind}: only floats can be overwritten", _UNQUANTISED)
        if place.endswith("_Mapped"):  # ggml_backend_cpu_buffer_from_ptr_type
            raise RuntimeFailed(f"{self._path.name} is mapped from its file, read-only", "open it with mmap=False")
        # repacked buffers and those of devices say that they are not host memory
        if not tensor.buffer or not self._api.ggml_backend_buffer_is_host(tensor.buffer):
            raise RuntimeFailed(
                f"{self._path.name}: {name} lies in {place}, not in plain memory", "open it with n_gpu_layers=0, as F32"
            )
        stored = self._stored.get(name)
        if stored is not None and (stored.code, stored.nbytes) != (fmt.code, fmt.nbytes(self.shape(name))):
            raise RuntimeFailed(f"{self._path} is no longer the file that was loaded", "open it again")
        return fmt

    def _keep(self, name: str) -> None:
        if name not in self._stored:
            cols = self.shape(name)[-1]
            data = np.empty((prod(self.shape(name)[:-1]), self._formats[name].row_bytes(cols)), np.uint8)
            self._api.ggml_backend_tensor_get(self._address(name), data.ctypes.data, 0, data.nbytes)
            self._copies[name] = data
        self._changed[name] = None

    def _originals(self, name: str) -> Iterator[npt.NDArray[np.uint8]]:
        """Rows as they were, in slabs of uint8 (rows, row_bytes)."""
        if name in self._copies:
            yield self._copies[name]
            return
        cols = self.shape(name)[-1]
        row, stored = self._formats[name].row_bytes(cols), self._stored[name]
        step = max(1, _SLAB // cols)
        for start in range(0, stored.nbytes // row, step):
            yield _read(self._file, self._path, stored, start * row, min(step * row, stored.nbytes - start * row), row)


_UNQUANTISED = "edgekit convert MODEL -q F32 (or BF16) makes one that can be tried on"


def _read(file: Any, path: Path, stored: TensorInfo, at: int, size: int, row: int) -> npt.NDArray[np.uint8]:
    try:
        file.seek(stored.offset + at)
        data = file.read(size)
    except OSError as e:
        raise RuntimeFailed(f"cannot read {path}: {e.strerror}", "close the session and open it again") from None
    if len(data) < size:
        raise CorruptCheckpoint(f"{path} became shorter while it was in use", "convert it again")
    return np.frombuffer(data, np.uint8).reshape(-1, row)


def _find(model: Model, threads: int) -> dict[str, int]:
    """ggml_tensor addresses by name: llama.cpp has no call for them, but its scheduler shows every node of a graph."""
    raw.functions()
    operations = {raw.operations()[name] for name in _OPERATIONS}
    leaf = raw.operations()["NONE"]
    found: dict[str, int] = {}

    def look(address: int, ask: bool, _user: int | None) -> bool:
        node = raw.read(address)
        if ask and node.op in operations:
            weight = raw.read(node.src[0])
            name = weight.name.decode("utf-8", "replace")
            if weight.op == leaf and name.endswith(".weight") and weight.ne[1] * weight.ne[2] > 1:
                found.setdefault(name, node.src[0])
        return not ask

    callback = library().api.ggml_backend_sched_eval_callback(look)
    context = Context(model, ContextSettings(32, threads, 8, 8, outputs=8), cb_eval=callback)
    try:
        context.decode(np.zeros(2, np.int32), 0, 0)
    finally:
        context.close()
    if not found:
        raise RuntimeFailed(f"{model.path.name} showed no weight matrix", "report this model")
    return found


def _functions() -> Any:
    api = raw.functions()
    address, size = ctypes.c_void_p, ctypes.c_size_t
    api.ggml_backend_buffer_name.argtypes, api.ggml_backend_buffer_name.restype = (address,), ctypes.c_char_p
    api.ggml_backend_tensor_set.argtypes = (address, address, size, size)
    api.ggml_backend_tensor_set.restype = None
    return api
