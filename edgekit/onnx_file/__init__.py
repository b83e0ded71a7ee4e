"""The ONNX container, read without the `onnx` package: nodes, names, shapes, and where each weight lies.

Knows the schema (onnx.proto of ONNX 1.23) and no operator; reads no weight unless asked for one. What comes out is
what a runtime sees: documentation, shape annotations and training information are stepped over.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint
from edgekit.onnx_file._runnable import runnable
from edgekit.onnx_file._tensor import DTYPES, EXTERNAL, RAW, TYPED, Initializer, read_tensor
from edgekit.onnx_file._values import external_path, read_bytes, read_values
from edgekit.onnx_file._wire import Message, Source

__all__ = [
    "DTYPES",
    "EXTERNAL",
    "RAW",
    "TYPED",
    "Graph",
    "Initializer",
    "Node",
    "OnnxFile",
    "Value",
    "open_onnx",
    "require_runnable",
]

MAX_DEPTH = 32
"""Graphs inside attributes of graphs (If, Loop, Scan); two or three are real."""

_COST = 8  # what a node, attribute or value costs of the budget, in fields


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output. `shape`: None where it is not stated; each axis a size, a name, or None.

    `dtype` of what is no tensor: "sequence", "map", "optional", "sparse", "opaque", or "" where nothing is stated.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, slots=True)
class Node:
    """One operator call. An absent optional input is the empty string.

    `attributes`: int, float, str (bytes where it is not UTF-8), Initializer, Graph, or a tuple of them. A reference to
    an attribute of the function around it is the str `@name`.
    """

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in the order of the file, and the initializers by name. `sparse`: (values, indices) of sparse ones."""

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    initializers: Mapping[str, Initializer]
    sparse: tuple[tuple[Initializer, Initializer], ...] = ()


@dataclass(frozen=True)
class OnnxFile:
    """A model file that has been read and checked, but for what lies outside it: see `check`.

    `opsets`: domain -> version, the standard domain as `ai.onnx`. `tensors`: every tensor anywhere in the file, those
    in attributes, subgraphs and functions too.
    """

    path: Path
    nbytes: int
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    graph: Graph
    functions: Mapping[tuple[str, str], tuple[Node, ...]]
    tensors: tuple[Initializer, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Value, ...]:
        """As the graph lists them; old models list initializers here, too."""
        return self.graph.inputs

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.graph.outputs

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.graph.nodes

    @property
    def initializers(self) -> Mapping[str, Initializer]:
        return self.graph.initializers

    def every_node(self) -> Iterator[Node]:
        """Those of subgraphs and functions, too."""
        yield from _walk(self.graph.nodes)
        for nodes in self.functions.values():
            yield from _walk(nodes)

    def operators(self) -> Counter[str]:
        """How often each operator is called; those outside the standard domain as `domain:Op`."""
        return Counter(n.op if n.domain in _STANDARD else f"{n.domain}:{n.op}" for n in self.every_node())

    def external_files(self) -> dict[str, Path]:
        """Name in the model -> path, of every file its tensors lie in. Raises CorruptCheckpoint as `check` does."""
        names = dict.fromkeys(t.file for t in self.tensors if t.file is not None)
        return {name: external_path(self.path, name) for name in names}

    def check(self, *, checksums: bool = True) -> None:
        """External data: inside the folder, present, long enough, of the checksum stated.

        Raises CorruptCheckpoint naming the tensor. No runtime is needed, no weight is read unless there is a checksum.
        """
        files = self.external_files()
        sizes = {name: path.stat().st_size for name, path in files.items()}
        sums: dict[str, str] = {}
        for t in self.tensors:
            if t.file is None:
                continue
            if t.offset + t.length > sizes[t.file]:
                raise CorruptCheckpoint(
                    f"{self.path}: tensor {t.name!r} ends at byte {t.offset + t.length} of {t.file}, "
                    f"which ends at {sizes[t.file]}",
                    "truncated? fetch it again",
                )
            if t.checksum and checksums:
                sums[t.file] = sums.get(t.file) or _sha1(files[t.file])
                if sums[t.file] != t.checksum:
                    raise CorruptCheckpoint(
                        f"{self.path}: {t.file} is not the file that tensor {t.name!r} states the checksum of",
                        "fetch both files again",
                    )

    def read(self, tensor: Initializer) -> bytes:
        """Its raw data as stored, `nbytes` long. Raises CorruptCheckpoint; UnsupportedModel for a typed one."""
        return read_bytes(self.path, tensor)

    def values(self, tensor: Initializer) -> npt.NDArray[Any]:
        """Its elements in its shape. 2- and 4-bit integers come as int8 or uint8, float formats that numpy lacks as
        the unsigned integers that hold their bits. Raises CorruptCheckpoint, UnsupportedModel (texts, 6 bits)."""
        return read_values(self.path, tensor)


