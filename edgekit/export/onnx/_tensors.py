"""Tensors of an ONNX graph and the files that hold them: read a slab at a time, written one after another.

Knows TensorProto and external data; knows neither nodes nor number formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint, MissingExtra
from edgekit.quant.nbits import INLINE, data_bytes

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

Floats = npt.NDArray[np.float32]

FLOAT, UINT8, STRING, EXTERNAL = 1, 2, 8, 1  # TensorProto.DataType and .DataLocation

_CHUNK = 8 << 20  # bytes copied at a time


def read_graph(path: Path) -> ModelProto:
    """The model in `path` without its external data. Raises MissingExtra, CorruptCheckpoint."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as missing:
        raise MissingExtra("the onnx package is not installed", 'pip install "edgekit[onnx]"') from missing
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as missing:
        raise CorruptCheckpoint(f"{path} does not exist", "export the model again") from missing
    except (DecodeError, OSError, ValueError) as broken:
        raise CorruptCheckpoint(f"{path} is no ONNX graph: {broken}", "export the model again") from broken
    return model


@dataclass(frozen=True, slots=True)
class Place:
    """Where external data lies: `offset` and `length` in bytes."""

    path: Path
    offset: int
    length: int


def place_of(tensor: TensorProto, folder: Path) -> Place:
    """The checked place of an external tensor. Raises CorruptCheckpoint: outside `folder`, cut short, wrong length."""
    told = {entry.key: entry.value for entry in tensor.external_data}
    path = (folder / told.get("location", "")).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise CorruptCheckpoint(f"{tensor.name}: no data file {told.get('location')!r} in {folder}", "export it again")
    size = _size(tensor)
    try:
        offset, length = int(told.get("offset", 0)), int(told.get("length", size))
    except ValueError:
        offset = length = -1
    if offset < 0 or length != size or offset + length > path.stat().st_size:
        raise CorruptCheckpoint(
            f"{tensor.name}: {told.get('length')} bytes at {told.get('offset')} of {path.name}, which has "
            f"{path.stat().st_size}; {tuple(tensor.dims)} needs {size}",
            "export the model again",
        )
    return Place(path, offset, length)


def _size(tensor: TensorProto) -> int:
    from onnx import helper

    itemsize = int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return itemsize * int(prod(tensor.dims))


@dataclass(frozen=True, slots=True)
class Matrix:
    """A constant float32 matrix of `rows` outputs (or entries) by `cols`, as `name` stores it: turned if
    `transposed`."""

    tensor: TensorProto
    folder: Path
    transposed: bool

    @property
    def name(self) -> str:
        return str(self.tensor.name)

    @property
    def rows(self) -> int:
        return int(self.tensor.dims[1 if self.transposed else 0])

    @property
    def cols(self) -> int:
        return int(self.tensor.dims[0 if self.transposed else 1])

    def read(self, start: int, stop: int) -> Floats:
        """Rows from `start` to `stop`: float32 (stop - start, cols), the caller's own.

        Read, not mapped: a map of a transposed matrix makes all of it resident for a slab of its rows.
        """
        if self.tensor.data_location != EXTERNAL:
            from onnx import numpy_helper

            whole = numpy_helper.to_array(self.tensor)
            return np.array(whole[:, start:stop].T if self.transposed else whole[start:stop], np.float32, order="C")
        place = place_of(self.tensor, self.folder)
        with place.path.open("rb", buffering=0) as file:
            if not self.transposed:
                rows = np.empty((stop - start, self.cols), "<f4")
                _fill(file, place.offset + 4 * start * self.cols, rows)
                return rows
            turned = np.empty((self.cols, stop - start), "<f4")
            for number, row in enumerate(turned):
                _fill(file, place.offset + 4 * (number * self.rows + start), row)
        return np.ascontiguousarray(turned.T)

    def equals(self, other: Matrix, rows: int = 4096) -> bool:
        """Whether both hold the same numbers; unequal ones are told apart within the first rows."""
        if (self.name, self.transposed) == (other.name, other.transposed):
            return True
        bounds = range(0, self.rows, rows)
        return (self.rows, self.cols) == (other.rows, other.cols) and all(
            np.array_equal(self.read(a, min(a + rows, self.rows)), other.read(a, min(a + rows, self.rows)))
            for a in bounds
        )


