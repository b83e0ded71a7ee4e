"""How far a model is from its reference: divergence with errors and a noise floor, changed answers, task scores.

Knows what a reference can be and the order of the work; the measuring is in quality, reference, flips and tasks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgekit import artifact, calibration, corpus, flips, pipeline, quality, reference, tasks, verification
from edgekit.errors import DoesNotFit, EdgekitError, UnsupportedModel, UnsupportedVocabulary
from edgekit.flips import Flips, Prompt
from edgekit.generation import template_of
from edgekit.gguf_file import GgufFile, open_gguf
from edgekit.host import usable_cores
from edgekit.planning import Plan
from edgekit.quality import Comparison, Stored
from edgekit.reference import CompactReference
from edgekit.runtime import Session
from edgekit.runtime.llama_cpp import LlamaSession, open_session
from edgekit.target import Target
from edgekit.tasks import Score
from edgekit.units import Progress, silent

CONTEXT, BUILTIN_CONTEXT = 512, 256
"""Tokens of a chunk: llama-perplexity's default for a text of the user's, less for the short built-in one."""

LARGEST_TEXT = 256 << 20
"""Bytes above which a text is refused: its tokens would take days to read."""

FLOOR_CHUNKS = 8
"""Chunks that the noise floor is measured on: it is the same everywhere, and a second reference is expensive."""

SMALL_BATCH = 32
"""Tokens a batch for reading a text a second time with other kernels."""

ANSWER_CONTEXT, TASK_CONTEXT = 1024, 4096
"""Context for prompts and for tasks, where the model was trained for as much."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured, and on what. None = the default.

    `prompts` None: no answers are compared. `save`: a file for the reference's predictions. `floor`: whether the
    noise floor is measured.
    """

    text: Path | None = None
    chunks: int | None = None
    n_ctx: int | None = None
    threads: int | None = None
    floor: bool = True
    save: Path | None = None
    prompts: tuple[Prompt, ...] | None = None
    answer_tokens: int = flips.MAX_TOKENS
    tasks: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Floor:
    """The divergence that is there although the weights are the same: what lies below cannot be told from nothing."""

    method: str
    kl_mean: float
    kl_stderr: float
    top1: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """Everything measured. `kind`: the reference is a `model` or was `stored`; sizes are of the files, bytes.

    `jitter` is the floor of the artefact itself: how far it is from itself when the same text is read in small batches.
    `flips`, `floor` and `reference_tasks` are None or empty where they were not wanted or need a model and there is
    none; `notes` say why.
    """

    artifact: str
    reference: str
    kind: str
    text: str
    nbytes: int
    reference_nbytes: int | None
    comparison: Comparison
    floor: Floor | None = None
    jitter: Floor | None = None
    flips: Flips | None = None
    tasks: tuple[Score, ...] = ()
    reference_tasks: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the versions that took part."""
        found = asdict(replace(self, flips=None))
        return found | {"flips": self.flips.as_json() if self.flips else None, "versions": pipeline.versions()}


def evaluate(
    ref: str | Path, against: str | Path, options: Options = Options(), *, progress: Progress = silent
) -> Evaluation:
    """Compare the model behind `ref` (an artefact or a GGUF) with a reference.

    `against`: a GGUF or an artefact; a model folder or hub id, from which a temporary unquantised GGUF is made; or a
    file with stored predictions (`save`, or llama-perplexity's `--kl-divergence-base`). Raises what opening those
    raises, DoesNotFit for disk and memory, EdgekitError for different vocabularies and texts that are too short.
    """
    candidate = artifact.model_file(ref)
    _must_predict(open_gguf(candidate))
    if options.tasks:
        tasks.require()
    if options.save and not options.save.absolute().parent.is_dir():
        raise EdgekitError(f"there is no folder {options.save.parent}", "make it, or choose another --save")
    stored = _stored(Path(against))
    if stored is not None:
        return _against_stored(candidate, Path(against), stored, options, progress)
    with _model(against, candidate, options, progress) as model:
        return _against_model(candidate, model, options, progress)


def keep(found: Evaluation, ref: str | Path) -> Path:
    """Leave `found` as `evaluation.json` in the artefact folder, where the report looks for it."""
    return artifact.keep(ref, artifact.EVALUATION, found.as_json())


