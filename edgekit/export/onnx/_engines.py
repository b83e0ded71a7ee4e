"""Who exports what: onnxruntime-genai's builder, torch.onnx, or optimum-onnx in an environment of its own.

Knows how to ask each for a float32 graph and how its quantized graph is laid out; knows no target.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgekit.artifact import readable_os_errors
from edgekit.checkpoint import Checkpoint
from edgekit.errors import EdgekitError, UnsupportedModel
from edgekit.export.onnx import _decoder, _encoder, _optimum, _pair, _seq2seq, _shipping
from edgekit.onnx_planning import GENERATION, TEXT2TEXT, Exporter, OnnxPlan
from edgekit.units import Progress

GRAPH = "model.onnx"

OPTIMUM_BYTES = 22.0
"""Peak memory of optimum-onnx in bytes a parameter: 2,953 MiB were seen for 134.5 M, fewer a parameter for larger ones
(5,945 MiB for 604 M)."""
PAIR_BASE, PAIR_BYTES = 420 << 20, 21.0
"""The same for an encoder-decoder, behind what the packages take: 401 MiB were seen for 0.8 M parameters, 1,592 for
60.5 M, 3,594 for 189.9 M."""

Build = Callable[[Path, Path, Progress], Path]


@dataclass(frozen=True)
class Engine:
    """One exporter, for one model. `name`: `onnxruntime-genai`, `torch` or `optimum-onnx`; `notes`: what the user
    should know of this choice."""

    name: str
    task: str
    build: Build
    require: Callable[[], object]
    exporter: Exporter
    notes: tuple[str, ...] = ()

    @property
    def graph_name(self) -> str:
        """Where the graph lies in the artefact; of an encoder-decoder, the decoder's."""
        if self.task == TEXT2TEXT:
            return _pair.SHIPPED
        return _encoder.GRAPH if self.name == "torch" else GRAPH

    def ship(
        self, exported: Path, quantized: Path, root: Path, stage: Path, plan: OnnxPlan, threads: int | None
    ) -> None:
        """Lay the `quantized` graph out in `stage`, with the files that go beside it. `exported`: the folder of the
        float32 graph; `root`: the model's; `threads`: the target's, None where it is not known."""
        if self.task == TEXT2TEXT:
            _pair.ship(root, quantized, stage)
            return
        with readable_os_errors(stage):
            if self.name == "torch":
                _encoder.ship(root, quantized, stage)
                return
            for path in exported.iterdir():
                if path.is_file() and not path.name.startswith(GRAPH):
                    shutil.copyfile(path, stage / path.name)
            for path in (quantized, quantized.with_name(f"{quantized.name}.data")):
                if path.is_file():
                    path.replace(stage / path.name)
        _shipping.ship(stage, context=plan.context, threads=threads)


def engine_for(checkpoint: Checkpoint, task: str | None = None) -> Engine:
    """The engine that exports this model exactly. Raises UnsupportedModel with what each of them says."""
    config, root, parameters = checkpoint.config, checkpoint.root, checkpoint.parameters
    if task == TEXT2TEXT or (task is None and config.get("is_encoder_decoder")):
        return _pair_engine(checkpoint)
    encoding = task if task and task != GENERATION else (None if task else _encoder.task_of(config, root))
    if encoding is not None:
        if why := _encoder.supported(config, encoding):
            raise UnsupportedModel(f"{checkpoint.name}: {why}", "edgekit convert MODEL --format onnx --task TASK")
        return Engine(
            "torch",
            encoding,
            partial(_torch, encoding),
            _encoder.require,
            Exporter(_encoder.build_bytes(parameters)),
        )
    genai = _decoder.supported(config)
    if genai is None:
        return Engine(
            _decoder.BUILDER,
            GENERATION,
            _genai,
            _decoder.require,
            Exporter(_decoder.build_bytes(parameters, checkpoint.dtype), fused=True),
        )
    optimum = _optimum.supported(config)
    if optimum is None:
        return Engine(
            "optimum-onnx",
            GENERATION,
            _older,
            _optimum.require,
            Exporter(int(OPTIMUM_BYTES * parameters)),
            ("exported by optimum-onnx: a graph without fused attention, whose cache is copied for every token",),
        )
    raise UnsupportedModel(
        f"{checkpoint.name}: {genai}; {optimum}",
        "leave out --format onnx: GGUF may know this family (edgekit plan MODEL)",
    )


def _pair_engine(checkpoint: Checkpoint) -> Engine:
    if why := _seq2seq.supported(checkpoint.config, checkpoint.root, checkpoint.tensors):
        raise UnsupportedModel(f"{checkpoint.name}: {why}", "see docs/onnx-optimum.md, encoder-decoders")
    exporter = Exporter(PAIR_BASE + int(PAIR_BYTES * checkpoint.parameters))
    return Engine("optimum-onnx", TEXT2TEXT, _two_graphs, _optimum.require, exporter)


def _torch(task: str, root: Path, folder: Path, progress: Progress) -> Path:
    return _encoder.build(root, folder, task=task, progress=progress)


def _genai(root: Path, folder: Path, progress: Progress) -> Path:
    return _decoder.build(root, folder, progress=progress)


def _older(root: Path, folder: Path, progress: Progress) -> Path:
    return _optimum.build(root, folder, progress=progress)


def _two_graphs(root: Path, folder: Path, progress: Progress) -> Path:
    return _seq2seq.build(root, folder, progress=progress)


def cut_positions(graph: Path, context: int) -> None:
    """Positions beyond the planned context are only bytes in the rotary tables: cut them before quantizing."""
    if context < 1:
        raise EdgekitError(f"a context of {context} tokens makes no sense", "--ctx-size 4096")
    _shipping.shorten_rope(graph, context)
