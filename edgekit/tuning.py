"""The best file of a size: importance, error feedback, a measured mix; a gate ships no worse than the stock preset.

Knows what is compared with what; learning (edgekit.learning), allocating and encoding are done elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Protocol, TypeVar

import numpy as np

from edgekit import artifact, chat, flips, folding, mixing
from edgekit.arch import Blueprint
from edgekit.effort import EFFORTS, RUNG_SECONDS, estimate, rung_names, worth_it
from edgekit.effort import find as find_effort
from edgekit.export import gguf
from edgekit.flips import Flips
from edgekit.imatrix_file import Imatrix, open_imatrix
from edgekit.learning import Knowledge, Moments, Opener, importance_names, learn
from edgekit.planning import Plan, plan, with_formats
from edgekit.quality import Column
from edgekit.reader import Answers
from edgekit.runtime import Session
from edgekit.runtime.steady import open_steady
from edgekit.target import Target
from edgekit.units import Progress, silent

__all__ = [
    "EFFORTS", "Attempt", "Candidate", "Knowledge", "Outcome", "attempts", "bring", "candidate", "changed_answers",
    "choose", "climb", "estimate", "importance_names", "learn", "rungs", "spill_folder", "tune", "worth_it",
]  # fmt: skip

RESAMPLES = 2_000
"""Of the paired bootstrap."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to spend the bytes. KL divergence from the unquantised model in nats a token, on held-out text."""

    name: str
    kind: str
    nbytes: int
    kl: float
    kl_stderr: float
    top1: float
    shipped: bool = False


@dataclass(frozen=True)
class Outcome:
    """What is shipped, and why: every candidate, and the chance that the winner is no better than the stock preset."""

    plan: Plan
    written: gguf.Written
    candidates: tuple[Candidate, ...]
    doubt: float
    text: str
    tokens: int
    held_out: int
    warnings: tuple[str, ...] = ()
    ladder: tuple[Candidate, ...] = ()
    flips: Flips | None = None


def bring(path: Path, blueprint: Blueprint) -> Imatrix:
    """An importance matrix of the user's, checked against this model. Raises EdgekitError for another model's."""
    found = open_imatrix(path)
    found.require({t.name: _experts_and_cols(t.shape) for t in blueprint.tensors if len(t.shape) > 1})
    return found


def _experts_and_cols(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0] if len(shape) == 3 else 1, shape[-1])


@dataclass(frozen=True)
class Attempt:
    """A candidate before it is written: formats, and what its weights are encoded with."""

    plan: Plan
    importance: gguf.Importance
    moments: Moments | None

    def encoding(self, threads: int) -> gguf.Encoding:
        return gguf.Encoding(threads, self.importance, gguf.Feedback(self.moments) if self.moments else None)


def attempts(
    decided: Plan,
    known: Knowledge,
    budget: int,
    target: Target,
    *,
    prefer: str,
    effort: str,
    progress: Progress = silent,
) -> dict[str, Attempt]:
    """What the gate chooses from, of at most `budget` bytes each, the stock preset first.

    The preset with importance; the same formats with error feedback; the measured mix with it; at high effort that
    mix with folded scales too; and a random mix, which is only there to be beaten.
    """
    kind = "speed" if prefer == "speed" else "quality"
    ours = with_formats(
        decided, mixing.mix(decided, known.sensitivity, budget, target, prefer=kind), target, "measured"
    )
    chance = with_formats(decided, mixing.random_mix(decided, known.sensitivity, budget, target), target, "by lot")
    found = {
        "preset": Attempt(decided, known.importance, None),
        "feedback": Attempt(decided, known.importance, known.moments),
        "mix": Attempt(ours, known.importance, known.moments),
    }
    if effort == "high":
        found["folded"] = _folded(ours, known, progress)
    found["random"] = Attempt(chance, known.importance, known.moments)
    return found


def _folded(plan: Plan, known: Knowledge, progress: Progress) -> Attempt:
    """`plan` with scales moved between matrices where that lowers the rounding error: the same model, other weights."""
    formats = {t.name: t.format for t in plan.tensors}
    made = folding.fold(plan.blueprint, known.importance, known.moments, formats, progress=progress)
    by_name = {t.name: t for t in made.blueprint.tensors}
    tensors = tuple(replace(t, made=by_name[t.name]) for t in plan.tensors)
    return Attempt(replace(plan, blueprint=made.blueprint, tensors=tensors), made.importance, made.moments)


