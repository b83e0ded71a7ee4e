"""The text that both models read, and whether they read it alike. Knows files and tokens; measures nothing."""

from __future__ import annotations

from pathlib import Path

from edgekit import calibration, corpus
from edgekit.errors import EdgekitError
from edgekit.evaluation._what import Options
from edgekit.runtime import Session

CONTEXT, BUILTIN_CONTEXT = 512, 256
"""Tokens of a chunk: llama-perplexity's default for a text of the user's, less for the short built-in one."""

LARGEST_TEXT = 256 << 20
"""Bytes above which a text is refused: its tokens would take days to read."""

ALIKE = 0.95
"""Share of lines that two engines' tokenizers must cut alike: both have rare texts of their own that they differ on."""


def default_context(options: Options) -> int:
    return CONTEXT if options.text else BUILTIN_CONTEXT


def tokens_of(session: Session, options: Options) -> list[int]:
    """Ids of the text, as llama-perplexity makes them: special tokens added, none read out of the text."""
    if options.text and options.text.suffix.lower() in (".jsonl", ".ndjson"):
        chats = calibration.read_text(options.text, session, session.template)
        return [token for chunk in chats.chunks for token in chunk]
    return session.tokenize(text_of(options.text), add_special=True, parse_special=False)


def text_of(path: Path | None) -> str:
    """The file, or the built-in text. Raises EdgekitError."""
    if path is None:
        return corpus.TEXT
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise EdgekitError(f"{path} is larger than {LARGEST_TEXT >> 20} MiB", "give a part of it")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise EdgekitError(f"{path}: byte {e.start} is not UTF-8", "save the text as UTF-8") from None
    except OSError as e:
        raise EdgekitError(f"cannot read {path}: {e.strerror}", "--text FILE, or leave it out") from None


def name_of(options: Options) -> str:
    return options.text.name if options.text else "built-in text"


def notes_on(options: Options) -> tuple[str, ...]:
    if options.text:
        return ()
    return (f"the built-in text is short ({len(corpus.TEXT.split())} words): --text FILE gives smaller errors",)


def same_vocabulary(reference: int, candidate: int | None, name: str) -> None:
    """Raise EdgekitError for sizes that differ; None is not known before the model is open."""
    if candidate is not None and candidate != reference:
        raise EdgekitError(
            f"the vocabularies differ: {reference} tokens in the reference, {candidate} in {name}",
            "compare models that share a tokenizer",
        )


def same_tokens(ours: Session, theirs: Session, options: Options, *, one_engine: bool) -> tuple[str, ...]:
    """Notes on how alike both cut the text. Raises EdgekitError for what cannot be one tokenizer.

    Within one engine every token is the same; two engines may differ on rare texts, and both then read the
    reference's tokens.
    """
    text = text_of(options.text)[: 1 << 16]
    if _ids(ours, text) == _ids(theirs, text):
        return ()
    lines = [line for line in text.split("\n") if line.strip()]
    share = sum(_ids(ours, line) == _ids(theirs, line) for line in lines) / max(1, len(lines))
    if one_engine or share < ALIKE:
        raise EdgekitError("the two models cut the text into different tokens", "compare models that share a tokenizer")
    return (f"the two engines cut {1 - share:.1%} of the lines differently; both read the reference's tokens",)


def _ids(session: Session, text: str) -> list[int]:
    return session.tokenize(text, add_special=True, parse_special=False)
