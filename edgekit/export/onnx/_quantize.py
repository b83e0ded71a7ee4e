"""Quantise a float32 ONNX graph: matrices become MatMulNBits, token tables GatherBlockQuantized, in one data file.

Knows graphs as onnxruntime-genai's model builder and torch.onnx.export make them, and no model family; a slab of one
matrix is in memory at a time. Number formats and sizes are edgekit.quant.nbits'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from edgekit.export.onnx._matrices import Use, drop_unused, find_uses
from edgekit.export.onnx._rewriting import Quantised, Report, Rewriting, run
from edgekit.export.onnx._tensors import DataFile, read_graph
from edgekit.quant import gptq, nbits
from edgekit.quant.nbits import NBits
from edgekit.units import Progress, silent

if TYPE_CHECKING:
    from onnx import ModelProto

Moments = Mapping[str, npt.NDArray[np.float32]]
"""Name of a tensor that matrices multiply -> second moment of its columns, float32 (cols, cols), or its diagonal."""

_SLAB = 4 << 20  # weights in memory at a time
_ROWS = 512  # a slab is a multiple of what error feedback takes at once


@dataclass(frozen=True, slots=True)
class Scheme:
    """`linear`: the format of matrices; `head`: of the matrix that makes logits; `embedding`: of token tables, None
    leaving them float32. A table tied to the head shares the head's bytes. `overrides`: format by node name, None
    leaving that matrix float32; names that a graph does not have are ignored."""

    linear: NBits
    head: NBits
    embedding: NBits | None
    overrides: Mapping[str, NBits | None] = field(default_factory=dict)


def quantize(
    source: Path,
    out: Path,
    scheme: Scheme,
    *,
    moments: Moments | None = None,
    search: bool = True,
    threads: int = 1,
    progress: Progress = silent,
) -> Report:
    """Float32 graph `source` -> `out` and, beside it, `<name of out>.data`; every other file is the caller's.

    With `moments`, matrices are rounded with error feedback, those of which only a diagonal is known by weighted
    scales; `search` False rounds to nearest as ONNX Runtime's own quantizer does. `progress` counts weights.
    Raises OutputExists where a file is there already, CorruptCheckpoint for a source that contradicts itself,
    MissingExtra without the onnx package. Leaves nothing behind when it fails.
    """
    return run(_Work(read_graph(source), source, scheme, moments or {}, search, threads, progress), out)


@dataclass(slots=True)
class _Stored:
    """Names of the tensors that a matrix became."""

    data: str
    scales: str
    zero_points: str | None
    fmt: NBits
    error: float
    node: str

    def inputs(self) -> list[str]:
        return [self.scales, *([self.zero_points] if self.zero_points else [])]


class _Work(Rewriting):
    """One run: finds the uses, writes the data in the order of the graph, rewrites the nodes."""

    def __init__(
        self,
        model: ModelProto,
        source: Path,
        scheme: Scheme,
        moments: Moments,
        search: bool,
        threads: int,
        progress: Progress,
    ) -> None:
        super().__init__(model, source, progress)
        self.scheme, self.moments, self.search, self.threads = scheme, moments, search, threads
        self.done = self.total = 0
        self.curvature: tuple[str, gptq.Curvature] | None = None

    def write(self, file: BinaryIO, location: str) -> None:
        graph = self.model.graph
        out = DataFile(file, location)
        uses = find_uses(graph, self.source.parent)
        plan = self._formats(uses)
        apart = {use.key: use.matrix for use, _ in plan}  # a table that shares the head's bytes is no work
        self.total = sum(matrix.rows * matrix.cols for matrix in apart.values())
        stored: dict[tuple[str, bool], _Stored] = {}
        for use, fmt in plan:
            if use.key not in stored:
                stored[use.key] = self._store(use, fmt, out)
            self._rewrite(use, stored[use.key])
        drop_unused(graph)
        self.copy_rest(out)
        _forget_exporter(self.model)
        _declare_domain(self.model)

    def _formats(self, uses: list[Use]) -> list[tuple[Use, NBits]]:
        """What is quantised, matrices before the tables that may share their bytes."""
        found: list[tuple[Use, NBits]] = []
        tied = {use.key for use in uses if use.table}
        for use in (use for use in uses if not use.table):
            usual = self.scheme.head if use.head or use.key in tied else self.scheme.linear
            self._decide(use, self.scheme.overrides.get(use.node.name, usual), found)
        for use in (use for use in uses if use.table):
            fmt = self.scheme.overrides.get(use.node.name, self.scheme.embedding)
            head = None if fmt is None else _twin(use, found)
            if head is not None:
                found.append((Use(use.node, head[0].matrix, table=True), head[1]))
            else:
                self._decide(use, fmt, found)
        return found

    def _decide(self, use: Use, fmt: NBits | None, found: list[tuple[Use, NBits]]) -> None:
        m = use.matrix
        if fmt is None:
            self.reasons[m.name] = "the scheme leaves it float32"
        elif not nbits.worthwhile(m.rows, m.cols):
            self.reasons[m.name] = "a matrix of few rows or columns"
        elif use.table and m.cols % fmt.fitted(m.cols).block:
            self.reasons[m.name] = f"rows of {m.cols} do not divide into blocks"
        else:
            found.append((use, fmt.fitted(m.cols)))

    def _store(self, use: Use, fmt: NBits, out: DataFile) -> _Stored:
        """Encode a matrix slab after slab into the data file; its scales and zero points follow it."""
        m = use.matrix
        curvature, importance = self._known(use)
        base = m.name + ("" if m.transposed else ".rows")
        names = (f"{base}_Q{fmt.bits}", f"{base}_scales", None if fmt.symmetric else f"{base}_zero_points")
        blocks = fmt.blocks(m.cols)
        writer = out.begin(names[0], (m.rows, blocks, fmt.block * fmt.bits // 8))
        scales, zeros, wrong, square = [], [], 0.0, 0.0
        step = max(1, _SLAB // m.cols // _ROWS) * _ROWS
        for start in range(0, m.rows, step):
            rows = m.read(start, min(start + step, m.rows))
            packed = nbits.encode(
                rows, fmt, search=self.search, importance=importance, curvature=curvature, threads=self.threads
            )
            writer.write(packed.data)
            scales.append(packed.scales)
            if packed.zero_points is not None:
                zeros.append(packed.zero_points)
            square += float(np.square(rows).sum(dtype=np.float64))
            rows -= nbits.decode(packed, m.cols)
            wrong += float(np.square(rows).sum(dtype=np.float64))
            self._advance(rows.size)
        tensors = [writer.end(), out.add(names[1], np.concatenate(scales))]
        if names[2] is not None:
            tensors.append(out.add(names[2], np.concatenate(zeros)))
        self.model.graph.initializer.extend(tensors)
        self.made.update(tensor.name for tensor in tensors)
        return _Stored(*names, fmt, float(np.sqrt(wrong / square)) if square else 0.0, use.node.name)

    def _advance(self, values: int) -> None:
        self.done += values
        self.progress("quantize", min(self.done, self.total), self.total)

    def _known(self, use: Use) -> tuple[gptq.Curvature | None, npt.NDArray[np.float32] | None]:
        """(factors of the second moment, importance) of what a matrix multiplies; neighbours share their input."""
        name = "" if use.table else use.node.input[0]
        moment = self.moments.get(name)
        if moment is None:
            return None, None
        if moment.ndim == 1:
            return None, moment
        if self.curvature is None or self.curvature[0] != name:
            self.curvature = name, gptq.prepare(moment)
        return self.curvature[1], None

    def _rewrite(self, use: Use, stored: _Stored) -> None:
        m, node = use.matrix, use.node
        if use.table:
            self._gather(use, stored)
        else:
            self._multiply(use, stored)
        shares = stored.node if stored.node != node.name else None
        op = "GatherBlockQuantized" if use.table else "MatMulNBits"
        self.nodes.append(Quantised(node.name, op, (m.rows, m.cols), stored.fmt, stored.error, shares))

    def _multiply(self, use: Use, stored: _Stored) -> None:
        """MatMul or Gemm -> MatMulNBits of the same name and output; a Gemm's bias is added by a node of its own."""
        from onnx import helper

        m, node, fmt = use.matrix, use.node, stored.fmt
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        output = node.output[0]
        new = helper.make_node(
            "MatMulNBits",
            [node.input[0], stored.data, *stored.inputs()],
            [f"{output}_unbiased" if bias else output],
            name=node.name,
            domain="com.microsoft",
            K=m.cols,
            N=m.rows,
            bits=fmt.bits,
            block_size=fmt.block,
            accuracy_level=4,
        )
        if bias:
            add = helper.make_node("Add", [new.output[0], bias], [output], name=f"{node.name}/bias")
            at = next(i for i, each in enumerate(self.model.graph.node) if each.output[:1] == [output])
            self.model.graph.node.insert(at + 1, add)
        node.CopyFrom(new)

    def _gather(self, use: Use, stored: _Stored) -> None:
        """Gather -> GatherBlockQuantized. Its data has the head's bytes in a shape of its own: a second tensor at the
        same place of the data file, so that nothing is copied or stored twice."""
        from onnx import helper

        m, node, fmt = use.matrix, use.node, stored.fmt
        whole = next(t for t in self.model.graph.initializer if t.name == stored.data)
        flat = f"{stored.data}_flat"
        if all(t.name != flat for t in self.model.graph.initializer):
            copy = self.model.graph.initializer.add()
            copy.CopyFrom(whole)
            copy.name = flat
            self.made.add(flat)
            del copy.dims[:]
            copy.dims.extend((m.rows, m.cols * fmt.bits // 8))
        new = helper.make_node(
            "GatherBlockQuantized",
            [flat, node.input[1], *stored.inputs()],
            [node.output[0]],
            name=node.name,
            domain="com.microsoft",
            bits=fmt.bits,
            block_size=fmt.block,
            gather_axis=0,
            quantize_axis=1,
        )
        node.CopyFrom(new)


def _twin(table: Use, found: list[tuple[Use, NBits]]) -> tuple[Use, NBits] | None:
    """The matrix with the numbers of `table`, if its rows are whole blocks, which a look-up needs."""
    m = table.matrix
    for use, fmt in found:
        same = (use.matrix.rows, use.matrix.cols) == (m.rows, m.cols) and m.cols % fmt.block == 0
        if same and not use.table and use.matrix.equals(m):
            return use, fmt
    return None


def _forget_exporter(model: ModelProto) -> None:
    """Drop what the exporter noted about nodes: stack traces with paths of the machine it ran on."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in model.graph.value_info:
        value.ClearField("metadata_props")


def _declare_domain(model: ModelProto) -> None:
    if all(each.domain != "com.microsoft" for each in model.opset_import):
        model.opset_import.add(domain="com.microsoft", version=1)