# --- what the reference is -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """A reference that can be run. `plan`: its tensors as a checkpoint; None for a file that is quantized already."""

    name: str
    path: Path
    plan: Plan | None


def _stored(path: Path) -> Stored | CompactReference | None:
    """Stored predictions, by the first bytes of the file; None for anything else."""
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError:
        return None
    if magic[:4] == b"PK\3\4":
        return reference.open_reference(path)
    return None if magic[:4] == b"GGUF" else quality.open_stored(path)


@contextmanager
def _model(against: str | Path, candidate: Path, options: Options, progress: Progress) -> Iterator[_Model]:
    """The reference as a GGUF on disk; one that had to be made is removed afterwards."""
    path = Path(against)
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").is_file()):
        file = artifact.model_file(path)
        yield _Model(path.name, file, _plan_of(file))
        return
    source = pipeline.open_source(against, progress=progress)
    plan = _unquantised_plan(source)
    beside = 0 if options.save else candidate.stat().st_size
    with verification.unquantised(
        _work_folder(candidate), plan, threads=options.threads or usable_cores(), beside=beside, progress=progress
    ) as made:
        yield _Model(source.checkpoint.name, made, plan)


def _plan_of(path: Path) -> Plan | None:
    try:
        return _unquantised_plan(pipeline.open_source(path))
    except (UnsupportedModel, UnsupportedVocabulary):
        return None


def _unquantised_plan(source: pipeline.Source) -> Plan:
    if not source.blueprint.geometry.causal:
        raise EdgekitError(f"{source.checkpoint.name} is an encoder: it predicts no tokens", "compare language models")
    # a named preset, since nothing is chosen here: what is used of it are the tensors, not their formats
    return pipeline.plan_source(source, Target.load("host"), pipeline.Options(quant="F16", context=CONTEXT))


def _work_folder(candidate: Path) -> Path:
    """Beside the candidate, since /tmp may be memory; elsewhere when that cannot be written."""
    folder = candidate.absolute().parent
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def _must_predict(file: GgufFile) -> None:
    pooled = file.get(f"{file.get('general.architecture')}.pooling_type")
    if pooled is not None:
        raise EdgekitError(f"{file.path.name} is an encoder: it predicts no tokens", "compare language models")


# --- against a model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What was learned from the reference while it was open."""

    tokens: list[int]
    n_ctx: int
    text: str
    ids: list[list[int]]
    answers: list[list[int]]
    scores: tuple[Score, ...]
    floor: Floor | None
    notes: tuple[str, ...]


def _against_model(candidate: Path, model: _Model, options: Options, progress: Progress) -> Evaluation:
    sizes = (candidate.stat().st_size, model.path.stat().st_size)
    if not options.save:
        verification.need_memory(sum(sizes), "--save FILE has one read after the other")
    with _session(model.path, options) as source:
        seen = _look(source, model, options, progress)
        if options.save:
            _same_vocabulary(source.n_vocab, open_gguf(candidate))
            stored = reference.record(source, _chunks(seen, options), progress=progress)
            stored.save(options.save)
        else:
            with _session(candidate, options) as session:
                _same_tokens(source, session, _sample(options))
                found = quality.compare(
                    source, session, seen.tokens, seen.n_ctx, chunks=options.chunks, shorten=True, progress=progress
                )
                return _finish(candidate, model, seen, found, session, options, progress)
    with _session(candidate, options) as session:
        found = stored.compare(session, progress=progress)
        return _finish(candidate, model, seen, found, session, options, progress)


def _look(source: LlamaSession, model: _Model, options: Options, progress: Progress) -> _Seen:
    """Everything that the reference alone is needed for."""
    template = template_of(open_gguf(model.path))
    tokens = _tokens(source, options, template)
    n_ctx = min(options.n_ctx or _default_context(options), len(tokens))
    floor, notes = _floor(source, model, tokens, n_ctx, options, progress)
    prompts = options.prompts or ()
    ids = flips.prompt_ids(source, template, prompts)
    answers = flips.greedy(source, ids, options.answer_tokens, progress=progress)
    scores = tasks.run(source, options.tasks, limit=options.limit, progress=progress) if options.tasks else ()
    name = options.text.name if options.text else "built-in text"
    return _Seen(tokens, n_ctx, name, ids, answers, scores, floor, notes + _text_notes(options))


