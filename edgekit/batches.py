"""Texts, or pairs of texts, into padded batches of token ids for an encoder. Knows `tokenizers`; knows no engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.checkpoint._files import read_json
from edgekit.errors import CorruptCheckpoint, EdgekitError, MissingExtra, UnsupportedVocabulary

Ids = npt.NDArray[np.int64]
Text = str | tuple[str, str]
"""A text, or two that are read together: question and document, premise and hypothesis."""

_MAX_TOKENIZER = 256 << 20


@dataclass(frozen=True, slots=True)
class Batch:
    """int64 (b, s) each; `mask` is 0 where `ids` is padding. `rows`: which of the texts these are."""

    rows: tuple[int, ...]
    ids: Ids
    mask: Ids
    types: Ids


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A model's tokenizer: special tokens added, texts cut to `max_length` tokens with those (None: not cut)."""

    inner: Any
    pad: int
    max_length: int | None

    def encode(self, texts: Sequence[Text]) -> list[Any]:
        """One `tokenizers.Encoding` a text; of a pair, the longer text is cut first. Raises EdgekitError."""
        for i, text in enumerate(texts):
            for part in (text,) if isinstance(text, str) else text:
                if not isinstance(part, str):
                    raise EdgekitError(f"text {i} is a {type(part).__name__}", "give text, or two texts as a pair")
                if not part.isascii():
                    _must_be_unicode(part, i)
        return list(self.inner.encode_batch(list(texts)))

    def batches(self, texts: Sequence[Text], *, most: int = 32, tokens: int = 4096) -> Iterator[Batch]:
        """Every text once, like lengths together: at most `most` texts and about `tokens` tokens with padding."""
        encoded = self.encode(texts)
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids))
        start = 0
        while start < len(order):
            longest = max(1, len(encoded[order[start]].ids))
            rows = order[start : start + max(1, min(most, tokens // longest))]
            yield self._padded(rows, [encoded[i] for i in rows], longest)
            start += len(rows)

    def _padded(self, rows: list[int], encoded: list[Any], width: int) -> Batch:
        ids = np.full((len(rows), width), self.pad, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, one in enumerate(encoded):
            if not one.ids:
                raise EdgekitError("a text without any token has no result", "leave empty texts out")
            n = len(one.ids)
            ids[row, :n], mask[row, :n], types[row, :n] = one.ids, 1, one.type_ids
        return Batch(tuple(rows), ids, mask, types)


def open_tokenizer(root: Path, *, max_length: int | None = None, lower: bool = False) -> Tokenizer:
    """The tokenizer in `root`, without the padding and truncation that its file may ask for. `lower`: texts are
    lower-cased first, where the tokenizer does not do so itself. Raises CorruptCheckpoint, UnsupportedVocabulary."""
    try:
        from tokenizers import Tokenizer as Fast
        from tokenizers import normalizers
    except ImportError:
        raise MissingExtra("the `tokenizers` package is missing", 'pip install "edgekit[onnx-runtime]"') from None
    path = root / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedVocabulary(f"{root} has no tokenizer.json", "save the tokenizer with a fast one beside it")
    if path.stat().st_size > _MAX_TOKENIZER:
        raise CorruptCheckpoint(f"{path}: {path.stat().st_size} bytes; more than any tokenizer needs")
    try:
        text = path.read_text(encoding="utf-8")
        inner = Fast.from_str(text)
    except Exception as e:  # noqa: BLE001 - the library raises bare Exception for what it cannot read
        raise CorruptCheckpoint(f"{path}: {e}", "fetch it again") from None
    inner.no_padding()
    inner.no_truncation()
    settings = read_json(root, "tokenizer_config.json") if (root / "tokenizer_config.json").is_file() else {}
    if lower and '"lowercase": true' not in text and '"Lowercase"' not in text and '"lowercase":true' not in text:
        steps = [normalizers.Lowercase(), *([inner.normalizer] if inner.normalizer else [])]
        inner.normalizer = normalizers.Sequence(steps)
    if max_length is not None:
        room = max_length - inner.num_special_tokens_to_add(is_pair=False)
        if room < 1:
            raise CorruptCheckpoint(f"{root}: a limit of {max_length} tokens leaves no room for a text")
        side = "left" if settings.get("truncation_side") == "left" else "right"
        inner.enable_truncation(max_length, strategy="longest_first", direction=side)
    return Tokenizer(inner, _pad(root, inner, settings), max_length)


def _pad(root: Path, inner: Any, settings: dict[str, Any]) -> int:
    """The padding token: families such as RoBERTa count positions by where it is not."""
    token = settings.get("pad_token")
    if token is None and (root / "special_tokens_map.json").is_file():
        token = read_json(root, "special_tokens_map.json").get("pad_token")
    name = token.get("content") if isinstance(token, dict) else token
    found = inner.token_to_id(name) if isinstance(name, str) else None
    if found is None and (root / "config.json").is_file():
        found = read_json(root, "config.json").get("pad_token_id")
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 1 << 31 else 0


def _must_be_unicode(text: str, i: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise EdgekitError(f"half a surrogate pair at character {e.start} of text {i}: not Unicode") from None
