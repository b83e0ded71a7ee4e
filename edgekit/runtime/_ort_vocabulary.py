"""A model's own tokenizer at work: ids of text, bytes of ids, which ids begin and end, the chat template.

Reads tokenizer.json, tokenizer_config.json, config.json, chat_template.jinja; knows no graph and no GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgekit.chat import Template
from edgekit.errors import CorruptCheckpoint, MissingExtra, UnsupportedVocabulary
from edgekit.runtime._common import encoded
from edgekit.vocab import bpe, special
from edgekit.vocab.built import SPACE, by_id
from edgekit.vocab.files import Files, added_tokens, read_files
from edgekit.vocab.reference import TokenizerJson
from edgekit.vocab.spaces import parts, spaces_of

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Vocabulary:
    """The tokenizer in the folder `root`. `stops`: ids that end a generation beside those its files name.

    Raises CorruptCheckpoint, UnsupportedVocabulary.
    """

    def __init__(self, root: Path, config: Mapping[str, Any], stops: Sequence[int] = ()) -> None:
        self._files = files = read_files(root, config)
        if files.tokenizer is None:
            raise UnsupportedVocabulary(
                f"{root} has no tokenizer.json",
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes one",
            )
        self._tokenizer = files.tokenizer
        self._added = added_tokens(files)
        self._texts = self._by_id()
        self._specials = _specials(files, self._texts)
        self._stops = frozenset(self._ends(stops))

    def _by_id(self) -> list[str | None]:
        model = self._tokenizer.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, list):  # Unigram lists [text, score] pairs
            if not all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in vocab):
                raise CorruptCheckpoint(f"{self._files.root / 'tokenizer.json'}: model.vocab is not a list of pairs")
            texts: list[str | None] = [text for text, _ in vocab]
            top = max(self._added, default=-1) + 1
            texts += [None] * (top - len(texts))
            for number, token in self._added.items():
                texts[number] = token.content
            return texts
        return by_id(vocab, self._added)

    def _ends(self, stops: Sequence[int]) -> set[int]:
        """What the files name, what the texts of tokens say (as llama.cpp takes them), and `stops`."""
        named = (self._specials.ids.get(role) for role in ("eos", "eot", "eom"))
        known = {i for i, text in enumerate(self._texts) if text in special.STOP_TEXTS}
        return known | {*self._specials.stops, *stops, *(i for i in named if i is not None)}

    @cached_property
    def _reference(self) -> TokenizerJson:
        try:
            return TokenizerJson(self._tokenizer, self._added, self._files.root / "tokenizer.json")
        except ImportError:
            raise MissingExtra("the `tokenizers` package is missing", 'pip install "edgekit[onnx-runtime]"') from None

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def bos(self) -> int | None:
        return self._specials.ids.get("bos")

    @property
    def add_bos(self) -> bool:
        return self._specials.add_bos

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation."""
        return token in self._stops

    def is_special(self, token: int) -> bool:
        """Whether `token` steers and is no text."""
        return token in self._hidden

    def template(self) -> Template | None:
        """The default chat template with the texts of the special tokens that the files name, or None."""
        text = self._files.templates.get("default")
        if text is None:
            return None
        named = {f"{role}_token": t for role in _ROLES if (t := self._files.special_text(role))}
        return Template(text, named)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Ids of `text`. Raises EdgekitError for a text that is not Unicode."""
        encoded(text)
        return self._reference.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of `tokens`; control tokens are shown only if `special`. Invalid UTF-8 becomes U+FFFD.

        The space that the tokenizer puts in front of a text is no part of it.
        """
        data = b"".join(self.piece(t, special=special) for t in tokens)
        if self.leads and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes `token` adds to a text; control tokens none unless `special`, ids without a token none."""
        text = self._texts[token] if 0 <= token < len(self._texts) else None
        if text is None:
            return b""
        if token in self._shown_whole:
            return text.encode("utf-8", "replace")
        if token in self._hidden:
            return text.encode("utf-8", "replace") if special else b""
        return self._bytes(text)

    @cached_property
    def _hidden(self) -> frozenset[int]:
        """Control tokens, and the one for what is unknown."""
        model = self._tokenizer["model"]
        hidden = {i for i, token in self._added.items() if token.special}
        if isinstance(model.get("unk_id"), int):
            hidden.add(model["unk_id"])
        elif model.get("unk_token") in self._texts and not self._byte_level:
            hidden.add(self._texts.index(model["unk_token"]))
        return frozenset(hidden)

    @cached_property
    def _shown_whole(self) -> frozenset[int]:
        """Added tokens that are text."""
        return frozenset(i for i, token in self._added.items() if not token.special)

    @cached_property
    def _byte_level(self) -> bool:
        ends = [p.get("type") for p in parts(self._tokenizer.get("decoder"), "decoders")]
        return bpe.is_byte_level(self._tokenizer) or "ByteLevel" in ends

    @cached_property
    def leads(self) -> bool:
        """Whether texts get a space in front."""
        before = parts(self._tokenizer.get("pre_tokenizer"), "pretokenizers")
        if self._byte_level:
            return any(p.get("type") == "ByteLevel" and p.get("add_prefix_space") is True for p in before)
        return self._word_pieces is not None or spaces_of(self._tokenizer).prefix != "never"

    @cached_property
    def _word_pieces(self) -> str | None:
        """The mark of a word's continuation, for WordPiece."""
        model = self._tokenizer["model"]
        return str(model.get("continuing_subword_prefix", "##")) if model.get("type") == "WordPiece" else None

    @cached_property
    def _falls_back(self) -> bool:
        return self._tokenizer["model"].get("byte_fallback") is True

    def _bytes(self, text: str) -> bytes:
        if self._byte_level:
            table = _alphabet()
            return b"".join(table.get(c) or c.encode("utf-8", "replace") for c in text)
        if self._word_pieces is not None:
            mark = self._word_pieces
            text = text[len(mark) :] if text.startswith(mark) and text != mark else f" {text}"
        elif self._falls_back and (byte := _BYTE.fullmatch(text)):
            return bytes([int(byte[1], 16)])
        else:
            text = text.replace(SPACE, " ")
        return text.encode("utf-8", "replace")


def _specials(files: Files, texts: Sequence[str | None]) -> special.Specials:
    tokenizer = files.tokenizer or {}
    model = tokenizer["model"]
    roles: dict[str, int] = {}
    if isinstance(model.get("unk_id"), int):
        roles["unk"] = model["unk_id"]
    elif model.get("unk_token") in texts:
        roles["unk"] = texts.index(model["unk_token"])
    return special.find(files, texts, special.frame_of(tokenizer, texts), roles)


def _alphabet() -> dict[str, bytes]:
    """GPT-2's characters for the 256 bytes (bytes_to_unicode in its encoder.py): printable ones stand for themselves,
    the others are U+0100 and on, in order."""
    if not _ALPHABET:
        kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = [b for b in range(256) if b not in kept]
        _ALPHABET.update({chr(b): bytes([b]) for b in kept})
        _ALPHABET.update({chr(0x100 + n): bytes([b]) for n, b in enumerate(others)})
    return _ALPHABET


_ALPHABET: dict[str, bytes] = {}
