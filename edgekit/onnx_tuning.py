"""The best ONNX form of a size: plain and with error feedback, in every variant that fits; a gate on held-out text.

Knows the order of the work and what is compared with what; measuring, encoding and running are done elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit import calibration, learning, reference
from edgekit import effort as efforts
from edgekit.calibration import Text
from edgekit.export import onnx
from edgekit.onnx_planning import OnnxPlan
from edgekit.quality import Columns
from edgekit.reference import CompactReference
from edgekit.runtime import Session
from edgekit.runtime.opening import open_session
from edgekit.tuning import Candidate, chance_no_better, surely_better
from edgekit.units import Progress, silent

Moments = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Knowledge:
    """What reading text with the float32 graph taught. `moments`: second moments by the tensor that MatMuls read."""

    moments: Moments = field(repr=False)
    judge: CompactReference = field(repr=False)
    text: str
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """What is shipped, and why: every candidate, and the chance that the winner is no better than the plain form."""

    plan: OnnxPlan
    stored: onnx.Report
    candidates: tuple[Candidate, ...]
    doubt: float
    text: str
    tokens: int
    held_out: int


def learn(
    source: Path,
    text: str | Path,
    context: int,
    *,
    effort: str,
    threads: int | None = None,
    progress: Progress = silent,
) -> Knowledge:
    """Read text with the float32 export in folder `source`. `text`: a file, or `self`, which the model then writes.

    The last part of a file, or texts of another seed, are held out: nothing that is learned comes from them.
    """
    wanted = efforts.find(effort)
    with open_session(source, n_ctx=min(calibration.CHUNK, context), threads=threads) as session:
        if text == "self":
            learned = _written(session, wanted.tokens, 1, progress)
            judged = _written(session, wanted.held_out, 1_000_003, progress)
        else:
            limit = wanted.tokens + wanted.held_out
            whole = calibration.read_text(Path(text), session, session.template, limit=limit)
            learned, judged = learning.split(whole, wanted.held_out / limit)
        judge = reference.record(session, judged.chunks, progress=progress)
    batches = [np.asarray(chunk, np.int64)[None] for chunk in learned.chunks]
    moments = onnx.observe(source / onnx.GRAPH, batches, progress=progress)
    return Knowledge(moments, judge, learned.name, learned.tokens)


def _written(session: Session, tokens: int, seed: int, progress: Progress) -> Text:
    """Text that the model writes itself, one after the other: this engine decodes one sequence at a time."""
    chunks: list[tuple[int, ...]] = []
    done = 0
    while done < tokens:
        number = len(chunks)
        ids = calibration.opening(session, session.template, number)
        room = max(1, session.n_ctx - len(ids))
        ids += session.generate(ids, room, temperature=1.0, top_k=0, top_p=1.0, min_p=0.02, seed=seed + number)
        chunks.append(tuple(ids))
        done += max(1, len(ids))
        progress("write text", min(done, tokens), tokens)
    return Text(f"self, seed {seed}", tuple(c for c in chunks if len(c) >= reference.SHORTEST))


def choose(
    plans: Sequence[OnnxPlan],
    known: Knowledge,
    source: Path,
    folder: Path,
    *,
    threads: int,
    progress: Progress = silent,
) -> Outcome:
    """Write every plan, plain and with error feedback, judge it on the held-out text, keep the winner only.

    `plans`: what the bytes allow, the first being what would be shipped without measuring. It stands unless another
    has the lower mean and the paired bootstrap is 95 % sure of it.
    """
    tried = [(plan, moments) for plan in plans for moments in (None, known.moments)]
    standing, seen = 0, []
    for number, (plan, moments) in enumerate(tried):
        place = folder / f"candidate-{number}"
        shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.onnx", "*.data"))
        stored = onnx.store(
            source / onnx.GRAPH,
            place / onnx.GRAPH,
            plan.variant,
            plan.shape.layers,
            moments,
            threads,
            progress=progress,
        )
        columns = _judged(place, known.judge, threads, progress)
        seen.append((place, stored, columns.kl, float(columns.same.mean())))
        if number and surely_better(columns.kl, seen[standing][2]):
            shutil.rmtree(seen[standing][0])
            standing = number
        elif number:
            shutil.rmtree(place)
    candidates = tuple(
        Candidate(
            name=_name(plan, moments),
            kind="feedback" if moments is not None else "preset",
            nbytes=plan.file_bytes,
            kl=float(kl.mean()),
            kl_stderr=float(kl.std(ddof=1) / np.sqrt(len(kl))),
            top1=top1,
            shipped=number == standing,
        )
        for number, ((plan, moments), (_, _, kl, top1)) in enumerate(zip(tried, seen, strict=True))
    )
    _, stored, kl, _ = seen[standing]
    doubt = chance_no_better(kl, seen[0][2]) if standing else 1.0
    chosen = replace(tried[standing][0], why=_why(candidates))
    return Outcome(chosen, stored, candidates, doubt, known.text, known.tokens, known.judge.positions)


def _judged(place: Path, judge: CompactReference, threads: int, progress: Progress) -> Columns:
    with open_session(place, n_ctx=max(map(len, judge.chunks)), threads=threads) as session:
        return judge.columns(session, progress=progress)


def _name(plan: OnnxPlan, moments: Moments | None) -> str:
    return f"{plan.variant.name} with error feedback" if moments is not None else plan.variant.name


def _why(candidates: Sequence[Candidate]) -> str:
    first, best = candidates[0], next(c for c in candidates if c.shipped)
    if best is first:
        return "nothing of its size was surely better"
    return f"{best.kl / first.kl:.2f} of the KL divergence of plain {first.name}"
