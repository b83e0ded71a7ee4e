"""What every engine's session does the same way: booking time, checking token ids, comparing with what was read.

Knows token ids and clocks; knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, RuntimeFailed

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
