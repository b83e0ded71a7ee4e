"""How far a model is from its reference: divergence with errors and a noise floor, changed answers, task scores.

Knows the order of the work; what a reference can be is in _models, the measuring in quality, similarity, reference,
flips and tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit import artifact, flips, quality, reference, similarity, tasks, verification
from edgekit.errors import EdgekitError
from edgekit.evaluation._floor import jitter, noise_floor
from edgekit.evaluation._models import (
    Model,
    candidate_of,
    must_compare,
    reference_for,
    same_kind,
    stored_predictions,
)
from edgekit.evaluation._text import (
    default_context,
    name_of,
    notes_on,
    same_tokens,
    same_vocabulary,
    text_of,
    tokens_of,
)
from edgekit.evaluation._what import Evaluation, Floor, Options
from edgekit.flips import Flips
from edgekit.quality import Comparison, Stored
from edgekit.reference import CompactReference
from edgekit.runtime import Session
from edgekit.tasks import Score
from edgekit.units import Progress, silent

__all__ = ["Evaluation", "Floor", "Options", "evaluate", "keep"]

ANSWER_CONTEXT, TASK_CONTEXT = 1024, 4096
"""Context for prompts and for tasks, where the model was trained for as much."""

_DEFAULTS = Options()


def evaluate(
    ref: str | Path, against: str | Path, options: Options = _DEFAULTS, *, progress: Progress = silent
) -> Evaluation:
    """Compare the model behind `ref` (an artefact, a GGUF or an ONNX graph) with a reference.

    `against`: a GGUF, an ONNX graph or an artefact; a model folder or hub id, from which a temporary unquantised GGUF
    is made; or a file with stored predictions (`save`, or llama-perplexity's `--kl-divergence-base`). Encoders are
    compared by their vectors. Raises what opening those raises, DoesNotFit for disk and memory, EdgekitError for
    different vocabularies and texts that are too short.
    """
    candidate = candidate_of(ref)
    must_compare(candidate)
    if options.tasks:
        tasks.require()
    if options.save and not options.save.absolute().parent.is_dir():
        raise EdgekitError(f"there is no folder {options.save.parent}", "make it, or choose another --save")
    stored = stored_predictions(Path(against))
    if stored is not None:
        if candidate.encoder:
            raise EdgekitError(f"{candidate.name} is an encoder: it predicts no tokens", "compare it with a model")
        return _against_stored(candidate, Path(against), stored, options, progress)
    beside = 0 if options.save else None
    with reference_for(against, candidate, beside=beside, threads=options.threads, progress=progress) as model:
        same_kind(candidate, model)
        compare = _encoders if candidate.encoder else _against_model
        return compare(candidate, model, options, progress)


def keep(found: Evaluation, ref: str | Path) -> Path:
    """Leave `found` as `evaluation.json` in the artefact folder, where the report looks for it."""
    return artifact.keep(ref, artifact.EVALUATION, found.as_json())


# --- encoders --------------------------------------------------------------------------------------------------------


def _encoders(candidate: Model, model: Model, options: Options, progress: Progress) -> Evaluation:
    if options.tasks or options.save:
        raise EdgekitError(f"{candidate.name} is an encoder: it predicts no tokens", "leave out --tasks and --save")
    texts = similarity.sentences(text_of(options.text))
    with model.open(options.n_ctx, options.threads) as source, candidate.open(options.n_ctx, options.threads) as other:
        found = similarity.compare(source, other, texts, progress=progress)
    return _told(candidate, model, name_of(options), None, embeddings=found, notes=notes_on(options))


def _told(
    candidate: Model, model: Model, text: str, found: Comparison | None, *, notes: tuple[str, ...],
    embeddings: similarity.Agreement | None = None,
) -> Evaluation:  # fmt: skip
    return Evaluation(
        artifact=candidate.path.name if candidate.engine == "gguf" else candidate.name,
        reference=model.name,
        kind="model",
        text=text,
        nbytes=candidate.nbytes,
        reference_nbytes=model.nbytes,
        comparison=found,
        embeddings=embeddings,
        notes=notes,
        engine=candidate.engine,
    )


# --- against a model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What was learned from the reference while it was open."""

    tokens: list[int]
    n_ctx: int
    ids: list[list[int]]
    answers: list[list[int]]
    scores: tuple[Score, ...]
    floor: Floor | None
    notes: tuple[str, ...]


def _against_model(candidate: Model, model: Model, options: Options, progress: Progress) -> Evaluation:
    if not options.save:
        verification.need_memory(candidate.nbytes + model.nbytes, "--save FILE has one read after the other")
    with _session(model, options) as source:
        seen = _look(source, model, options, progress)
        same_vocabulary(source.n_vocab, candidate.n_vocab, candidate.name)
        if options.save:
            stored = reference.record(source, _chunks(seen, options), progress=progress)
            stored.save(options.save)
        else:
            with _session(candidate, options) as session:
                notes = same_tokens(source, session, options, one_engine=candidate.engine == model.engine)
                found = quality.compare(
                    source, session, seen.tokens, seen.n_ctx, chunks=options.chunks, shorten=True, progress=progress
                )
                seen = replace(seen, notes=seen.notes + notes)
                return _finish(candidate, model, seen, found, session, options, progress)
    with _session(candidate, options) as session:
        found = stored.compare(session, progress=progress)
        return _finish(candidate, model, seen, found, session, options, progress)


def _look(source: Session, model: Model, options: Options, progress: Progress) -> _Seen:
    """Everything that the reference alone is needed for."""
    tokens = tokens_of(source, options)
    n_ctx = min(options.n_ctx or default_context(options), len(tokens))
    floor, notes = noise_floor(source, model, tokens, n_ctx, options, progress)
    ids = flips.prompt_ids(source, source.template, options.prompts or ())
    answers = flips.greedy(source, ids, options.answer_tokens, progress=progress)
    scores = tasks.run(source, options.tasks, limit=options.limit, progress=progress) if options.tasks else ()
    return _Seen(tokens, n_ctx, ids, answers, scores, floor, notes + notes_on(options))


def _finish(
    candidate: Model, model: Model, seen: _Seen, found: Comparison, session: Session, options: Options,
    progress: Progress,
) -> Evaluation:  # fmt: skip
    """The part that needs the candidate alone."""
    changed: Flips | None = None
    if options.prompts is not None:
        theirs = flips.greedy(session, seen.ids, options.answer_tokens, progress=progress)
        changed = flips.compare(session, options.prompts, seen.answers, theirs, options.answer_tokens)
    scores = tasks.run(session, options.tasks, limit=options.limit, progress=progress) if options.tasks else ()
    notes = seen.notes
    if options.floor and candidate.engine != "gguf":
        notes += ("own noise is measured for GGUF only: onnxruntime-genai offers no other batches to read in",)
    return replace(
        _told(candidate, model, name_of(options), found, notes=notes),
        floor=seen.floor,
        jitter=jitter(candidate, session, seen.tokens, seen.n_ctx, options, progress),
        flips=changed,
        tasks=scores,
        reference_tasks=seen.scores,
    )


def _session(model: Model, options: Options) -> Session:
    most = model.trained if model.trained > 0 else TASK_CONTEXT
    n_ctx = options.n_ctx or default_context(options)
    if options.prompts:
        n_ctx = max(n_ctx, min(most, ANSWER_CONTEXT))
    if options.tasks:
        n_ctx = max(n_ctx, min(most, TASK_CONTEXT))
    return model.open(n_ctx, options.threads)


def _chunks(seen: _Seen, options: Options) -> list[Sequence[int]]:
    count = min(options.chunks or 1 << 30, len(seen.tokens) // seen.n_ctx) if seen.n_ctx else 0
    return [seen.tokens[i * seen.n_ctx : (i + 1) * seen.n_ctx] for i in range(count)]


# --- against what was stored -----------------------------------------------------------------------------------------


def _against_stored(
    candidate: Model, path: Path, stored: Stored | CompactReference, options: Options, progress: Progress
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
    kept = Model(path.name, path, False, path.stat().st_size)
    told = _told(candidate, kept, "the text it was recorded from", found, notes=tuple(notes))
    return replace(told, kind="stored", tasks=scores)