def choose(
    tried: Mapping[str, Attempt],
    known: Knowledge,
    folder: Path,
    *,
    threads: int,
    rungs: Sequence[Plan] = (),
    progress: Progress = silent,
) -> Outcome:
    """Write every candidate into `folder`, judge them on the held-out text, keep the winner's file only.

    The stock preset wins unless another has the lower mean and the paired bootstrap is 95 % sure of it. `rungs`: stock
    presets to measure beside them (see `rungs`), one file at a time; those that would take more than a minute each are
    left out, with a warning.
    """
    judging = _Judging(known, folder, threads, progress)
    seen: dict[str, _Seen] = {}
    winner = "preset"
    for kind, attempt in tried.items():
        found = seen[kind] = judging.judge(kind, attempt)
        if kind not in (winner, "random") and surely_better(found.kl, seen[winner].kl):
            seen[winner].written.path.unlink()
            winner = kind
        elif kind != "preset":
            found.written.path.unlink()
    preset = tried["preset"].plan.preset.name
    candidates = tuple(
        _candidate(_NAMES[kind].format(preset), kind, found, shipped=kind == winner) for kind, found in seen.items()
    )
    ladder, notes = judging.ladder(rungs, seen["preset"].seconds)
    return Outcome(
        replace(tried[winner].plan, why=_why(winner, candidates)),
        seen[winner].written,
        candidates,
        chance_no_better(seen[winner].kl, seen["preset"].kl) if winner != "preset" else 1.0,
        known.text,
        known.tokens,
        known.judge.positions,
        known.warnings + notes,
        ladder,
        judging.flips(seen[winner].written.path),
    )


_NAMES = {
    "preset": "{}",
    "feedback": "{} with error feedback",
    "mix": "measured mix",
    "folded": "measured mix, scales folded",
    "random": "random mix",
}


@dataclass(frozen=True)
class _Seen:
    """A candidate that was written and judged, and the seconds that took."""

    written: gguf.Written
    kl: Column
    top1: float
    seconds: float


@dataclass(frozen=True)
class _Judging:
    known: Knowledge
    folder: Path
    threads: int
    progress: Progress

    def judge(self, name: str, attempt: Attempt) -> _Seen:
        start = perf_counter()
        path = self.folder / f"{name}.gguf"
        written = gguf.write(attempt.plan, path, attempt.encoding(self.threads), progress=self.progress)
        longest = max(map(len, self.known.judge.chunks))
        with open_steady(path, n_ctx=longest, threads=self.threads) as session:
            columns = self.known.judge.columns(session, progress=self.progress)
        return _Seen(written, columns.kl, float(columns.same.mean()), perf_counter() - start)

    def ladder(self, plans: Sequence[Plan], seconds: float) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
        """Stock presets with importance, and what was left out. `seconds`: what one takes, as seen last."""

        def judged(rung: Plan) -> tuple[Candidate, float]:
            seen = self.judge(f"rung-{rung.preset.name}", Attempt(rung, self.known.importance, None))
            seen.written.path.unlink()
            return _candidate(rung.preset.name, "preset", seen, shipped=False), seen.seconds

        return climb(plans, judged, seconds)

    def flips(self, path: Path) -> Flips | None:
        """How the answers of the file at `path` differ from the unquantised model's."""
        return changed_answers(
            self.known.answers, lambda context: open_steady(path, n_ctx=context, threads=self.threads), self.progress
        )


class _Labelled(Protocol):
    @property
    def label(self) -> str: ...


P = TypeVar("P", bound=_Labelled)


def climb(
    plans: Sequence[P], judged: Callable[[P], tuple[Candidate, float]], seconds: float
) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """What `judged` says of `plans`, and a warning that names what was left out since one takes more than a minute.

    `judged` gives the seconds that it took too; `seconds`: what the last one took before.
    """
    found: list[Candidate] = []
    for decided in plans:
        if seconds > RUNG_SECONDS:
            left = ", ".join(p.label for p in plans[len(found) :])
            return tuple(found), (f"not measured to compare with, each takes about {seconds:.0f} s: {left}",)
        rung, seconds = judged(decided)
        found.append(rung)
    return tuple(found), ()


def changed_answers(
    asked: Answers | None, opened: Callable[[int], AbstractContextManager[Session]], progress: Progress = silent
) -> Flips | None:
    """How the answers of the model that `opened` gives, with a context of so many tokens, differ from those known."""
    if asked is None:
        return None
    with opened(max(map(len, asked.ids)) + asked.max_tokens) as session:
        answers = flips.greedy(session, asked.ids, asked.max_tokens, progress=progress)
        return flips.compare(session, asked.prompts, asked.answers, answers, asked.max_tokens)


