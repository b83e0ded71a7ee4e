"""tokenizer.json for a model that comes with a SentencePiece file alone. Knows what transformers 5 makes of that."""

from __future__ import annotations

import json
from pathlib import Path

from edgekit.vocab.protobuf import SentencePiece, read_sentencepiece

SPACE = "\u2581"


def restore(root: Path, tokenizer: Path) -> bool:
    """Let the converted `tokenizer` cut text as the SentencePiece file in `root` does -> whether it was changed.

    transformers 5 converts a BPE of SentencePiece with a pre-tokenizer that puts no space before a text that begins
    with one; SentencePiece does (`add_dummy_prefix`, normalizer_spec), so that " the" would lose a token. Its merges
    are not in the order of the pieces' scores either: Llama 2 has runs of spaces last. A model that has a
    tokenizer.json of its own is left as it is.
    """
    source = root / "tokenizer.model"
    if (root / "tokenizer.json").is_file() or not source.is_file() or not tokenizer.is_file():
        return False
    found = json.loads(tokenizer.read_text(encoding="utf-8"))
    split = found.get("pre_tokenizer") or {}
    if found["model"]["type"] != "BPE" or split.get("type") != "Metaspace" or found.get("normalizer"):
        return False
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    model = read_sentencepiece(source)
    if model.add_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    found |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    found["model"]["merges"] = merges_of(model)
    tokenizer.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return True


def merges_of(model: SentencePiece) -> list[list[str]]:
    """Every way to put a piece together of two others, best score first: what SentencePiece's BPE does step by step."""
    ids = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    found = []
    for text, score, _ in model.pieces:
        cuts = [(text[:i], text[i:]) for i in range(1, len(text))]
        known = sorted((ids[a], ids[b], a, b) for a, b in cuts if a in ids and b in ids)
        found += [(-score, [a, b]) for _, _, a, b in known]
    return [pair for _, pair in sorted(found, key=lambda each: each[0])]
