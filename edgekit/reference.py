"""A reference's predictions in tens of megabytes: the likeliest tokens of every position and a fair sample of the rest.

Knows log-probabilities and how to estimate a KL divergence from a part of them; knows no model file.

With r = q/p, KL(p || q) = Σ p·(r - 1 - ln r), since both sum to 1: every term is at least 0 and of second order, so
that a few terms drawn in proportion to p estimate the sum of all (the estimator k3 of Schulman, "Approximating KL
divergence", 2020). The `top` likeliest tokens are kept with their own weight, and the remaining probability is
represented by `samples` tokens drawn from it at even distances (systematic sampling), each standing for an equal share:
the estimate is unbiased, and its error averages out over positions, where plain top-k loses what the tail contributes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint, EdgekitError
from edgekit.quality import Column, Columns, Comparison, Ids, finite_logits, log_sum, summary
from edgekit.runtime import Logits, Session
from edgekit.units import Progress, silent

TOP, SAMPLES = 64, 32
"""Tokens kept a position: 8 bytes each, so 24 MiB for 32,768 positions whatever the vocabulary."""

SHORTEST = 16
"""Tokens that a chunk must have."""

_SLAB = 16 << 20  # bytes of logits that are worked on at once: what is made of them takes several times as much

_KEYS = ("tokens", "lengths", "counts", "ids", "logs", "tail", "losses")


@dataclass(frozen=True)
class CompactReference:
    """Predictions of `chunks`, each read as a text of its own; scored from position `skip` x its length on.

    `ids` uint32 and `logs` float32 (positions, kept): `top` likeliest tokens first, the likeliest of all in column 0,
    then the samples; `tail` float64 (positions,): probability of all tokens beyond the top. `losses` float64
    (positions,): minus the log-probability of the token that really came next.
    """

    chunks: tuple[tuple[int, ...], ...] = field(repr=False)
    n_vocab: int
    skip: float
    top: int
    ids: npt.NDArray[np.uint32] = field(repr=False)
    logs: npt.NDArray[np.float32] = field(repr=False)
    tail: Column = field(repr=False)
    losses: Column = field(repr=False)

    @property
    def positions(self) -> int:
        return len(self.losses)

    @property
    def tokens(self) -> int:
        """Tokens that one comparison reads."""
        return sum(map(len, self.chunks))

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.logs.nbytes + self.tail.nbytes + self.losses.nbytes

    def columns(self, candidate: Session, *, progress: Progress = silent) -> Columns:
        """One value a scored position: losses of both, KL(reference || candidate) in nats, whether both choose alike.

        One forward pass over `chunks`. Raises EdgekitError for another vocabulary or too small a context,
        VerificationFailed at a logit that is not finite.
        """
        if candidate.n_vocab != self.n_vocab:
            raise EdgekitError(
                f"the vocabularies differ: {self.n_vocab} tokens in the reference, {candidate.n_vocab} in the other",
                "compare models that share a tokenizer",
            )
        losses, divergences, same, at = [], [], [], 0
        for rows, answers in _scored(candidate, self.chunks, self.skip, progress):
            span = slice(at, at + len(rows))
            total = log_sum(rows)
            losses.append(total - _of(rows, answers))
            divergences.append(self._divergence(rows, total, span))
            same.append(rows.argmax(axis=1) == self.ids[span, 0])
            at += len(rows)
        return Columns(self.losses, np.concatenate(losses), np.concatenate(divergences), np.concatenate(same))

    def compare(self, candidate: Session, *, progress: Progress = silent) -> Comparison:
        """As `columns`, summed up."""
        longest = max(map(len, self.chunks))
        return summary(self.columns(candidate, progress=progress), len(self.chunks), longest)

    def _divergence(self, rows: Logits, total: Column, span: slice) -> Column:
        logs = self.logs[span].astype(np.float64)
        ratio = np.take_along_axis(rows, self.ids[span].astype(np.int64), axis=1).astype(np.float64)
        ratio -= total[:, None] + logs
        terms = np.expm1(ratio) - ratio
        found: Column = (np.exp(logs[:, : self.top]) * terms[:, : self.top]).sum(axis=1)
        if logs.shape[1] > self.top:
            found += self.tail[span] * terms[:, self.top :].mean(axis=1)
        return found

    def save(self, path: str | Path) -> None:
        """Write as .npz, beside and moved into place."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.part")
        tokens = np.concatenate([np.asarray(c, np.int32) for c in self.chunks])
        lengths = np.array([len(c) for c in self.chunks], np.int64)
        counts = np.array([self.n_vocab, self.top, self.skip], np.float64)
        parts: tuple[npt.NDArray[Any], ...] = (tokens, lengths, counts, self.ids, self.logs, self.tail, self.losses)
        try:
            with beside.open("wb") as file:
                np.savez(file, allow_pickle=False, **dict(zip(_KEYS, parts, strict=True)))
            beside.replace(path)
        except OSError as e:
            raise EdgekitError(f"cannot write {path}: {e.strerror}", "free some space, or choose another folder") from e
        finally:
            beside.unlink(missing_ok=True)