def _fill(file: FileIO, offset: int, into: npt.NDArray[Any]) -> None:
    """Read the bytes of `into` from `offset` on."""
    view = into.reshape(-1).view(np.uint8).data
    file.seek(offset)
    while view:
        got = file.readinto(view)
        if not got:
            raise CorruptCheckpoint(f"{file.name} ended early", "export the model again")
        view = view[got:]


def tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    """Initializers of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from tensors_of(inner)


class DataFile:
    """The one external file of a graph, in the making: every tensor at a multiple of ALIGN, those below INLINE bytes
    in the graph instead."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file, self._location, self._position = file, location, 0

    def begin(self, name: str, dims: tuple[int, ...]) -> Writing:
        """A uint8 tensor that is written piece after piece."""
        from onnx import TensorProto

        return Writing(self, TensorProto(name=name, data_type=UINT8, dims=dims), prod(dims))

    def add(self, name: str, values: npt.NDArray[Any]) -> TensorProto:
        """A tensor of the given numbers: float32 or uint8."""
        from onnx import TensorProto

        kind = UINT8 if values.dtype == np.uint8 else FLOAT
        writing = Writing(self, TensorProto(name=name, data_type=kind, dims=values.shape), values.nbytes)
        writing.write(values)
        return writing.end()

    def take(self, tensor: TensorProto, folder: Path) -> int:
        """Move the data of a tensor here, wherever it is; returns its size in bytes."""
        if tensor.data_type == STRING:
            return 0
        size = _size(tensor)
        if tensor.data_location == EXTERNAL:
            self._take_file(tensor, place_of(tensor, folder))
        elif size >= INLINE:
            from onnx import numpy_helper

            values = numpy_helper.to_array(tensor).tobytes()
            for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(field)
            writing = Writing(self, tensor, size)
            writing.write(values)
            writing.end()
        return size

    def _take_file(self, tensor: TensorProto, place: Place) -> None:
        del tensor.external_data[:]
        tensor.ClearField("data_location")
        writing = Writing(self, tensor, place.length)
        with place.path.open("rb") as file:
            file.seek(place.offset)
            left = place.length
            while left:
                piece = file.read(min(left, _CHUNK))
                if not piece:
                    raise CorruptCheckpoint(f"{place.path} ended early", "export the model again")
                writing.write(piece)
                left -= len(piece)
        writing.end()

    def append(self, piece: bytes | memoryview) -> None:
        self._file.write(piece)
        self._position += len(piece)

    def settle(self, tensor: TensorProto, size: int) -> None:
        """Say in `tensor` where the `size` bytes are that were appended last; pad for the next."""
        from onnx import TensorProto

        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", self._position - size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        self.append(bytes(data_bytes([size]) - size))


class Writing:
    """A tensor whose bytes come in pieces."""

    def __init__(self, out: DataFile, tensor: TensorProto, size: int) -> None:
        self._out, self._tensor, self._size, self._written = out, tensor, size, 0
        self._inline = bytearray() if size < INLINE else None

    def write(self, values: npt.NDArray[Any] | bytes) -> None:
        piece = values if isinstance(values, bytes) else np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        if self._inline is not None:
            self._inline += piece
        else:
            self._out.append(piece)
        self._written += len(piece)

    def end(self) -> TensorProto:
        assert self._written == self._size, f"{self._tensor.name}: {self._written} bytes instead of {self._size}"
        if self._inline is not None:
            self._tensor.raw_data = bytes(self._inline)
        else:
            self._out.settle(self._tensor, self._size)
        return self._tensor
