"""An ONNX artefact for a device: plan, export in float32, prove it, quantize or choose, prove again, seal."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekit import artifact, onnx_pair_planning, onnx_planning
from edgekit.artifact import Artifact
from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.errors import DoesNotFit, EdgekitError, UnsupportedModel
from edgekit.host import usable_cores
from edgekit.onnx_planning import TEXT2TEXT, OnnxPlan, Wish
from edgekit.pipeline._manifest import gate, public_ref, versions
from edgekit.pipeline._model import Options, safe_name
from edgekit.recipe import Recipe
from edgekit.target import Target
from edgekit.units import Progress, silent

if TYPE_CHECKING:
    from edgekit.export.onnx import Engine, Report
    from edgekit.onnx_tuning import Outcome
    from edgekit.tuning import Candidate
    from edgekit.verification import Certificate


@dataclass(frozen=True)
class OnnxConversion:
    """What `convert` did. `artifact` and `certificate` are None after a dry run."""

    plan: OnnxPlan
    source: OnnxSource
    target: Target
    out: Path
    artifact: Artifact | None = None
    certificate: Certificate | None = None
    warnings: tuple[str, ...] = ()
    outcome: Outcome | None = None

    @property
    def name(self) -> str:
        return self.source.checkpoint.name

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return self.outcome.candidates if self.outcome else ()

    @property
    def held_out(self) -> int:
        return self.outcome.held_out if self.outcome else 0


@dataclass(frozen=True)
class OnnxSource:
    """A model folder and the engine that exports it."""

    checkpoint: Checkpoint
    engine: Engine


def open_source(model: str | Path, options: Options, *, progress: Progress = silent) -> OnnxSource:
    """Open what the user named and find who exports it. Raises UnsupportedModel with every engine's reason."""
    from edgekit.export import onnx

    checkpoint = open_checkpoint(model, progress=progress)
    if checkpoint.kind != "safetensors":
        raise UnsupportedModel(
            f"{checkpoint.name} is a GGUF: the ONNX exporters read Hugging Face folders", "name the folder or hub id"
        )
    checkpoint = replace(checkpoint, name=safe_name(options.name or checkpoint.name))
    return OnnxSource(checkpoint, onnx.engine_for(checkpoint, options.task))


def plan_source(source: OnnxSource, target: Target, options: Options) -> OnnxPlan:
    """Plan an opened source for one target. Raises UnknownName, DoesNotFit, EdgekitError."""
    export = Recipe.load(options.recipe).export
    recipes = export.quant if export.format == "onnx" else "auto"  # a GGUF recipe names GGUF presets
    wish = Wish(
        quant=options.quant or recipes,
        context=options.context or export.ctx_size,
        prefer=options.prefer or export.prefer,
        budget=_budget(source, options),
        candidates=export.candidates if export.format == "onnx" else (),
    )
    checkpoint, engine = source.checkpoint, source.engine
    if engine.task == TEXT2TEXT:
        return onnx_pair_planning.plan(checkpoint, target, wish, engine.exporter)
    return onnx_planning.plan(checkpoint, engine.task, target, wish, engine.exporter)


def _budget(source: OnnxSource, options: Options) -> int | None:
    if options.target_size is not None and options.target_bpw is not None:
        raise EdgekitError("--target-size and --target-bpw say the same thing", "give one of them")
    if options.target_bpw is None:
        return options.target_size
    return round(source.checkpoint.parameters * options.target_bpw / 8)


def plan_all(source: OnnxSource, options: Options) -> Iterable[tuple[Target, OnnxPlan | DoesNotFit]]:
    """One plan for each shipped target, in name order; DoesNotFit where nothing fits."""
    for name in Target.names():
        target = Target.load(name)
        try:
            yield target, plan_source(source, target, options)
        except DoesNotFit as e:
            yield target, e


def convert(
    model: str | Path, device: Target, recipe: Recipe, options: Options, *, dry_run: bool, progress: Progress
) -> OnnxConversion:
    """Make the artefact. Every refusal is given before a weight is read, but for what only the proof can show.

    Raises DoesNotFit (exit 3; the device, or this machine while exporting), VerificationFailed (exit 4, nothing is
    sealed), MissingExtra and the other EdgekitErrors (exit 1).
    """
    source = open_source(model, options, progress=progress)
    decided = plan_source(source, device, options)
    onnx_planning.require_fit(decided)
    if decided.task == TEXT2TEXT and options.calibration not in (None, "none", "auto"):
        raise EdgekitError("encoder-decoders are rounded to nearest: nothing is calibrated", "leave --calibration out")
    out = options.out or Path(f"{source.checkpoint.name}-{device.name}-onnx")
    artifact.refuse_overwrite(out, force=options.force)
    done = OnnxConversion(decided, source, device, out, warnings=_warnings(source, decided))
    if dry_run:
        return done
    _require_build(source, decided, out)
    return _make(done, recipe, options, progress)


