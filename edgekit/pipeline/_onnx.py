"""An ONNX artefact for a device: plan, export in float32, prove it, quantize or choose, prove again, seal."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
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
from edgekit.pipeline._manifest import learned, public_ref, versions
from edgekit.pipeline._model import Options, safe_name
from edgekit.recipe import Recipe
from edgekit.target import Target
from edgekit.units import Progress, announce, show_bytes, silent

if TYPE_CHECKING:
    from edgekit.effort import Work
    from edgekit.export.onnx import Engine, Report
    from edgekit.onnx_tuning import Outcome
    from edgekit.tuning import Candidate
    from edgekit.verification import Certificate


NEVER_CALIBRATED = 8
"""Bits of the matrices from which on `auto` reads no text: what rounding costs there is less than anybody can see."""


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
    wanted, skipped = _calibration(source, device, decided, recipe, options)
    out = options.out or Path(f"{source.checkpoint.name}-{device.name}-onnx")
    artifact.refuse_overwrite(out, force=options.force)
    done = OnnxConversion(decided, source, device, out, warnings=(*_warnings(source, decided), *skipped))
    if dry_run:
        if wanted != "none" and decided.shape.causal:
            announce(
                progress, f"it would learn what to keep: {learning_work(source, device, decided, options, wanted)}"
            )
        return done
    _require_build(source, decided, out)
    if wanted != "none" and decided.shape.causal and (reason := _no_room(decided)):
        raise DoesNotFit(reason, "--calibration none, or convert on a larger machine")
    return _make(done, _Job(recipe, options, wanted), progress)


@dataclass(frozen=True)
class _Job:
    """What `_make` needs beside the conversion. `calibration`: a file, `self` or `none`."""

    recipe: Recipe
    options: Options
    calibration: str

    @property
    def threads(self) -> int:
        return self.options.threads or usable_cores()


def _calibration(
    source: OnnxSource, device: Target, decided: OnnxPlan, recipe: Recipe, options: Options
) -> tuple[str, tuple[str, ...]]:
    """(what is read to learn from, why nothing is if that was not the user's choice)."""
    if decided.task == TEXT2TEXT:
        if options.calibration not in (None, "none", "auto"):
            raise EdgekitError(
                "encoder-decoders are rounded to nearest: nothing is calibrated", "leave --calibration out"
            )
        return "none", ()
    if not decided.shape.causal:
        return _encoder_text(decided, options), ()
    wanted = options.calibration or recipe.export.calibration
    if wanted.lower().endswith((".gguf", ".dat", ".imatrix")):
        raise EdgekitError(
            f"{wanted}: an importance matrix says nothing of how inputs go together, which ONNX forms are made from",
            "--calibration FILE with text, or self",
        )
    if wanted in ("none", "auto") and options.calibration is None and _budget(source, options):
        return "self", ()  # a size is best met by measuring what its bytes are worth
    if wanted != "auto":
        return wanted, ()
    if decided.variant.linear.bits >= NEVER_CALIBRATED:
        return "none", ()
    from edgekit import effort

    work = learning_work(source, device, decided, options, "self")
    reason = effort.too_long(work) or _no_room(decided)
    return ("none", (reason,)) if reason else ("self", ())


def _encoder_text(decided: OnnxPlan, options: Options) -> str:
    """What an encoder's fixed scales are learned from. Nothing else of an encoder learns from text."""
    wanted = options.calibration or "none"
    if wanted in ("none", "auto"):
        return "none"
    if decided.variant.kind != "static":
        raise EdgekitError(
            f"{decided.variant.name} of an encoder learns nothing from text: its scales come from the weights, or from "
            "every input anew",
            "leave --calibration out, or choose -q int8-static, whose fixed scales are learned",
        )
    if wanted == "self":
        raise EdgekitError("an encoder writes no text to learn from", "--calibration FILE, or leave it out")
    return wanted


def learning_work(source: OnnxSource, device: Target, decided: OnnxPlan, options: Options, text: str) -> Work:
    """What learning from `text` (a file, or `self`) and choosing takes on this machine."""
    from edgekit import effort, onnx_effort

    speed = effort.measure_speed(options.threads or usable_cores())
    plans = len(_rivals(source, device, decided, options))
    return onnx_effort.estimate(decided, options.effort, speed, source=text, plans=plans)


def learning(source: OnnxSource, device: Target, decided: OnnxPlan, options: Options) -> str:
    """What `convert` would do beside writing, in a line: learn, with the work that takes; or why not; or nothing."""
    wanted, skipped = _calibration(source, device, decided, Recipe.load(options.recipe), options)
    if wanted == "none" or not decided.shape.causal:
        return "; ".join(skipped)
    return f"calibrates: {learning_work(source, device, decided, options, wanted)}"


def _no_room(decided: OnnxPlan) -> str | None:
    """Why this machine cannot hold what calibrating needs, or None."""
    import psutil

    from edgekit import onnx_effort

    needed, free = onnx_effort.memory(decided), psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"not calibrated: that takes {show_bytes(needed)} of memory, and {show_bytes(free)} is free"


def _require_build(source: OnnxSource, decided: OnnxPlan, out: Path) -> None:
    """Packages, memory and disk for the export: all of it is known beforehand."""
    import psutil

    source.engine.require()
    onnx_planning.require_build_memory(decided, psutil.virtual_memory().available)
    float32 = 4 * source.checkpoint.parameters
    artifact.need_disk(out.absolute().parent, float32 + 2 * decided.file_bytes)


def _warnings(source: OnnxSource, decided: OnnxPlan) -> tuple[str, ...]:
    return (*source.engine.notes, *decided.notes)


def _make(done: OnnxConversion, job: _Job, progress: Progress) -> OnnxConversion:
    from edgekit import onnx_pair_verification as pair
    from edgekit import onnx_verification as single

    threads = job.threads
    level = job.options.verify or job.recipe.export.verify
    checkpoint, engine = done.source.checkpoint, done.source.engine
    two, root = engine.task == TEXT2TEXT, checkpoint.root
    with artifact.staging(done.out, force=job.options.force) as stage:
        with tempfile.TemporaryDirectory(prefix="work-", dir=stage) as temporary:
            work = Path(temporary)
            graph = engine.build(root, work / "float32", progress)
            prove = (
                partial(pair.prove_export, graph, root)
                if two
                else partial(single.prove_export, graph, root, engine.task)
            )
            export = prove(done.plan, level=level, threads=threads, progress=progress)
            done, report = _store(done, job, graph, work, progress)
            done = _weighed(done, report)
            engine.ship(graph.parent, report.graph, root, stage, done.plan, done.target.threads)
        verify = partial(pair.verify, stage, root) if two else partial(single.verify, stage, root, engine.task)
        certificate = verify(done.plan, report, export, level=level, threads=threads, progress=progress)
        (stage / "README.md").write_text(_card(done, certificate), encoding="utf-8")
        artifact.seal(stage, _manifest(done, certificate, job.recipe, report), {})
    warnings = tuple(dict.fromkeys(done.warnings + certificate.warnings))
    return replace(done, artifact=artifact.open_artifact(done.out), certificate=certificate, warnings=warnings)


def _weighed(done: OnnxConversion, report: Report) -> OnnxConversion:
    """The plan with the bytes that were written; a difference to those planned is told."""
    planned = done.plan.data_bytes
    written = report.data_bytes + (report.encoder.data_bytes if report.encoder else 0)
    if written == planned:
        return done
    said = f"the weights take {written:,} bytes; {planned:,} were planned"
    return replace(done, plan=replace(done.plan, data_bytes=written), warnings=(*done.warnings, said))


def _store(
    done: OnnxConversion, job: _Job, graph: Path, work: Path, progress: Progress
) -> tuple[OnnxConversion, Report]:
    """The quantized graph in `work`: stored at once, or chosen among candidates where there is text to learn from."""
    from edgekit.export import onnx

    decided = done.plan
    if decided.task == TEXT2TEXT:
        pair = onnx_pair_planning.shape_of(done.source.checkpoint.config)
        place = work / "stored"
        place.mkdir()
        return done, onnx.store_pair(graph.parent, place, decided.variant, pair, job.threads, progress=progress)
    if decided.shape.causal:
        onnx.cut_positions(graph, decided.context)
        if job.calibration != "none":
            return _tune(done, job, graph, work, progress)
    place = work / "stored"
    place.mkdir()
    return done, onnx.store(
        graph,
        place / onnx.GRAPH,
        decided.variant,
        decided.shape.layers,
        None,
        job.threads,
        feeds=_feeds(done, job.calibration) if decided.variant.kind == "static" else (),
        kind=_activations(done.target),
        progress=progress,
    )


def _tune(
    done: OnnxConversion, job: _Job, graph: Path, work: Path, progress: Progress
) -> tuple[OnnxConversion, Report]:
    from edgekit import onnx_tuning

    source, target, decided = done.source, done.target, done.plan
    said = learning_work(source, target, decided, job.options, job.calibration)
    announce(progress, f"learning what to keep: {said}")
    known = onnx_tuning.learn(
        graph.parent,
        job.calibration,
        decided.context,
        digest=source.checkpoint.digest,
        exporter=source.engine.name,
        effort=job.options.effort,
        spill=work / "moments",
        threads=job.threads,
        progress=progress,
    )
    plans = _rivals(source, target, decided, job.options)
    rungs = _rungs(source, target, plans, job.options)
    outcome = onnx_tuning.choose(plans, known, graph.parent, work, threads=job.threads, rungs=rungs, progress=progress)
    warnings = done.warnings + outcome.warnings
    return replace(done, plan=outcome.plan, outcome=outcome, warnings=warnings), outcome.stored


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
    if calibration != "none":
        text = plain_text(Path(calibration))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return onnx.batches_of(done.source.checkpoint.root, lines[:512], most=min(512, done.plan.context))


def _rivals(source: OnnxSource, target: Target, decided: OnnxPlan, options: Options) -> list[OnnxPlan]:
    """The plan, and where a size was asked for, every other variant that is at most as large."""
    budget = _budget(source, options)
    if budget is None or options.quant not in (None, "auto"):
        return [decided]
    others = _others(source, target, [decided], options)
    return [decided, *(p for p in others if p.file_bytes <= budget and p.memory.fits)]


def _rungs(source: OnnxSource, target: Target, plans: Sequence[OnnxPlan], options: Options) -> list[OnnxPlan]:
    """The variants that are no candidates, which are measured beside them to show where the winner stands."""
    from edgekit import effort

    return [] if effort.find(options.effort).rungs == 0 else _others(source, target, plans, options)


def _others(source: OnnxSource, target: Target, plans: Sequence[OnnxPlan], options: Options) -> list[OnnxPlan]:
    """Plans of every variant that is not among `plans`."""
    apart = replace(options, target_size=None, target_bpw=None)
    names = [n for n in onnx_planning.variants(plans[0].task) if n not in {p.variant.name for p in plans}]
    return [plan_source(source, target, replace(apart, quant=name)) for name in names]


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
        **learned(done.outcome),
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
        **learned(done.outcome),
        "warnings": list(done.warnings),
    }
