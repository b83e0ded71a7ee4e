"""WordPiece for llama.cpp's `bert` vocabulary, which writes word starts with U+2581 and continuations bare."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

from edgekit.errors import UnsupportedVocabulary
from edgekit.gguf_file import MetaValue
from edgekit.vocab.built import NORMAL, SPACE, Built, Limit, by_id, fill_holes, type_of
from edgekit.vocab.files import Added, Json
from edgekit.vocab.spaces import parts

_PREFIX = "##"


def build(tokenizer: Json, added: Mapping[int, Added]) -> Built:
    """Raises UnsupportedVocabulary for a continuation mark other than `##`, a normaliser other than BERT's."""
    model = tokenizer["model"]
    if model.get("continuing_subword_prefix", _PREFIX) != _PREFIX:
        raise UnsupportedVocabulary(
            f"tokenizer.json: WordPiece marks continuations with {model['continuing_subword_prefix']!r}, not '##'"
        )
    texts = by_id(model.get("vocab"), added)
    types = [NORMAL] * len(texts)
    for number, token in added.items():
        types[number] = type_of(token, None)
    tokens: list[str | None] = [
        t if t is None or number in added else (t[2:] if t.startswith(_PREFIX) and len(t) > 2 else SPACE + t)
        for number, t in enumerate(texts)
    ]
    lowercase, strip = _case(tokenizer)
    extra: dict[str, MetaValue] = {
        "tokenizer.ggml.normalizer.lowercase": lowercase,
        "tokenizer.ggml.normalizer.strip_accents": strip,
    }
    longest = int(model.get("max_input_chars_per_word", 100))
    built = Built("bert", "default", fill_holes(tokens, types, None), types, extra=extra)
    built.limits = _limits(longest, strip)
    return built


def _limits(longest: int, strips_accents: bool) -> list[Limit]:
    limits = [
        Limit(
            f"a word of more than {longest} characters is unknown to the model's tokenizer, not to llama.cpp",
            lambda text: any(len(word) > longest for word in text.split()),
        ),
        Limit(
            "llama.cpp takes U+000B, U+000C, U+0085 for spaces and U+2581 for the start of a word, "
            "unlike the model's tokenizer",
            lambda text: any(c in text for c in "\x0b\x0c\x85\u2581"),
        ),
    ]
    if strips_accents:
        reason = "llama.cpp strips more marks than accents: vowel signs, enclosing marks, parts of Hangul syllables"
        limits.append(Limit(reason, lambda text: any(map(_is_more_than_accent, text))))
    return limits


def _is_more_than_accent(c: str) -> bool:
    return unicodedata.category(c) in ("Mc", "Me") or unicodedata.name(c, "").startswith("HANGUL")


def _case(tokenizer: Json) -> tuple[bool, bool]:
    """(lowercase, strip accents). BERT strips accents when it lowercases, unless told otherwise."""
    lowercase, strip = False, None
    for part in parts(tokenizer.get("normalizer"), "normalizers"):
        kind = part.get("type")
        if kind == "BertNormalizer":
            lowercase, strip = bool(part.get("lowercase", True)), part.get("strip_accents")
            if not part.get("handle_chinese_chars", True):
                raise UnsupportedVocabulary(
                    "tokenizer.json: handle_chinese_chars is off; llama.cpp always splits Chinese characters"
                )
        elif kind == "Lowercase":
            lowercase = True
        elif kind == "StripAccents":
            strip = True
        elif kind not in ("NFD", "NFC", "Sequence"):
            raise UnsupportedVocabulary(f"tokenizer.json: llama.cpp's WordPiece has no {kind} normaliser")
    return lowercase, lowercase if strip is None else bool(strip)
