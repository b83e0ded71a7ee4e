"""What a loaded model can be asked, whichever engine runs it. One engine a file; knows none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from edgekit.chat import Template

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Timings:
    """Time spent computing since the session was opened or `reset`, milliseconds; loading apart.

    Decode: batches of one token; prefill: all others.
    """

    load_ms: float
    prefill_ms: float
    prefill_tokens: int
    decode_ms: float
    decode_tokens: int


class Session(Protocol):
    """A model with a context of `n_ctx` tokens. Not thread safe: one caller at a time."""

    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def bos(self) -> int | None:
        """The beginning-of-sequence token, if the vocabulary has one."""

    @property
    def add_bos(self) -> bool:
        """Whether every sequence is meant to start with `bos`."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def template(self) -> Template | None:
        """The chat template with the texts of the special tokens that the model's files name."""

    @property
    def encoder(self) -> bool:
        """Opened to turn texts into vectors or scores: it writes none."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was allowed but is worth knowing, one sentence each."""

    @property
    def finish_reason(self) -> str:
        """Why the last generation ended: `stop` (an end token or stop string), `length`, or `` while it runs."""

    def metadata(self) -> Mapping[str, str]: ...
    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]: ...
    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str: ...
    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes `token` adds to the text; not always whole UTF-8 characters. Control tokens: none, unless `special`."""

    def logits(self, tokens: Sequence[int]) -> Logits:
        """`tokens` as a sequence of its own -> float32 (len(tokens), n_vocab), one row a position."""

    def logits_chunks(self, tokens: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, Logits]]:
        """As `logits`, in slabs of bounded size: (position of the first row, rows), from position `first` on."""

    def generate(
        self,
        tokens: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[int]:
        """Continue `tokens`. Ends before an end-of-generation token, and before the token completing a stop string."""

    def stream(
        self,
        tokens: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """As `generate`, as text: never half a character, never any part of a stop string."""

    def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> Logits:
        """One vector a text -> float32 (len(texts), dim); of length 1 if `normalize`, None: as the model's files say.

        `prompt` goes in front of every text, or the one that those files call `prompt_name`, or their default.
        """

    def timings(self) -> Timings: ...
    def reset(self) -> None:
        """Forget every token and zero the timings."""

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
