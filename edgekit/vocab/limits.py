"""What llama.cpp cannot do with added tokens as the `tokenizers` library does. Knows flags, no vocabulary."""

from __future__ import annotations

import re
from collections.abc import Mapping

from edgekit.vocab.built import Limit
from edgekit.vocab.files import Added


def added_limits(added: Mapping[int, Added], normalizes: bool) -> list[Limit]:
    """`normalizes`: the tokenizer changes text (not only spaces) before it looks for tokens marked `normalized`."""
    limits = []
    for side, what in (("lstrip", "before"), ("rstrip", "after")):
        tokens = [t.content for t in added.values() if getattr(t, side) and t.content]
        if tokens:
            limits.append(_strip_limit(tokens, what))
    whole = [t.content for t in added.values() if t.single_word and t.content]
    if whole:
        pattern = re.compile("|".join(rf"\w{re.escape(t)}|{re.escape(t)}\w" for t in whole))
        limits.append(Limit(f"{_names(whole)} counts only as a whole word in the model's tokenizer", _search(pattern)))
    return limits


def _strip_limit(tokens: list[str], what: str) -> Limit:
    names = "|".join(map(re.escape, tokens))
    pattern = re.compile(rf"\s(?:{names})" if what == "before" else rf"(?:{names})\s")
    reason = f"the model's tokenizer swallows spaces {what} {_names(tokens)}; llama.cpp keeps them"
    return Limit(reason, _search(pattern))


def _search(pattern: re.Pattern[str]):  # type: ignore[no-untyped-def]
    return lambda text: pattern.search(text) is not None


def _names(tokens: list[str]) -> str:
    return ", ".join(tokens[:4]) + (f" and {len(tokens) - 4} more" if len(tokens) > 4 else "")
