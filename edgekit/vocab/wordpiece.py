"""WordPiece for llama.cpp's `bert` vocabulary, which writes word starts with U+2581 and continuations bare."""

from __future__ import annotations

from collections.abc import Mapping

from edgekit.errors import UnsupportedVocabulary
from edgekit.gguf_file import MetaValue
from edgekit.vocab.built import NORMAL, SPACE, Built, Limit, by_id, type_of
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
        # [UNK] too: llama.cpp's own files have it as a control token, and it takes the id from its key
        types[number] = max(type_of(token, None), 3) if token.special else type_of(token, None)
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
    limits = [
        Limit(
            f"a word of more than {longest} characters is one unknown token in the model's tokenizer, pieces in llama.cpp",
            lambda text: any(len(word) > longest for word in text.split()),
        )
    ]
    return Built("bert", "default", tokens, types, extra=extra, limits=limits)  # type: ignore[arg-type]


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
