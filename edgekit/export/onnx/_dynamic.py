"""The fast 8-bit form of an encoder: integer products, the activations scaled as they come.

Matrices become MatMulInteger behind DynamicQuantizeLinear, look-up tables 8-bit rows with a scale each; products of
activations stay float. Knows the float32 graphs of `_encoder`; a matrix at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgekit.export.onnx._matrices import Use, attribute, drop_unused, find_uses
from edgekit.export.onnx._rewriting import Report, Rewriting, run
from edgekit.export.onnx._tensors import FLOAT, DataFile, Matrix, Writing, read_graph
from edgekit.quant import channels
from edgekit.quant.nbits import worthwhile
from edgekit.units import Progress, silent

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

INT8 = 3  # TensorProto.DataType


def quantize(
    source: Path,
    out: Path,
    *,
    largest: int = channels.LARGEST,
    skip: Callable[[str], bool] | None = None,
    progress: Progress = silent,
) -> Report:
    """Float32 graph `source` -> `out` and, beside it, `<name of out>.data`. `largest`: of the integers that are
    multiplied; `skip`: names of nodes that stay float32.

    Operators of ONNX itself (DynamicQuantizeLinear, MatMulInteger, opset 10), so that any runtime reads it. The
    rounding of activations is per tensor: padding and other texts of a batch change a result a little.
    Raises OutputExists, CorruptCheckpoint, MissingExtra. Leaves nothing behind when it fails.
    """
    model = read_graph(source)
    return run(Work(model, source, largest, skip or (lambda _: False), progress), out)


class Work(Rewriting):
    """One run: writes the integers in the order of the graph, puts new nodes in place of the old ones."""

    def __init__(
        self, model: ModelProto, source: Path, largest: int, skip: Callable[[str], bool], progress: Progress
    ) -> None:
        super().__init__(model, source, progress)
        self.largest, self.skip = largest, skip
        self.stored: dict[tuple[str, bool], tuple[str, str]] = {}
        self.rounded: dict[str, tuple[str, str, str]] = {}

    def write(self, file: BinaryIO, location: str) -> None:
        graph = self.model.graph
        out = DataFile(file, location)
        found = [*find_uses(graph, self.source.parent), *_small_tables(graph, self.source.parent)]
        uses = {use.node.output[0]: use.matrix for use in found if self._wants(use)}
        nodes: list[NodeProto] = []
        for node in graph.node:
            matrix = uses.get(node.output[0])
            if matrix is None:
                nodes.append(node)
            elif node.op_type == "Gather":
                nodes += self._look_up(node, matrix, out)
            else:
                nodes += self.multiply(node, matrix, out)
            self.progress("quantize", min(len(self.stored), len(uses)), len(uses))
        kept = [_copied(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
        drop_unused(graph)
        self.copy_rest(out)

    def _wants(self, use: Use) -> bool:
        if self.skip(use.node.name):
            self.reasons[use.matrix.name] = "left float32 as asked"
        elif not worthwhile(use.matrix.rows, use.matrix.cols):
            self.reasons[use.matrix.name] = "a matrix of few rows or columns"
        return use.matrix.name not in self.reasons

    def multiply(self, node: NodeProto, matrix: Matrix, out: DataFile) -> list[NodeProto]:
        """x · W -> float(round(x) · round(W)) · scale of x · scales of W, and the bias of a Gemm."""
        from onnx import helper

        weight, scales = self.store(matrix, out, transposed=True)
        made = self._round(node.input[0])
        x, scale, zero = self.rounded[node.input[0]]
        base, output = node.output[0], node.output[0]
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        made += [
            helper.make_node("MatMulInteger", [x, weight, zero], [f"{base}_sum"], name=node.name),
            helper.make_node("Cast", [f"{base}_sum"], [f"{base}_float"], name=f"{node.name}/cast", to=FLOAT),
            helper.make_node("Mul", [scale, scales], [f"{base}_scale"], name=f"{node.name}/scale"),
            helper.make_node(
                "Mul",
                [f"{base}_float", f"{base}_scale"],
                [f"{base}_product" if bias else output],
                name=f"{node.name}/mul",
            ),
        ]
        if bias:
            made.append(helper.make_node("Add", [f"{base}_product", bias], [output], name=f"{node.name}/bias"))
        return made

    def _round(self, name: str) -> list[NodeProto]:
        """The node that rounds an activation to 8 bits, once for all that read it."""
        from onnx import helper

        if name in self.rounded:
            return []
        self.rounded[name] = (f"{name}_q", f"{name}_q_scale", f"{name}_q_zero")
        return [helper.make_node("DynamicQuantizeLinear", [name], list(self.rounded[name]), name=f"{name}_quantize")]

    def _look_up(self, node: NodeProto, matrix: Matrix, out: DataFile) -> list[NodeProto]:
        """Rows of a table -> 8-bit rows times their scales."""
        from onnx import helper

        table, scales = self.store(matrix, out, transposed=False)
        index, output = node.input[1], node.output[0]
        return [
            helper.make_node("Gather", [table, index], [f"{output}_int8"], name=node.name, axis=0),
            helper.make_node("Cast", [f"{output}_int8"], [f"{output}_float"], name=f"{node.name}/cast", to=FLOAT),
            helper.make_node("Gather", [scales, index], [f"{output}_scale"], name=f"{node.name}/scale", axis=0),
            helper.make_node("Mul", [f"{output}_float", f"{output}_scale"], [output], name=f"{node.name}/mul"),
        ]

    def store(self, matrix: Matrix, out: DataFile, *, transposed: bool) -> tuple[str, str]:
        """(name of the integers, of the scales). Columns of a MatMul's weight are `rows` of `matrix`."""
        key = (matrix.name, matrix.transposed)
        if key not in self.stored:
            packed = channels.encode(matrix.read(0, matrix.rows), self.largest if transposed else channels.LARGEST)
            names = f"{matrix.name}_int8", f"{matrix.name}_scales"
            values, scales = packed.values, packed.scales
            values, scales = (values.T, scales) if transposed else (values, scales[:, None])
            self.model.graph.initializer.append(_int8(out, names[0], values))
            self.model.graph.initializer.append(out.add(names[1], scales))
            self.made.update(names)
            self.stored[key] = names
        return self.stored[key]


def _small_tables(graph: GraphProto, folder: Path) -> list[Use]:
    """Look-ups in tables of positions: too few bytes for blocks to pay, not for rows."""
    constants = {t.name: t for t in graph.initializer if t.data_type == FLOAT and len(t.dims) == 2}
    looked = [
        n for n in graph.node if n.op_type == "Gather" and n.input[0] in constants and not attribute(n, "axis", 0)
    ]
    return [Use(node, Matrix(constants[node.input[0]], folder, transposed=False), table=True) for node in looked]


def _copied(node: NodeProto) -> NodeProto:
    from onnx import NodeProto as Node

    copy = Node()
    copy.CopyFrom(node)
    return copy


def _int8(out: DataFile, name: str, values: npt.NDArray[np.int8]) -> Any:
    from onnx import TensorProto

    writing = Writing(out, TensorProto(name=name, data_type=INT8, dims=values.shape), values.nbytes)
    writing.write(values)
    return writing.end()
