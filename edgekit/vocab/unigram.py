"""Unigram (T5, XLM-R) for llama.cpp's `t5` vocabulary, from tokenizer.json or a SentencePiece model."""

from __future__ import annotations

import base64
import itertools
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from edgekit.errors import CorruptCheckpoint, UnsupportedVocabulary
from edgekit.gguf_file import MetaValue, Typed
from edgekit.vocab.built import NORMAL, PAD_SCORE, SPACE, UNKNOWN, Built, Limit, by_id, fill_holes, type_of
from edgekit.vocab.files import Added, Json
from edgekit.vocab.protobuf import SentencePiece
from edgekit.vocab.spaces import Part, parts

_RUN = re.compile(r"(\S)\1+")
_LONG = 5  # characters of a run that may be cut at several places whatever the vocabulary holds


def from_json(tokenizer: Json, added: Mapping[int, Added]) -> Built:
    """Raises CorruptCheckpoint, UnsupportedVocabulary."""
    model = tokenizer["model"]
    entries = model.get("vocab")
    if not isinstance(entries, list) or not all(_is_entry(e) for e in entries):
        raise CorruptCheckpoint("tokenizer.json: a Unigram vocabulary must be a list of [text, score]")
    vocab = {text: i for i, (text, _) in enumerate(entries)}
    if len(vocab) != len(entries):
        raise CorruptCheckpoint("tokenizer.json: the Unigram vocabulary holds a text twice")
    tokens = by_id(vocab, added)
    scores = [float(score) for _, score in entries] + [PAD_SCORE] * (len(tokens) - len(entries))
    types = [NORMAL] * len(tokens)
    unk = model.get("unk_id")
    for number, token in added.items():
        types[number] = type_of(token, None)
    if isinstance(unk, int) and 0 <= unk < len(types):
        types[unk] = UNKNOWN
    prefix, merge_spaces = _spaces(tokenizer)
    charsmap = _charsmap(tokenizer)
    built = _built(tokens, scores, types, charsmap, prefix, merge_spaces)
    if not charsmap and any(p.get("type") == "WhitespaceSplit" for p in _pre_tokenizers(tokenizer)):
        reason = "without SentencePiece's rules llama.cpp splits at U+0020 alone, not at line ends, others, U+2581"
        built.limits.append(Limit(reason, lambda text: any((c.isspace() and c != " ") or c == SPACE for c in text)))
    return _without_bytes(built) if model.get("byte_fallback") else built


def from_model(model: SentencePiece, laid: tuple[list[str | None], list[float], list[int]]) -> Built:
    """`laid` are texts, scores, types with the added tokens already over them."""
    if model.whitespace_as_suffix or not model.escape_whitespaces:
        raise UnsupportedVocabulary("the SentencePiece model treats whitespace as a suffix or does not escape it")
    built = _built(*laid, model.charsmap, model.add_dummy_prefix, model.remove_extra_whitespaces)
    return _without_bytes(built) if model.byte_fallback else built


def _without_bytes(built: Built) -> Built:
    known = set("".join(built.tokens)) | {" "}
    reason = "characters that are not in the vocabulary are bytes in the model's tokenizer, unknown in llama.cpp"
    built.limits.append(Limit(reason, lambda text: not known.issuperset(text)))
    return built


def _built(
    tokens: list[str | None], scores: list[float], types: list[int], charsmap: bytes, prefix: bool, merge_spaces: bool
) -> Built:
    extra: dict[str, MetaValue] = {
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": merge_spaces,
    }
    if charsmap:
        extra["tokenizer.ggml.precompiled_charsmap"] = Typed("array:uint8", list(charsmap))
    built = Built("t5", "default", fill_holes(tokens, types, None), types, scores, extra=extra)
    reason = "a run of one character may be cut at other places where several ways have the same score"
    built.limits.append(Limit(reason, _has_ties(built.tokens)))
    if charsmap:
        reason = "SentencePiece's rules reach stacked marks and U+0085 in llama.cpp, not in the tokenizers library"
        built.limits.append(Limit(reason, _is_stacked))
    return built


def _has_ties(tokens: list[str]) -> Callable[[str], bool]:
    """A predicate: has the text a run that no piece holds whole while a piece holds part of it: 00 0, or 0 00?"""
    longest: dict[str, int] = {}
    for token in tokens:
        piece = token.removeprefix(SPACE)
        if len(piece) > 1 and piece == piece[0] * len(piece):
            longest[piece[0]] = max(longest.get(piece[0], 0), len(piece))

    def applies(text: str) -> bool:
        runs = [(run[1], len(run[0])) for run in _RUN.finditer(text)]
        return any(n >= _LONG or 1 < longest.get(c, n) < n for c, n in runs)

    return applies


def _is_stacked(text: str) -> bool:
    marks = [unicodedata.combining(c) != 0 for c in text]
    return "\x85" in text or any(a and b for a, b in itertools.pairwise(marks))


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], int | float)
    )


def _charsmap(tokenizer: Json) -> bytes:
    """SentencePiece's compiled normalisation rules; llama.cpp runs them itself."""
    for part in parts(tokenizer.get("normalizer"), "normalizers"):
        if part.get("type") == "Precompiled" and part.get("precompiled_charsmap"):
            try:
                return base64.b64decode(part["precompiled_charsmap"], validate=True)
            except ValueError:
                raise CorruptCheckpoint("tokenizer.json: precompiled_charsmap is not base64") from None
        elif part.get("type") not in ("Precompiled", "Replace", "Strip"):
            raise UnsupportedVocabulary(f"tokenizer.json: llama.cpp's Unigram has no {part.get('type')} normaliser")
    return b""


def _pre_tokenizers(tokenizer: Json) -> list[Part]:
    return list(parts(tokenizer.get("pre_tokenizer"), "pretokenizers"))


def _spaces(tokenizer: Json) -> tuple[bool, bool]:
    """(a space in front, runs of spaces count as one)."""
    prefix, merge = False, False
    for part in _pre_tokenizers(tokenizer):
        if part.get("type") == "WhitespaceSplit":
            merge = True
        if part.get("type") == "Metaspace":
            scheme = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
            prefix = scheme != "never"
    for part in parts(tokenizer.get("normalizer"), "normalizers"):
        merge = merge or _collapses(part)
    return prefix, merge


def _collapses(part: Part) -> bool:
    """`Replace(" {2,}", " " or U+2581)`, as transformers writes it for SentencePiece's remove_extra_whitespaces."""
    pattern = part.get("pattern")
    return (
        part.get("type") == "Replace"
        and isinstance(pattern, dict)
        and pattern.get("Regex") == " {2,}"
        and part.get("content") in (" ", SPACE)
    )
