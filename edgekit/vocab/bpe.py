"""Byte-level BPE: tokens, merges and the pre-tokenizer that the runtime has for it.

Structure decides where it can; where it cannot, the candidates are tried in the runtime itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from edgekit.corpus import STRINGS
from edgekit.errors import CorruptCheckpoint, UnsupportedVocabulary
from edgekit.vocab.built import CONTROL, NORMAL, Built, Limit, by_id, fill_holes, type_of
from edgekit.vocab.files import Added, Files, Json
from edgekit.vocab.parity import differences, explain
from edgekit.vocab.pretokenizer import Pre, Shape, as_json, exact, nearest, pieces, shape_of
from edgekit.vocab.probe import Probe
from edgekit.vocab.reference import TokenizerJson
from edgekit.vocab.spaces import foreign_normalizers, normalizer_limits, parts

_HARMLESS = {"NFC"}
"""Normalisers that leave ordinary text of today alone, so that a warning is enough."""
_WORDS = 2000


def is_byte_level(tokenizer: Json) -> bool:
    return any(p.get("type") == "ByteLevel" for p in parts(tokenizer.get("pre_tokenizer"), "pretokenizers"))


def build(files: Files, added: Mapping[int, Added]) -> Built:
    """Raises CorruptCheckpoint, and UnsupportedVocabulary with the strings that would differ."""
    tokenizer = files.tokenizer
    assert tokenizer is not None
    model = tokenizer["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedVocabulary(f"tokenizer.json: model.{key} = {model[key]!r} has no counterpart in llama.cpp")
    texts = by_id(model.get("vocab"), added)
    types = [NORMAL] * len(texts)
    for number, token in added.items():
        types[number] = CONTROL if token.special else type_of(token, None)
    pairs = merge_pairs(model)
    spaced = next((t for t in model["vocab"] if " " in t), None)
    if spaced and any(spaced in p for p in pairs):
        raise UnsupportedVocabulary(f"tokenizer.json: a merge holds {spaced!r}; llama.cpp cannot read a space in it")
    built = Built("gpt2", "", fill_holes(texts, types, None), types, merges=list(map(" ".join, pairs)))
    built.limits += normalizer_limits(foreign_normalizers(tokenizer))
    pre = _pre_tokenizer(files, added, built)
    built.pre = pre.name
    built.limits += _approximations(pre, tokenizer.get("pre_tokenizer"))
    return built


def merge_pairs(model: Mapping[str, Any]) -> list[list[str]]:
    """`["a b", ...]` or `[["a", "b"], ...]` as pairs, each checked against the vocabulary. Raises CorruptCheckpoint."""
    merges, vocab = model.get("merges"), model.get("vocab")
    if not isinstance(merges, list) or not isinstance(vocab, dict):
        raise CorruptCheckpoint("tokenizer.json: a BPE model without a list of merges")
    # whole columns at a time: a vocabulary may have half a million merges, and planning waits for them
    pairs = merges if set(map(type, merges)) == {list} else [m.split(" ") if type(m) is str else m for m in merges]
    if set(map(type, pairs)) - {list} or set(map(len, pairs)) - {2}:
        odd = next(i for i, pair in enumerate(pairs) if type(pair) is not list or len(pair) != 2)
        raise CorruptCheckpoint(f"tokenizer.json: merge {odd} is {merges[odd]!r}, not two tokens")
    try:
        whole = all(map(vocab.__contains__, map("".join, pairs))) and all(
            map(vocab.__contains__, chain.from_iterable(pairs))
        )
    except TypeError:
        raise CorruptCheckpoint("tokenizer.json: a merge that is not two strings") from None
    if not whole:
        raise _dangling(pairs, vocab)
    return pairs


def _dangling(pairs: Sequence[Sequence[str]], vocab: Mapping[str, Any]) -> CorruptCheckpoint:
    number, text = next((i, t) for i, (a, b) in enumerate(pairs) for t in (a, b, a + b) if t not in vocab)
    return CorruptCheckpoint(
        f"tokenizer.json: merge {number} {tuple(pairs[number])} needs the token {text!r}, which does not exist",
        "the file was cut or edited; download it again",
    )


def _pre_tokenizer(files: Files, added: Mapping[int, Added], built: Built) -> Pre:
    """The row of the table that splits as this tokenizer does."""
    tokenizer = files.tokenizer
    assert tokenizer is not None
    shape = shape_of(tokenizer.get("pre_tokenizer"))
    ignore = tokenizer["model"].get("ignore_merges") is True
    rows = exact(shape, ignore)
    if rows and _ordinary(tokenizer) and not shape.add_prefix_space and rows[0].ignore_merges == ignore:
        return rows[0]
    candidates = rows or nearest(tokenizer.get("pre_tokenizer"), ignore)
    return _by_behaviour(files, added, built, candidates, shape)


def _by_behaviour(files: Files, added: Mapping[int, Added], built: Built, rows: Sequence[Pre], shape: Shape) -> Pre:
    """The first candidate that gives the model's own ids for every probe string that no limit covers."""
    assert files.tokenizer is not None
    reference = TokenizerJson(files.tokenizer, added, files.root / "tokenizer.json")
    tolerated = built.limits if _ordinary(files.tokenizer) else []
    strings = [*STRINGS, *_some_words(reference, len(built.tokens))]
    best: tuple[int, Pre, str] | None = None
    for row in rows:
        limits = [*tolerated, *_approximations(row, files.tokenizer.get("pre_tokenizer"))]
        with Probe(built.trial(pre=row.name)) as probe:
            found = differences(reference, probe, strings, limits, add_special=False)
        if not found:
            return row
        if best is None or len(found) < best[0]:
            best = len(found), row, explain(found)
    assert best is not None
    raise _unlike(shape, *best)


def _unlike(shape: Shape, count: int, row: Pre, strings: str) -> UnsupportedVocabulary:
    described = shape.why or " then ".join(shape.steps or ()) or "no pre-tokenizer"
    if shape.add_prefix_space:
        described += ", a space put in front of every text"
    return UnsupportedVocabulary(
        f"no pre-tokenizer of llama.cpp splits text as this tokenizer.json does ({described[:300]}); the nearest, "
        f"{row.name!r}, differs in {count} probe strings:\n{strings}",
        "run this model with transformers, or train a vocabulary with the pre-tokenizer of Llama 3, Qwen2 or GPT-2",
    )


def _ordinary(tokenizer: Json) -> bool:
    return all(p.get("type") in _HARMLESS for p in foreign_normalizers(tokenizer))


def _some_words(reference: TokenizerJson, size: int) -> list[str]:
    """Texts of tokens spread over the vocabulary: whether merges are ignored shows in them."""
    return [
        text for i in range(0, size, max(1, size // _WORDS)) if (text := reference.decode([i])) and "\ufffd" not in text
    ]


def _approximations(row: Pre, own: object) -> list[Limit]:
    if not row.runs:
        return []
    runs = as_json(row)
    reason = "llama.cpp tells capitals only from A to Z, so it cuts some words of other alphabets at another place"
    return [Limit(reason, lambda text: pieces(own, text) != pieces(runs, text))]
