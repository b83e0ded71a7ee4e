"""What a folder's tokenizer and facts give every session that writes text with its graphs. Knows no graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

from edgekit.runtime._common import Tokens, Writer, checked, room_for
from edgekit.runtime._ort_folder import DecoderFacts, Folder
from edgekit.runtime._ort_vocabulary import Vocabulary


class FolderWriter(Writer, ABC):
    """The part of `edgekit.runtime.Session` that is about tokens."""

    folder: Folder
    _facts: DecoderFacts

    @property
    @abstractmethod
    def n_ctx(self) -> int:
        """Tokens that the context holds."""

    @property
    def n_vocab(self) -> int:
        return self._facts.n_vocab

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Read when it is first needed: token ids alone need none. Raises UnsupportedVocabulary."""
        return Vocabulary(self.folder.root, self.folder.config, self._facts.stops)

    @property
    def bos(self) -> int | None:
        return self.vocabulary.bos

    @property
    def add_bos(self) -> bool:
        return self.vocabulary.add_bos

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        return self.vocabulary.tokenize(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return self.vocabulary.detokenize(checked(tokens, self.n_vocab, self._name).tolist(), special=special)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        checked([token], self.n_vocab, self._name)
        return self.vocabulary.piece(token, special=special)

    @property
    def _name(self) -> str:
        return self.folder.root.name

    def _admitted(self, tokens: Sequence[int]) -> Tokens:
        """Ids within the vocabulary, no more than the context holds. Raises RuntimeFailed."""
        return room_for(checked(tokens, self.n_vocab, self._name), self.n_ctx)
