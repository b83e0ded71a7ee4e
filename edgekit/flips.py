"""Prompts whose greedy answer is another one: both answers, and the token where they part.

Knows prompts and answers; knows neither how models are opened nor what counts as good.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import chat
from edgekit.errors import EdgekitError
from edgekit.runtime import Session
from edgekit.units import Progress, silent

MAX_TOKENS = 48
"""Tokens of an answer that are compared unless told otherwise."""

LARGEST_FILE = 64 << 20
"""Bytes above which a file of prompts is refused: it would take days to answer."""

Messages = tuple[Mapping[str, str], ...]

PROMPTS = (
    "What is the capital of Australia?",
    "Explain to a child why the sea is salty.",
    "Write a Python function that counts the vowels in a string.",
    "How many minutes are there in three and a half hours? Show the steps.",
    "Translate into German: The library closes at six on Saturdays.",
    "Give three reasons to walk to work.",
    "A shirt costs 40 euros and is reduced by a quarter. What is the new price?",
    "Continue the story: The door at the end of the corridor had never been open before.",
    "Which of these is not a fruit: apple, carrot, plum, pear?",
    "Rewrite politely: Send me the report now.",
    "What happens when ice is heated from minus ten to plus ten degrees?",
    "Write a SQL query that counts orders by month.",
    "Name the planets from the sun outwards.",
    "If all birds lay eggs and a robin is a bird, does a robin lay eggs? Why?",
    "Résume en une phrase : le chat dort toute la journée et chasse la nuit.",
    "What does the command `ls -l` print?",
    "Write a haiku about rain on a tin roof.",
    'Return only JSON with the keys "name" and "age" for Ada, who is 36.',
    "Who wrote Romeo and Juliet, and about when?",
    "List the ingredients of pancakes.",
    "What is the difference between weather and climate?",
    "Correct the grammar: She don't has no time for going there.",
    "用一句话解释什么是重力。",
    "Is 91 a prime number? Answer yes or no, then explain.",
)
"""Asked where the user names none: facts, sums, code, languages, formats; each likely to hang on a close decision."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked: the messages, and the text that names it in a report (the last message)."""

    messages: Messages

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Answer:
    """Both greedy answers to a prompt. `at`: index of the first token that differs, None where all are the same."""

    prompt: str
    reference: str
    candidate: str
    tokens: int
    at: int | None

    @property
    def changed(self) -> bool:
        return self.at is not None


@dataclass(frozen=True, slots=True)
class Flips:
    """Answers in the order of the prompts, each of at most `max_tokens` tokens."""

    answers: tuple[Answer, ...]
    max_tokens: int

    @property
    def changed(self) -> tuple[Answer, ...]:
        return tuple(a for a in self.answers if a.changed)

    def as_json(self) -> dict[str, Any]:
        """Plain values; also what a manifest keeps under `flips`."""
        rows = [
            {"prompt": a.prompt, "at": a.at, "tokens": a.tokens, "reference": a.reference, "candidate": a.candidate}
            for a in self.answers
        ]
        return {"prompts": len(rows), "changed": len(self.changed), "max_tokens": self.max_tokens, "answers": rows}


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompts_from(choice: str) -> tuple[Prompt, ...] | None:
    """What `--prompts` means: `builtin`, `none` (None), or a file."""
    if choice == "none":
        return None
    return builtin_prompts() if choice == "builtin" else read_prompts(Path(choice))


def builtin_prompts() -> tuple[Prompt, ...]:
    return tuple(_asked(text) for text in PROMPTS)


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """One prompt a line; in `.jsonl`, a chat a line: `messages`, `prompt`, or a bare string. Empty lines are left out.

    A last turn of the assistant is dropped: it is what the models are asked for. Raises EdgekitError naming the line.
    """
    parse = _record if path.suffix.lower() in (".jsonl", ".ndjson") else lambda line, where: _asked(line.strip())
    found = tuple(parse(line, f"{path}, line {n}") for n, line in _lines(path))
    if not found:
        raise EdgekitError(f"{path} holds no prompt", "write one prompt a line")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise EdgekitError(f"{path} is larger than {LARGEST_FILE >> 20} MiB", "give the prompts that matter most")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise EdgekitError(f"{path}: byte {e.start} is not UTF-8", "save the prompts as UTF-8") from None
    except OSError as e:
        raise EdgekitError(f"cannot read {path}: {e.strerror}", "--prompts FILE, builtin or none") from None
    # not splitlines(): U+2028 and the like are legal inside a JSON string
    yield from ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())


_CHAT = 'write {"messages": [{"role": "user", "content": "..."}]} or {"prompt": "..."}'


def _record(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise EdgekitError(f"{where} is not JSON: {e}", _CHAT) from None
    if isinstance(record, Mapping) and isinstance(record.get("messages"), list):
        return _chat(record["messages"], where)
    text = record.get("prompt") if isinstance(record, Mapping) else record
    if not isinstance(text, str) or not text.strip():
        raise EdgekitError(f"{where} holds no prompt", _CHAT)
    return _asked(text)


def _chat(turns: list[Any], where: str) -> Prompt:
    messages = []
    for turn in turns:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise EdgekitError(f"{where}: a message needs a role and a content, both text", _CHAT)
        messages.append({"role": role, "content": content})
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise EdgekitError(f"{where} asks nothing", _CHAT)
    return Prompt(tuple(messages))


def _asked(text: str) -> Prompt:
    return Prompt(({"role": "user", "content": text},))


# --- answers ---------------------------------------------------------------------------------------------------------


def prompt_ids(session: Session, template: chat.Template | None, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of every prompt: rendered with `template`, or, where there is none, the contents as bare text."""
    found = []
    for prompt in prompts:
        if template is None:
            text, special = "\n\n".join(m["content"] for m in prompt.messages), True
        else:
            text = template.render(prompt.messages)
            bos = template.specials.get("bos_token")
            special = not (bos and text.startswith(bos))  # a second BOS would change the answer
        ids = session.tokenize(text, add_special=special)
        if not ids or len(ids) >= session.n_ctx:
            raise EdgekitError(
                f"the prompt {_brief(prompt.text)!r} has {len(ids)} tokens, the context {session.n_ctx}",
                "leave it out, or raise --ctx-size",
            )
        found.append(ids)
    return found


def greedy(
    session: Session, ids: Sequence[Sequence[int]], max_tokens: int = MAX_TOKENS, *, progress: Progress = silent
) -> list[list[int]]:
    """The likeliest continuation of every prompt, at most `max_tokens` tokens, end token not included."""
    found = []
    for i, prompt in enumerate(ids):
        session.reset()  # each prompt from the start: a cache left by the one before rounds differently
        found.append(list(session.generate(prompt, max_tokens)))
        progress("answer", i + 1, len(ids))
    return found


def compare(
    session: Session,
    prompts: Sequence[Prompt],
    reference: Sequence[Sequence[int]],
    candidate: Sequence[Sequence[int]],
    max_tokens: int = MAX_TOKENS,
) -> Flips:
    """Both models' answers side by side; `session` (either model's) turns the ids into text."""
    rows = []
    for prompt, ours, theirs in zip(prompts, reference, candidate, strict=True):
        text, other = session.detokenize(ours, special=True), session.detokenize(theirs, special=True)
        rows.append(Answer(prompt.text, text, other, max(len(ours), len(theirs)), _parting(ours, theirs)))
    return Flips(tuple(rows), max_tokens)


def _parting(a: Sequence[int], b: Sequence[int]) -> int | None:
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _brief(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "…"
