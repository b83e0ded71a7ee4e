"""Compares the model's own tokenizer with the runtime's, string by string. Knows neither; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgekit.vocab.built import Limit


class Encoder(Protocol):
    def encode(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Difference:
    """A text for which the two disagree."""

    text: str
    expected: tuple[int, ...]
    got: tuple[int, ...]
    parse_special: bool


def differences(
    expected: Encoder,
    got: Encoder,
    texts: Iterable[str],
    limits: Sequence[Limit] = (),
    *,
    add_special: bool = True,
    parse_special: bool = True,
) -> list[Difference]:
    """Texts whose ids differ and that no limit covers."""
    found = []
    for text in texts:
        a = expected.encode(text, add_special=add_special, parse_special=parse_special)
        b = got.encode(text, add_special=add_special, parse_special=parse_special)
        how = {"add_special": add_special, "parse_special": parse_special}
        if a != b and not any(limit.covers(text, **how) for limit in limits):
            found.append(Difference(text, tuple(a), tuple(b), parse_special))
    return found


def explain(found: Sequence[Difference], show: int = 5) -> str:
    """Lines `text  expected ids  got ids`, the shortest texts first, each cut around the first id that differs."""
    lines = []
    for d in sorted(found, key=lambda d: len(d.text))[:show]:
        at = next((i for i, (a, b) in enumerate(zip(d.expected, d.got, strict=False)) if a != b), 0)
        start = max(0, at - 1)
        lines.append(f"  {_cut(d.text)}: expected {_ids(d.expected, start)}, got {_ids(d.got, start)}")
    if len(found) > show:
        lines.append(f"  ... and {len(found) - show} more")
    return "\n".join(lines)


def _cut(text: str) -> str:
    return repr(text if len(text) <= 48 else text[:45] + "...")


def _ids(ids: Sequence[int], start: int) -> str:
    part = ", ".join(map(str, ids[start : start + 6]))
    return f"[{'... ' if start else ''}{part}{', ...' if len(ids) > start + 6 else ''}]"