def require_runnable(file: OnnxFile) -> None:
    """Raise UnsupportedModel if the installed onnxruntime is too old for the file's IR version or its opset."""
    runnable(file.path, file.ir_version, file.opsets.get("ai.onnx", 1))


_STANDARD = ("", "ai.onnx")


def open_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Read a model file; no weight is touched, and the file is closed again.

    Raises CorruptCheckpoint for a file that is damaged, truncated, contradicts itself, or is no ONNX model.
    """
    path = Path(path)
    if not path.is_file():
        raise CorruptCheckpoint(f"cannot read {path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb", buffering=0) as file:
            source = Source(file, path)
            if not source.size:
                source.fail("the file is empty", "fetch it again")
            return _Reader(source).model()
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {path}: {e.strerror}") from None


class _Reader:
    """Messages into the dataclasses above; collects every tensor on the way."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.tensors: list[Initializer] = []

    def model(self) -> OnnxFile:
        m = self.source.message((0, self.source.size), "the model")
        graph = m.message(7, "the graph")
        if graph is None or 1 not in m:
            m.fail("no graph or no version in it", "not an ONNX model?")
        opsets: dict[str, int] = {}
        for entry in m.messages(8, "an opset"):
            domain = entry.text(1) or "ai.onnx"
            if domain in opsets:
                m.fail(f"two opsets of {domain!r}")
            opsets[domain] = entry.integer(2)
        functions = {}
        for f in m.messages(25, "a function"):
            key = (f.text(10), f.text(1))
            functions[key] = tuple(self.node(n, 1) for n in f.messages(7, f"a node of function {key[1]!r}"))
        producer = f"{m.text(2)} {m.text(3)}".strip()
        metadata = {e.text(1): e.text(2) for e in m.messages(14, "metadata")}
        found = self.graph(graph, 0)
        return OnnxFile(
            self.source.path, self.source.size, m.integer(1), opsets, producer, found, functions,
            tuple(self.tensors), metadata,
        )  # fmt: skip

    def graph(self, m: Message, depth: int) -> Graph:
        if depth > MAX_DEPTH:
            m.fail(f"graphs inside graphs, more than {MAX_DEPTH} deep")
        initializers: dict[str, Initializer] = {}
        for t in m.messages(5, "an initializer"):
            tensor = self.tensor(t)
            if not tensor.name or tensor.name in initializers:
                t.fail("appears twice" if tensor.name else "has no name")
            initializers[tensor.name] = tensor
        sparse = tuple(self._sparse(s) for s in m.messages(15, "a sparse initializer"))
        nodes = tuple(self.node(n, depth) for n in m.messages(1, "a node"))
        inputs = tuple(self._value(v) for v in m.messages(11, "an input"))
        outputs = tuple(self._value(v) for v in m.messages(12, "an output"))
        return Graph(m.text(2), nodes, inputs, outputs, initializers, sparse)

    def tensor(self, m: Message) -> Initializer:
        self.tensors.append(read_tensor(m))
        return self.tensors[-1]

    def _sparse(self, m: Message) -> tuple[Initializer, Initializer]:
        values, indices = m.message(1, "the values"), m.message(2, "the indices")
        if values is None or indices is None:
            m.fail("no values or no indices")
        return self.tensor(values), self.tensor(indices)

    def node(self, m: Message, depth: int) -> Node:
        self.source.spend(_COST)
        op, name = m.text(4), m.text(3)
        if not op:
            m.fail(f"{name!r} has no operator")
        m.what = f"node {name[:200]!r} ({op[:80]})"
        attributes: dict[str, Any] = {}
        for a in m.messages(5, f"an attribute of {m.what}"):
            key = a.text(1)
            if not key or key in attributes:
                m.fail(f"attribute {key!r} appears twice" if key else "an attribute without a name")
            a.what = f"attribute {key[:80]!r} of {m.what}"
            attributes[key] = self._attribute(a, depth)
        return Node(op, m.text(7), name, tuple(m.texts(1)), tuple(m.texts(2)), attributes)

    def _attribute(self, m: Message, depth: int) -> Any:
        self.source.spend(_COST)
        reference = m.text(21)
        if reference:
            return f"@{reference}"
        kind = m.integer(20)
        if kind == 0:  # IR versions before 2 leave the type out
            kind = next((k for k, (number, _) in _ATTRIBUTES.items() if number in m), 0)
        if kind not in _ATTRIBUTES:
            m.fail(f"attribute type {kind}")
        number, read = _ATTRIBUTES[kind]
        return read(self, m, number, depth)

    def texts(self, m: Message, number: int) -> tuple[str | bytes, ...]:
        return tuple(_loose(self.source.text_bytes(span, m.what)) for span in m.spans(number))

    def _value(self, m: Message) -> Value:
        self.source.spend(_COST)
        name = m.text(1)
        m.what = f"input or output {name[:200]!r}"
        declared = m.message(2, f"the type of {name[:200]!r}")
        if declared is None:
            return Value(name, "", None)
        for number, kind in _KINDS.items():
            if number in declared:
                return Value(name, kind, None)
        tensor = declared.message(1, f"the type of {name[:200]!r}")
        if tensor is None:
            return Value(name, "", None)
        code = tensor.integer(1)
        if code and code not in DTYPES:
            tensor.fail(f"data type {code}; known: 1 to {max(DTYPES)}")
        shape = tensor.message(2, f"the shape of {name[:200]!r}")
        axes = None if shape is None else tuple(_axis(d) for d in shape.messages(1, "an axis"))
        return Value(name, DTYPES[code][0] if code else "", axes)


