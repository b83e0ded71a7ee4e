"""The one pipeline: open, plan, run the stages, write, verify, seal. The only place that knows the order."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import arch, artifact
from edgekit.arch import Blueprint, Role
from edgekit.artifact import Artifact
from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.errors import DoesNotFit, EdgekitError, UnsupportedModel
from edgekit.export import gguf
from edgekit.export.gguf import Written
from edgekit.gguf_file import MetaValue, encode_header, plain
from edgekit.host import usable_cores
from edgekit.imatrix_file import Imatrix
from edgekit.planning import Draft, Plan, require_fit
from edgekit.planning import plan as decide
from edgekit.quant import presets
from edgekit.recipe import Recipe
from edgekit.target import Target
from edgekit.units import Progress, silent
from edgekit.vocab import Vocabulary, read_vocabulary

if TYPE_CHECKING:  # a plan needs neither the runtime nor what measures with it
    from edgekit.tuning import Outcome
    from edgekit.verification import Certificate


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may ask of `convert` and `plan` beside model and target. None = the recipe decides."""

    recipe: str = "default"
    quant: str | None = None
    context: int | None = None
    kv: str | None = None
    prefer: str | None = None
    target_size: int | None = None
    target_bpw: float | None = None
    calibration: str | None = None
    verify: str | None = None
    name: str | None = None
    out: Path | None = None
    strict: bool = False
    force: bool = False
    threads: int | None = None
    effort: str = "normal"


@dataclass(frozen=True)
class Source:
    """A model opened and understood: headers, family, tokenizer, and what metadata does not depend on the format."""

    checkpoint: Checkpoint
    blueprint: Blueprint
    vocabulary: Vocabulary | None
    metadata: Mapping[str, MetaValue]


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


def open_source(model: str | Path, *, name: str | None = None, progress: Progress = silent) -> Source:
    """Open what the user named, under another `name` if one is given.

    Raises CorruptCheckpoint, UnsupportedModel, UnsupportedVocabulary, DownloadFailed.
    """
    checkpoint = open_checkpoint(model, progress=progress)
    checkpoint = replace(checkpoint, name=safe_name(name or checkpoint.name))
    blueprint = arch.blueprint(checkpoint)
    rows = next((t.shape[0] for t in blueprint.tensors if t.role is Role.EMBED), None)
    vocabulary = None
    if checkpoint.kind != "gguf":
        vocabulary = read_vocabulary(checkpoint.root, checkpoint.config, rows=rows)
    return Source(checkpoint, blueprint, vocabulary, gguf.metadata(checkpoint, blueprint, vocabulary))


def plan(model: str | Path, target: str = "host", options: Options = Options(), *, progress: Progress = silent) -> Plan:
    """The plan that `convert` would follow, whether it fits or not (`auto` raises DoesNotFit when nothing does)."""
    return plan_source(open_source(model, progress=progress), Target.load(target), options)


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
    if export.format != "gguf":
        raise UnsupportedModel(f"recipe {options.recipe} writes {export.format}", "edgekit recipes list")
    return decide(
        source.blueprint,
        source.metadata,
        target,
        quant=options.quant or export.quant,
        candidates=ladder if budget else export.candidates or ladder,
        context=options.context or export.ctx_size,
        kv_type=options.kv or export.kv,
        prefer=options.prefer or export.prefer,
        importance=importance,
        budget=budget,
        drafts=drafts,
    )


