"""What generation_config.json demands or forbids of a written text, token by token, as transformers' processors do.

Pure; knows token ids and logits, and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.runtime import Logits

_UNKNOWN = {
    "num_beams": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
    "force_words_ids": None, "exponential_decay_length_penalty": None,
}  # fmt: skip
"""Settings that are not followed, with the value that asks for nothing."""


@dataclass(frozen=True, slots=True)
class Rules:
    """`start`: the first token, which is not part of the answer. `first`: the one that must follow it; `never` and
    `never_first`: tokens that may not be written, at all or as the first; no run of `ngram` tokens comes twice (0: it
    may); none of `ends` before `least` tokens are written, `start` counted."""

    start: int
    first: int | None = None
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()
    ngram: int = 0
    least: int = 0
    ends: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def apply(self, logits: Logits, written: Sequence[int]) -> Logits:
        """Logits, float32 (n_vocab), behind `written`, which begins with `start`: -inf for what is forbidden."""
        out = logits.copy()
        if len(written) == 1 and self.first is not None:
            out[:] = -np.inf
            out[self.first] = 0.0
            return out
        barred = [*self.never, *(self.never_first if len(written) == 1 + (self.first is not None) else ())]
        barred += _repeats(written, self.ngram)
        if len(written) < self.least:
            barred += self.ends
        out[barred] = -np.inf
        return out


def _repeats(written: Sequence[int], n: int) -> list[int]:
    """Tokens that would make the last `n` of them a run that was there before."""
    if n < 1 or len(written) < n:
        return []
    tail = tuple(written[len(written) - n + 1 :])
    return [written[i + n - 1] for i in range(len(written) - n + 1) if tuple(written[i : i + n - 1]) == tail]


def read_rules(config: Mapping[str, Any], generation: Mapping[str, Any], n_vocab: int) -> Rules | None:
    """Out of config.json and generation_config.json, which has the last word; None where neither names a first token.

    Ids that the vocabulary does not have are left out.
    """
    said = {**config, **generation}

    def ids(value: object) -> tuple[int, ...]:
        found = value if isinstance(value, list) else [value]
        return tuple(i for i in found if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < n_vocab)

    def number(key: str) -> int:
        value = said.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

    start = ids(said.get("decoder_start_token_id")) or ids(said.get("bos_token_id"))
    if not start:
        return None
    bad = said.get("bad_words_ids")
    words = [word for word in bad if isinstance(word, list)] if isinstance(bad, list) else []
    first, ends = ids(said.get("forced_bos_token_id")), ids(said.get("eos_token_id"))
    shortest = number("min_new_tokens")
    return Rules(
        start=start[0],
        first=first[0] if first else None,
        never=(*ids(said.get("suppress_tokens")), *(i for word in words if len(word) == 1 for i in ids(word))),
        never_first=ids(said.get("begin_suppress_tokens")),
        ngram=number("no_repeat_ngram_size"),
        least=max(number("min_length"), shortest + 1 if shortest else 0),
        ends=ends,
        notes=tuple(_unfollowed(said, words)),
    )


def _unfollowed(said: Mapping[str, Any], words: Sequence[Sequence[Any]]) -> Iterator[str]:
    for key, nothing in _UNKNOWN.items():
        if said.get(key, nothing) not in (nothing, None):
            beams = ": one text is written here, likeliest token after likeliest token" if key == "num_beams" else ""
            yield f"generation_config.json asks for {key} = {said[key]!r}, which is not followed{beams}"
    if any(len(word) > 1 for word in words):
        yield "bad_words_ids of several tokens are not followed"