def _finish(
    candidate: Path, model: _Model, seen: _Seen, found: Comparison, session: LlamaSession, options: Options,
    progress: Progress,
) -> Evaluation:  # fmt: skip
    """The part that needs the candidate alone."""
    changed = None
    if options.prompts is not None:
        theirs = flips.greedy(session, seen.ids, options.answer_tokens, progress=progress)
        changed = flips.compare(session, options.prompts, seen.answers, theirs, options.answer_tokens)
    scores = tasks.run(session, options.tasks, limit=options.limit, progress=progress) if options.tasks else ()
    return Evaluation(
        artifact=candidate.name,
        reference=model.name,
        kind="model",
        text=seen.text,
        nbytes=candidate.stat().st_size,
        reference_nbytes=model.path.stat().st_size,
        comparison=found,
        floor=seen.floor,
        jitter=_jitter(candidate, session, seen.tokens, seen.n_ctx, options, progress),
        flips=changed,
        tasks=scores,
        reference_tasks=seen.scores,
        notes=seen.notes,
    )


def _session(path: Path, options: Options) -> LlamaSession:
    file = open_gguf(path)
    trained = file.get(f"{file.get('general.architecture')}.context_length")
    most = trained if isinstance(trained, int) and trained > 0 else TASK_CONTEXT
    n_ctx = options.n_ctx or _default_context(options)
    if options.prompts:
        n_ctx = max(n_ctx, min(most, ANSWER_CONTEXT))
    if options.tasks:
        n_ctx = max(n_ctx, min(most, TASK_CONTEXT))
    return open_session(path, n_ctx=n_ctx, threads=options.threads)


def _default_context(options: Options) -> int:
    return CONTEXT if options.text else BUILTIN_CONTEXT


def _tokens(session: Session, options: Options, template: Any) -> list[int]:
    """Ids of the text, as llama-perplexity makes them: special tokens added, none read out of the text."""
    if options.text and options.text.suffix.lower() in (".jsonl", ".ndjson"):
        chats = calibration.read_text(options.text, session, template)
        return [token for chunk in chats.chunks for token in chunk]
    return session.tokenize(_text(options.text), add_special=True, parse_special=False)


def _text(path: Path | None) -> str:
    if path is None:
        return corpus.TEXT
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise EdgekitError(f"{path} is larger than {LARGEST_TEXT >> 20} MiB", "give a part of it")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise EdgekitError(f"{path}: byte {e.start} is not UTF-8", "save the text as UTF-8") from None
    except OSError as e:
        raise EdgekitError(f"cannot read {path}: {e.strerror}", "--text FILE, or leave it out") from None


def _sample(options: Options) -> str:
    return _text(options.text)[: 1 << 16]


def _text_notes(options: Options) -> tuple[str, ...]:
    if options.text:
        return ()
    return (f"the built-in text is short ({len(corpus.TEXT.split())} words): --text FILE gives smaller errors",)


