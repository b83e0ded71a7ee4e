"""How a tokenizer.json treats spaces and normalises text, and what of it llama.cpp can do. Knows no vocabulary."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.vocab.built import SPACE, Limit

Part = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Spaces:
    """`prefix`: when a text gets a space in front: always, unless (it has one), first (of all segments), never."""

    prefix: str
    metaspace: bool
    """Spaces are written as U+2581."""


def parts(node: object, nested: str) -> Iterator[Part]:
    """The members of a (nested) Sequence in order."""
    if isinstance(node, dict):
        inner = node.get(nested)
        if isinstance(inner, list):
            for item in inner:
                yield from parts(item, nested)
        else:
            yield node


def spaces_of(tokenizer: Mapping[str, Any]) -> Spaces:
    prefix, metaspace = "never", False
    for part in parts(tokenizer.get("normalizer"), "normalizers"):
        if part.get("type") == "Prepend" and part.get("prepend") == SPACE:
            prefix = "always"
        if _is_space_swap(part):
            metaspace = True
    for part in parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace":
            metaspace = True
            scheme = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
            prefix = {"always": "unless", "first": "first"}.get(str(scheme), prefix)
    return Spaces(prefix, metaspace)


def _is_space_swap(part: Part) -> bool:
    return part.get("type") == "Replace" and part.get("content") == SPACE and part.get("pattern") == {"String": " "}


def foreign_normalizers(tokenizer: Mapping[str, Any]) -> list[Part]:
    """Normaliser parts that are not about spaces: llama.cpp does none for BPE and SentencePiece vocabularies."""
    known = {"Prepend"}
    return [
        part
        for part in parts(tokenizer.get("normalizer"), "normalizers")
        if part.get("type") not in known and not _is_space_swap(part) and not _is_marker(part)
    ]


def _is_marker(part: Part) -> bool:
    """A replacement of a text that nobody types (ChatGLM's `<!dummy-prefix!>`) by the space sign."""
    pattern = part.get("pattern")
    text = pattern.get("String", "") if isinstance(pattern, dict) else ""
    return (
        part.get("type") == "Replace" and part.get("content") == SPACE and text.startswith("<!") and text.endswith("!>")
    )


def normalizer_limits(normalizers: list[Part]) -> list[Limit]:
    """One Limit for all of them together: they change some texts before the model's own tokenizer cuts them."""
    if not normalizers:
        return []
    names = " and ".join(dict.fromkeys(str(p.get("type")) for p in normalizers))
    reason = (
        f"llama.cpp has no {names} normaliser for this kind of vocabulary: text that it would change keeps its form"
    )
    return [Limit(reason, changes(normalizers))]


def changes(normalizers: list[Part]) -> Callable[[str], bool]:
    """A predicate: do these normalisers change the text?"""
    forms = {"NFC", "NFD", "NFKC", "NFKD"}
    if len(normalizers) == 1 and normalizers[0].get("type") in forms:
        form: Any = normalizers[0]["type"]
        return lambda text: unicodedata.normalize(form, text) != text
    return lambda text: _normalized(normalizers, text) != text


def _normalized(normalizers: list[Part], text: str) -> str:
    from tokenizers import Tokenizer, models

    shell = json.loads(Tokenizer(models.BPE()).to_str())
    shell["normalizer"] = {"type": "Sequence", "normalizers": [dict(p) for p in normalizers]}
    return str(Tokenizer.from_str(json.dumps(shell)).normalizer.normalize_str(text))
