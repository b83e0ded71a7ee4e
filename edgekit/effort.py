"""What tuning costs, known before it runs: tokens and forward passes of every step, and about how long on this machine.

Knows counts and speeds; runs nothing but a small matrix product to see how fast this machine multiplies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from time import perf_counter

import numpy as np

from edgekit import sensitivity
from edgekit.arch import Blueprint, Role
from edgekit.host import detect
from edgekit.planning import Plan
from edgekit.quant import gptq, presets
from edgekit.shelf import unknown

PASS = sensitivity.PASS
"""Tokens of one forward pass, as work is counted."""

PATIENCE = 600.0
"""Seconds that may pass without having been asked for."""

FEEDBACK_PATIENCE = 180.0
"""Seconds that probing with the encoder of the final file may take beyond ggml's own, below high effort."""


RUNG_SECONDS = 60.0
"""A stock preset that takes longer than this to write and judge is not measured just to compare with."""


@dataclass(frozen=True, slots=True)
class Effort:
    """`tokens` read to calibrate, of which `held_out` more decide between candidates; prompts that are answered to see
    flips, and tokens of an answer; stock presets around the size that are measured too (None: all)."""

    tokens: int
    held_out: int
    prompts: int
    answer_tokens: int
    rungs: int | None


EFFORTS: Mapping[str, Effort] = {
    "low": Effort(8_192, 8_192, 8, 16, 0),
    "normal": Effort(32_768, 16_384, 24, 32, 6),
    "high": Effort(131_072, 32_768, 24, 48, None),
}


def find(name: str) -> Effort:
    """Raises UnknownName."""
    if name not in EFFORTS:
        raise unknown("effort", name, EFFORTS)
    return EFFORTS[name]


@dataclass(frozen=True, slots=True)
class Speed:
    """Of this machine: `flops` of a float32 product on one core, `threads` that compute, and how much faster than that
    product the engine is with 16-bit weights (`half`)."""

    flops: float
    threads: int
    half: float = 1.0


@dataclass(frozen=True, slots=True)
class Work:
    """Steps of tuning by name: tokens that the model reads or writes in each, and seconds where the speed is known.

    Writing files is a step of 0 tokens.
    """

    tokens: Mapping[str, int]
    seconds_of: Mapping[str, float] | None = None

    @property
    def passes(self) -> int:
        """Forward passes of 4,096 tokens, all steps together."""
        return ceil(sum(self.tokens.values()) / PASS)

    @property
    def seconds(self) -> float | None:
        return None if self.seconds_of is None else sum(self.seconds_of.values())

    def __str__(self) -> str:
        steps = ", ".join(f"{name} {ceil(n / PASS)}" for name, n in self.tokens.items() if n)
        about = "" if self.seconds is None else f"; about {_duration(self.seconds)} here"
        return f"{self.passes} forward passes of {PASS:,} tokens ({steps}){about}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def measure_speed(threads: int | None = None) -> Speed:
    """About 0.1 s of float32 products of 512 x 512 on one core; the best of them, since others may be busy here."""
    host = detect()
    a = np.ones((512, 512), np.float32)
    a @ a
    best, end = float("inf"), perf_counter() + 0.1
    while (start := perf_counter()) < end:
        a @ a
        best = min(best, perf_counter() - start)
    # numpy spreads the product over all cores unless it is told not to, as the command line tells it
    used = 1 if os.environ.get("OPENBLAS_NUM_THREADS") == "1" else host.threads
    return Speed(2 * 512**3 / best / used, threads or host.threads, _HALF if set(host.isa) & _BF16 else _EMULATED)


_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
_HALF, _EMULATED, _FULL = 1.35, 0.7, 0.9  # the engine's products with 16-bit and 32-bit weights, see docs/tuning.md


def estimate(plan: Plan, effort: str = "normal", speed: Speed | None = None, *, source: str = "self") -> Work:
    """What tuning `plan` takes with text of `source` (`self`, or a file). A pure function; seconds only with a `speed`.

    Nothing is taken off for what the cache holds. Raises UnknownName for the effort.
    """
    chosen = find(effort)
    written = chosen.tokens + chosen.held_out if source == "self" else 0
    groups, formats = sensitivity.choose_probes(sensitivity.parts_of(plan.blueprint), effort)
    probes = PASS * sensitivity.passes(groups, formats, effort, combined=len(sensitivity.COMBINED))
    candidates = 5 if effort == "high" else 4
    tokens = {
        "text": written,
        "importance": chosen.tokens,
        "reference": chosen.held_out,
        "probes": probes,
        "candidates": candidates * chosen.held_out,
        "ladder": _rungs(plan, chosen, speed) * chosen.held_out,
        "answers": 2 * chosen.prompts * (chosen.answer_tokens + _PROMPT),
    }
    return Work(tokens, None if speed is None else _seconds(plan, effort, speed, tokens, candidates))


def _rungs(plan: Plan, chosen: Effort, speed: Speed | None) -> int:
    """Stock presets that will be measured to compare with: none where each would take too long."""
    if speed and _writing(plan, speed) + chosen.held_out * _a_token(plan, speed) > RUNG_SECONDS:
        return 0
    return len(rung_names()) if chosen.rungs is None else chosen.rungs