def _chunks(seen: _Seen, options: Options) -> list[list[int]]:
    count = min(options.chunks or 1 << 30, len(seen.tokens) // seen.n_ctx) if seen.n_ctx else 0
    return [seen.tokens[i * seen.n_ctx : (i + 1) * seen.n_ctx] for i in range(count)]


def _same_vocabulary(size: int, file: GgufFile) -> None:
    words: Sequence[Any] = file.get("tokenizer.ggml.tokens", ())
    if len(words) != size:
        raise EdgekitError(
            f"the vocabularies differ: {size} tokens in the reference, {len(words)} in {file.path.name}",
            "compare models that share a tokenizer",
        )


def _same_tokens(ours: Session, theirs: Session, text: str) -> None:
    first, second = (s.tokenize(text, add_special=True, parse_special=False) for s in (ours, theirs))
    if first != second:
        raise EdgekitError("the two models cut the text into different tokens", "compare models that share a tokenizer")


# --- the noise floor -------------------------------------------------------------------------------------------------


def _floor(
    source: LlamaSession, model: _Model, tokens: list[int], n_ctx: int, options: Options, progress: Progress
) -> tuple[Floor | None, tuple[str, ...]]:
    """The reference against itself: its weights in the other of F32 and BF16, or, quantized, read in small batches."""
    if not options.floor:
        return None, ()
    chunks = min(options.chunks or FLOOR_CHUNKS, FLOOR_CHUNKS)
    try:
        with _twin(model, options, n_ctx, progress) as (method, twin, flip):
            pair = (twin, source) if flip else (source, twin)
            found = quality.compare(*pair, tokens, n_ctx, chunks=chunks, progress=progress)
    except DoesNotFit as e:
        return None, (f"the noise floor was not measured: {e}",)
    return Floor(method, found.kl_mean, found.kl_stderr, found.top1, found.tokens), ()


@contextmanager
def _twin(model: _Model, options: Options, n_ctx: int, progress: Progress) -> Iterator[tuple[str, LlamaSession, bool]]:
    """(what was done, the session, whether it is the reference of the two): F32 is the more exact one."""
    if model.plan is None:
        with _in_small_batches(model.path, n_ctx, options) as session:
            yield f"the reference read in batches of {SMALL_BATCH} tokens against itself", session, False
        return
    own = verification.source_precision(model.plan)
    other = "BF16" if own == "F32" else "F32"
    with (
        verification.unquantised(
            _work_folder(model.path), model.plan, threads=options.threads or usable_cores(), preset=other,
            beside=model.path.stat().st_size, progress=progress,
        ) as made,
        open_session(made, n_ctx=n_ctx, threads=options.threads) as session,
    ):  # fmt: skip
        exact, rounded = ("F32", own) if other == "F32" else (own, other)
        yield f"{rounded} against {exact}", session, other == "F32"


@contextmanager
def _in_small_batches(path: Path, n_ctx: int, options: Options) -> Iterator[LlamaSession]:
    """The kernels for a few tokens, which generating uses, round otherwise than those for many."""
    verification.need_memory(2 * path.stat().st_size)
    with open_session(path, n_ctx=n_ctx, threads=options.threads, n_batch=SMALL_BATCH, n_ubatch=SMALL_BATCH) as session:
        yield session


def _jitter(
    path: Path, session: LlamaSession, tokens: Sequence[int], n_ctx: int, options: Options, progress: Progress
) -> Floor | None:
    """The candidate against itself. Blocks of weights meet activations rounded to 8 bits, and the smallest difference
    before that rounding becomes one of its size: no figure of this file on this text is finer."""
    if not options.floor:
        return None
    chunks = min(options.chunks or FLOOR_CHUNKS, FLOOR_CHUNKS)
    try:
        with _in_small_batches(path, n_ctx, options) as again:
            found = quality.compare(session, again, tokens, n_ctx, chunks=chunks, progress=progress)
    except DoesNotFit:
        return None
    method = f"the artefact read in batches of {SMALL_BATCH} tokens against itself"
    return Floor(method, found.kl_mean, found.kl_stderr, found.top1, found.tokens)


# --- against what was stored -----------------------------------------------------------------------------------------


def _against_stored(
    candidate: Path, path: Path, stored: Stored | CompactReference, options: Options, progress: Progress
) -> Evaluation:
    if options.text or options.chunks or options.n_ctx or options.save:
        raise EdgekitError(
            f"{path} holds its own text, chunks and context", "leave out --text, --chunks, --ctx-size and --save"
        )
    longest = stored.n_ctx if isinstance(stored, Stored) else max(map(len, stored.chunks))
    notes = ["a stored reference has no model: no noise floor, and no answers to compare"] if options.prompts else []
    own = replace(options, n_ctx=longest, prompts=None)
    with _session(candidate, own) as session:
        if isinstance(stored, Stored):
            found = quality.compare(stored, session, progress=progress)
            if stored.nll is None:
                notes.append("the reference's perplexity is too low where its file cuts off small probabilities")
        else:
            found = stored.compare(session, progress=progress)
        scores = tasks.run(session, options.tasks, limit=options.limit, progress=progress) if options.tasks else ()
    return Evaluation(
        artifact=candidate.name,
        reference=path.name,
        kind="stored",
        text="the text it was recorded from",
        nbytes=candidate.stat().st_size,
        reference_nbytes=path.stat().st_size,
        comparison=found,
        tasks=scores,
        notes=tuple(notes),
    )
