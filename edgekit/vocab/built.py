"""What every kind of vocabulary boils down to: tokens by id, types, and the ways the runtime is known to differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edgekit.errors import CorruptCheckpoint, UnsupportedVocabulary
from edgekit.gguf_file import MetaValue, Typed
from edgekit.vocab.files import Added

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""`llama_token_type`."""

MAX_TOKENS = 1 << 22
SPACE = "\u2581"
PAD_SCORE = -10000.0


@dataclass(frozen=True, slots=True)
class Limit:
    """A difference between the model's own tokenizer and the runtime that no metadata can remove."""

    reason: str
    applies: Callable[[str], bool] = field(compare=False)
    """True for a text whose ids may differ for this reason."""
    only: str = ""
    """`framed`: only where BOS and EOS are added; `literal`: only where special tokens in a text are plain text."""

    def covers(self, text: str, *, add_special: bool, parse_special: bool) -> bool:
        if (self.only == "framed" and not add_special) or (self.only == "literal" and parse_special):
            return False
        return self.applies(text)


@dataclass
class Built:
    """A vocabulary under construction."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    extra: dict[str, MetaValue] = field(default_factory=dict)
    limits: list[Limit] = field(default_factory=list)
    lead: str = ""

    def trial(self, **changes: str) -> dict[str, MetaValue]:
        """Enough metadata to ask the runtime about plain text; `changes` are `tokenizer.ggml.*` keys to try."""
        meta: dict[str, MetaValue] = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.add_eos_token": False,
        }
        if self.scores is not None:
            meta["tokenizer.ggml.scores"] = self.scores
        if self.merges is not None:
            meta["tokenizer.ggml.merges"] = self.merges or Typed("array:string", [])
        return meta | self.extra | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def by_id(vocab: object, added: Mapping[int, Added]) -> list[str | None]:
    """Token texts in id order from a `{text: id}` object and the added tokens; None where an id has no token.

    Raises CorruptCheckpoint for an id that two different texts claim, or that is absurd.
    """
    if not isinstance(vocab, dict):
        raise CorruptCheckpoint("tokenizer.json: model.vocab is not an object")
    odd = next((i for i in vocab.values() if type(i) is not int or not 0 <= i < MAX_TOKENS), None)
    odd = next((i for i in added if i >= MAX_TOKENS), odd)
    if odd is not None:
        raise CorruptCheckpoint(f"tokenizer.json: {odd!r} is no token id")
    top = max(max(vocab.values(), default=-1), max(added, default=-1))
    tokens: list[str | None] = [None] * (top + 1)
    for text, number in vocab.items():
        if tokens[number] is not None:
            raise CorruptCheckpoint(f"tokenizer.json: tokens {tokens[number]!r} and {text!r} share id {number}")
        tokens[number] = text
    for number, token in added.items():
        if tokens[number] not in (None, token.content):
            raise CorruptCheckpoint(
                f"added token {token.content!r} has id {number}, which is {tokens[number]!r} in the vocabulary",
                "the tokenizer files come from two different models; download them again",
            )
        tokens[number] = token.content
    return tokens


def fill_holes(tokens: list[str | None], types: list[int], size: int | None) -> list[str]:
    """Pads to `size` rows and names unused ids `[PAD{id}]`, in place of what no id has. Extends `types` with UNUSED."""
    if size is not None and size < len(tokens):
        raise AssertionError("cut first")
    filled = [f"[PAD{i}]" if t is None else t for i, t in enumerate(tokens)]
    for i, t in enumerate(tokens):
        if t is None:
            types[i] = UNUSED
    for i in range(len(filled), size or 0):
        filled.append(f"[PAD{i}]")
        types.append(UNUSED)
    return filled


def check_unique(tokens: list[str]) -> None:
    """llama.cpp aborts on two tokens of one text, and reads a token only up to its first NUL."""
    if len(set(tokens)) != len(tokens):
        seen: dict[str, int] = {}
        for i, t in enumerate(tokens):
            if t in seen:
                raise UnsupportedVocabulary(
                    f"tokens {seen[t]} and {i} are both {t!r}: the runtime needs every token's text to be unique"
                )
            seen[t] = i
    bad = next((i for i, t in enumerate(tokens) if "\0" in t), None)
    if bad is not None:
        raise UnsupportedVocabulary(f"token {bad} ({tokens[bad]!r}) holds a NUL, which the runtime cannot store")


def type_of(token: Added, unk: str | None) -> int:
    """Special tokens are CONTROL, matched only when the caller asks for it; the others are always matched."""
    if token.special:
        return UNKNOWN if token.content == unk else CONTROL
    return USER_DEFINED
