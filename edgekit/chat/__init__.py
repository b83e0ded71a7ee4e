"""Chat templates: rendered as transformers renders them, and described where they are simple enough to describe.

Knows messages and Jinja; knows no tokenizer and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from edgekit.chat.sandbox import Clock, TemplateFailed
from edgekit.chat.sandbox import render as _run
from edgekit.chat.shape import Ask, ChatShape, derive

__all__ = ["ChatShape", "Message", "Template", "TemplateFailed", "probe", "render"]

Message = Mapping[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Template:
    """A chat template and the texts of its special tokens by template name: `bos_token`, `eos_token`, ..."""

    text: str = field(repr=False)
    specials: Mapping[str, str] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt. Raises TemplateFailed, which names the line."""
        return render(
            self.text,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **{**self.specials, **kwargs},
        )

    def shape(self) -> ChatShape | None:
        """The template as fixed texts between the turns, proven equal to it, or None if it is not of that kind."""
        return probe(self.text, **self.specials)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    clock: Clock | None = datetime.now,
    **kwargs: Any,
) -> str:
    """The text that `transformers` gives for `apply_chat_template(messages, tokenize=False, ...)`.

    `kwargs` are what the template sees beside `messages`: texts of special tokens, switches. Raises TemplateFailed.
    """
    variables = {
        "messages": [_with_reasoning(_plain(m)) for m in messages],
        "tools": None if tools is None else [_plain(t) for t in tools],
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    return _run(template, variables | {k: _plain(v) for k, v in kwargs.items()}, clock)


def probe(template: str, **specials: str) -> ChatShape | None:
    """The shape of `template`, derived from renderings of marked messages and proven on conversations; or None.

    A template that writes today's date is described with the date it falls back to when it has no clock; one that
    needs a clock gets this day's, and the shape says so (`dated`).
    """
    today = datetime.now()

    names: dict[str, Any] = dict(specials)

    def asker(clock: Clock | None) -> Ask:
        return lambda messages, generation: render(
            template, messages, add_generation_prompt=generation, clock=clock, **names
        )

    bos, eos = specials.get("bos_token", ""), specials.get("eos_token", "")
    return derive(asker(None), bos, eos) or derive(asker(lambda: today), bos, eos, dated=True)


def _plain(value: Any) -> Any:
    """A copy of plain JSON types: nothing with methods of its own gets into a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read the reasoning of a turn under one of three names; they find it under the two they use."""
    found = next((message[k] for k in _REASONING if message.get(k) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}