def record(
    session: Session,
    chunks: Sequence[Sequence[int]],
    *,
    skip: float = 0.5,
    top: int = TOP,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Progress = silent,
) -> CompactReference:
    """Read `chunks` with the reference model: one forward pass. `skip` 0.5 scores what llama-perplexity scores.

    A vocabulary of at most `top` + `samples` tokens is kept whole. Raises EdgekitError for chunks that are too short
    or do not fit the context, VerificationFailed at a logit that is not finite.
    """
    if top < 1 or samples < 1 or not 0 <= skip < 1:
        raise ValueError(f"top {top}, samples {samples}, skip {skip}")
    kept = tuple(tuple(int(i) for i in chunk) for chunk in chunks)
    shortest = min(map(len, kept), default=0)
    if shortest < SHORTEST:
        raise EdgekitError(f"a text of {shortest} tokens is too short to compare on", f"give at least {SHORTEST}")
    if session.n_vocab <= top + samples:
        top, samples = session.n_vocab, 0
    offsets = np.random.default_rng(seed)
    ids, logs, tail, losses = [], [], [], []
    for rows, answers in _scored(session, kept, skip, progress):
        total = log_sum(rows)
        losses.append(total - _of(rows, answers))
        likely = rows - total[:, None].astype(np.float32)
        chosen, rest = _choose(likely, top, samples, offsets)
        ids.append(chosen.astype(np.uint32))
        logs.append(np.take_along_axis(likely, chosen, axis=1))
        tail.append(rest)
    return CompactReference(
        kept, session.n_vocab, skip, top, np.concatenate(ids), np.concatenate(logs), np.concatenate(tail),
        np.concatenate(losses),
    )  # fmt: skip


def open_reference(path: str | Path) -> CompactReference:
    """A file written by `save`. Raises CorruptCheckpoint for anything else."""
    path = Path(path)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            parts = [file[key] for key in _KEYS]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise CorruptCheckpoint(f"{path} holds no stored predictions: {e}", "record them again") from None
    if not _consistent(parts):
        raise CorruptCheckpoint(f"{path} holds predictions that do not belong together", "record them again")
    tokens, lengths, (n_vocab, top, skip), ids, logs, tail, losses = parts
    ends = np.cumsum(lengths)[:-1]
    chunks = tuple(tuple(part.tolist()) for part in np.split(tokens, ends))
    return CompactReference(chunks, int(n_vocab), float(skip), int(top), ids, logs, tail, losses)


def _consistent(parts: list[npt.NDArray[Any]]) -> bool:
    kinds = (np.int32, np.int64, np.float64, np.uint32, np.float32, np.float64, np.float64)
    if any(p.dtype != k for p, k in zip(parts, kinds, strict=True)):
        return False
    tokens, lengths, counts, ids, logs, tail, losses = parts
    if [p.ndim for p in parts] != [1, 1, 1, 2, 2, 1, 1] or len(counts) != 3 or not np.isfinite(counts).all():
        return False
    n_vocab, top, skip = counts
    whole = len(lengths) and lengths.min() >= SHORTEST and lengths.max() <= len(tokens)
    if not whole or lengths.sum() != len(tokens) or not 0 <= skip < 1 or not 1 <= top <= ids.shape[1]:
        return False
    positions = sum(n - 1 - _first(n, skip) for n in lengths.tolist())
    return bool(
        tokens.min() >= 0
        and max(int(tokens.max()), int(ids.max())) < n_vocab
        and ids.shape == logs.shape == (positions, ids.shape[1])
        and tail.shape == losses.shape == (positions,)
        and all(np.isfinite(p).all() for p in (logs, tail, losses))
    )


def _first(length: int, skip: float) -> int:
    return min(int(length * skip), length - 2)


def _scored(
    session: Session, chunks: Sequence[Sequence[int]], skip: float, progress: Progress
) -> Iterator[tuple[Logits, Ids]]:
    """Blocks of logits of the scored positions, with the tokens that really came next."""
    longest = max(map(len, chunks))
    if session.n_ctx < longest:
        raise EdgekitError(
            f"chunks of {longest} tokens do not fit in a context of {session.n_ctx}", f"open it with n_ctx={longest}"
        )
    for index, chunk in enumerate(chunks):
        ids = np.asarray(chunk, np.int64)
        first = _first(len(ids), skip)
        at = first + 1
        for slab in finite_logits(session, ids, first, index):
            step = max(1, _SLAB // slab[0].nbytes)
            for start in range(0, len(slab), step):
                rows = slab[start : start + step]
                yield rows, ids[at : at + len(rows)]
                at += len(rows)
        progress("read", index + 1, len(chunks))


def _of(rows: Logits, tokens: Ids) -> Column:
    return rows[np.arange(len(rows)), tokens].astype(np.float64)


def _choose(logs: Logits, top: int, samples: int, offsets: np.random.Generator) -> tuple[Ids, Column]:
    """(rows, top + samples) tokens, and the probability beyond the top of each row, float64."""
    if samples == 0:
        order: Ids = np.argsort(-logs, axis=1, kind="stable")
        return order, np.zeros(len(logs))
    best = np.argpartition(logs, -top, axis=1)[:, -top:]
    values = np.take_along_axis(logs, best, axis=1)
    best = np.take_along_axis(best, np.argsort(-values, axis=1, kind="stable"), axis=1)
    rest = np.exp(logs, dtype=np.float64)
    np.put_along_axis(rest, best, 0.0, axis=1)
    sums = np.cumsum(rest, axis=1)
    marks = (np.arange(samples) + offsets.random(len(logs))[:, None]) / samples * sums[:, -1:]
    drawn = np.stack([np.searchsorted(s, m, side="right") for s, m in zip(sums, marks, strict=True)])
    # rounding may put the last mark at the very end, behind every token of the tail
    drawn = np.minimum(drawn, (rest.shape[1] - 1 - (rest[:, ::-1] > 0).argmax(axis=1))[:, None])
    return np.concatenate([best, drawn], axis=1), sums[:, -1]