def _require_build(source: OnnxSource, decided: OnnxPlan, out: Path) -> None:
    """Packages, memory and disk for the export: all of it is known beforehand."""
    import psutil

    source.engine.require()
    onnx_planning.require_build_memory(decided, psutil.virtual_memory().available)
    float32 = 4 * source.checkpoint.parameters
    artifact.need_disk(out.absolute().parent, float32 + 2 * decided.file_bytes)


def _warnings(source: OnnxSource, decided: OnnxPlan) -> tuple[str, ...]:
    return (*source.engine.notes, *decided.notes)


def _make(done: OnnxConversion, recipe: Recipe, options: Options, progress: Progress) -> OnnxConversion:
    from edgekit import onnx_pair_verification as pair
    from edgekit import onnx_verification as single

    threads = options.threads or usable_cores()
    level = options.verify or recipe.export.verify
    checkpoint, engine = done.source.checkpoint, done.source.engine
    two, root = engine.task == TEXT2TEXT, checkpoint.root
    with artifact.staging(done.out, force=options.force) as stage:
        with tempfile.TemporaryDirectory(prefix="work-", dir=stage) as temporary:
            work = Path(temporary)
            graph = engine.build(root, work / "float32", progress)
            prove = (
                partial(pair.prove_export, graph, root)
                if two
                else partial(single.prove_export, graph, root, engine.task)
            )
            export = prove(done.plan, level=level, threads=threads, progress=progress)
            done, report = _store(done, recipe, options, graph, work, threads, progress)
            engine.ship(graph.parent, report.graph, root, stage, done.plan, done.target.threads)
        verify = partial(pair.verify, stage, root) if two else partial(single.verify, stage, root, engine.task)
        certificate = verify(done.plan, report, export, level=level, threads=threads, progress=progress)
        (stage / "README.md").write_text(_card(done, certificate), encoding="utf-8")
        artifact.seal(stage, _manifest(done, certificate, recipe, report), {})
    warnings = tuple(dict.fromkeys(done.warnings + certificate.warnings))
    return replace(done, artifact=artifact.open_artifact(done.out), certificate=certificate, warnings=warnings)


def _store(
    done: OnnxConversion, recipe: Recipe, options: Options, graph: Path, work: Path, threads: int, progress: Progress
) -> tuple[OnnxConversion, Report]:
    """The quantized graph in `work`: stored at once, or chosen among candidates where there is text to learn from."""
    from edgekit.export import onnx

    decided = done.plan
    wanted = options.calibration or recipe.export.calibration
    if decided.task == TEXT2TEXT:
        pair = onnx_pair_planning.shape_of(done.source.checkpoint.config)
        place = work / "stored"
        place.mkdir()
        return done, onnx.store_pair(graph.parent, place, decided.variant, pair, threads, progress=progress)
    if decided.shape.causal:
        onnx.cut_positions(graph, decided.context)
    if not decided.shape.causal or wanted in ("none", "auto"):
        place = work / "stored"
        place.mkdir()
        return done, onnx.store(
            graph,
            place / onnx.GRAPH,
            decided.variant,
            decided.shape.layers,
            None,
            threads,
            feeds=_feeds(done, wanted) if decided.variant.kind == "static" else (),
            kind=_activations(done.target),
            progress=progress,
        )
    from edgekit import onnx_tuning

    known = onnx_tuning.learn(
        graph.parent, wanted, decided.context, effort=options.effort, threads=threads, progress=progress
    )
    outcome = onnx_tuning.choose(_rivals(done, options), known, graph.parent, work, threads=threads, progress=progress)
    return replace(done, plan=outcome.plan, outcome=outcome), outcome.stored


def _activations(target: Target) -> Literal["int8", "uint8", "uint16"]:
    """How fixed scales round activations: TensorRT wants them around zero, Qualcomm's NPU multiplies 16 by 8 bits."""
    if "TensorRT" in target.ort_providers:
        return "int8"
    return "uint16" if "QNN" in target.ort_providers else "uint8"


