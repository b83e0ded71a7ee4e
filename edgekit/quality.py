"""How good a model still is: perplexity, and how far its predictions are from another's. Knows no model file.

The definitions are those of llama.cpp's llama-perplexity (tools/perplexity/perplexity.cpp): the text is cut into
chunks of `n_ctx` tokens, each read on its own with BOS in place of its first token where the vocabulary wants one;
scored are the predictions of the second half, so that every one has at least half a context before it.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint, DoesNotFit, EdgekitError, VerificationFailed
from edgekit.runtime import Logits, Session
from edgekit.units import Progress, show_bytes, silent

Column = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

SHORTEST = 16
"""Tokens a chunk must have for a perplexity to mean anything at all."""

_BLOCK = 1 << 22  # values worked on at once: 16 MiB of float32, and a few temporaries of that size
_STORED_FLOOR = -16.0  # below it llama-perplexity counts a stored log-probability as none
_MAGIC, _TRAILER = b"_logits_", b"_losses_"


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` predictions; `stderr` is that of `value`."""

    value: float
    stderr: float
    tokens: int
    chunks: int
    n_ctx: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Candidate against reference over the same `tokens` predictions.

    `kl_*`: KL divergence D(reference || candidate) in nats per token. `ln_ratio`: ln(PPL candidate / PPL reference).
    `delta_p`: candidate's minus reference's probability of the token that really came next, mean and root mean
    square, as fractions. `top1`: share of tokens where both would choose the same. `*_stderr`: standard errors.
    """

    tokens: int
    chunks: int
    n_ctx: int
    ppl_reference: float
    ppl_reference_stderr: float
    ppl_candidate: float
    ppl_candidate_stderr: float
    ln_ratio: float
    ln_ratio_stderr: float
    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    delta_p_mean: float
    delta_p_mean_stderr: float
    delta_p_rms: float
    delta_p_rms_stderr: float
    top1: float
    top1_stderr: float


@dataclass(frozen=True, slots=True)
class Stored:
    """Predictions of a reference on disk, for one that is too large to be in memory beside the candidate.

    The file format of `llama-perplexity --kl-divergence-base`: 16 bits a log-probability, those below -16 cut off,
    which is fine for divergences above about 1e-5 and puts a perplexity too low. Files written here therefore end in
    `nll`, the exact losses of the text; it is None for llama-perplexity's own files (which ignores what follows).
    """

    path: Path
    n_ctx: int
    n_vocab: int
    tokens: tuple[int, ...] = field(repr=False)
    nll: Column | None = field(default=None, repr=False, compare=False)

    @property
    def chunks(self) -> int:
        return len(self.tokens) // self.n_ctx


def perplexity(
    session: Session, tokens: Sequence[int], n_ctx: int, *, chunks: int | None = None, shorten: bool = False,
    progress: Progress = silent,
) -> Perplexity:  # fmt: skip
    """Perplexity of `tokens` (at most `chunks` chunks of `n_ctx`; what is left over at the end is not read).

    `shorten`: a text shorter than `n_ctx` is one chunk. Raises EdgekitError if there are too few tokens,
    VerificationFailed at the first logit that is not finite.
    """
    work = _cut(tokens, n_ctx, chunks, shorten)
    _must_have_room(session, work.n_ctx)
    losses = []
    for i, chunk in enumerate(work.chunks):
        for rows, answers in _scored(session, chunk, work.first, i):
            losses.append(log_sum(rows) - _picked(rows, answers))
        progress("perplexity", i + 1, len(work.chunks))
    nll = np.concatenate(losses)
    value = math.exp(min(nll.mean(), 700.0))  # beyond that a float64 has no exponential
    return Perplexity(value, value * stderr_of_mean(nll), len(nll), len(work.chunks), work.n_ctx)


def compare(
    reference: Session | Stored, candidate: Session, tokens: Sequence[int] | None = None, n_ctx: int | None = None, *,
    chunks: int | None = None, shorten: bool = False, progress: Progress = silent,
) -> Comparison:  # fmt: skip
    """How far `candidate`'s predictions are from `reference`'s on `tokens`, read in chunks of `n_ctx`.

    Both may be left out for a `Stored` reference, which holds its own. Memory: two slabs of logits and a few blocks of
    16 MiB. Raises EdgekitError for different vocabularies or too few tokens, VerificationFailed at the first logit
    that is not finite.
    """
    tokens, n_ctx = _agreed(reference, tokens, n_ctx)
    if reference.n_vocab != candidate.n_vocab:
        raise EdgekitError(
            f"the vocabularies differ: {reference.n_vocab} tokens in the reference, {candidate.n_vocab} in the other",
            "compare models that share a tokenizer",
        )
    work = _cut(tokens, n_ctx, chunks, shorten)
    for model in (reference, candidate):
        _must_have_room(model, work.n_ctx)
    floor = _STORED_FLOOR if isinstance(reference, Stored) else -math.inf
    columns: list[Columns] = []
    for i, chunk in enumerate(work.chunks):
        answers, at = chunk[work.first + 1 :], 0
        left = _log_probabilities(reference, chunk, work.first, i)
        right = _log_probabilities(candidate, chunk, work.first, i)
        for ours, theirs in _paired(left, right):
            columns.append(_measure(ours, theirs, answers[at : at + len(ours)], floor))
            at += len(ours)
        progress("comparison", i + 1, len(work.chunks))
    seen = Columns.joined(columns)
    if isinstance(reference, Stored) and reference.nll is not None:
        seen = replace(seen, nll_reference=reference.nll[: len(seen.kl)])
    return summary(seen, len(work.chunks), work.n_ctx)


def record(
    session: Session, tokens: Sequence[int], n_ctx: int, path: str | Path, *, chunks: int | None = None,
    shorten: bool = False, progress: Progress = silent,
) -> Stored:  # fmt: skip
    """Write `session`'s predictions of `tokens` to `path` (2 bytes x n_vocab x half the tokens), to compare with later.

    Written beside and moved into place. Raises DoesNotFit if the disk is too small, and what `perplexity` raises.
    """
    work, path = _cut(tokens, n_ctx, chunks, shorten), Path(path)
    _must_have_room(session, work.n_ctx)
    needed = len(work.chunks) * work.scored * _stored_row(session.n_vocab).itemsize
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise DoesNotFit(
            f"{path.name} needs {show_bytes(needed)}, {path.parent} has {show_bytes(free)}", "record fewer chunks"
        )
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            _write(file, session, work, progress)
        beside.replace(path)
    except OSError as e:
        raise EdgekitError(f"cannot write {path}: {e.strerror}", "free some space, or choose another folder") from None
    finally:
        beside.unlink(missing_ok=True)
    return open_stored(path)


def open_stored(path: str | Path) -> Stored:
    """A file written by `record` or by llama-perplexity. Raises CorruptCheckpoint if it is neither or is cut short."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic, size = file.read(8), path.stat().st_size
            counts = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4")
            n_ctx, n_vocab, chunks = (int(n) for n in counts)
            if magic != _MAGIC or not (4 <= n_ctx <= 1 << 24 and 2 <= n_vocab <= 1 << 24 and 1 <= chunks <= 1 << 24):
                raise CorruptCheckpoint(f"{path} holds no stored predictions", "write it with quality.record")
            rows = chunks * (n_ctx - 1 - n_ctx // 2)
            needed = 20 + 4 * chunks * n_ctx + rows * _stored_row(n_vocab).itemsize
            if size < needed:
                raise CorruptCheckpoint(f"{path} has {size} bytes of {needed}: cut short", "write it again")
            tokens = np.frombuffer(file.read(4 * chunks * n_ctx), "<i4")
            file.seek(needed)
            losses = file.read(8 + 8 * rows)
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {path}: {e.strerror}") from None
    if tokens.min() < 0 or tokens.max() >= n_vocab:
        raise CorruptCheckpoint(f"{path} holds tokens outside its vocabulary of {n_vocab}", "write it again")
    exact = losses[:8] == _TRAILER and len(losses) == 8 + 8 * rows
    return Stored(path, n_ctx, n_vocab, tuple(tokens.tolist()), np.frombuffer(losses[8:], "<f8") if exact else None)


# --- what is read ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    """The chunks of a text. Scored are the predictions from index `first` on, but for the last token's."""

    chunks: list[Ids]
    n_ctx: int

    @property
    def first(self) -> int:
        return self.n_ctx // 2

    @property
    def scored(self) -> int:
        return self.n_ctx - 1 - self.first


def _cut(tokens: Sequence[int], n_ctx: int, chunks: int | None, shorten: bool) -> _Work:
    if shorten:
        n_ctx = min(n_ctx, len(tokens))
    if n_ctx < SHORTEST:
        raise EdgekitError(f"chunks of {n_ctx} tokens are too short to score", f"at least {SHORTEST} are needed")
    if len(tokens) < n_ctx:
        raise EdgekitError(
            f"the text has {len(tokens)} tokens; at least {n_ctx} are needed for one chunk",
            "give a longer text or a smaller context",
        )
    count = len(tokens) // n_ctx
    count = count if chunks is None else max(1, min(chunks, count))
    ids = np.asarray(tokens[: count * n_ctx], np.int64)
    return _Work(list(ids.reshape(count, n_ctx)), n_ctx)


def _agreed(reference: Session | Stored, tokens: Sequence[int] | None, n_ctx: int | None) -> tuple[Sequence[int], int]:
    if isinstance(reference, Stored):
        if n_ctx not in (None, reference.n_ctx) or (
            tokens is not None and tuple(tokens)[: len(reference.tokens)] != reference.tokens
        ):
            raise EdgekitError(
                f"{reference.path} was recorded from another text or with another context than {n_ctx}",
                "leave both out, or record it again",
            )
        return reference.tokens, reference.n_ctx
    if tokens is None or n_ctx is None:
        raise EdgekitError("no text to compare on", "give tokens and n_ctx")
    return tokens, n_ctx


def _must_have_room(model: Session | Stored, n_ctx: int) -> None:
    if model.n_ctx < n_ctx:
        raise EdgekitError(
            f"chunks of {n_ctx} tokens do not fit in a context of {model.n_ctx}", f"open it with n_ctx={n_ctx}"
        )


# --- logits, a block at a time ---------------------------------------------------------------------------------------


def _scored(session: Session, chunk: Ids, first: int, index: int) -> Iterator[tuple[Logits, Ids]]:
    """Blocks of logits with the tokens that really came next."""
    at = first + 1
    for rows in finite_logits(session, chunk, first, index):
        yield rows, chunk[at : at + len(rows)]
        at += len(rows)


def finite_logits(session: Session, chunk: Ids, first: int, index: int) -> Iterator[Logits]:
    """Logits of the scored positions of one chunk, in blocks of rows. Raises VerificationFailed."""
    ids = chunk.tolist()
    if session.add_bos and session.bos is not None:
        ids[0] = session.bos
    for start, computed in session.logits_chunks(ids, first=first):
        slab = computed[: len(ids) - 1 - start]  # nothing is known to come after the last token
        step = max(1, _BLOCK // session.n_vocab)
        for at in range(0, len(slab), step):
            rows = slab[at : at + step]
            if not np.isfinite(rows).all():
                row, token = (int(i) for i in np.argwhere(~np.isfinite(rows))[0])
                raise VerificationFailed(
                    f"the logit of token {token} is {rows[row, token]} at position {start + at + row} of chunk {index}",
                    "the weights or their format are broken: try another preset, for example -q Q8_0",
                )
            yield rows


def _log_probabilities(model: Session | Stored, chunk: Ids, first: int, index: int) -> Iterator[Logits]:
    """float32 (rows, n_vocab): log of the probability of every token."""
    if isinstance(model, Stored):
        yield from _stored_rows(model, index)
        return
    for rows in finite_logits(model, chunk, first, index):
        yield rows - log_sum(rows)[:, None].astype(np.float32)


def _paired(left: Iterator[Logits], right: Iterator[Logits]) -> Iterator[tuple[Logits, Logits]]:
    """Both cut at the same rows."""
    a = b = np.empty((0, 0), np.float32)
    while True:
        a = a if len(a) else next(left, a)
        b = b if len(b) else next(right, b)
        n = min(len(a), len(b))
        if not n:
            return
        yield a[:n], b[:n]
        a, b = a[n:], b[n:]


def log_sum(rows: Logits) -> Column:
    """log(sum(exp(row))) -> float64 (rows,): exponentials in float32, their sum in float64."""
    top = rows.max(axis=1)
    total = np.exp(rows - top[:, None]).sum(axis=1, dtype=np.float64)
    logs: Column = top + np.log(total)
    return logs


def _picked(rows: Logits, tokens: Ids) -> Column:
    return rows[np.arange(len(rows)), tokens].astype(np.float64)


# --- the stored format -----------------------------------------------------------------------------------------------


def _stored_row(n_vocab: int) -> np.dtype[np.void]:
    """scale and lowest log-probability as float32, then a uint16 a token, padded to an even number."""
    return np.dtype([("scale", "<f4"), ("low", "<f4"), ("steps", "<u2", (n_vocab + n_vocab % 2,))])


def _write(file: BinaryIO, session: Session, work: _Work, progress: Progress) -> None:
    file.write(_MAGIC + np.array([work.n_ctx, session.n_vocab, len(work.chunks)], "<i4").tobytes())
    file.write(np.concatenate(work.chunks).astype("<i4").tobytes())
    losses = []
    for i, chunk in enumerate(work.chunks):
        for rows, answers in _scored(session, chunk, work.first, i):
            losses.append(log_sum(rows) - _picked(rows, answers))
            file.write(_packed(rows).tobytes())
        progress("record", i + 1, len(work.chunks))
    file.write(_TRAILER + np.concatenate(losses).astype("<f8").tobytes())


def _packed(rows: Logits) -> npt.NDArray[np.void]:
    top = rows.max(axis=1, keepdims=True)
    low = np.maximum(rows.min(axis=1, keepdims=True), top - 16)
    scale = (top - low) / np.float32(65535)
    out = np.zeros(len(rows), _stored_row(rows.shape[1]))
    out["scale"] = scale[:, 0]
    out["low"] = low[:, 0] - log_sum(rows)
    steps = np.divide(rows - low, scale, out=np.zeros_like(rows), where=scale > 0)
    out["steps"][:, : rows.shape[1]] = np.rint(np.clip(steps, 0, 65535))
    return out


def _stored_rows(stored: Stored, index: int) -> Iterator[Logits]:
    kind = _stored_row(stored.n_vocab)
    rows = stored.n_ctx - 1 - stored.n_ctx // 2
    step = max(1, _BLOCK // stored.n_vocab)
    with stored.path.open("rb") as file:
        file.seek(20 + 4 * len(stored.tokens) + index * rows * kind.itemsize)
        for at in range(0, rows, step):
            yield _unpacked(_read_rows(file, kind, min(step, rows - at)), stored.n_vocab)


def _read_rows(file: BinaryIO, kind: np.dtype[np.void], count: int) -> npt.NDArray[np.void]:
    data = file.read(count * kind.itemsize)
    if len(data) < count * kind.itemsize:
        raise CorruptCheckpoint(f"{file.name} became shorter while it was read", "write it again")
    return np.frombuffer(data, kind)


def _unpacked(packed: npt.NDArray[np.void], n_vocab: int) -> Logits:
    steps = packed["steps"][:, :n_vocab].astype(np.float32)
    steps *= packed["scale"][:, None]
    steps += packed["low"][:, None]
    return steps


# --- statistics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Columns:
    """One value a scored token."""

    nll_reference: Column
    nll_candidate: Column
    kl: Column
    same: npt.NDArray[np.bool_]

    @staticmethod
    def joined(parts: Sequence[Columns]) -> Columns:
        return Columns(
            np.concatenate([p.nll_reference for p in parts]),
            np.concatenate([p.nll_candidate for p in parts]),
            np.concatenate([p.kl for p in parts]),
            np.concatenate([p.same for p in parts]),
        )


def _measure(reference: Logits, candidate: Logits, answers: Ids, floor: float) -> Columns:
    """Both are log-probabilities (rows, n_vocab); tokens at `floor` or below in the reference weigh nothing."""
    difference = reference - candidate
    difference *= np.exp(reference)
    difference[reference <= floor] = 0
    return Columns(
        -_picked(reference, answers),
        -_picked(candidate, answers),
        difference.sum(axis=1, dtype=np.float64),
        reference.argmax(axis=1) == candidate.argmax(axis=1),
    )


def summary(seen: Columns, chunks: int, n_ctx: int) -> Comparison:
    n = len(seen.kl)
    ln_reference, ln_candidate = float(seen.nll_reference.mean()), float(seen.nll_candidate.mean())
    ppl_reference, ppl_candidate = math.exp(min(ln_reference, 700.0)), math.exp(min(ln_candidate, 700.0))
    delta = np.exp(-seen.nll_candidate) - np.exp(-seen.nll_reference)
    rms = math.sqrt(float(np.mean(delta**2)))
    top1 = float(seen.same.mean())
    median, p90, p99, p999 = (float(p) for p in np.percentile(seen.kl, (50, 90, 99, 99.9)))
    return Comparison(
        tokens=n,
        chunks=chunks,
        n_ctx=n_ctx,
        ppl_reference=ppl_reference,
        ppl_reference_stderr=ppl_reference * stderr_of_mean(seen.nll_reference),
        ppl_candidate=ppl_candidate,
        ppl_candidate_stderr=ppl_candidate * stderr_of_mean(seen.nll_candidate),
        ln_ratio=ln_candidate - ln_reference,
        ln_ratio_stderr=stderr_of_mean(seen.nll_candidate - seen.nll_reference),
        kl_mean=float(seen.kl.mean()),
        kl_stderr=stderr_of_mean(seen.kl),
        kl_median=median,
        kl_p90=p90,
        kl_p99=p99,
        kl_p999=p999,
        kl_max=float(seen.kl.max()),
        delta_p_mean=float(delta.mean()),
        delta_p_mean_stderr=stderr_of_mean(delta),
        delta_p_rms=rms,
        delta_p_rms_stderr=stderr_of_mean(delta**2) / (2 * rms) if rms else 0.0,
        top1=top1,
        top1_stderr=math.sqrt(top1 * (1 - top1) / max(n - 1, 1)),
    )


def stderr_of_mean(values: Column) -> float:
    """Standard error of the mean."""
    return math.sqrt(float(values.var()) / (len(values) - 1)) if len(values) > 1 else 0.0