_KINDS = {4: "sequence", 5: "map", 7: "opaque", 8: "sparse", 9: "optional"}


def _axis(m: Message) -> int | str | None:
    if 1 in m:
        return m.integer(1)
    return m.text(2) or None


def _loose(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _float(r: _Reader, m: Message, number: int, _: int) -> float:
    found = m.floats(number)
    if len(found) > 1:
        m.fail("is one float, and there are several")
    return found[0] if found else 0.0


def _text(r: _Reader, m: Message, number: int, _: int) -> str | bytes:
    return next(iter(r.texts(m, number)), "")


def _tensor(r: _Reader, m: Message, number: int, _: int) -> Initializer:
    found = m.message(number, f"the tensor in {m.what}")
    if found is None:
        m.fail("no tensor in it")
    return r.tensor(found)


def _subgraph(r: _Reader, m: Message, number: int, depth: int) -> Graph:
    found = m.message(number, f"the graph in {m.what}")
    if found is None:
        m.fail("no graph in it")
    return r.graph(found, depth + 1)


def _unread(r: _Reader, m: Message, number: int, _: int) -> tuple[Any, ...]:
    """Sparse tensors and types as attributes: no operator of a language model has them. Their tensors still count."""
    if number in (22, 23):
        return tuple(r._sparse(s) for s in m.messages(number, m.what))
    return ()


_Read = Callable[[_Reader, Message, int, int], Any]
_ATTRIBUTES: dict[int, tuple[int, _Read]] = {
    1: (2, _float),
    2: (3, lambda r, m, n, d: m.integer(n)),
    3: (4, _text),
    4: (5, _tensor),
    5: (6, _subgraph),
    6: (7, lambda r, m, n, d: tuple(m.floats(n))),
    7: (8, lambda r, m, n, d: tuple(m.integers(n))),
    8: (9, lambda r, m, n, d: r.texts(m, n)),
    9: (10, lambda r, m, n, d: tuple(r.tensor(t) for t in m.messages(n, m.what))),
    10: (11, lambda r, m, n, d: tuple(r.graph(g, d + 1) for g in m.messages(n, m.what))),
    11: (22, _unread),
    12: (23, _unread),
    13: (14, _unread),
    14: (15, _unread),
}
"""AttributeProto.AttributeType -> (field, how it is read)."""


def _walk(nodes: tuple[Node, ...]) -> Iterator[Node]:
    for node in nodes:
        yield node
        for value in node.attributes.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if isinstance(inner, Graph):
                    yield from _walk(inner.nodes)


def _sha1(path: Path) -> str:
    digest = hashlib.sha1(usedforsecurity=False)  # what ONNX prescribes; against damage, not against people
    with path.open("rb") as f:
        while piece := f.read(4 << 20):
            digest.update(piece)
    return digest.hexdigest()
