"""What a GGUF or ONNX file holds, read from its header: nothing is loaded and no runtime is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgekit.export.onnx import _bits
from edgekit.gguf_file import GgufFile, open_gguf, plain
from edgekit.onnx_file import TYPED, Initializer, Node, OnnxFile, Value, open_onnx
from edgekit.quant import presets
from edgekit.runtime._ort_pair import encoder_of, takes_states
from edgekit.units import show_bytes, show_count


@dataclass(frozen=True, slots=True)
class Inspection:
    """A header and what follows from it. `path` as the user gave it."""

    file: GgufFile
    nbytes: int

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def parameters(self) -> int:
        return sum(prod(t.shape) for t in self.file.tensors.values())

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.file.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / self.parameters if self.parameters else 0.0

    @property
    def bytes_by_format(self) -> dict[str, tuple[int, int]]:
        """Format -> (tensors, bytes), largest first."""
        count: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for t in self.file.tensors.values():
            count[t.type] += 1
            size[t.type] += t.nbytes
        return {name: (count[name], n) for name, n in size.most_common()}

    @property
    def preset(self) -> str:
        """The preset that `general.file_type` names, or what it says where that is none."""
        number = self.file.get("general.file_type")
        return next((p.name for p in presets.PRESETS.values() if p.file_type == number), f"unknown ({number})")

    def metadata(self, *, longest: int = 8) -> dict[str, Any]:
        """Plain values; an array longer than `longest` becomes its length and first items."""
        return {key: _short(plain(value), longest) for key, value in self.file.metadata.items()}

    def as_json(self, *, tensors: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {
            "file": self.path.name,
            "bytes": self.nbytes,
            "version": self.file.version,
            "preset": self.preset,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "formats": {k: {"tensors": n, "bytes": b} for k, (n, b) in self.bytes_by_format.items()},
            "metadata": self.metadata(),
        }
        if tensors:
            found["tensors"] = [
                {"name": t.name, "shape": list(t.shape), "format": t.type, "bytes": t.nbytes, "offset": t.offset}
                for t in self.file.tensors.values()
            ]
        return found


@dataclass(frozen=True)
class OnnxInspection:
    """An ONNX graph and what follows from it. `files`: external data by name, bytes. `encoder`: the graph beside a
    decoder that reads what it makes."""

    file: OnnxFile
    files: Mapping[str, int]
    bits: _bits.Bits
    encoder: Path | None = None

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def nbytes(self) -> int:
        """The graph and its data files."""
        return self.file.nbytes + sum(self.files.values())

    @property
    def bytes_by_format(self) -> dict[str, tuple[int, int]]:
        """Format -> (weights, bytes), largest first. A quantised matrix counts with its scales and zero points; bytes
        that two tensors share in a data file count once."""
        weights, size = Counter[str](), Counter[str]()
        seen: set[tuple[str | None, int, str]] = set()

        def add(name: str, count: int, tensors: Sequence[Initializer]) -> None:
            new = [t for t in tensors if _place(t) not in seen]
            weights[name] += count if tensors and tensors[0] in new else 0
            size[name] += sum(t.nbytes for t in new)
            seen.update(_place(t) for t in tensors)

        for node in self.file.every_node():
            for name, count, inputs in _quantised(self.file, node):
                add(name, count, [self.file.initializers[n] for n in inputs if n in self.file.initializers])
        for t in self.file.initializers.values():
            add(t.dtype, t.elements, [t])
        return {name: (weights[name], n) for name, n in size.most_common() if n}

    @property
    def parameters(self) -> int:
        return sum(count for count, _ in self.bytes_by_format.values())

    @property
    def bits_per_weight(self) -> float:
        """Of everything that is stored, rotary tables and constants included."""
        return 8 * sum(n for _, n in self.bytes_by_format.values()) / max(1, self.parameters)

    def metadata(self) -> dict[str, str]:
        return dict(self.file.metadata)

    def rows(self) -> list[tuple[str, str]]:
        """(what, what it is), as a person reads it."""
        f = self.file
        domains = ", ".join(f"{domain} {version}" for domain, version in f.opsets.items())
        parts = [f"{k:<10} {show_count(n):>8}  {show_bytes(b):>10}" for k, (n, b) in self.bytes_by_format.items()]
        found = [
            ("file", str(f.path)),
            ("size", f"{show_bytes(self.nbytes)} ({self.nbytes:,} bytes)"),
            ("data", "\n".join(f"{name}  {show_bytes(n)}" for name, n in self.files.items()) or "inside the graph"),
            ("made by", f.producer or "nobody says"),
            ("opsets", f"{domains}; IR version {f.ir_version}"),
            ("weights", f"{show_count(self.parameters)} at {self.bits_per_weight:.2f} bits per weight"),
            ("formats", "\n".join(parts)),
            ("matrices", _histogram(self.bits)),
            ("operators", ", ".join(f"{n} {op}" for op, n in f.operators().most_common())),
            ("inputs", _values(f.inputs)),
            ("outputs", _values(f.outputs)),
        ]
        found += [("float32", line) for line in self.bits.warnings]
        if self.encoder is not None:
            found.append(("reads", f"the states of {self.encoder.name}: edgekit inspect {self.encoder}"))
        return found

    def as_json(self, *, tensors: bool = False) -> dict[str, Any]:
        f = self.file
        found: dict[str, Any] = {
            "file": f.path.name,
            "bytes": self.nbytes,
            "format": "onnx",
            "files": dict(self.files),
            "ir_version": f.ir_version,
            "opsets": dict(f.opsets),
            "producer": f.producer,
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "formats": {k: {"weights": n, "bytes": b} for k, (n, b) in self.bytes_by_format.items()},
            "matrices": {f"int{b} b{k}": n for (b, k), n in self.bits.matrices.items()},
            "tables": {f"int{b} b{k}": n for (b, k), n in self.bits.tables.items()},
            "float32": dict(self.bits.plain),
            "operators": dict(f.operators().most_common()),
            "inputs": [{"name": v.name, "dtype": v.dtype, "shape": v.shape} for v in f.inputs],
            "outputs": [{"name": v.name, "dtype": v.dtype, "shape": v.shape} for v in f.outputs],
            "metadata": self.metadata(),
        }
        if tensors:
            found["tensors"] = [
                {"name": t.name, "shape": list(t.shape), "format": t.dtype, "bytes": t.nbytes, "file": t.file}
                for t in f.initializers.values()
            ]
        return found


def inspect(path: Path) -> Inspection | OnnxInspection:
    """Read the header of `path`, a GGUF or an ONNX graph. Raises CorruptCheckpoint; data files are looked for too."""
    if path.suffix.lower() != ".onnx":
        return Inspection(open_gguf(path), path.stat().st_size)
    file = open_onnx(path)
    file.check(checksums=False)
    sizes = {name: found.stat().st_size for name, found in file.external_files().items()}
    encoder = encoder_of(path) if takes_states(file) else None
    return OnnxInspection(file, sizes, _bits.read_bits(file), encoder)


def _place(t: Initializer) -> tuple[str | None, int, str]:
    """Where its bytes lie; two names for one place are one weight."""
    return t.file, t.offset, t.name if t.storage == TYPED or not t.nbytes else ""


def _quantised(file: OnnxFile, node: Node) -> list[tuple[str, int, list[str]]]:
    """(format, weights, names of its tensors, the data first) of what a node reads quantised."""
    bits, block = int(node.attributes.get("bits", 4)), int(node.attributes.get("block_size", 128))
    if node.op == "MatMulNBits":
        count = int(node.attributes.get("N", 0)) * int(node.attributes.get("K", 0))
        return [(f"int{bits} b{block}", count, [n for n in node.inputs[1:4] if n])]
    if node.op == "GatherBlockQuantized" and node.inputs[0] in file.initializers:
        data = file.initializers[node.inputs[0]]
        count = data.nbytes * 8 // bits
        return [(f"int{bits} b{block}", count, [data.name, *(n for n in node.inputs[2:4] if n)])]
    return []


def _histogram(bits: _bits.Bits) -> str:
    parts = [f"{n} in int{b} b{k}" for (b, k), n in sorted(bits.matrices.items())]
    parts += [f"{n} table{'s' * (n > 1)} in int{b} b{k}" for (b, k), n in sorted(bits.tables.items())]
    if bits.integer:
        parts.append(f"{bits.integer} int8 matrices, a scale a channel")
    return ", ".join(parts) or "not quantised"


def _values(values: Sequence[Value], longest: int = 6) -> str:
    shown = [f"{v.name} {v.dtype} {_shape(v)}" for v in values[:longest]]
    more = len(values) - longest
    return "\n".join([*shown, f"and {more} more"] if more > 0 else shown)


def _shape(value: Value) -> str:
    axes = value.shape
    return "of any shape" if axes is None else f"({', '.join('?' if a is None else str(a) for a in axes)})"


def _short(value: Any, longest: int) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [_short(v, longest) for v in value[:longest]]
        return items if len(value) <= longest else {"length": len(value), "first": items}
    if isinstance(value, Mapping):
        return dict(value)
    return value
