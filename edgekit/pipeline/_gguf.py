"""A GGUF for a device: plan, write or choose among candidates, verify, seal."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit import artifact, embedding
from edgekit.artifact import Artifact
from edgekit.errors import DoesNotFit, EdgekitError, UnsupportedModel
from edgekit.export import gguf
from edgekit.export.gguf import Written
from edgekit.gguf_file import plain
from edgekit.host import usable_cores
from edgekit.imatrix_file import Imatrix
from edgekit.pipeline._manifest import manifest
from edgekit.pipeline._model import Options, Source, open_source, size_budget
from edgekit.planning import Draft, Plan, require_fit
from edgekit.planning import plan as decide
from edgekit.quant import presets
from edgekit.recipe import Recipe
from edgekit.target import Target
from edgekit.units import Progress, announce

if TYPE_CHECKING:  # a plan needs neither the runtime nor what measures with it
    from edgekit.tuning import Outcome
    from edgekit.verification import Certificate


NEVER_CALIBRATED = 8.0
"""Bits per weight above which `auto` reads no text: what rounding costs there is less than anybody can measure."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` did. `artifact` and `certificate` are None after a dry run."""

    plan: Plan
    source: Source
    target: Target
    out: Path
    artifact: Artifact | None = None
    certificate: Certificate | None = None
    warnings: tuple[str, ...] = ()
    outcome: Outcome | None = None


def plan_source(
    source: Source,
    target: Target,
    options: Options = Options(),
    importance: Collection[str] = (),
    drafts: dict[str, Draft] | None = None,
) -> Plan:
    """Plan an opened source for one target. `importance`: tensors that will have an importance vector."""
    export = Recipe.load(options.recipe).export
    budget = size_budget(source, options)
    ladder = presets.LADDER if importance else presets.PLAIN_LADDER
    return decide(
        source.blueprint,
        source.metadata,
        target,
        quant=options.quant or (export.quant if export.format == "gguf" else "auto"),
        candidates=ladder if budget or export.format == "onnx" else export.candidates or ladder,
        context=options.context or export.ctx_size,
        kv_type=options.kv or export.kv,
        prefer=options.prefer or export.prefer,
        importance=importance,
        budget=budget,
        drafts=drafts,
    )


def plan_all(source: Source, options: Options = Options()) -> Iterable[tuple[Target, Plan | DoesNotFit]]:
    """One plan for each shipped target, in name order; DoesNotFit where nothing fits."""
    drafts: dict[str, Draft] = {}
    for name in Target.names():
        target = Target.load(name)
        try:
            yield target, plan_source(source, target, options, drafts=drafts)
        except DoesNotFit as e:
            yield target, e


def convert(
    model: str | Path, device: Target, recipe: Recipe, options: Options, *, dry_run: bool, progress: Progress
) -> Conversion:
    """Make the artefact for `device`. Every decision is made, and every refusal given, before a weight is read.

    Raises DoesNotFit (exit 3), VerificationFailed (exit 4, nothing sealed) and the other EdgekitErrors (exit 1).
    """
    source = open_source(model, name=options.name, progress=progress)
    wanted, skipped = _calibration(source, device, recipe, options)
    brought = _brought(wanted, source)
    names = importance_names(source, wanted, brought)
    decided = plan_source(source, device, options, names)
    require_fit(decided, alternatives(source, device, options))
    refuse_fallbacks(decided, strict=options.strict)
    name = source.checkpoint.name
    out = options.out or Path(f"{name}-{device.name}")
    artifact.refuse_overwrite(out, force=options.force)
    conversion = Conversion(decided, source, device, out, warnings=(*_warnings(source, decided), *skipped))
    if dry_run:
        return conversion
    return _make(conversion, _Job(name, recipe, options, wanted, brought), progress)


@dataclass(frozen=True)
class _Job:
    """What `_make` needs beside the conversion."""

    name: str
    recipe: Recipe
    options: Options
    calibration: str
    brought: Imatrix | None

    @property
    def threads(self) -> int:
        return self.options.threads or usable_cores()


