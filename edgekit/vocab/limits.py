"""What llama.cpp cannot do with added tokens as the `tokenizers` library does. Knows flags, no vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from edgekit.vocab.built import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Built, Limit
from edgekit.vocab.files import Added, Json
from edgekit.vocab.spaces import parts
from edgekit.vocab.special import ROLE_TEXTS, STOP_TEXTS


def added_limits(added: Mapping[int, Added]) -> list[Limit]:
    """Tokens that take the space around them along, or match only as whole words."""
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


def normalized_limits(tokenizer: Json, added: Mapping[int, Added]) -> list[Limit]:
    """Tokens marked `normalized` are looked for in the normalised text: where that has a space put in front of it, the
    library finds `▁<s>` and not `<s>`, so only at the beginning and after a space."""
    if not any(p.get("type") == "Prepend" for p in parts(tokenizer.get("normalizer"), "normalizers")):
        return []
    tokens = [t.content for t in added.values() if t.normalized and t.content]
    reason = f"the model's tokenizer finds {_names(tokens)} only behind a space; llama.cpp finds it everywhere"
    return [Limit(reason, _search(_any_of(tokens)))] if tokens else []


def forced_limits(built: Built) -> list[Limit]:
    """Ordinary tokens that llama.cpp takes for special ones because of their text (the tables in special.py)."""
    texts = STOP_TEXTS | ROLE_TEXTS | {"<PAD>", "[PAD]"}
    forced = [t for t, kind in zip(built.tokens, built.types, strict=True) if kind == NORMAL and t in texts]
    reason = f"{_names(forced)} is an ordinary word of the model's tokenizer; llama.cpp takes it for a special token"
    return [Limit(reason, _search(_any_of(forced)))] if forced else []


def literal_limits(model: str, added: Mapping[int, Added]) -> list[Limit]:
    """Where special tokens in a text are to be ordinary text: what llama.cpp does otherwise."""
    every = [t.content for t in added.values() if t.content]
    if model == "t5":
        reason = (
            "special tokens in a text that is not to hold any are pieces of the vocabulary in the model's tokenizer"
        )
        return [Limit(reason, _search(_any_of(every)), "literal")] if every else []
    forced = [t.content for t in added.values() if not t.special and t.content in (STOP_TEXTS | ROLE_TEXTS)]
    shown = [t.content for t in added.values() if t.special and t.content in _HARMONY] if _is_harmony(every) else []
    limits = []
    if forced:
        reason = f"{_names(forced)} is always matched by the model's tokenizer, by llama.cpp only as a special token"
        limits.append(Limit(reason, _search(_any_of(forced)), "literal"))
    if shown:
        reason = f"{_names(shown)} is matched by llama.cpp even in a text that is not to hold special tokens"
        limits.append(Limit(reason, _search(_any_of(shown)), "literal"))
    return limits


_HARMONY = {"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|end|>"}
"""llama.cpp turns these into ordinary added tokens (gpt-oss; `<|end|>` only beside `<|return|>` and `<|call|>`)."""


def _is_harmony(texts: list[str]) -> bool:
    return bool(_HARMONY & set(texts) - {"<|end|>"})


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)))


def _strip_limit(tokens: list[str], what: str) -> Limit:
    names = "|".join(map(re.escape, tokens))
    pattern = re.compile(rf"\s(?:{names})" if what == "before" else rf"(?:{names})\s")
    reason = f"the model's tokenizer swallows spaces {what} {_names(tokens)}; llama.cpp keeps them"
    return Limit(reason, _search(pattern))


def _search(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.search(text) is not None


def _names(tokens: list[str]) -> str:
    return ", ".join(tokens[:4]) + (f" and {len(tokens) - 4} more" if len(tokens) > 4 else "")


def name_hint(built: Built, added: Mapping[int, Added]) -> str:
    """llama.cpp lets special tokens swallow the space after them only in a model with `phi-3` in `general.name`.

    The hint is given where the tokens it then treats so are this tokenizer's (llama-vocab.cpp, "Handle per token
    attributes": all but `<unk>`, `<s>` and `<|endoftext|>`).
    """
    swallow = {t.content for t in added.values() if t.rstrip}
    kinds = (CONTROL, USER_DEFINED, UNKNOWN)
    special = {t for t, kind in zip(built.tokens, built.types, strict=True) if kind in kinds}
    same = (
        swallow == special - {"<unk>", "<s>", "<|endoftext|>"} and {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= special
    )
    return "phi-3" if swallow and same else ""
