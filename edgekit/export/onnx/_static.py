"""The 8-bit form of an encoder for accelerators: QuantizeLinear and DequantizeLinear with scales fixed by calibration.

Only what constant matrices multiply is rounded: products of activations (attention) and sums stay float, which
TensorRT wants and without which the vectors of an encoder are lost. Knows ranges; the writing is `_dynamic`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from edgekit.batches import open_tokenizer
from edgekit.checkpoint._files import read_json
from edgekit.embedding import positions
from edgekit.errors import EdgekitError
from edgekit.export.onnx._dynamic import Work
from edgekit.export.onnx._moments import _session, _sizes
from edgekit.export.onnx._rewriting import Report, run
from edgekit.export.onnx._tensors import DataFile, Matrix, read_graph
from edgekit.quant import channels
from edgekit.units import Progress, silent

if TYPE_CHECKING:
    from onnx import NodeProto

Feeds = Mapping[str, npt.NDArray[np.int64]]
Kind = Literal["uint8", "int8", "uint16"]
"""How activations are rounded: `uint8` with a zero point, `int8` around zero as TensorRT wants it, `uint16` for NPUs
that multiply 16 by 8 bits."""

_LEVELS = {"uint8": 255, "int8": 255, "uint16": 65535}
_TYPES = {"uint8": 2, "int8": 3, "uint16": 4}  # TensorProto.DataType
_BINS = 2048
_CLIPPED = 4.0  # what a squared error of clipping counts beside one of rounding: it falls on the values that matter
_CLIPS = tuple(float(c) for c in np.geomspace(1.0, 0.02, 40))


@dataclass(frozen=True, slots=True)
class Range:
    """What an activation is rounded within; 0 lies inside."""

    low: float
    high: float


def quantize(
    source: Path,
    out: Path,
    batches: Sequence[Feeds],
    *,
    kind: Kind = "uint8",
    largest: int = channels.LARGEST,
    skip: Callable[[str], bool] | None = None,
    threads: int = 1,
    progress: Progress = silent,
) -> Report:
    """Float32 graph `source` -> `out` and `<name of out>.data`, ranges from `batches` of the graph's own inputs; no
    integer weight is beyond `largest`.

    Raises OutputExists, CorruptCheckpoint, MissingExtra, EdgekitError without batches. Leaves nothing when it fails.
    """
    ranges = observe_ranges(source, batches, kind=kind, threads=threads, progress=progress)
    work = _Static(read_graph(source), source, largest, skip or (lambda _: False), progress)
    work.ranges, work.kind = ranges, kind
    return run(work, out)


def batches_of(root: Path, texts: Sequence[str], *, most: int = 512) -> list[Feeds]:
    """Texts as the model in `root` reads them, cut to `most` tokens -> batches to calibrate with."""
    limit = positions(read_json(root, "config.json")) or most
    tokenizer = open_tokenizer(root, max_length=min(limit, most))
    return [
        {"input_ids": b.ids, "attention_mask": b.mask, "token_type_ids": b.types}
        for b in tokenizer.batches(texts, most=8)
    ]


def observe_ranges(
    graph: Path, batches: Sequence[Feeds], *, kind: Kind = "uint8", threads: int = 1, progress: Progress = silent
) -> dict[str, Range]:
    """The range of each tensor that a constant matrix multiplies, over the tokens that are no padding.

    Of many ranges, all inside the extremes, the one that costs least in rounding and clipping together.
    """
    names = list(_sizes(graph))
    if not names or not batches:
        raise EdgekitError(f"{graph} has no matrix to observe, or there is no text", "calibrate with more text")
    session = _session(graph, dict.fromkeys(names), threads)
    extremes = {name: [0.0, 0.0] for name in names}
    steps = 2 * len(batches)
    for done, batch in enumerate(batches):
        for name, values in _seen(session, names, batch):
            extremes[name] = [min(extremes[name][0], values.min()), max(extremes[name][1], values.max())]
        progress("calibrate", done + 1, steps)
    counts = {name: np.zeros(_BINS, np.int64) for name in names}
    for done, batch in enumerate(batches, len(batches)):
        for name, values in _seen(session, names, batch):
            counts[name] += np.histogram(values, _BINS, _ordered(*extremes[name]))[0]
        progress("calibrate", done + 1, steps)
    return {name: _best(counts[name], *_ordered(*extremes[name]), kind) for name in names}


def _seen(session: Any, names: Sequence[str], batch: Feeds) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """The values of each tensor where the batch is no padding."""
    wanted = {i.name for i in session.get_inputs()}
    found = session.run(list(names), {k: v for k, v in batch.items() if k in wanted})
    mask = batch["attention_mask"].astype(bool)
    return [(n, v[mask] if v.shape[:2] == mask.shape else v) for n, v in zip(names, found, strict=True)]


def _ordered(low: float, high: float) -> tuple[float, float]:
    return float(low), float(high) if high > low else float(low) + 1e-6


def _best(counts: npt.NDArray[np.int64], low: float, high: float, kind: Kind) -> Range:
    edges = np.linspace(low, high, _BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    tried = [_fitted(low * clip, high * clip, kind) for clip in _CLIPS]
    costs = [_cost(middles, counts, found, kind) for found in tried]
    return tried[int(np.argmin(costs))]


def _fitted(low: float, high: float, kind: Kind) -> Range:
    if kind == "int8":
        high = max(-low, high)
        low = -high
    return Range(min(low, 0.0), max(high, 0.0))


def _cost(middles: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], found: Range, kind: Kind) -> float:
    """Squared error of values inside from rounding, of those outside from clipping."""
    step = (found.high - found.low) / _LEVELS[kind]
    outside = middles - np.clip(middles, found.low, found.high)
    return float((counts * np.where(outside == 0, step * step / 12, _CLIPPED * outside * outside)).sum())


class _Static(Work):
    """As `Work`, with matrices behind a pair of QuantizeLinear and DequantizeLinear on either side."""

    ranges: Mapping[str, Range]
    kind: Kind

    def multiply(self, node: NodeProto, matrix: Matrix, out: DataFile) -> list[NodeProto]:
        """x · W -> DequantizeLinear(QuantizeLinear(x)) · DequantizeLinear(W), the node itself as it was."""
        from onnx import helper

        weight, scales = self.store(matrix, out, transposed=True)
        made = self._pair(node.input[0])
        plain = f"{weight}_float"
        if weight not in self.rounded:
            made.append(
                helper.make_node("DequantizeLinear", [weight, scales], [plain], name=f"{weight}_dequantize", axis=1)
            )
            self.rounded[weight] = (plain, "", "")
        kept = helper.make_node(
            node.op_type, [self.rounded[node.input[0]][0], plain, *node.input[2:]], list(node.output), name=node.name
        )
        made.append(kept)
        return made

    def _pair(self, name: str) -> list[NodeProto]:
        """The pair that rounds an activation, once for all that read it."""
        from onnx import helper

        if name in self.rounded:
            return []
        scale, zero, rounded, plain = (f"{name}_{part}" for part in ("scale", "zero", "q", "qdq"))
        self._constants(name, scale, zero)
        self.rounded[name] = (plain, "", "")
        return [
            helper.make_node("QuantizeLinear", [name, scale, zero], [rounded], name=f"{name}_quantize"),
            helper.make_node("DequantizeLinear", [rounded, scale, zero], [plain], name=f"{name}_dequantize"),
        ]

    def _constants(self, name: str, scale: str, zero: str) -> None:
        from onnx import helper

        found, levels = self.ranges[name], _LEVELS[self.kind]
        if self.kind == "int8":
            step, point = max(found.high / 127, 1e-12), 0
        else:
            step = max((found.high - found.low) / levels, 1e-12)
            point = round(-found.low / step)
        graph = self.model.graph
        graph.initializer.append(helper.make_tensor(scale, 1, [], [step]))
        graph.initializer.append(helper.make_tensor(zero, _TYPES[self.kind], [], [min(levels, point)]))