def _calibration(source: Source, device: Target, recipe: Recipe, options: Options) -> tuple[str, tuple[str, ...]]:
    """(what is read to learn from, why nothing is if that was not the user's choice)."""
    wanted = options.calibration or recipe.export.calibration
    if wanted in ("none", "auto") and options.calibration is None and size_budget(source, options):
        return "self", ()  # a size is best met by measuring what its bytes are worth
    if wanted != "auto":
        return wanted, ()
    if not source.blueprint.geometry.causal:
        return "none", ()
    from edgekit import effort

    decided = plan_source(source, device, options)
    if decided.bits_per_weight > NEVER_CALIBRATED or not decided.memory.fits:
        return "none", ()
    reason = effort.worth_it(decided, options.effort) or _no_room(decided)
    return ("none", (reason,)) if reason else ("self", ())


def _no_room(decided: Plan) -> str | None:
    """Why this machine cannot hold the unquantised model that calibrating reads, or None."""
    from edgekit import verification

    try:
        verification.need_memory(4 * decided.parameters + decided.file_bytes)
    except DoesNotFit as e:
        return f"not calibrated: {e}"
    return None


def _brought(calibration: str, source: Source) -> Imatrix | None:
    """The importance matrix, where the user gave one (`.gguf` or `.dat`) instead of a text."""
    if not calibration.lower().endswith((".gguf", ".dat", ".imatrix")):
        return None
    from edgekit import tuning

    return tuning.bring(Path(calibration), source.blueprint)


def importance_names(source: Source, calibration: str, brought: Imatrix | None) -> Collection[str]:
    """Tensors that will have an importance vector: what the plan needs to know before anything is read."""
    if calibration == "none":
        return ()
    if not source.blueprint.geometry.causal:
        raise UnsupportedModel("calibration reads text as a decoder does; this is an encoder", "--calibration none")
    from edgekit import tuning

    return brought.importance().keys() if brought else tuning.importance_names(source.blueprint)


def _make(conversion: Conversion, job: _Job, progress: Progress) -> Conversion:
    from edgekit import verification

    source, out, threads = conversion.source, conversion.out, job.threads
    with artifact.staging(out, force=job.options.force) as stage:
        conversion, written = _write(conversion, job, stage, progress)
        level = job.options.verify or job.recipe.export.verify
        certificate = verification.verify(
            written.path,
            conversion.plan,
            source.checkpoint,
            source.vocabulary,
            level=level,
            threads=threads,
            progress=progress,
        )
        for path, text in _companions(conversion, written.path.name, certificate).items():
            (stage / path).write_text(text, encoding="utf-8")
        _carry(source, stage)
        sealed = manifest(conversion, written, certificate, job.recipe)
        artifact.seal(stage, sealed, {written.path.name: written.sha256})
    warnings = tuple(dict.fromkeys(conversion.warnings + certificate.warnings))
    return replace(conversion, artifact=artifact.open_artifact(out), certificate=certificate, warnings=warnings)


def _carry(source: Source, stage: Path) -> None:
    """An encoder's own files say how its token vectors become one, and how long a text may be: no GGUF key does."""
    root = source.checkpoint.root
    if source.blueprint.geometry.causal or source.blueprint.classifies or source.checkpoint.kind == "gguf":
        return
    for name in embedding.files_of(root):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.inside(root, name), stage / name)