_PROMPT = 24  # tokens of a question in its template, about
_ALONE = 5  # times that a token takes which is not read or written among many
_ENCODE = 1.2e4  # operations a weight of ggml's encoders with importance
_EACH, _PAIR, _FACTOR = 6e4, 10.0, 2.0  # of error feedback: a weight, a pair of columns, a triple once for each input
_LAYER, _WORD = 1.2e6, 400.0  # operations of a token beside its matrices: a layer, and an entry of the vocabulary


def _seconds(plan: Plan, effort: str, speed: Speed, tokens: Mapping[str, int], candidates: int) -> dict[str, float]:
    found = {name: n * _a_token(plan, speed) for name, n in tokens.items()}
    found["importance"] += tokens["importance"] * sum(cols**2 for cols in _inputs(plan.blueprint)) / speed.flops
    found["answers"] *= _ALONE
    fed_back = feedback_seconds(plan.blueprint, speed)
    rungs = tokens["ladder"] // find(effort).held_out
    found["writing"] = (1 + rungs) * _writing(plan, speed) + (candidates - 1) * fed_back
    if with_feedback(plan.blueprint, effort, speed):
        found["probes"] += probing_seconds(plan.blueprint, effort, speed)
    return found


def _a_token(plan: Plan, speed: Speed) -> float:
    """Seconds of one token among many, through the unquantised model."""
    matrices = (t for t in plan.tensors if len(t.shape) > 1)
    half = all(source.dtype in ("F16", "BF16") for t in matrices for source in t.made.sources)
    rate = speed.flops * speed.threads * (speed.half if half else _FULL)
    return (2 * active(plan.blueprint) + _overhead(plan.blueprint)) / rate


def _writing(plan: Plan, speed: Speed) -> float:
    """Seconds of encoding every matrix once with ggml's encoders."""
    return sum(t.made.values for t in plan.tensors if len(t.shape) > 1) * _ENCODE / speed.flops / speed.threads


def feedback_seconds(blueprint: Blueprint, speed: Speed) -> float:
    """Of encoding every matrix once with error feedback."""
    rows = sum(t.values * (_EACH + _PAIR * t.shape[-1]) for t in blueprint.tensors if len(t.shape) > 1)
    return (rows / speed.threads + _FACTOR * sum(cols**3 for cols in _inputs(blueprint))) / speed.flops


def with_feedback(blueprint: Blueprint, effort: str, speed: Speed) -> bool:
    """Whether formats are probed with the encoder that the file will have: at high effort, and at normal where that
    takes little time."""
    if effort == "high":
        return True
    return effort == "normal" and probing_seconds(blueprint, effort, speed) <= FEEDBACK_PATIENCE


def probing_seconds(blueprint: Blueprint, effort: str, speed: Speed) -> float:
    """What probes with error feedback take beyond those without: every matrix in every format that is tried, and a
    sample of it in all that are considered."""
    parts = sensitivity.parts_of(blueprint)
    formats = sensitivity.choose_probes(parts, effort)[1]
    considered = len(gptq.FORMATS.intersection(sensitivity.CONSIDERED))
    sampled = sum(min(prod(p.shape), sensitivity.SAMPLE) * (_EACH + _PAIR * p.shape[-1]) for p in parts)
    return len(formats) * feedback_seconds(blueprint, speed) + considered * sampled / speed.flops / speed.threads


def active(blueprint: Blueprint) -> int:
    """Weights that one token is multiplied with: of experts those that it is routed to."""
    untied = any(t.role is Role.OUTPUT for t in blueprint.tensors)
    found = 0
    for made in blueprint.tensors:
        if len(made.shape) < 2 or (untied and made.role is Role.EMBED) or made.role in (Role.POSITION, Role.TOKEN_TYPE):
            continue
        experts, used = blueprint.geometry.experts, blueprint.geometry.experts_used
        found += made.values * used // experts if len(made.shape) == 3 and experts else made.values
    return found


def _overhead(blueprint: Blueprint) -> float:
    """Operations of a token beside its matrices: norms, attention, and what is made of its logits."""
    words = max((t.shape[0] for t in blueprint.tensors if t.role is Role.EMBED), default=0)
    return _LAYER * max(1, len(blueprint.geometry.layers)) + _WORD * words


def _inputs(blueprint: Blueprint) -> list[int]:
    """Columns of every distinct input of a layer's matrices, roughly: one for each kind of matrix and width."""
    kinds = {(t.name.split(".")[1] if t.name.startswith("blk.") else t.name, t.role.value[:5], t.shape[-1]): t.shape[-1]
             for t in blueprint.tensors if len(t.shape) > 1 and t.role is not Role.EMBED}  # fmt: skip
    return list(kinds.values())


def rung_names() -> list[str]:
    """Stock presets that a ladder may have."""
    return [name for name in presets.LADDER if name not in ("BF16", "IQ1_M", "IQ1_S")]


def worth_it(
    plan: Plan, effort: str = "normal", speed: Speed | None = None, *, patience: float = PATIENCE
) -> str | None:
    """None where tuning may be done without being asked for; else a sentence that says how long it would take.

    It measures the speed of this machine unless given one. Encoders are not tuned: no sentence is needed for them.
    """
    return too_long(estimate(plan, effort, speed or measure_speed()), patience)


def too_long(work: Work, patience: float = PATIENCE) -> str | None:
    """As `worth_it` for work whose seconds are known."""
    assert work.seconds is not None
    if work.seconds <= patience:
        return None
    return f"calibrating would take about {_duration(work.seconds)} here: --calibration self does it"
