"""A SentencePiece model as the tokenizer.json it stands for, so that one library runs both. Knows no llama.cpp."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from edgekit.vocab.built import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED
from edgekit.vocab.files import Added
from edgekit.vocab.protobuf import UNIGRAM, SentencePiece


def tokenizer_json(
    model: SentencePiece, added: Mapping[int, Added], before: tuple[int, ...], after: tuple[int, ...]
) -> dict[str, Any]:
    """`before` and `after` are ids that a text gets around it (BOS, EOS)."""
    return {
        "version": "1.0",
        "added_tokens": _added(model, added),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": None,
        "post_processor": _frame(model, before, after),
        "decoder": _decoder(model),
        "model": _unigram(model) if model.model_type == UNIGRAM else _bpe(model),
    }


def merges_of(model: SentencePiece) -> list[list[str]]:
    """Every pair of pieces that joins into a piece, in the order in which SentencePiece would join them."""
    ids = {text: i for i, (text, _, kind) in enumerate(model.pieces) if kind in (NORMAL, USER_DEFINED)}
    pairs = []
    for number, (text, score, kind) in enumerate(model.pieces):
        if kind != NORMAL:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                pairs.append((-score, number, ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(pairs)]


def _bpe(model: SentencePiece) -> dict[str, Any]:
    unk = next((text for text, _, kind in model.pieces if kind == UNKNOWN), None)
    return {
        "type": "BPE",
        "unk_token": unk,
        "fuse_unk": True,
        "byte_fallback": any(kind == BYTE for _, _, kind in model.pieces),
        "vocab": {text: i for i, (text, _, _) in enumerate(model.pieces)},
        "merges": merges_of(model),
    }


def _unigram(model: SentencePiece) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": model.unk_id,
        "byte_fallback": any(kind == BYTE for _, _, kind in model.pieces),
        "vocab": [[text, score] for text, score, _ in model.pieces],
    }


def _normalizers(model: SentencePiece) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def _added(model: SentencePiece, added: Mapping[int, Added]) -> list[dict[str, Any]]:
    entries = {
        number: {"id": number, "content": text, "special": kind != USER_DEFINED}
        for number, (text, _, kind) in enumerate(model.pieces)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    }
    for number, token in added.items():
        flags = {k: getattr(token, k) for k in ("lstrip", "rstrip", "single_word")}
        entries[number] = {"id": number, "content": token.content, "special": token.special} | flags
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [plain | entries[number] for number in sorted(entries)]


def _frame(model: SentencePiece, before: tuple[int, ...], after: tuple[int, ...]) -> dict[str, Any]:
    def special(i: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": model.pieces[i][0], "type_id": 0}}

    first, last = [special(i) for i in before], [special(i) for i in after]
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    named = {
        model.pieces[i][0]: {"id": model.pieces[i][0], "ids": [i], "tokens": [model.pieces[i][0]]}
        for i in (*before, *after)
    }
    return {
        "type": "TemplateProcessing",
        "single": [*first, a, *last],
        "pair": [*first, a, *last, *first, b, *last],
        "special_tokens": named,
    }


def _decoder(model: SentencePiece) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
