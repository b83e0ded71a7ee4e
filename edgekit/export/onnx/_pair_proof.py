"""Do the two graphs of an encoder-decoder compute what the source computes? Encoder states, logits, greedy text.

Judges as `_proof` does: float32 graphs by the noise of arithmetic, quantised ones by what rounding to nearest loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.errors import VerificationFailed
from edgekit.export.onnx import _proof
from edgekit.export.onnx._pair_running import Pair
from edgekit.export.onnx._predictions import Predictions
from edgekit.export.onnx._proof import CLEAR, Figures, Greedy, Proof, decoder_figures, relative

Floats = npt.NDArray[np.float32]
STATES = "encoder_last_hidden_state"


@dataclass(frozen=True)
class PairProof:
    """`states`: of the encoder; `logits`: of the decoder, the worse of all tokens at once and one after another."""

    states: Proof
    logits: Proof


def judge(
    encoder: Path, decoder: Path, known: Predictions, *, exact: bool, slack: float, threads: int = 1
) -> PairProof:
    """Hold both graphs against what the source predicts. Raises VerificationFailed."""
    pair = Pair(encoder, decoder, threads)
    states = [pair.states(ids) for ids in known.texts]
    whole = [pair.begin(s).append(ids) for s, ids in zip(states, known.targets, strict=True)]
    steps = [pair.begin(s).each(ids) for s, ids in zip(states, known.targets, strict=True)]
    reference = [output["logits"] for output in known.outputs]
    first = _states_figures(known, states)
    both = [_logits_figures(known, reference, rows) for rows in (whole, steps)]
    worse = max(both, key=lambda f: f.relative)
    if exact:
        _proof.require_exact(encoder, first)
        for figures in both:
            _proof.require_exact(decoder, figures)
        return PairProof(Proof(first), Proof(worse))
    rounded = _states_figures(known, [output[STATES] for output in known.rounded])
    expected = _logits_figures(known, reference, [output["logits"] for output in known.rounded])
    _proof.require_rounding(encoder, first, rounded, slack)
    for figures in both:
        _proof.require_rounding(decoder, figures, expected, slack)
    return PairProof(Proof(first, rounded), Proof(worse, expected, _proof.far(worse)))


def _states_figures(known: Predictions, found: Sequence[Floats]) -> Figures:
    reference = [output[STATES] for output in known.outputs]
    pairs = list(zip(reference, found, strict=True))
    for theirs, ours in pairs:
        if theirs.shape != ours.shape:
            raise VerificationFailed(f"the encoder gives states {ours.shape}, the model {theirs.shape}", _proof.AGAIN)
    rows = [(a, b) for r, f in pairs for a, b in zip(r, f, strict=True)]
    all_r, all_f = np.concatenate(reference), np.concatenate(list(found))
    return Figures(
        compared=len(rows),
        tokens=len(rows),
        relative=relative(all_r, all_f),
        worst=max(relative(a, b) for a, b in rows),
        max_abs=float(np.abs(all_r - all_f).max()),
        top1=1.0,
        flips=0,
    )


def _logits_figures(known: Predictions, reference: Sequence[Floats], found: Sequence[Floats]) -> Figures:
    return decoder_figures(known, np.concatenate(reference), np.concatenate(list(found)))


# --- the text --------------------------------------------------------------------------------------------------------


def write_greedily(encoder: Path, decoder: Path, known: Predictions, n: int, threads: int = 1) -> list[list[int]]:
    """The likeliest token, `n` times, for each of the texts; the token that begins them is the first."""
    pair = Pair(encoder, decoder, threads)
    answers = []
    for ids, target in zip(known.texts, known.targets, strict=True):
        written, answer = pair.begin(pair.states(ids)), [target[0]]
        for _ in range(n):
            answer.append(int(written.append(answer[-1:])[-1].argmax()))
        answers.append(answer)
    return answers


def same_greedy(
    encoder: Path, decoder: Path, known: Predictions, answers: Sequence[Sequence[int]], noise: float, threads: int = 1
) -> Greedy:
    """Let the graphs that ship write what the float32 graphs wrote: they must like each token best, or as well as the
    best but for `noise`, which is how far rounding moves the logits, relative. Raises VerificationFailed."""
    pair = Pair(encoder, decoder, threads)
    gaps, same = [0.0], 0
    for ids, answer in zip(known.texts, answers, strict=True):
        rows = pair.begin(pair.states(ids)).each(answer[:-1]).astype(np.float64)
        lead = (rows.max(1) - rows[np.arange(len(rows)), list(answer[1:])]) / rows.std(1)
        same += int((lead == 0).sum())
        gaps += lead.tolist()
    found = Greedy(len(answers), sum(len(a) - 1 for a in answers), same, max(gaps), noise)
    if not found.gap <= max(2.5 * CLEAR, min(1.0, 6 * noise)):
        raise VerificationFailed(
            f"{decoder.name} does not write what the float32 graph writes: {found.same} of {found.tokens} tokens are "
            f"the same, and another one leads by {found.gap:.2g} standard deviations",
            _proof.AGAIN,
        )
    return found
