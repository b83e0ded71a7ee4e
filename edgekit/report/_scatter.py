"""File size against KL divergence as one picture: marks, errors, the line through stock presets, names.

Knows points only, not where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from edgekit.report._charts import Scale, el, label, round_ticks, svg
from edgekit.units import GIB, KIB, MIB, show_bytes


@dataclass(frozen=True, slots=True)
class Point:
    """A file of `nbytes` with mean KL divergence `kl` in nats per token. `kind` chooses the mark."""

    name: str
    kind: str
    nbytes: float
    kl: float
    stderr: float
    strong: bool = False


def best_presets(points: Sequence[Point]) -> list[Point]:
    """The stock presets that no stock preset of at most their bytes beats, in order of size."""
    found: list[Point] = []
    for p in sorted(points, key=lambda p: (p.nbytes, p.kl)):
        if p.kind == "preset" and p.kl > 0 and (not found or p.kl < found[-1].kl):
            found.append(p)
    return found


def read_line(line: Sequence[Point], nbytes: float, kl: float) -> tuple[float | None, float | None]:
    """(KL that the drawn line has at `nbytes`, bytes at which it has `kl`); None beyond its ends.

    Straight between neighbours as it is drawn: size linear, divergence logarithmic.
    """
    at_size = at_kl = None
    for a, b in pairwise(line):
        fall = math.log(b.kl / a.kl)
        if a.nbytes <= nbytes <= b.nbytes:
            at_size = a.kl * math.exp(fall * (nbytes - a.nbytes) / (b.nbytes - a.nbytes))
        if a.kl >= kl >= b.kl:
            at_kl = a.nbytes + (b.nbytes - a.nbytes) * math.log(kl / a.kl) / fall
    return at_size, at_kl


# --- the picture -----------------------------------------------------------------------------------------------------

_WIDE, _HIGH = 700, 430
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 20, 16, 46
_BASE = _HIGH - _BOTTOM
_CHAR, _BOLD = 6.6, 7.3  # width of a character of the 12 px labels, about
_LONGEST = 34


def scatter(points: Sequence[Point]) -> str:
    """Size to the right, KL divergence upwards on a logarithmic scale: the best is below and to the left.

    Points without a positive divergence have no place on that scale and are left out. Empty without any point.
    """
    shown = sorted((p for p in points if p.kl > 0), key=_rank)
    if not shown:
        return ""
    unit, word = _unit(max(p.nbytes for p in shown))
    x = _linear([p.nbytes for p in shown], _LEFT + 22, _WIDE - _RIGHT - 40)
    y = _logarithmic([v for p in shown for v in (_low(p), p.kl + p.stderr)], _BASE - 18, _TOP + 14)
    line = [(x(p.nbytes), y(p.kl)) for p in best_presets(shown)]
    parts = [_y_axis(y), _x_axis(x, unit, word), _line(line)]
    parts += [_mark(p, x(p.nbytes), y(p.kl), y) for p in reversed(shown)]
    parts += _names(shown, x, y, line)
    return svg(_HIGH, "File size against KL divergence", parts, _WIDE, 600.0)


def _rank(p: Point) -> tuple[bool, int, float]:
    """The important first: they get their names first, and are drawn last, on top."""
    return (not p.strong, {"preset": 1, "random": 2}.get(p.kind, 0), p.nbytes)


def _low(p: Point) -> float:
    """The lower end of its error; an error as large as the value would have none on a logarithmic scale."""
    return max(p.kl - p.stderr, p.kl / 2)


def _linear(values: Sequence[float], start: float, stop: float) -> Scale:
    low, high = min(values), max(values)
    pad = (high - low) * 0.03 or high * 0.1
    return Scale(low - pad, high + pad, start, stop, log=False)


def _logarithmic(values: Sequence[float], start: float, stop: float) -> Scale:
    low, high = min(values) / 1.2, max(values) * 1.2
    wider = max(1.0, math.sqrt(4 * low / high))  # one point alone still needs an axis
    return Scale(low / wider, high * wider, start, stop, log=True)


def _unit(largest: float) -> tuple[int, str]:
    return next(((n, w) for n, w in ((GIB, "GiB"), (MIB, "MiB")) if largest >= n), (KIB, "KiB"))


def _x_axis(x: Scale, unit: int, word: str) -> str:
    parts = [el("line", x1=_LEFT, x2=_WIDE - _RIGHT, y1=_BASE, y2=_BASE, class_="axis")]
    for tick in round_ticks(x.low / unit, x.high / unit, 8):
        at = x(tick * unit)
        parts.append(el("line", x1=at, x2=at, y1=_BASE, y2=_BASE + 4, class_="axis"))
        parts.append(label(at, _BASE + 18, f"{tick:g}", "tick", "middle"))
    middle = (_LEFT + _WIDE - _RIGHT) / 2
    return "".join([*parts, label(middle, _BASE + 38, f"file size in {word}", "name", "middle")])


def _y_axis(y: Scale) -> str:
    parts = []
    for value in _log_ticks(y.low, y.high):
        at = y(value)
        parts.append(el("line", x1=_LEFT, x2=_WIDE - _RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(label(_LEFT - 8, at + 4, f"{value:g}", "tick", "end"))
    turned = el(
        "text", "mean KL in nats per token (log)", x=0, y=0, class_="name", text_anchor="middle",
        transform=f"translate(14 {(_BASE + _TOP) / 2:.0f}) rotate(-90)",
    )  # fmt: skip
    return "".join([*parts, turned])


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade; only whole decades where those would be many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    skip = max(1, len(decades) // 8)
    ticks = [float(f"{s}e{d}") for d in decades if d % skip == 0 for s in steps]
    found = [t for t in ticks if low <= t <= high]
    return found if len(found) > 1 else round_ticks(low, high, 4)


def _line(places: Sequence[tuple[float, float]]) -> str:
    if len(places) < 2:
        return ""
    return el("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_="presets")


def _mark(p: Point, x: float, y: float, scale: Scale) -> str:
    tip = el("title", escape(f"{p.name}: {show_bytes(p.nbytes)}, KL {p.kl:.3g} ± {p.stderr:.2g}"))
    parts, cls = [], p.kind if p.kind in ("preset", "random") else "ours"
    if p.stderr > 0:
        top, bottom = scale(p.kl + p.stderr), scale(_low(p))
        bar = f"M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 4:.1f} {top:.1f}h8M{x - 4:.1f} {bottom:.1f}h8"
        parts.append(el("path", d=bar, class_=f"error {cls}"))
    if p.strong:
        parts.append(el("circle", cx=x, cy=y, r=10.0, class_="shipped"))
    if p.kind == "random":
        cross = f"M{x - 4.5:.1f} {y - 4.5:.1f}l9 9m0-9l-9 9"
        parts.append(el("path", d=cross, class_="mark random"))
    else:
        parts.append(el("circle", cx=x, cy=y, r=4.5 if cls == "preset" else 5.5, class_=f"mark {cls}"))
    return el("g", tip, *parts)


# --- names -----------------------------------------------------------------------------------------------------------

_Box = tuple[float, float, float, float]


def _names(points: Sequence[Point], x: Scale, y: Scale, line: Sequence[tuple[float, float]]) -> list[str]:
    """A name near each mark where it covers no mark and no name, and the line only if it must; a thin leader joins the
    two where they are apart. A name for which there is no room is left out: the table has it."""
    marks = [_around(p, x(p.nbytes), y(p.kl), y) for p in points]
    lines = [box for a, b in pairwise(line) for box in _along(a, b)]
    names: list[_Box] = []
    found = []
    for p in points:
        text = p.name if len(p.name) <= _LONGEST else p.name[: _LONGEST - 1] + "…"
        width, px, py = len(text) * (_BOLD if p.strong else _CHAR), x(p.nbytes), y(p.kl)
        places = list(_places(px, py, width, 14.0 if p.strong else 9.0))
        free = (q for avoid in ([*marks, *lines], marks) for q in _free(places, width, avoid, names))
        place = next(free, None)
        if place is None:
            continue
        lx, ly, anchor, left, leader = place
        names.append(_box(left, ly, width))
        if leader:
            (x1, y1), (x2, y2) = leader
            found.append(el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="leader"))
            lines += _along(*leader)
        found.append(label(lx, ly, text, "point strong" if p.strong else "point", anchor))
    return found


_Leader = tuple[tuple[float, float], tuple[float, float]]
_Place = tuple[float, float, str, float, _Leader | None]


def _places(px: float, py: float, width: float, gap: float) -> Iterator[_Place]:
    """(x, y, anchor, left end, leader) of a name, nearest first: beside, above and below, then aslant."""
    yield px + gap, py + 4, "start", px + gap, None
    yield px - gap, py + 4, "end", px - gap - width, None
    yield px, py - gap - 2, "middle", px - width / 2, None
    yield px, py + gap + 11, "middle", px - width / 2, None
    for far in (gap + 3, gap + 14, gap + 28, gap + 44, gap + 62):
        for down in (-1, 1):
            ly = py + down * far + 4
            yield px + far, ly, "start", px + far, ((px, py), (px + far - 2, ly - 4))
            yield px - far, ly, "end", px - far - width, ((px, py), (px - far + 2, ly - 4))


def _free(places: Sequence[_Place], width: float, avoid: Sequence[_Box], names: Sequence[_Box]) -> Iterator[_Place]:
    """The places where the name covers nothing of `avoid` and no other name, and its leader crosses no name."""
    for place in places:
        box, leader = _box(place[3], place[1], width), place[4]
        inside = box[0] >= _LEFT and box[2] <= _WIDE and box[1] >= 0 and box[3] <= _BASE
        if not inside or any(_overlap(box, other) for other in (*avoid, *names)):
            continue
        if leader is None or not any(_overlap(step, other) for step in _along(*leader) for other in names):
            yield place


def _box(left: float, baseline: float, width: float) -> _Box:
    return (left - 2, baseline - 11, left + width + 2, baseline + 3)


def _around(p: Point, x: float, y: float, scale: Scale) -> _Box:
    r = 11.0 if p.strong else 6.0
    return (x - r, min(y - r, scale(p.kl + p.stderr)), x + r, max(y + r, scale(_low(p))))


def _along(a: tuple[float, float], b: tuple[float, float]) -> Iterator[_Box]:
    """Small boxes that cover the way from `a` to `b`."""
    steps = max(1, round(math.dist(a, b) / 6))
    for i in range(steps + 1):
        x, y = (s + (e - s) * i / steps for s, e in zip(a, b, strict=True))
        yield (x - 2, y - 2, x + 2, y + 2)


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
