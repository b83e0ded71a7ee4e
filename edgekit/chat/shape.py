"""A chat template as fixed texts between turns: what an Ollama template and a stop list can be made of.

Knows conversations of system, user and assistant turns; asks the template, never reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgekit.errors import EdgekitError

Ask = Callable[[Sequence[Mapping[str, str]], bool], str]
"""(messages, add_generation_prompt) -> prompt."""

_ORDER = "a conversation is [system], user, assistant, user, ... and ends with the user"
_SYSTEM, _USER, _ASSISTANT = "S7system7S", "U7user{}7U", "A7assistant{}7A"


@dataclass(frozen=True, slots=True)
class ChatShape:
    """`bos` + opening, then for every turn its content and the text up to the next one's content.

    Without a system turn: `opening` user `reply` assistant `again` user `ask`; with one, `opening` is replaced by
    `system_before` system `system_after`.
    """

    bos: str
    opening: str
    system_before: str | None
    """None: the template has no place for a system turn."""
    system_after: str
    reply: str
    again: str
    ask: str
    trims: bool
    """The template strips the space around every content."""
    stop: tuple[str, ...]
    """Texts at which generation ends: what follows an assistant turn."""
    merges_system: bool
    """The system text stands inside the first user turn."""
    default_system: str
    """What `opening` says where the caller gives no system turn; empty if nothing."""
    dated: bool = False
    """The texts hold the date of the day they were derived, because the template always writes it."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """[system], user, assistant, user, ... with a user turn at the end. Raises EdgekitError for another order."""
        turns = [(m["role"], m["content"].strip() if self.trims else m["content"]) for m in messages]
        if not turns or turns[-1][0] != "user":
            raise EdgekitError(_ORDER)
        out = [self.bos]
        if turns[0][0] == "system":
            if self.system_before is None:
                raise EdgekitError("this chat template has no place for a system message")
            out += [self.system_before, turns.pop(0)[1], self.system_after]
        else:
            out.append(self.opening)
        for i, (role, content) in enumerate(turns):
            if role != ("user", "assistant")[i % 2]:
                raise EdgekitError(_ORDER)
            after = self.ask if i == len(turns) - 1 else (self.reply, self.again)[i % 2]
            out += [content, after]
        return "".join(out)

    def to_go_template(self, *, bos: bool = False) -> str:
        """For `TEMPLATE` in an Ollama Modelfile (Go text/template; ollama's template.go passes .System, .Messages).

        Ollama adds the BOS itself where the vocabulary says so: `bos` writes it for one that does not. Ollama has no
        function that strips spaces, so `trims` is lost.
        """
        begin = _go(self.bos) if bos else ""
        if self.system_before is None:
            first = _go(self.opening)
        else:
            with_system = f"{_go(self.system_before)}{{{{ $.System }}}}{_go(self.system_after)}"
            first = f"{{{{ if $.System }}}}{with_system}{{{{ else }}}}{_go(self.opening)}{{{{ end }}}}"
        opens = '{{ if or (eq $i 0) (and (eq $i 1) (eq (index $.Messages 0).Role "system")) }}'
        last = "{{ if eq (len (slice $.Messages $i)) 1 }}"
        return (
            f'{begin}{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}'
            f"{opens}{first}{{{{ else }}}}{_go(self.again)}{{{{ end }}}}{{{{ .Content }}}}"
            f"{last}{_go(self.ask)}{{{{ else }}}}{_go(self.reply)}{{{{ end }}}}"
            '{{ else if eq .Role "assistant" }}{{ .Content }}{{ end }}{{ end }}'
        )


def derive(ask: Ask, bos: str, eos: str, *, dated: bool = False) -> ChatShape | None:
    """None where the template refuses plain conversations or does more than put fixed texts between the turns."""
    try:
        shape = _derive(ask, bos, eos)
    except EdgekitError:
        return None
    return replace(shape, dated=dated) if shape is not None and _proven(shape, ask) else None


def _derive(ask: Ask, bos: str, eos: str) -> ChatShape | None:
    plain = _between(ask(_turns(3), True), 3, system=False)
    if plain is None:
        return None
    opening, reply, again, last = plain
    try:
        framed = _between(ask(_turns(3, system=True), True), 3, system=True)
    except EdgekitError:
        framed = None
    before = after = None
    if framed is not None:
        before, after, *rest = framed
        if rest != [reply, again, last]:
            return None
    held = bos if bos and opening.startswith(bos) and (before is None or before.startswith(bos)) else ""
    opening = opening[len(held) :]
    before = before[len(held) :] if before is not None else None
    after = after or ""
    user_start = _common_suffix(opening, again)
    default = ""
    if before and opening.startswith(before) and opening.endswith(after) and len(opening) > len(before + after):
        default = opening[len(before) : len(opening) - len(after)]
    return ChatShape(
        bos=held,
        opening=opening,
        system_before=before,
        system_after=after,
        reply=reply,
        again=again,
        ask=last,
        trims=f" {_SYSTEM} " not in ask([{"role": "user", "content": f" {_SYSTEM} "}], True),
        stop=_stops(again, eos),
        merges_system=before is not None and bool(before) and before.endswith(user_start) and bool(user_start),
        default_system=default,
    )


def _turns(count: int, *, system: bool = False) -> list[Mapping[str, str]]:
    turns: list[Mapping[str, str]] = [{"role": "system", "content": _SYSTEM}] if system else []
    for i in range(count):
        role, mark = ("user", _USER) if i % 2 == 0 else ("assistant", _ASSISTANT)
        turns.append({"role": role, "content": mark.format(i)})
    return turns


def _between(text: str, count: int, *, system: bool) -> list[str] | None:
    """The texts before, between and after the marks; None unless each mark is there once and in order."""
    marks = [m["content"] for m in _turns(count, system=system)]
    if any(text.count(mark) != 1 for mark in marks):
        return None
    parts = re.split("|".join(map(re.escape, marks)), text)
    rebuilt = "".join(p + m for p, m in zip(parts, [*marks, ""], strict=True))
    return parts if rebuilt == text else None


def _stops(again: str, eos: str) -> tuple[str, ...]:
    """The end mark of an assistant turn, and the end of text."""
    first = re.match(r"\s*(<[^<>\n]{1,40}>|\[[^\[\]\n]{1,40}\])", again)
    marks = [first[1]] if first else [line for line in again.strip("\n").split("\n")[:1] if line.strip()]
    return tuple(dict.fromkeys(m for m in (*marks, eos) if m))


def _common_suffix(a: str, b: str) -> str:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return a[len(a) - n :]


_TALK = (
    "Hello!",
    "Hi. What can I do?",
    "Two lines\nand a {brace} {{pair}}, 'quotes' \"too\" & <tags> % 100.",
    "Ναι, 好的 👍\n\n- item\n",
    "x",
    "A longer answer. " * 20,
    "last",
)


def _proven(shape: ChatShape, ask: Ask) -> bool:
    """Equal to the template on conversations of one to four user turns, with and without a system turn."""
    systems = [None, "Be brief.", "Rules:\n1. one\n2. two"] if shape.system_before is not None else [None]
    texts = [t.strip() for t in _TALK] if shape.trims else [f" {t} " if i == 2 else t for i, t in enumerate(_TALK)]
    for system in systems:
        for count in (1, 3, 5, 7):
            turns = [{"role": "system", "content": system}] if system else []
            turns += [{"role": ("user", "assistant")[i % 2], "content": texts[i]} for i in range(count)]
            try:
                if ask(turns, True) != shape.render(turns):
                    return False
            except EdgekitError:
                return False
    return True


def _go(text: str) -> str:
    """Literal text in a Go template inside a Modelfile's triple quotes."""
    return re.sub(r'\{\{|\}\}|"""', lambda m: "{{ `" + m[0] + "` }}" if m[0] != '"""' else '{{ "\\"\\"\\"" }}', text)