def _write(conversion: Conversion, job: _Job, stage: Path, progress: Progress) -> tuple[Conversion, Written]:
    """The model file in `stage`: written at once, or chosen among candidates where there is text to learn from."""
    decided = conversion.plan
    if job.calibration == "none" or job.brought:
        importance = job.brought.importance() if job.brought else None
        path = stage / file_name(job.name, decided)
        return conversion, gguf.write(decided, path, gguf.Encoding(job.threads, importance), progress=progress)
    with tempfile.TemporaryDirectory(prefix="work-", dir=stage) as temporary:
        outcome = _tune(conversion, job, Path(temporary), progress)
        path = stage / file_name(job.name, outcome.plan)
        outcome.written.path.replace(path)
    warnings = conversion.warnings + outcome.warnings
    done = replace(conversion, plan=outcome.plan, outcome=outcome, warnings=warnings)
    return done, replace(outcome.written, path=path)


def _tune(conversion: Conversion, job: _Job, folder: Path, progress: Progress) -> Outcome:
    from edgekit import effort, tuning, verification

    decided, source = conversion.plan, conversion.source
    work = effort.estimate(decided, job.options.effort, effort.measure_speed(job.threads), source=job.calibration)
    announce(progress, f"learning what to keep: {work}")
    return tuning.tune(
        partial(verification.unquantised, folder, decided, threads=job.threads, progress=progress),
        decided,
        job.calibration,
        verification.chat_template(source.checkpoint, source.vocabulary),
        folder,
        target=conversion.target,
        budget=size_budget(source, job.options) or decided.file_bytes,
        digest=source.checkpoint.digest,
        effort=job.options.effort,
        prefer=job.options.prefer or job.recipe.export.prefer,
        threads=job.threads,
        progress=progress,
    )


def file_name(name: str, decided: Plan) -> str:
    """By the GGUF naming convention: model, then the preset; of a mix that is no preset, its bits per weight."""
    if any(t.reason == "measured" for t in decided.tensors):
        return f"{name}-{decided.bits_per_weight:.2f}bpw.gguf"
    return f"{name}-{decided.preset.name}.gguf"


def _companions(conversion: Conversion, file_name: str, certificate: Certificate) -> dict[str, str]:
    from edgekit import verification
    from edgekit.share import card, ollama

    source, decided = conversion.source, conversion.plan
    checks = {check.name: check.detail for check in certificate.checks}
    texts = {"README.md": card.write(source.checkpoint, decided, conversion.target, file_name, checks)}
    if decided.geometry.causal:
        template = verification.chat_template(source.checkpoint, source.vocabulary)
        adds_bos = bool(plain(decided.metadata.get("tokenizer.ggml.add_bos_token", False)))
        texts["Modelfile"] = ollama.modelfile(file_name, template, decided.context, adds_bos=adds_bos)
    return texts


def alternatives(source: Source, device: Target, options: Options) -> Iterable[Plan]:
    """The same with smaller presets, best first: what DoesNotFit proposes. Lazily, since it is rarely needed."""
    for name in presets.PLAIN_LADDER:
        yield plan_source(source, device, replace(options, quant=name))


def refuse_fallbacks(decided: Plan, *, strict: bool) -> None:
    """Under `--strict`, a tensor that could not take its format is an error that names it."""
    if strict and decided.fallbacks:
        first = decided.fallbacks[0]
        raise EdgekitError(
            f"{len(decided.fallbacks)} tensors cannot hold the format they should have: {first.name} has rows of "
            f"{first.shape[-1]}, {first.wanted} would become {first.format.name}",
            "choose a preset of 32-weight blocks (Q8_0, Q5_0, Q4_0, IQ4_NL), or leave --strict out",
        )


def _warnings(source: Source, decided: Plan) -> tuple[str, ...]:
    found = [*source.blueprint.notes, *(source.vocabulary.warnings if source.vocabulary else ())]
    if decided.fallbacks:
        worst = decided.fallbacks[0]
        found.append(
            f"{len(decided.fallbacks)} of {len(decided.tensors)} tensors have rows that {worst.wanted} cannot hold "
            f"({worst.name}: {worst.shape[-1]}) and take a larger format"
        )
    if decided.geometry.context and decided.context > decided.geometry.context:
        found.append(f"a context of {decided.context} is more than the {decided.geometry.context} it was trained for")
    return tuple(found)
