"""The model's own tokenizer, run as it is: what the runtime is compared with. Knows no GGUF."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgekit.errors import UnsupportedVocabulary
from edgekit.vocab.files import Added


class Reference(Protocol):
    """Encodes and decodes as the model's own files say."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Token ids. Without `parse_special` the text of a special token is ordinary text."""

    def pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids of two texts that are read together, special ones included, and the segment of each."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included."""


class TokenizerJson:
    """tokenizer.json through the `tokenizers` library, without the truncation and padding some files carry."""

    def __init__(self, tokenizer: Mapping[str, Any], added: Mapping[int, Added], where: Path) -> None:
        from tokenizers import AddedToken, Tokenizer

        numbered = _numbered(tokenizer)
        as_is = numbered is tokenizer and where.name == "tokenizer.json" and where.is_file()
        try:
            self._tokenizer = Tokenizer.from_file(str(where)) if as_is else Tokenizer.from_str(json.dumps(numbered))
        except Exception as e:  # noqa: BLE001 - the Rust library raises plain Exception for everything it cannot parse
            raise UnsupportedVocabulary(f"{where}: the tokenizers library does not read it ({e})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = {entry["id"] for entry in tokenizer.get("added_tokens") or ()}
        for number, token in added.items():
            if number not in known and number == self._tokenizer.get_vocab_size():
                flags = {k: getattr(token, k) for k in ("special", "normalized", "lstrip", "rstrip", "single_word")}
                self._tokenizer.add_tokens([AddedToken(token.content, **flags)])

    def encode(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        self._tokenizer.encode_special_tokens = not parse_special
        return list(self._tokenizer.encode(text, add_special_tokens=add_special).ids)

    def pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        self._tokenizer.encode_special_tokens = False
        encoded = self._tokenizer.encode(first, second)
        return list(encoded.ids), list(encoded.type_ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def _numbered(tokenizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The library numbers added tokens anew, whatever ids the file gives, unless the vocabulary holds them."""
    vocab = tokenizer.get("model", {}).get("vocab")
    added = tokenizer.get("added_tokens") or []
    if not isinstance(vocab, dict):
        return tokenizer
    beyond = sorted(t["id"] for t in added if t["content"] not in vocab)
    if beyond == list(range(len(vocab), len(vocab) + len(beyond))):
        return tokenizer
    full = vocab | {t["content"]: t["id"] for t in added}
    return dict(tokenizer) | {"model": dict(tokenizer["model"]) | {"vocab": full}}