def _feeds(done: OnnxConversion, calibration: str) -> list[Any]:
    """What fixed ranges are learned from: the lines of the user's text, else sentences of the built-in one."""
    from edgekit import corpus
    from edgekit.calibration import plain_text
    from edgekit.export import onnx

    text = corpus.TEXT.replace(". ", ".\n")
    if calibration not in ("none", "self", "auto"):
        text = plain_text(Path(calibration))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return onnx.batches_of(done.source.checkpoint.root, lines[:512], most=min(512, done.plan.context))


def _rivals(done: OnnxConversion, options: Options) -> list[OnnxPlan]:
    """The plan, and where a size was asked for, every other variant that is at most as large."""
    budget = _budget(done.source, options)
    plans = [done.plan]
    if budget is None or options.quant not in (None, "auto"):
        return plans
    for name in onnx_planning.variants(done.plan.task):
        rival = plan_source(done.source, done.target, replace(options, quant=name, target_size=None, target_bpw=None))
        if name != done.plan.variant.name and rival.file_bytes <= budget and rival.memory.fits:
            plans.append(rival)
    return plans


def _card(done: OnnxConversion, certificate: Certificate) -> str:
    from edgekit.share import card

    checks = {check.name: check.detail for check in certificate.checks}
    return card.write_onnx(done.source.checkpoint, done.plan, done.target, checks)


def _manifest(done: OnnxConversion, certificate: Certificate, recipe: Recipe, report: Report) -> Mapping[str, Any]:

    checkpoint = done.source.checkpoint
    packages = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "onnxscript", "optimum", "torch", "transformers")
    return {
        "model_file": done.source.engine.graph_name,
        "format": "onnx",
        "task": done.plan.task,
        "engine": done.source.engine.name,
        "source": {
            "ref": public_ref(checkpoint),
            "name": checkpoint.name,
            "digest": checkpoint.digest,
            "architecture": done.plan.family,
            "parameters": checkpoint.parameters,
            "dtype": checkpoint.dtype,
        },
        "target": done.target.name,
        "providers": list(onnx_planning.providers_for(done.plan.variant, done.target)),
        "recipe": recipe.model_dump(mode="json"),
        "plan": summary(done.plan, tensors=True),
        "nodes": [asdict(node) for node in report.nodes],
        "left": [asdict(tensor) for tensor in report.left],
        **_encoder_of(report),
        "certificate": asdict(certificate),
        **gate(done.outcome),
        "warnings": list(done.warnings),
        "versions": versions(packages),
        "instruction_set": platform.machine(),
    }


def _encoder_of(report: Report) -> dict[str, Any]:
    """Of an encoder-decoder, what the manifest says of the graph that is not its model file."""
    if report.encoder is None:
        return {}
    part = report.encoder
    return {"encoder": {"nodes": [asdict(n) for n in part.nodes], "left": [asdict(t) for t in part.left]}}


def summary(decided: OnnxPlan, *, tensors: bool = False) -> dict[str, Any]:
    """A plan as plain values for JSON: bytes, tokens, tokens/s. `tensors` adds one row for each weight."""
    memory = decided.memory
    found: dict[str, Any] = {
        "target": decided.target,
        "format": "onnx",
        "task": decided.task,
        "preset": decided.variant.name,
        "why": decided.why,
        "architecture": decided.family,
        "parameters": decided.parameters,
        "file_bytes": decided.file_bytes,
        "data_bytes": decided.data_bytes,
        "build_bytes": decided.build_bytes,
        "bits_per_weight": round(decided.bits_per_weight, 4),
        "bytes_by_format": decided.bytes_by_format,
        "context": decided.context,
        "kv_type": "f32",
        "memory": asdict(memory) | {"total": memory.total, "headroom": memory.headroom, "fits": memory.fits},
        "forecast": asdict(decided.forecast),
        "notes": list(decided.notes),
    }
    if tensors:
        found["tensors"] = [
            {"name": s.name, "shape": list(s.shape), "format": s.format, "bytes": s.nbytes} for s in decided.stored
        ]
    return found


def conversion_summary(done: OnnxConversion) -> dict[str, Any]:
    """What `convert --json` prints."""
    model = done.artifact.model if done.artifact else None
    return {
        "out": str(done.out),
        "model": str(model) if model else None,
        "files": done.artifact.manifest["files"] if done.artifact else None,
        "plan": summary(done.plan),
        "certificate": asdict(done.certificate) if done.certificate else None,
        **gate(done.outcome),
        "warnings": list(done.warnings),
    }
