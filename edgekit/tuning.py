"""The best file of a size: importance, error feedback, a measured mix; a gate ships no worse than the stock preset.

Knows the order of the work and what is compared with what; measuring, allocating and encoding are done elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np

from edgekit import artifact, calibration, chat, folding, mixing, reference, sensitivity
from edgekit.arch import Blueprint, Role
from edgekit.calibration import Text
from edgekit.errors import EdgekitError
from edgekit.export import gguf
from edgekit.export.gguf import Slab
from edgekit.imatrix_file import Imatrix, open_imatrix
from edgekit.planning import Plan, with_formats
from edgekit.quality import Column, Columns
from edgekit.quant import Format, ggml, gptq
from edgekit.reference import CompactReference
from edgekit.runtime.llama_cpp import LlamaSession, open_session
from edgekit.sensitivity import Sensitivity
from edgekit.target import Target
from edgekit.units import Progress, silent

EFFORTS: Mapping[str, tuple[int, int]] = {"low": (8_192, 8_192), "normal": (32_768, 16_384), "high": (131_072, 32_768)}
"""Tokens read to calibrate, and tokens of held-out text that decide between candidates."""

Moments = Mapping[str, Slab]

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


def importance_names(blueprint: Blueprint) -> frozenset[str]:
    """Matrices that get an importance vector when the model reads text: all but those that are only looked up."""
    untied = any(t.role is Role.OUTPUT for t in blueprint.tensors)
    looked_up = {Role.POSITION, Role.TOKEN_TYPE} | ({Role.EMBED} if untied else set())
    matrices = (t for t in blueprint.tensors if len(t.shape) > 1 and not t.keep_f32)
    return frozenset(t.name for t in matrices if t.role not in looked_up)


def bring(path: Path, blueprint: Blueprint) -> Imatrix:
    """An importance matrix of the user's, checked against this model. Raises EdgekitError for another model's."""
    found = open_imatrix(path)
    found.require({t.name: _experts_and_cols(t.shape) for t in blueprint.tensors if len(t.shape) > 1})
    return found


def _experts_and_cols(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0] if len(shape) == 3 else 1, shape[-1])


def learn(
    model: Path,
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
    """Read text with the unquantised `model`. `source`: a file, or `self`. `spill` holds second moments on disk.

    The last part of a file, or texts of another seed, are held out: nothing that is learned comes from them.
    """
    tokens, held_out = EFFORTS[effort]
    context = min(calibration.CHUNK, decided.geometry.context or calibration.CHUNK)
    learnable = importance_names(decided.blueprint)
    names = [t.name for t in decided.tensors if t.name in learnable]
    # probing overwrites weights in memory, so they must not be pages of the file
    with open_session(model, n_ctx=context, threads=threads, mmap=False) as session:
        text, judged = _texts(session, source, template, tokens, held_out, progress)
        found = calibration.calibrate(session, text, digest=digest, moments=names, spill=spill, progress=progress)
        judge = reference.record(session, judged.chunks, progress=progress)
        importance = found.imatrix.importance()
        moments = {name: found.moments[name] for name in names}
        costs = _probe(session, decided, text, importance, moments, effort, progress)
    return Knowledge(importance, moments, judge, costs, text.name, text.tokens, found.warnings)


def _probe(
    session: LlamaSession,
    decided: Plan,
    text: Text,
    importance: gguf.Importance,
    moments: Moments,
    effort: str,
    progress: Progress,
) -> Sensitivity:
    """The cost of every group in every format, and of the stock preset as a whole to correct the sum with.

    At high effort with the encoder that the file will have, error feedback; else with ggml's own, which ranks alike and
    costs a fraction of the time.
    """
    groups, formats = sensitivity.choose_probes(sensitivity.parts_of(decided.blueprint), effort)
    measured = {part.name for group in groups for part in group.parts}
    stock = {t.name: t.format.name for t in decided.tensors if t.name in measured}
    return sensitivity.measure(
        session,
        groups,
        formats,
        text.chunks,
        importance,
        effort=effort,
        considered=[f for f in sensitivity.CONSIDERED if f in gptq.FORMATS],
        combined=[stock],
        encode=_with_feedback(importance, moments) if effort == "high" else None,
        moments=moments if effort == "high" else None,
        progress=progress,
    )


def _with_feedback(importance: gguf.Importance, moments: Moments) -> sensitivity.Encode:
    feedback = gguf.Feedback(moments)

    def encode(name: str, expert: int, rows: Slab, fmt: Format) -> sensitivity.Bytes:
        weights = importance.get(name)
        weights = weights[expert] if weights is not None and weights.ndim == 2 else weights
        if name in feedback and fmt.name in gptq.FORMATS:
            return gptq.encode(rows, fmt, feedback.curvature(name, expert), importance=weights).data
        return ggml.encode(rows, fmt, weights)

    return encode


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


def _texts(
    session: LlamaSession,
    source: str | Path,
    template: chat.Template | None,
    tokens: int,
    held_out: int,
    progress: Progress,
) -> tuple[Text, Text]:
    """(to learn from, to judge by), disjoint."""
    if source == "self":
        learned = calibration.write_text(session, template, tokens, seed=1, progress=progress)
        judged = calibration.write_text(session, template, held_out, seed=1_000_003, progress=progress)
        return learned, _long_enough(judged)
    whole = calibration.read_text(Path(source), session, template, limit=tokens + held_out)
    share = held_out / (tokens + held_out)
    count = max(1, round(len(whole.chunks) * share))
    if len(whole.chunks) < 2:
        raise EdgekitError(
            f"{whole.name} has {whole.tokens} tokens: too few to learn from one part and judge by another",
            f"give at least {2 * calibration.CHUNK} tokens, or use --calibration self",
        )
    return Text(whole.name, whole.chunks[:-count]), _long_enough(Text(whole.name, whole.chunks[-count:]))


def _long_enough(text: Text) -> Text:
    kept = tuple(c for c in text.chunks if len(c) >= reference.SHORTEST)
    if not kept:
        raise EdgekitError("the held-out text is too short to compare on", "give more calibration text")
    return Text(text.name, kept)


def choose(
    tried: Mapping[str, Attempt], known: Knowledge, folder: Path, *, threads: int, progress: Progress = silent
) -> Outcome:
    """Write every candidate into `folder`, judge them on the held-out text, keep the winner's file only.

    The stock preset wins unless another has the lower mean and the paired bootstrap is 95 % sure of it.
    """
    seen: dict[str, tuple[gguf.Written, Column, float]] = {}
    winner = "preset"
    for kind, attempt in tried.items():
        written = gguf.write(attempt.plan, folder / f"{kind}.gguf", attempt.encoding(threads), progress=progress)
        columns = _judged(written.path, known.judge, threads, progress)
        seen[kind] = (written, columns.kl, float(columns.same.mean()))
        if kind not in (winner, "random") and _surely_better(columns.kl, seen[winner][1]):
            seen[winner][0].path.unlink()
            winner = kind
        elif kind != "preset":
            written.path.unlink()
    preset = tried["preset"].plan.preset.name
    candidates = tuple(
        _candidate(preset, kind, written, kl, top1, shipped=kind == winner)
        for kind, (written, kl, top1) in seen.items()
    )
    doubt = chance_no_better(seen[winner][1], seen["preset"][1]) if winner != "preset" else 1.0
    return Outcome(
        replace(tried[winner].plan, why=_why(winner, candidates)),
        seen[winner][0],
        candidates,
        doubt,
        known.text,
        known.tokens,
        known.judge.positions,
        known.warnings,
    )


def _judged(path: Path, judge: CompactReference, threads: int, progress: Progress) -> Columns:
    longest = max(map(len, judge.chunks))
    with open_session(path, n_ctx=longest, threads=threads) as session:
        return judge.columns(session, progress=progress)


def _candidate(preset: str, kind: str, written: gguf.Written, kl: Column, top1: float, *, shipped: bool) -> Candidate:
    names = {"preset": preset, "feedback": f"{preset} with error feedback", "mix": "measured mix"}
    name = names.get(kind) or {"folded": "measured mix, scales folded", "random": "random mix"}[kind]
    stderr = float(kl.std(ddof=1) / np.sqrt(len(kl)))
    return Candidate(name, kind, written.nbytes, float(kl.mean()), stderr, top1, shipped)


def _why(winner: str, candidates: Sequence[Candidate]) -> str:
    stock = next(c for c in candidates if c.kind == "preset")
    if winner == "preset":
        return f"nothing was surely better than {stock.name} with importance at its bytes"
    best = next(c for c in candidates if c.shipped)
    return f"{best.kl / stock.kl:.2f} of the KL divergence of {stock.name} with importance, at most its bytes"


def _surely_better(candidate: Column, standing: Column) -> bool:
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
