"""Which nodes of an ONNX graph multiply by a constant matrix or look up rows of one, and what else a graph uses.

Knows MatMul, Gemm, Gather and the Transpose before them; changes nothing but what nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.export.onnx._tensors import FLOAT, Matrix

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

TOKENS = "input_ids"
"""The graph input whose look-ups make a table one of tokens; tables of positions and token types are small."""

_LARGE_TABLE = 1 << 14  # entries from which on a table is quantised whatever indexes it


@dataclass(frozen=True, slots=True)
class Use:
    """A node and the constant it reads. `head`: it makes logits; `table`: it looks rows up."""

    node: NodeProto
    matrix: Matrix
    head: bool = False
    table: bool = False

    @property
    def key(self) -> tuple[str, bool]:
        """Which matrix: a weight and the way it is read."""
        return self.matrix.name, self.matrix.transposed


def find_uses(graph: GraphProto, folder: Path) -> list[Use]:
    """Every use of a constant float32 matrix, in the order of the graph; `folder` holds external data."""
    constants = {t.name: (t, False) for t in graph.initializer if t.data_type == FLOAT and len(t.dims) == 2}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in constants and attribute(node, "perm", [1, 0]) == [1, 0]:
            tensor, turned = constants[node.input[0]]
            constants[node.output[0]] = tensor, not turned
    outputs = {o.name for o in graph.output}
    found = (_use(node, constants, outputs, folder) for node in graph.node)
    return [use for use in found if use is not None]


def _use(
    node: NodeProto, constants: dict[str, tuple[TensorProto, bool]], outputs: set[str], folder: Path
) -> Use | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Gather":
        if node.input[0] not in constants or attribute(node, "axis", 0) != 0:
            return None
        tensor, turned = constants[node.input[0]]
        matrix = Matrix(tensor, folder, turned)
        of_tokens = node.input[1] == TOKENS or matrix.rows >= _LARGE_TABLE
        return Use(node, matrix, table=True) if of_tokens else None
    if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in constants or node.input[0] in constants:
        return None
    tensor, turned = constants[node.input[1]]
    if node.op_type == "Gemm":
        plain = attribute(node, "alpha", 1.0) == 1.0 == attribute(node, "beta", 1.0) and not attribute(
            node, "transA", 0
        )
        if not plain:
            return None
        turned ^= bool(attribute(node, "transB", 0))
    head = "lm_head" in node.name or node.output[0] in outputs
    return Use(node, Matrix(tensor, folder, not turned), head=head)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Value of an attribute, or `default`."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def drop_unused(graph: GraphProto) -> None:
    """Remove nodes that nothing reads, tensors that no node reads, and what is said about either."""
    before = {t.name for t in graph.initializer}
    used = _used(graph)
    while dead := [node for node in graph.node if used.isdisjoint(node.output)]:
        for node in dead:
            graph.node.remove(node)
        used = _used(graph)
    _keep(graph.initializer, lambda t: t.name in used)
    # old graphs list their initializers among the inputs
    _keep(graph.input, lambda i: i.name in used or i.name not in before)
    known = used.union(*(node.output for node in graph.node))
    _keep(graph.value_info, lambda v: v.name in known)


def _keep(items: Any, wanted: Any) -> None:
    kept = [item for item in items if wanted(item)]
    del items[:]
    items.extend(kept)


def _used(graph: GraphProto) -> set[str]:
    """Names that nodes, those of inner graphs too, or the outputs read."""
    names = {o.name for o in graph.output}
    for node in graph.node:
        names.update(name for name in node.input if name)
        for each in node.attribute:
            for inner in (*each.graphs, *([each.g] if each.HasField("g") else [])):
                names |= _used(inner)
    return names


def readers(graph: GraphProto, name: str) -> str:
    """The kinds of node that read `name`, for a reader."""
    kinds = sorted({node.op_type for node in graph.node if name in node.input})
    return ", ".join(kinds) or "an inner graph"
