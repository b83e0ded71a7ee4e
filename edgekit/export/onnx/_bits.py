"""Is every matrix of a graph stored in the bits that were planned? Read from the file; nothing is run.

Knows the operators that hold quantised weights (ONNX Runtime's ContribOperators.md: MatMulNBits, GatherBlockQuantized)
and those that hold plain ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from edgekit.errors import VerificationFailed
from edgekit.onnx_file import Initializer, Node, OnnxFile
from edgekit.quant.nbits import MIN_SIDE, NBits
from edgekit.units import show_bytes

LARGE = 1 << 20
"""float32 tensors from here on are named."""

_FLOATS = ("float32", "float16", "bfloat16", "float64")
_ROTARY = ("cos_cache", "sin_cache")
_AGAIN = "please report this with `edgekit doctor --json`"


@dataclass(frozen=True, slots=True)
class Bits:
    """What a file holds. `matrices`: (bits, block) -> how many MatMulNBits; `tables`: the same of
    GatherBlockQuantized; `plain`: large float tensors by name, bytes; `integer`: matrices that MatMulInteger or
    DequantizeLinear read."""

    matrices: Mapping[tuple[int, int], int] = field(default_factory=dict)
    tables: Mapping[tuple[int, int], int] = field(default_factory=dict)
    plain: Mapping[str, int] = field(default_factory=dict)
    integer: int = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(f"{name} stays float32: {show_bytes(n)}" for name, n in self.plain.items())


def read_bits(file: OnnxFile) -> Bits:
    """What `file` says of itself, unchecked."""
    nodes = list(file.every_node())
    found = {op: Counter(_stated(n) for n in nodes if n.op == op) for op in ("MatMulNBits", "GatherBlockQuantized")}
    scales = {name for n in nodes if n.op in found for name in n.inputs[2:]}
    plain = {
        t.name: t.nbytes
        for t in file.tensors
        if t.dtype in _FLOATS and t.nbytes >= LARGE and t.name not in scales and not _is_rotary(t)
    }
    integers = {t.name for t in file.tensors if t.dtype in ("int8", "uint8", "int4", "uint4") and len(t.shape) == 2}
    readers = [n for n in nodes if n.op in ("MatMulInteger", "DequantizeLinear", "DynamicQuantizeMatMul")]
    count = sum(bool(integers & set(n.inputs)) for n in readers)
    return Bits(dict(found["MatMulNBits"]), dict(found["GatherBlockQuantized"]), plain, count)


def check_bits(
    file: OnnxFile, expected: Mapping[str, NBits | int] | NBits | int | None = None, *, plain: Collection[str] = ()
) -> Bits:
    """Hold every matrix against what was planned for it, and its data against what the node says of it.

    `expected`: a format, or only bits, for all nodes or by node name: then exactly those nodes; None: any. `plain`:
    nodes, or tensors, that were left float32 on purpose. Raises VerificationFailed for other bits or blocks, data of
    another size, scales that are not finite, a matrix of constant weights that stayed float32.
    """
    nodes = list(file.every_node())
    quantised = [n for n in nodes if n.op in ("MatMulNBits", "GatherBlockQuantized")]
    if isinstance(expected, Mapping):
        _same_names(file, {n.name for n in quantised}, set(expected))
    for node in quantised:
        wanted = expected[node.name] if isinstance(expected, Mapping) else expected
        if wanted is not None:
            _check_format(file, node, wanted)
        if node.op == "MatMulNBits":
            _check_data(file, node)
        _check_scales(file, node)
    _no_plain_matrix(file, nodes, plain)
    return read_bits(file)


def _stated(node: Node) -> tuple[int, int]:
    """(bits, block); the operators' defaults are 4 and, for the table, 128."""
    return int(node.attributes.get("bits", 4)), int(node.attributes.get("block_size", 128))


def _same_names(file: OnnxFile, found: set[str], planned: set[str]) -> None:
    for names, words in (
        (planned - found, "was planned to be quantised and is not"),
        (found - planned, "was not planned"),
    ):
        if names:
            raise VerificationFailed(f"{file.path.name}: {min(names)} {words} ({len(names)} such nodes)", _AGAIN)


def _check_format(file: OnnxFile, node: Node, wanted: NBits | int) -> None:
    bits, block = _stated(node)
    if isinstance(wanted, NBits):
        right = (bits, block) == (wanted.bits, wanted.block)
        asked = f"{wanted.bits} bits in blocks of {wanted.block}"
    else:
        right, asked = bits == wanted, f"{wanted} bits"
    if not right:
        raise VerificationFailed(
            f"{file.path.name}: {node.name} has {bits} bits in blocks of {block}, planned were {asked}", _AGAIN
        )


def _check_data(file: OnnxFile, node: Node) -> None:
    """(N, blocks, block·bits/8) bytes, N·blocks scales, and zero points of as many bits."""
    bits, block = _stated(node)
    rows, blocks = int(node.attributes["N"]), -(-int(node.attributes["K"]) // block)
    data, scales = (file.initializers.get(name) for name in node.inputs[1:3])
    if data is None or scales is None:
        raise VerificationFailed(f"{file.path.name}: the weights of {node.name} are not in the file", _AGAIN)
    zero = file.initializers.get(node.inputs[3]) if len(node.inputs) > 3 else None
    sizes = [data.nbytes, scales.elements]
    wanted = [rows * blocks * block * bits // 8, rows * blocks]
    if zero is not None and zero.dtype == "uint8":
        sizes.append(zero.nbytes)
        wanted.append(rows * -(-blocks * bits // 8))
    if sizes != wanted:
        raise VerificationFailed(f"{file.path.name}: the data of {node.name} has sizes {sizes}, not {wanted}", _AGAIN)


def _check_scales(file: OnnxFile, node: Node) -> None:
    scales = file.initializers.get(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is not None and scales.dtype in ("float32", "float16") and not np.isfinite(file.values(scales)).all():
        raise VerificationFailed(f"{file.path.name}: a scale of {node.name} is not finite", "try --quant int8")


def _no_plain_matrix(file: OnnxFile, nodes: list[Node], allowed: Collection[str]) -> None:
    """MatMul and Gemm with constant float weights, read straight or through Transpose and Cast."""
    made = {out: n for n in nodes if n.op in ("Transpose", "Cast", "Identity") for out in n.outputs}
    for node in nodes:
        if node.op not in ("MatMul", "Gemm"):
            continue
        for name in node.inputs[:2]:
            while name in made and name not in file.initializers:
                name = made[name].inputs[0]  # noqa: PLW2901 - follows the weight to where it lies
            weight = file.initializers.get(name)
            if weight is not None and _is_matrix(weight) and not {node.name, name} & set(allowed):
                raise VerificationFailed(
                    f"{file.path.name}: the weights of {node.name}, {weight.dtype} {weight.shape}, are not quantised",
                    _AGAIN,
                )


def _is_matrix(t: Initializer) -> bool:
    return t.dtype in _FLOATS and len(t.shape) == 2 and min(t.shape) >= MIN_SIDE


def _is_rotary(t: Initializer) -> bool:
    return any(part in t.name for part in _ROTARY)
