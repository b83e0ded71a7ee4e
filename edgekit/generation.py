"""Answer one prompt with a converted model: its chat template, its special tokens, text as it comes.

Knows how a prompt is made out of what a session says; the sampling is the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import chat
from edgekit.errors import EdgekitError
from edgekit.gguf_file import GgufFile
from edgekit.runtime import Session
from edgekit.runtime.opening import open_session


@dataclass(frozen=True, slots=True)
class Answer:
    """The text, why it ended (`stop`, `length`), and what it took; times in seconds. `notes`: what the engine told."""

    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int
    load_s: float
    first_token_s: float
    decode_tok_s: float
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """One line of figures."""
        return (
            f"{self.tokens} tokens at {self.decode_tok_s:.1f} tok/s; first after {self.first_token_s * 1000:.0f} ms "
            f"({self.prompt_tokens} prompt tokens); loaded in {self.load_s:.1f} s; ended by {self.finish_reason}"
        )


def answer(
    path: Path,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    context: int | None = None,
    threads: int | None = None,
    raw: bool = False,
    system: str | None = None,
    emit: Callable[[str], None] | None = None,
) -> Answer:
    """Answer `prompt`. `raw` continues the text without a template. `emit` gets each piece of text as it comes.

    Raises RuntimeFailed, EdgekitError (an empty prompt, one longer than the context).
    """
    if not prompt.strip():
        raise EdgekitError("the prompt is empty", 'edgekit run ARTIFACT "What is a byte?"')
    started = time.monotonic()
    with open_session(path, n_ctx=context, threads=threads) as session:
        loaded = time.monotonic()
        _must_write(session, path)
        tokens = prompt_tokens(session, prompt, raw=raw, system=system)
        size = session.n_ctx
        if len(tokens) >= size:
            raise EdgekitError(
                f"the prompt is {len(tokens)} tokens and the context {size}", f"--ctx-size {2 * len(tokens)}"
            )
        pieces, first = [], 0.0
        for piece in session.stream(tokens, max_tokens, temperature=temperature, seed=seed):
            first = first or time.monotonic() - loaded
            pieces.append(piece)
            if emit:
                emit(piece)
        times = session.timings()
        return Answer(
            text="".join(pieces),
            finish_reason=session.finish_reason,
            prompt_tokens=len(tokens),
            tokens=times.decode_tokens + 1 if pieces else 0,
            load_s=loaded - started,
            first_token_s=first,
            decode_tok_s=1000 * times.decode_tokens / times.decode_ms if times.decode_ms else 0.0,
            notes=session.notes,
        )


def _must_write(session: Session, path: Path) -> None:
    if session.encoder:
        verb = "scores" if getattr(session, "scoring", False) else "embed"
        raise EdgekitError(
            f"{path.name} is an encoder: it turns text into vectors or scores and does not write any",
            f"from Python: edgekit.load({str(path)!r}).{verb}([...])",
        )


def prompt_tokens(session: Session, prompt: str, *, raw: bool, system: str | None = None) -> list[int]:
    """Token ids of the prompt in the model's chat template; of the bare text where it has none, or `raw` is asked."""
    template = None if raw else session.template
    if template is None:
        return session.tokenize(f"{system}\n\n{prompt}" if system else prompt, add_special=True)
    messages: list[Mapping[str, str]] = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = template.render(messages)
    # most templates write the BOS themselves: a second one from the tokenizer would change the answer
    bos = template.specials.get("bos_token")
    return session.tokenize(text, add_special=not (bos and text.startswith(bos)))


def template_of(file: GgufFile) -> chat.Template | None:
    """The chat template in a GGUF with the texts of the special tokens that the file itself names, or None."""
    text = file.get("tokenizer.chat_template")
    if not isinstance(text, str):
        return None
    tokens: Sequence[Any] = file.get("tokenizer.ggml.tokens", ())
    specials = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = file.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            specials[f"{name}_token"] = str(tokens[index])
    return chat.Template(text, specials)
