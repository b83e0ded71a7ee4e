"""What the unquantised model teaches: its text, what flows through it, its predictions, what each format costs it.

Knows the order in which that is learned and what of it is known already; chooses no format and writes no file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edgekit import cache, calibration, chat, effort, sensitivity
from edgekit.arch import Blueprint, Role
from edgekit.calibration import Text
from edgekit.export import gguf
from edgekit.export.gguf import Slab
from edgekit.planning import Plan
from edgekit.quant import Format, ggml, gptq
from edgekit.reader import Answers, Reader, write_json
from edgekit.reference import CompactReference
from edgekit.runtime.llama_cpp import LlamaSession
from edgekit.runtime.steady import open_steady
from edgekit.sensitivity import Sensitivity
from edgekit.units import Progress, silent

Moments = Mapping[str, Slab]
Opener = Callable[[], AbstractContextManager[Path]]
"""Makes the unquantised model's file, which may go again when the block ends."""


@dataclass(frozen=True)
class Knowledge:
    """What reading the calibration text taught: importance for every matrix, and what the candidates are judged by."""

    importance: gguf.Importance
    moments: Moments
    judge: CompactReference
    sensitivity: Sensitivity
    text: str
    tokens: int
    warnings: tuple[str, ...] = field(default=())
    answers: Answers | None = None


def importance_names(blueprint: Blueprint) -> frozenset[str]:
    """Matrices that get an importance vector when the model reads text: all but those that are only looked up."""
    untied = any(t.role is Role.OUTPUT for t in blueprint.tensors)
    looked_up = {Role.POSITION, Role.TOKEN_TYPE} | ({Role.EMBED} if untied else set())
    matrices = (t for t in blueprint.tensors if len(t.shape) > 1 and not t.keep_f32)
    return frozenset(t.name for t in matrices if t.role not in looked_up)


def learn(
    model: Path | Opener,
    decided: Plan,
    source: str | Path,
    template: chat.Template | None,
    *,
    digest: str,
    effort: str,
    spill: Path,
    threads: int | None = None,
    progress: Progress = silent,
) -> Knowledge:
    """Read text with the unquantised `model`. `source`: a file, or `self`. `spill`: where second moments go that are
    too much for the cache.

    The last part of a file, or texts of another seed, are held out: nothing that is learned comes from them. Each step
    is kept in the cache by what it follows from, `digest` naming the model's content, and of the probes every single
    one: a run that was killed goes on where it was, and another size or target learns nothing anew. The model is opened
    only if something is missing.
    """
    context = min(calibration.CHUNK, decided.geometry.context or calibration.CHUNK)
    opened = partial(_open, model, context, threads)
    with Reader(opened, template, context, digest, calibration.engine(), effort, progress) as reader:
        text, judged = reader.texts(source)
        names = _learnable(decided)
        found = calibration.recall(text, digest=digest, moments=names) or calibration.calibrate(
            reader.session, text, digest=digest, moments=names, spill=spill, progress=progress
        )
        judge = reader.judge(judged)
        answers = reader.answers()
        importance = found.imatrix.importance()
        costs = _costs(reader, decided.blueprint, text, importance, found.moments, threads)
    return Knowledge(importance, found.moments, judge, costs, text.name, text.tokens, found.warnings, answers)


@contextmanager
def _open(model: Path | Opener, context: int, threads: int | None) -> Iterator[LlamaSession]:
    with ExitStack() as stack:
        path = model if isinstance(model, Path) else stack.enter_context(model())
        # probing overwrites weights in memory, so they must not be pages of the file
        yield stack.enter_context(open_steady(path, n_ctx=context, threads=threads, mmap=False))


def _learnable(decided: Plan) -> list[str]:
    learnable = importance_names(decided.blueprint)
    return [t.name for t in decided.tensors if t.name in learnable]


def _costs(
    reader: Reader[LlamaSession],
    blueprint: Blueprint,
    text: Text,
    importance: gguf.Importance,
    moments: Moments,
    threads: int | None,
) -> Sensitivity:
    """The cost of every group in every format, and of two stock presets as a whole to correct the sum with.

    At high effort, and where that takes little time, with the encoder that the file will have, error feedback; else
    with ggml's own, which ranks nearly alike and costs a fraction of the time.
    """
    groups, formats = sensitivity.choose_probes(sensitivity.parts_of(blueprint), reader.effort)
    feedback = _probes_with_feedback(reader, blueprint, threads)
    facts = {
        "text": text.digest, "effort": reader.effort, "feedback": feedback, "formats": formats,
        "groups": [g.name for g in groups], "moments": sorted(moments),
    }  # fmt: skip
    journal = cache.Journal("probes", cache.key(model=reader.digest, engine=reader.engine, **facts))

    def make() -> Sensitivity:
        return sensitivity.measure(
            reader.session,
            groups,
            formats,
            text.chunks,
            importance,
            effort=reader.effort,
            considered=[f for f in sensitivity.CONSIDERED if f in gptq.FORMATS],
            combined=sensitivity.combinations(blueprint, importance.keys()),
            encode=_with_feedback(importance, moments, reader.session.threads) if feedback else None,
            moments=moments if feedback else None,
            kept=journal,
            progress=reader.progress,
        )

    def save(made: Sensitivity, folder: Path) -> None:
        write_json(folder / "sensitivity.json", made.as_json())

    found = reader.remembered("sensitivity", _load_costs, make, save, **facts)
    journal.remove()
    return found


def _probes_with_feedback(reader: Reader[LlamaSession], blueprint: Blueprint, threads: int | None) -> bool:
    """Decided once for a model and machine, whatever else runs here: what is kept must be found again."""
    if reader.effort != "normal":
        return reader.effort == "high"

    def make() -> bool:
        return effort.with_feedback(blueprint, reader.effort, effort.measure_speed(threads))

    return reader.remembered(
        "choices",
        lambda folder: bool(json.loads((folder / "feedback.json").read_text(encoding="utf-8"))),
        make,
        lambda made, folder: write_json(folder / "feedback.json", made),
        what="probes with feedback", effort=reader.effort,
    )  # fmt: skip


def _load_costs(folder: Path) -> Sensitivity:
    return sensitivity.from_json(json.loads((folder / "sensitivity.json").read_text(encoding="utf-8")))


def _with_feedback(importance: gguf.Importance, moments: Moments, threads: int) -> sensitivity.Encode:
    feedback = gguf.Feedback(moments)

    def encode(name: str, expert: int, rows: Slab, fmt: Format) -> sensitivity.Bytes:
        weights = importance.get(name)
        weights = weights[expert] if weights is not None and weights.ndim == 2 else weights
        if name in feedback and fmt.name in gptq.FORMATS:
            curvature = feedback.curvature(name, expert)
            return gptq.encode(rows, fmt, curvature, importance=weights, threads=threads).data
        return ggml.encode(rows, fmt, weights, threads)

    return encode
