"""SentencePiece BPE for llama.cpp's `llama` vocabulary: pieces with scores, from tokenizer.model or tokenizer.json.

llama.cpp (`llm_tokenizer_spm`) joins the neighbours whose joint text has the highest score. tokenizer.json lists pairs
by rank instead: a token's score is minus the rank of the first merge that makes it, as in SentencePiece's own files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from edgekit.chat import Template, TemplateFailed
from edgekit.corpus import STRINGS, TEXT
from edgekit.errors import CorruptCheckpoint, UnsupportedVocabulary
from edgekit.vocab.bpe import merge_pairs
from edgekit.vocab.built import (
    BYTE,
    CONTROL,
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
from edgekit.vocab.parity import differences, explain
from edgekit.vocab.probe import Probe
from edgekit.vocab.protobuf import SentencePiece
from edgekit.vocab.reference import TokenizerJson
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
    derived = model is None or not _same_pieces(tokens, model)
    if model is not None and not derived:
        scores = [s for _, s, _ in model.pieces][: len(tokens)]
        scores += [ADDED_SCORE] * (len(tokens) - len(scores))
    else:
        scores = _scores(tokens, pairs)
    spell_user_defined(tokens, types)
    built = Built("llama", "default", fill_holes(tokens, types, None), types, scores)
    built.limits += normalizer_limits(foreign_normalizers(tokenizer))
    _set_spaces(built, spaces_of(tokenizer), added, files.templates.get("default"))
    if derived and not _complete(bpe["vocab"], pairs):
        _prove(built, TokenizerJson(tokenizer, added, files.root / "tokenizer.json"), pairs)
    return built


def _complete(vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> bool:
    """Whether every way to halve a made token into two tokens is a merge: then ranks and scores say the same.

    Of a large vocabulary 8,000 tokens are looked at: files made from scores have all such merges, trained ones few.
    """
    pairs = {(left, right) for left, right in merges}
    made = list(dict.fromkeys(map("".join, merges)))
    return all(
        (t[:i], t[i:]) in pairs
        for t in made[:: max(1, len(made) // 8000)]
        for i in range(1, len(t))
        if t[:i] in vocab and t[i:] in vocab
    )


def _prove(built: Built, reference: TokenizerJson, pairs: Sequence[Sequence[str]]) -> None:
    """A vocabulary trained as BPE has fewer merges than pairs that fit. llama.cpp joins all that fit, except under one
    pre-tokenizer (`sarvam-moe`), which follows merges on plain text but puts no space in front.

    Raises UnsupportedVocabulary where neither gives the model's own ids.
    """
    texts = [*STRINGS, *TEXT.splitlines()]
    plain = replace(built, model="gpt2", pre="sarvam-moe", merges=list(map(" ".join, pairs)), scores=None)
    best = None
    for candidate in [built] if built.extra["tokenizer.ggml.add_space_prefix"] else [built, plain]:
        with Probe(candidate.trial()) as probe:
            found = differences(reference, probe, texts, built.limits, add_special=False)
        if not found:
            built.model, built.pre = candidate.model, candidate.pre
            built.merges, built.scores = candidate.merges, candidate.scores
            return
        best = found if best is None or len(found) < len(best) else best
    assert best is not None
    raise UnsupportedVocabulary(
        f"llama.cpp joins pieces by score, this tokenizer.json by {len(pairs)} merges that say something else; "
        f"{len(best)} probe strings differ:\n{explain(best)}",
        "run this model with transformers, or train a vocabulary with ByteLevel pieces",
    )


def _set_spaces(built: Built, spaces: Spaces, added: Mapping[int, Added], template: str | None) -> None:
    """llama.cpp puts a space before every stretch of text between special tokens, or before none.

    Where the model's tokenizer does it for some only, its chat template decides which of the two is nearer.
    """
    texts = [re.escape(t.content) for t in added.values() if t.content]
    marks = re.compile("|".join(sorted(texts, key=len, reverse=True)) or "(?!)")
    votes = _votes(spaces.prefix, marks, template)
    prefixed = spaces.prefix != "never" if spaces.prefix in ("always", "never") else votes >= 0
    built.extra["tokenizer.ggml.add_space_prefix"] = prefixed
    if spaces.prefix in ("unless", "first"):
        does = "before every stretch of text" if prefixed else "before none"
        when = "before the first one" if spaces.prefix == "first" else "before those"
        reason = f"llama.cpp puts a space {does}, the model's tokenizer {when} that has none"
        built.limits.append(Limit(reason, lambda t: set(_gets_space(spaces.prefix, marks, t)) - {prefixed} != set()))
        built.lead = "" if prefixed else " "
    if any(kind == USER_DEFINED and text.isspace() for kind, text in zip(built.types, built.tokens, strict=True)):
        reason = "the sign U+2581 in a text is not a space in llama.cpp"
        built.limits.append(Limit(reason, lambda text: SPACE in text))


def _gets_space(prefix: str, marks: re.Pattern[str], text: str) -> list[bool]:
    """For every stretch of text between special tokens: whether the model's tokenizer puts a space before it."""
    found, at = [], 0
    for end, start in [*((m.start(), m.end()) for m in marks.finditer(text)), (len(text), len(text))]:
        if end > at:
            bare = not text.startswith((" ", SPACE), at)
            found.append(bare and (prefix == "unless" or at == 0))
        at = start
    return found


def _votes(prefix: str, marks: re.Pattern[str], template: str | None) -> int:
    """Stretches of a rendered conversation that get a space, less those that do not; 0 without a template."""
    if template is None or prefix in ("always", "never"):
        return 0
    turns = [{"role": role, "content": "Hello"} for role in ("user", "assistant", "user")]
    try:
        text = Template(template).render(turns)
    except TemplateFailed:
        return 0
    return sum(1 if gets else -1 for gets in _gets_space(prefix, marks, text))


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
        reason = "the model's tokenizer drops spaces at the ends and makes one of several; llama.cpp keeps them"
        built.limits.append(Limit(reason, _extra_spaces(built)))
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


def _extra_spaces(built: Built) -> Callable[[str], bool]:
    special = (t for t, kind in zip(built.tokens, built.types, strict=True) if kind in (CONTROL, UNKNOWN, USER_DEFINED))
    names = "|".join(map(re.escape, special)) or "(?!)"
    pattern = re.compile(rf"\A | \Z|  |{SPACE}| (?:{names})|(?:{names}) ")
    return lambda text: pattern.search(text) is not None