def rungs(decided: Plan, budget: int, target: Target, *, effort: str) -> tuple[Plan, ...]:
    """Plans of the stock presets whose sizes are nearest to `budget`, largest first, without that of `decided`: as many
    as the effort allows. They are what `choose` measures to show where the winner stands."""
    wanted = find_effort(effort).rungs
    names = [n for n in rung_names() if n != decided.preset.name]
    if wanted == 0:
        return ()
    blueprint = decided.blueprint
    drafts = (
        plan(blueprint, decided.metadata, target, quant=name, context=decided.context, kv_type=decided.kv_type,
             importance=importance_names(blueprint))
        for name in names
    )  # fmt: skip
    sizes = {p.file_bytes: p for p in drafts}  # presets that fall back alike are one
    near = sorted(sizes.values(), key=lambda p: abs(math.log(p.file_bytes / budget)))[:wanted]
    return tuple(sorted(near, key=lambda p: -p.file_bytes))


def tune(
    model: Path | Opener,
    decided: Plan,
    source: str | Path,
    template: chat.Template | None,
    folder: Path,
    *,
    target: Target,
    budget: int,
    digest: str,
    effort: str,
    prefer: str,
    threads: int,
    progress: Progress = silent,
) -> Outcome:
    """The best file of at most `budget` bytes, in `folder`: learn, try, choose. See `learn`, `attempts`, `choose`."""
    spill = folder / "moments"
    spill.mkdir(exist_ok=True)
    known = learn(
        model, decided, source, template,
        digest=digest, effort=effort, spill=spill, threads=threads, progress=progress,
    )  # fmt: skip
    tried = attempts(decided, known, budget, target, prefer=prefer, effort=effort, progress=progress)
    beside = rungs(decided, budget, target, effort=effort)
    return choose(tried, known, folder, threads=threads, rungs=beside, progress=progress)


def _candidate(name: str, kind: str, seen: _Seen, *, shipped: bool) -> Candidate:
    return candidate(name, kind, seen.written.nbytes, seen.kl, seen.top1, shipped=shipped)


def candidate(name: str, kind: str, nbytes: int, kl: Column, top1: float, *, shipped: bool) -> Candidate:
    """`kl`: the divergence of every position."""
    stderr = float(kl.std(ddof=1) / np.sqrt(len(kl)))
    return Candidate(name, kind, nbytes, float(kl.mean()), stderr, top1, shipped)


def _why(winner: str, candidates: Sequence[Candidate]) -> str:
    stock = next(c for c in candidates if c.kind == "preset")
    if winner == "preset":
        return f"nothing was surely better than {stock.name} with importance at its bytes"
    best = next(c for c in candidates if c.shipped)
    return f"{best.kl / stock.kl:.2f} of the KL divergence of {stock.name} with importance, at most its bytes"


def surely_better(candidate: Column, standing: Column) -> bool:
    """Whether `candidate` has the lower mean KL divergence and the paired bootstrap is 95 % sure of it."""
    return bool(candidate.mean() < standing.mean()) and chance_no_better(candidate, standing) < 0.05


def chance_no_better(candidate: Column, standing: Column, *, seed: int = 0) -> float:
    """Paired bootstrap over scored tokens: the share of resamples in which `candidate` has no lower mean.

    Neighbouring tokens are not independent, so whole runs of 64 are drawn (block bootstrap, Künsch 1989).
    """
    gain = standing - candidate
    block = min(64, max(1, len(gain) // 16))
    sums = np.add.reduceat(gain, np.arange(0, len(gain) - len(gain) % block, block))
    draws = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    return float((sums[draws].sum(axis=1) <= 0).mean())


def spill_folder(folder: Path, decided: Plan) -> Path:
    """A place for second moments beside the artefact, after checking that the disk has room for them."""
    learnable = importance_names(decided.blueprint)
    shapes = {(t.made.role.value[:5], t.shape) for t in decided.tensors if t.name in learnable}
    a_layer = sum(4 * prod(shape[:-2]) * shape[-1] ** 2 for _, shape in shapes)
    artifact.need_disk(folder, a_layer * max(1, len(decided.geometry.layers)))
    path = folder / "moments"
    path.mkdir(exist_ok=True)
    return path
