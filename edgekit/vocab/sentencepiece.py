"""SentencePiece BPE for llama.cpp's `llama` vocabulary: pieces with scores, from tokenizer.model or tokenizer.json.

llama.cpp (`llm_tokenizer_spm`) joins the neighbours whose joint text has the highest score. tokenizer.json lists pairs by
rank instead: a token's score is minus the rank of the first merge that makes it, as in SentencePiece's own files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from edgekit.errors import CorruptCheckpoint, UnsupportedVocabulary
from edgekit.vocab.bpe import merge_pairs
from edgekit.vocab.built import (
    BYTE,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Built,
    Limit,
    by_id,
    fill_holes,
    type_of,
)  # fmt: skip
from edgekit.vocab.files import Added, Files
from edgekit.vocab.protobuf import SentencePiece
from edgekit.vocab.spaces import Spaces, foreign_normalizers, normalizer_limits, spaces_of

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
ADDED_SCORE = -1000.0

Laid = tuple[list[str | None], list[float], list[int]]


def from_json(files: Files, added: Mapping[int, Added], model: SentencePiece | None) -> Built:
    """From tokenizer.json, with the scores of the SentencePiece `model` where one with the same pieces is there."""
    tokenizer = files.tokenizer
    assert tokenizer is not None
    bpe = tokenizer["model"]
    if not bpe.get("byte_fallback"):
        raise UnsupportedVocabulary(
            "tokenizer.json: a BPE model that neither works on bytes (ByteLevel) nor falls back to them "
            "(byte_fallback) has no counterpart in llama.cpp"
        )
    tokens = by_id(bpe.get("vocab"), added)
    pairs = merge_pairs(bpe)
    unk = bpe.get("unk_token")
    types = _types(tokens, added, unk)
    if model is not None and _same_pieces(tokens, model):
        scores = [s for _, s, _ in model.pieces][: len(tokens)]
        scores += [ADDED_SCORE] * (len(tokens) - len(scores))
    else:
        scores = _scores(tokens, pairs)
    spell_user_defined(tokens, types)
    built = Built("llama", "default", fill_holes(tokens, types, None), types, scores)
    built.limits += normalizer_limits(foreign_normalizers(tokenizer))
    _set_spaces(built, spaces_of(tokenizer), added, chats=bool(files.templates))
    return built


def _set_spaces(built: Built, spaces: Spaces, added: Mapping[int, Added], *, chats: bool) -> None:
    """llama.cpp puts a space before a text and after every special token, or never; the library can do either alone.

    With `first` (a space only before the text) a chat prompt, which begins with a special token, needs never, a bare text
    needs always. A model with a chat template is used through it.
    """
    prefixed = spaces.prefix != "never" and not (spaces.prefix == "first" and chats)
    built.extra["tokenizer.ggml.add_space_prefix"] = prefixed
    texts = tuple(t.content for t in added.values() if t.content)
    if spaces.prefix in ("unless", "first") and prefixed:
        reason = "a text that begins with a space gets no second one in the model's tokenizer; in llama.cpp it does"
        built.limits.append(Limit(reason, lambda text: text.startswith((" ", SPACE))))
    if spaces.prefix == "first" and prefixed:
        reason = "after a special token the model's tokenizer adds no space; llama.cpp does"
        built.limits.append(Limit(reason, lambda text: any(t in text for t in texts)))
    if spaces.prefix == "first" and not prefixed:
        built.lead = " "
        reason = (
            "the model's tokenizer puts a space before a text; llama.cpp, set for chat, does not: begin with a space"
        )
        built.limits.append(Limit(reason, lambda text: not text.startswith((" ", SPACE, *texts))))
    if any(kind == USER_DEFINED and text.isspace() for kind, text in zip(built.types, built.tokens, strict=True)):
        reason = "the sign U+2581 in a text is not a space in llama.cpp"
        built.limits.append(Limit(reason, lambda text: SPACE in text))


def lay_over(model: SentencePiece, added: Mapping[int, Added]) -> Laid:
    """Texts, scores, types by id, with the added tokens laid over the pieces. Raises CorruptCheckpoint on a clash."""
    size = max(len(model.pieces), max(added, default=-1) + 1)
    short = size - len(model.pieces)
    tokens: list[str | None] = [text for text, _, _ in model.pieces] + [None] * short
    scores = [score for _, score, _ in model.pieces] + [ADDED_SCORE] * short
    types = [kind for _, _, kind in model.pieces] + [NORMAL] * short
    unk = next((text for text, _, kind in model.pieces if kind == UNKNOWN), None)
    for number, token in added.items():
        old = tokens[number]
        if old not in (None, token.content) and types[number] == NORMAL:
            raise CorruptCheckpoint(
                f"added token {token.content!r} has id {number}, which is the piece {old!r} in the SentencePiece model",
                "the tokenizer files come from two different models; download them again",
            )
        tokens[number], types[number] = token.content, type_of(token, unk)
    return tokens, scores, types


def from_model(model: SentencePiece, laid: Laid) -> Built:
    """From a SentencePiece model alone."""
    tokens, scores, types = laid
    if model.whitespace_as_suffix or not model.escape_whitespaces:
        raise UnsupportedVocabulary("the SentencePiece model treats whitespace as a suffix or does not escape it")
    spell_user_defined(tokens, types)
    built = Built("llama", "default", fill_holes(tokens, types, None), types, scores)
    built.extra["tokenizer.ggml.add_space_prefix"] = model.add_dummy_prefix
    if model.remove_extra_whitespaces:
        built.limits.append(
            Limit("the model's tokenizer drops repeated spaces; llama.cpp keeps them", _has_extra_spaces)
        )
    if model.charsmap:
        name = model.normalizer or "precompiled"
        built.limits.append(
            Limit(f"llama.cpp does not apply the {name} normalisation of the model", lambda t: not t.isascii())
        )
    return built


def spell_user_defined(tokens: list[str | None], types: Sequence[int]) -> None:
    """USER_DEFINED texts are matched in raw text, where a space is a space and not yet U+2581."""
    for i, kind in enumerate(types):
        text = tokens[i]
        if kind == USER_DEFINED and text is not None:
            tokens[i] = text.replace(SPACE, " ")


def merges_complete(tokens: Sequence[str], merges: Sequence[Sequence[str]], types: Sequence[int]) -> bool:
    """Whether every way to halve a made token into two tokens is a merge, so that ranks and scores say the same."""
    known = {t for t, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    pairs = {(left, right) for left, right in merges}
    made = {left + right for left, right in pairs}
    return all((t[:i], t[i:]) in pairs for t in made for i in range(1, len(t)) if t[:i] in known and t[i:] in known)


def _scores(tokens: Sequence[str | None], merges: Sequence[Sequence[str]]) -> list[float]:
    """Tokens that no merge makes score below all that one does."""
    last = len(merges) - 1
    rank = {text: last - i for i, text in enumerate(map("".join, reversed(merges)))}  # the first merge wins
    worst = -float(len(merges) + 1)
    return [-float(rank[t]) if t in rank else worst for t in tokens]


def _types(tokens: Sequence[str | None], added: Mapping[int, Added], unk: str | None) -> list[int]:
    types = [BYTE if t is not None and _BYTE.fullmatch(t) else NORMAL for t in tokens]
    for number, token in added.items():
        if types[number] != BYTE:
            types[number] = type_of(token, unk)
    if unk in tokens:
        types[tokens.index(unk)] = UNKNOWN
    return types


def _same_pieces(tokens: Sequence[str | None], model: SentencePiece) -> bool:
    """Whether the normal pieces of the model are the tokens of tokenizer.json, id by id."""
    return len(model.pieces) <= len(tokens) and all(
        kind not in (NORMAL, BYTE) or tokens[i] == text for i, (text, _, kind) in enumerate(model.pieces)
    )


def _has_extra_spaces(text: str) -> bool:
    return "  " in text or text.startswith(" ") or text.endswith(" ")
