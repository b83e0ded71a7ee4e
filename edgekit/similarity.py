"""How far an encoder is from its reference: cosine of vectors, and whether it ranks pairs of texts alike.

Knows vectors; knows no model file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, VerificationFailed
from edgekit.runtime import Logits, Session
from edgekit.units import Progress, silent

FEWEST, MOST = 8, 256
"""Sentences that are needed to rank pairs at all, and those that are read: 256 make 32,640 pairs."""

LONGEST_SENTENCE = 60
"""Words of one sentence that are read, so that the limits of no encoder cut it."""

_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of `texts` sentences: cosine between both models' vectors (mean and its standard error, lowest), and Spearman's
    rank correlation of the cosines between all `pairs` of sentences in one model and in the other."""

    texts: int
    pairs: int
    width: int
    cosine_mean: float
    cosine_stderr: float
    cosine_min: float
    spearman: float


def compare(reference: Session, candidate: Session, texts: Sequence[str], *, progress: Progress = silent) -> Agreement:
    """Embed `texts` with both. Raises EdgekitError for different widths, VerificationFailed for what is not finite."""
    ours, theirs = (_vectors(s, texts, f"embed {n}", progress) for s, n in ((reference, 1), (candidate, 2)))
    if ours.shape[1] != theirs.shape[1]:
        raise EdgekitError(
            f"the vectors differ in width: {ours.shape[1]} in the reference, {theirs.shape[1]} in the other",
            "compare a model with the one it was made from",
        )
    cosines = (ours * theirs).sum(axis=1)
    above = np.triu_indices(len(texts), 1)
    return Agreement(
        texts=len(texts),
        pairs=len(above[0]),
        width=ours.shape[1],
        cosine_mean=float(cosines.mean()),
        cosine_stderr=float(cosines.std(ddof=1) / np.sqrt(len(cosines))),
        cosine_min=float(cosines.min()),
        spearman=spearman((ours @ ours.T)[above], (theirs @ theirs.T)[above]),
    )


def sentences(text: str) -> tuple[str, ...]:
    """Different sentences of a text, in its order: at most MOST, evenly chosen. Raises EdgekitError for too few."""
    found = dict.fromkeys(" ".join(part.split()[:LONGEST_SENTENCE]) for part in re.split(r"(?<=[.!?])\s+|\n+", text))
    whole = [s for s in found if len(s.split()) >= 4]
    if len(whole) < FEWEST:
        raise EdgekitError(f"the text has {len(whole)} sentences; at least {FEWEST} are needed", "give a longer --text")
    chosen = np.linspace(0, len(whole) - 1, min(MOST, len(whole))).astype(int)
    return tuple(whole[i] for i in chosen)


def spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank; 1 where neither orders anything."""
    first, second = _ranks(a), _ranks(b)
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    if size == 0:
        return 1.0 if not first.any() and not second.any() else 0.0
    return float((first * second).sum()) / size


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (ends - (counts - 1) / 2)[places]
    return ranks


def _vectors(session: Session, texts: Sequence[str], task: str, progress: Progress) -> npt.NDArray[np.float64]:
    """float64 (texts, width), each of length 1."""
    parts: list[Logits] = []
    for start in range(0, len(texts), _AT_ONCE):
        parts.append(session.embed(texts[start : start + _AT_ONCE], normalize=True))
        progress(task, min(start + _AT_ONCE, len(texts)), len(texts))
    found = np.concatenate(parts).astype(np.float64)
    if not np.isfinite(found).all():
        row = int(np.argwhere(~np.isfinite(found))[0][0])
        raise VerificationFailed(
            f"the vector of {texts[row][:60]!r} is not finite", "the weights are broken: try another preset or --quant"
        )
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    scaled: npt.NDArray[np.float64] = found / np.maximum(lengths, 1e-12)
    return scaled
