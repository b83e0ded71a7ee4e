"""What the weights of an ONNX graph weigh: parameters, bytes, and the bytes that one token reads. Runs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from edgekit.onnx_file import Initializer, Node, OnnxFile

_FLOATS = ("float32", "float16", "bfloat16", "float64")
_PASSED_ON = ("Reshape", "Transpose", "Identity", "Cast", "DequantizeLinear", "Squeeze", "Unsqueeze")
_LOOKED_UP = ("Gather", "GatherBlockQuantized")
_ROTARY = ("GroupQueryAttention", "RotaryEmbedding", "MultiHeadAttention")


@dataclass(frozen=True, slots=True)
class Weights:
    """`parameters` as the checkpoint counts them, scales apart; `nbytes` of all tensors; `format`: `int8 b32`, `fp32`
    ...: what most weights are in; `bytes_per_token`: all but tables of which one row is read."""

    parameters: int
    nbytes: int
    bytes_per_token: int
    format: str


def weights_of(file: OnnxFile) -> Weights:
    """Counted over the graph's initializers, those that lie in the same bytes once. Packed matrices count as the N x K
    weights that their node states."""
    users = _users(file)
    stored: dict[tuple[str | None, int | str], list[Initializer]] = {}
    for name, tensor in file.initializers.items():
        place = (tensor.file, tensor.offset) if tensor.file is not None else (None, name)
        stored.setdefault(place, []).append(tensor)
    counted: Counter[str] = Counter()
    total = read = 0
    for tensors in stored.values():
        uses = tuple(use for t in tensors for use in users.get(t.name, ()))
        nbytes = max(t.nbytes for t in tensors)
        total += nbytes
        if not all(node.op in _LOOKED_UP and at == 0 for node, at in uses) and not _is_rotary(uses):
            read += nbytes
        format_, values = _values(uses, tensors[0].dtype, tensors[0].shape)
        counted[format_] += values
    formats = counted.most_common()
    return Weights(counted.total(), total, read, formats[0][0] if formats else "fp32")


Uses = tuple[tuple[Node, int], ...]
"""Nodes that read a tensor, with the position among their inputs."""


def _users(file: OnnxFile) -> Mapping[str, Uses]:
    """For every initializer the nodes that work on it, looked at through nodes that only pass it on."""
    direct: dict[str, list[tuple[Node, int]]] = {}
    for node in file.every_node():
        for at, name in enumerate(node.inputs):
            direct.setdefault(name, []).append((node, at))

    def through(name: str, depth: int) -> Iterator[tuple[Node, int]]:
        for node, at in direct.get(name, ()):
            if at == 0 and node.op in _PASSED_ON and node.outputs and depth:
                yield from through(node.outputs[0], depth - 1)
            else:
                yield node, at

    return {name: tuple(through(name, 8)) for name in file.initializers}


def _is_rotary(uses: Uses) -> bool:
    return bool(uses) and all(node.op in _ROTARY for node, _ in uses)


def _values(uses: Uses, dtype: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """(format, weights) that an initializer stands for; 0 weights for scales, zero points, indices, rope tables."""
    for node, at in uses:
        if node.op == "MatMulNBits" and at == 1:
            return _packed(node), _number(node, "N", 0) * _number(node, "K", 0)
        if node.op == "MatMulNBits" and at in (2, 3):
            return "scales", 0
    for node, at in uses:
        if node.op == "GatherBlockQuantized" and at == 0:
            packed = 8 // max(1, _number(node, "bits", 4)) if dtype in ("int8", "uint8") else 1
            return _packed(node), prod(shape) * packed
        if node.op in ("GatherBlockQuantized", "DequantizeLinear", "QuantizeLinear") and at > 0:
            return "scales", 0
    if _is_rotary(uses):
        return "rope", 0
    if dtype in ("int8", "uint8") and len(shape) > 1:
        return "int8", prod(shape)
    if dtype in _FLOATS and prod(shape) > 1:
        return "fp32" if dtype == "float32" else dtype, prod(shape)
    return "other", 0


def _packed(node: Node) -> str:
    return f"int{_number(node, 'bits', 4)} b{_number(node, 'block_size', 32)}"


def _number(node: Node, name: str, default: int) -> int:
    value = node.attributes.get(name, default)
    return value if isinstance(value, int) else default
