"""What every engine's session does the same way: booking time, checking token ids, comparing with what was read.

Knows token ids and clocks; knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, RuntimeFailed
from edgekit.runtime import Logits, Session
from edgekit.runtime._text import TextStream

Tokens = npt.NDArray[np.int32]

PENALTY_WINDOW = 64
"""Tokens that a repeat penalty looks back at; the default of llama.cpp's tools (common_params_sampling)."""


class Spent:
    """Milliseconds and tokens of batches, those of one token (decode: True) apart.

    llama_perf_context would tell the same of llama.cpp, but it books the first batch before it is computed
    (llama_context::decode reserves its graphs, which synchronizes, after it has counted the tokens).
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.ms = {False: 0.0, True: 0.0}
        self.tokens = {False: 0, True: 0}

    def add(self, n: int, seconds: float) -> None:
        self.ms[n == 1] += 1e3 * seconds
        self.tokens[n == 1] += n


class _Writes(Session, Protocol):
    finish_reason: str


class Writer:
    """What a session that writes text makes of tokens and slabs of logits, whichever engine they come from."""

    def logits(self: Session, tokens: Sequence[int]) -> Logits:
        """`tokens` as a sequence of its own -> float32 (len(tokens), n_vocab). Raises RuntimeFailed."""
        out = np.empty((len(tokens), self.n_vocab), np.float32)
        for start, rows in self.logits_chunks(tokens):
            out[start : start + len(rows)] = rows
        return out

    def stream(
        self: _Writes,
        tokens: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """As `generate`, as text that can be shown at once: whole characters, nothing of a stop string."""
        ids = self.generate(
            tokens, max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repeat_penalty=repeat_penalty, seed=seed,
        )  # fmt: skip
        return _shown(self, ids, TextStream(stop))

    def __enter__(self) -> Self:
        return self

    def __exit__(self: Session, *exc: object) -> None:
        self.close()


def _shown(session: _Writes, ids: Iterator[int], text: TextStream) -> Iterator[str]:
    for token in ids:
        if shown := text.feed(session.piece(token)):
            yield shown
        if text.stopped:
            session.finish_reason = "stop"
            return
    if shown := text.flush():
        yield shown


def checked(tokens: Sequence[int], n_vocab: int, name: str) -> Tokens:
    """`tokens` as int32, each within the vocabulary. Raises RuntimeFailed naming the first that is not."""
    wide = np.asarray(tokens, np.int64).reshape(-1)
    wrong = np.flatnonzero((wide < 0) | (wide >= n_vocab))
    if wrong.size:
        at = int(wrong[0])
        raise RuntimeFailed(
            f"token {wide[at]} at position {at} is not in the vocabulary of {n_vocab} of {name}",
            "tokenize the text with this model",
        )
    return wide.astype(np.int32)


def room_for(ids: Tokens, n_ctx: int) -> Tokens:
    """`ids`, which fit in a context of `n_ctx`. Raises RuntimeFailed."""
    if len(ids) > n_ctx:
        raise RuntimeFailed(
            f"{len(ids)} tokens do not fit in a context of {n_ctx}", "shorten the text or raise --ctx-size"
        )
    return ids


def encoded(text: str) -> bytes:
    """UTF-8. Raises EdgekitError for half a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise EdgekitError(f"half a surrogate pair at character {e.start} of the text: not Unicode") from None


def same_start(held: Sequence[int], ids: Tokens) -> int:
    """How many tokens at the start of `ids` are those of `held`, its last one not counted."""
    kept = np.array(held[: max(0, len(ids) - 1)], np.int32)
    same = kept == ids[: len(kept)]
    return len(kept) if same.all() else int(np.argmin(same))