def size_budget(source: Source, options: Options) -> int | None:
    """Bytes that the file may have: --target-size, or --target-bpw times the weights plus what metadata takes."""
    if options.target_size is not None and options.target_bpw is not None:
        raise EdgekitError("--target-size and --target-bpw say the same thing", "give one of them")
    if options.target_bpw is None:
        return options.target_size
    if not 0 < options.target_bpw <= 32:
        raise EdgekitError(f"{options.target_bpw} bits per weight make no sense", "write for example --target-bpw 4.5")
    weights = sum(t.values for t in source.blueprint.tensors if t.role is not Role.ROPE)
    names = [(t.name, t.shape, 0, 4 * t.values) for t in source.blueprint.tensors]
    return round(weights * options.target_bpw / 8) + len(encode_header(source.metadata, names).bytes)


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
    model: str | Path,
    target: str = "host",
    options: Options = Options(),
    *,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Make the artefact for `target`. Every decision is made, and every refusal given, before a weight is read.

    Raises DoesNotFit (exit 3), VerificationFailed (exit 4, nothing sealed) and the other EdgekitErrors (exit 1).
    """
    device = Target.load(target)
    recipe = Recipe.load(options.recipe)
    source = open_source(model, name=options.name, progress=progress)
    wanted = options.calibration or recipe.export.calibration
    if wanted == "none" and options.calibration is None and size_budget(source, options):
        wanted = "self"  # a size is best met by measuring what its bytes are worth
    brought = _brought(wanted, source)
    names = importance_names(source, wanted, brought)
    decided = plan_source(source, device, options, names)
    require_fit(decided, alternatives(source, device, options))
    refuse_fallbacks(decided, strict=options.strict)
    name = source.checkpoint.name
    out = options.out or Path(f"{name}-{device.name}")
    artifact.refuse_overwrite(out, force=options.force)
    conversion = Conversion(decided, source, device, out, warnings=_warnings(source, decided))
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
        manifest = _manifest(conversion, written, certificate, job.recipe)
        artifact.seal(stage, manifest, {written.path.name: written.sha256})
    warnings = tuple(dict.fromkeys(conversion.warnings + certificate.warnings))
    return replace(conversion, artifact=artifact.open_artifact(out), certificate=certificate, warnings=warnings)


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
    from edgekit import tuning, verification

    decided, source = conversion.plan, conversion.source
    with verification.unquantised(folder, decided, threads=job.threads, progress=progress) as model:
        known = tuning.learn(
            model,
            decided,
            job.calibration,
            verification.chat_template(source.checkpoint, source.vocabulary),
            digest=source.checkpoint.digest,
            effort=job.options.effort,
            spill=tuning.spill_folder(folder, decided),
            threads=job.threads,
            progress=progress,
        )
        prefer = job.options.prefer or job.recipe.export.prefer
        budget = size_budget(source, job.options) or decided.file_bytes
        tried = tuning.attempts(
            decided, known, budget, conversion.target, prefer=prefer, effort=job.options.effort, progress=progress
        )
        return tuning.choose(tried, known, folder, threads=job.threads, progress=progress)


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


def safe_name(name: str) -> str:
    """A file name out of a model name: what is not a letter, digit, dot, dash or underscore becomes a dash."""
    clean = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip(".-")
    if not clean:
        raise EdgekitError(f"{name!r} cannot be a file name", "choose one with --name")
    return clean[:120]


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


def _manifest(conversion: Conversion, written: Written, certificate: Certificate, recipe: Recipe) -> Mapping[str, Any]:
    source = conversion.source
    return {
        "model_file": written.path.name,
        "format": "gguf",
        "source": {
            "ref": _public_ref(source.checkpoint),
            "name": source.checkpoint.name,
            "digest": source.checkpoint.digest,
            "architecture": conversion.plan.arch,
            "parameters": source.checkpoint.parameters,
            "dtype": source.checkpoint.dtype,
        },
        "target": conversion.target.name,
        "recipe": recipe.model_dump(mode="json"),
        "plan": summary(conversion.plan, tensors=True),
        "certificate": asdict(certificate),
        **_learned(conversion.outcome),
        "warnings": list(conversion.warnings),
        "versions": versions(),
        "instruction_set": platform.machine(),
    }


def _learned(outcome: Outcome | None) -> dict[str, Any]:
    """What was learned and compared, for the manifest."""
    if outcome is None:
        return {}
    return {
        "calibration": {"text": outcome.text, "tokens": outcome.tokens, "held_out": outcome.held_out},
        "candidates": [asdict(c) for c in outcome.candidates],
        "doubt": outcome.doubt,
    }


def _public_ref(checkpoint: Checkpoint) -> str:
    """What the user typed; of a local path only the last part, so that a manifest does not tell who made it."""
    return Path(checkpoint.ref).name if Path(checkpoint.ref).exists() else checkpoint.ref


def versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in ("edgekit", "llama-cpp-python", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def summary(decided: Plan, *, tensors: bool = False) -> dict[str, Any]:
    """A plan as plain values for JSON: bytes, tokens, tokens/s. `tensors` adds one row for each tensor."""
    memory = decided.memory
    found: dict[str, Any] = {
        "target": decided.target,
        "preset": decided.preset.name,
        "why": decided.why,
        "architecture": decided.arch,
        "parameters": decided.parameters,
        "file_bytes": decided.file_bytes,
        "weight_bytes": decided.weight_bytes,
        "bits_per_weight": round(decided.bits_per_weight, 4),
        "bytes_by_format": decided.bytes_by_format,
        "context": decided.context,
        "kv_type": decided.kv_type,
        "kv_bytes": dict(decided.kv_bytes),
        "memory": asdict(memory) | {"total": memory.total, "headroom": memory.headroom, "fits": memory.fits},
        "rule_of_thumb_bytes": decided.rule_of_thumb,
        "forecast": asdict(decided.forecast),
        "fallbacks": [
            {"tensor": t.name, "wanted": t.wanted, "format": t.format.name, "row": t.shape[-1]}
            for t in decided.fallbacks
        ],
        "ignored": list(decided.blueprint.ignored),
    }
    if tensors:
        found["tensors"] = [
            {"name": t.name, "shape": list(t.shape), "format": t.format.name, "bytes": t.nbytes}
            for t in decided.tensors
        ]
    return found


def conversion_summary(done: Conversion) -> dict[str, Any]:
    """What `convert --json` prints."""
    return {
        "out": str(done.out),
        "model": str(done.artifact.model) if done.artifact else None,
        "sha256": done.artifact.manifest["files"][done.artifact.model.name]["sha256"] if done.artifact else None,
        "plan": summary(done.plan),
        "certificate": asdict(done.certificate) if done.certificate else None,
        **_learned(done.outcome),
        "warnings": list(done.warnings),
    }
