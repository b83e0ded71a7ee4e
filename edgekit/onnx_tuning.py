"""The best ONNX form of a size: plain and with error feedback, in every variant that fits; a gate on held-out text.

Knows the order of the work and what is compared with what; measuring, encoding and running are done elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt

from edgekit import calibration
from edgekit.calibration import Text
from edgekit.export import onnx
from edgekit.flips import Flips
from edgekit.onnx_planning import OnnxPlan
from edgekit.quality import Column
from edgekit.reader import Answers, Reader
from edgekit.reference import CompactReference
from edgekit.runtime.onnxruntime import DecoderSession, open_decoder, template_of
from edgekit.tuning import Candidate, candidate, chance_no_better, changed_answers, climb, surely_better
from edgekit.units import Progress, silent

Moments = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Knowledge:
    """What reading text with the float32 graph taught. `moments`: second moments by the tensor that MatMuls read."""

    moments: Moments = field(repr=False)
    judge: CompactReference = field(repr=False)
    text: str
    tokens: int
    answers: Answers | None = None


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
    warnings: tuple[str, ...] = ()
    ladder: tuple[Candidate, ...] = ()
    flips: Flips | None = None


def learn(
    source: Path,
    text: str | Path,
    context: int,
    *,
    digest: str,
    exporter: str,
    effort: str,
    spill: Path,
    threads: int,
    progress: Progress = silent,
) -> Knowledge:
    """Read text with the float32 export in folder `source`. `text`: a file, or `self`, which the model then writes.

    The last part of a file, or texts of another seed, are held out: nothing that is learned comes from them. Each step
    is kept in the cache by what it follows from, `digest` naming the model's content and `exporter` who made the graph:
    a run that was killed goes on where it was, and another variant or target learns nothing anew. `spill`: a new folder
    for second moments that are too much for the cache.
    """
    size = min(calibration.CHUNK, context)
    opened = partial(open_decoder, source, n_ctx=size, threads=threads)
    engine = _engine(exporter)
    with Reader(opened, template_of(source), size, digest, engine, effort, progress) as reader:
        learned, judged = reader.texts(text)
        judge = reader.judge(judged)
        answers = reader.answers()
    moments = _moments(reader, source / onnx.GRAPH, learned, spill, threads)
    return Knowledge(moments, judge, learned.name, learned.tokens, answers)


def _engine(exporter: str) -> str:
    """Who exports and what computes: part of every key. Names of tensors are theirs."""
    found = [exporter]
    for package in ("onnxruntime", "onnxruntime-genai", "torch", "transformers"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _moments(reader: Reader[DecoderSession], graph: Path, text: Text, spill: Path, threads: int) -> Moments:
    entry = reader.entry("onnx-moments", text=text.digest)
    known = entry.find()
    if known is not None:
        return onnx.open_moments(known)
    batches = [np.asarray(chunk, np.int64)[None] for chunk in text.chunks]
    observe = partial(onnx.observe, graph, batches, threads=threads, progress=reader.progress)
    if not entry.admits(onnx.moment_bytes(graph)):
        return observe(spill=spill)
    with entry.making() as folder:
        return observe(spill=folder)  # mapped files go with the folder when it gets its name


def choose(
    plans: Sequence[OnnxPlan],
    known: Knowledge,
    source: Path,
    folder: Path,
    *,
    threads: int,
    rungs: Sequence[OnnxPlan] = (),
    progress: Progress = silent,
) -> Outcome:
    """Write every plan, plain and with error feedback, judge it on the held-out text, keep the winner only.

    `plans`: what the bytes allow, the first being what would be shipped without measuring. It stands unless another
    has the lower mean and the paired bootstrap is 95 % sure of it. `rungs`: variants to measure beside them, plain, one
    at a time; those that would take more than a minute each are left out, with a warning.
    """
    judging = _Judging(known, source, folder, threads, progress)
    tried = [(plan, moments) for plan in plans for moments in (None, known.moments)]
    seen: list[_Seen] = []
    standing = 0
    for number, (plan, moments) in enumerate(tried):
        seen.append(judging.judge(f"candidate-{number}", plan, moments))
        if number and surely_better(seen[number].kl, seen[standing].kl):
            shutil.rmtree(seen[standing].place)
            standing = number
        elif number:
            shutil.rmtree(seen[number].place)
    candidates = tuple(s.candidate(shipped=number == standing) for number, s in enumerate(seen))
    best = seen[standing]
    ladder, notes = climb(rungs, judging.rung, seen[0].seconds)
    return Outcome(
        replace(best.plan, why=_why(candidates)),
        best.stored,
        candidates,
        chance_no_better(best.kl, seen[0].kl) if standing else 1.0,
        known.text,
        known.tokens,
        known.judge.positions,
        notes,
        ladder,
        changed_answers(known.answers, partial(judging.open, best.place), progress),
    )


@dataclass(frozen=True)
class _Seen:
    """A candidate that was written and judged, and the seconds that took."""

    plan: OnnxPlan
    feedback: bool
    place: Path
    stored: onnx.Report
    kl: Column
    top1: float
    seconds: float

    def candidate(self, *, shipped: bool = False) -> Candidate:
        name = f"{self.plan.label} with error feedback" if self.feedback else self.plan.label
        kind = "feedback" if self.feedback else "preset"
        return candidate(name, kind, self.plan.file_bytes, self.kl, self.top1, shipped=shipped)


@dataclass(frozen=True)
class _Judging:
    known: Knowledge
    source: Path
    folder: Path
    threads: int
    progress: Progress

    def judge(self, name: str, plan: OnnxPlan, moments: Moments | None) -> _Seen:
        start = perf_counter()
        place = self.folder / name
        shutil.copytree(self.source, place, ignore=shutil.ignore_patterns("*.onnx", "*.data"))
        stored = onnx.store(
            self.source / onnx.GRAPH,
            place / onnx.GRAPH,
            plan.variant,
            plan.shape.layers,
            moments,
            self.threads,
            progress=self.progress,
        )
        with self.open(place, max(map(len, self.known.judge.chunks))) as session:
            columns = self.known.judge.columns(session, progress=self.progress)
        same = float(columns.same.mean())
        return _Seen(plan, moments is not None, place, stored, columns.kl, same, perf_counter() - start)

    def rung(self, plan: OnnxPlan) -> tuple[Candidate, float]:
        seen = self.judge(f"rung-{plan.label}", plan, None)
        shutil.rmtree(seen.place)
        return seen.candidate(), seen.seconds

    def open(self, place: Path, context: int) -> DecoderSession:
        return open_decoder(place, n_ctx=context, threads=self.threads)


def _why(candidates: Sequence[Candidate]) -> str:
    first, best = candidates[0], next(c for c in candidates if c.shipped)
    if best is first:
        return f"nothing was surely better than plain {first.name} at its bytes"
    return f"{best.kl / first.kl:.2f} of the KL divergence of plain {first.name}, at most its bytes"
