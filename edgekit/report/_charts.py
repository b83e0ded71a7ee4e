"""Charts as inline SVG, drawn by arithmetic: size against divergence, bits per layer, speed, memory.

Colours are classes of the page's style sheet, so that light and dark need no second drawing. Knows no artefact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from edgekit.units import GIB, KIB, MIB, show_bytes

WIDTH = 520
_CHAR, _BOLD = 7.0, 7.8  # width of a character of the 12 px labels, about


def el(tag: str, *inside: str, **attributes: object) -> str:
    """One element. Attribute values are escaped, `inside` is markup already; `class_` and `stroke_width` are spelled
    as HTML has them."""
    spelled = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None}
    head = "".join(f' {k}="{escape(_short(v))}"' for k, v in spelled.items())
    return f"<{tag}{head}>{''.join(inside)}</{tag}>"


def _short(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def label(x: float, y: float, text: str, cls: str = "", anchor: str = "start") -> str:
    return el("text", escape(text), x=x, y=y, class_=cls or None, text_anchor=anchor)


def _svg(height: float, title: str, parts: Iterable[str], width: float = WIDTH, least: float = 420.0) -> str:
    """Drawn at least `least` pixels wide, so that its words stay readable: a narrow screen scrolls."""
    return el(
        "svg", el("title", escape(title)), *parts, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img",
        xmlns="http://www.w3.org/2000/svg", style=f"min-width:{min(width, least):.0f}px;max-width:{1.4 * width:.0f}px",
    )  # fmt: skip


# --- size against divergence -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """A file of `nbytes` with mean KL divergence `kl` in nats per token. `kind` chooses the mark."""

    name: str
    kind: str
    nbytes: float
    kl: float
    stderr: float
    strong: bool = False


_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 24, 16, 44
_PLOT_HEIGHT = 310


def scatter(points: Sequence[Point]) -> str:
    """Size to the right, KL divergence upwards on a logarithmic scale: the best is below and to the left.

    Points without a positive divergence have no place on that scale and are left out. Empty without any point.
    """
    shown = [p for p in points if p.kl > 0]
    if not shown:
        return ""
    unit, word = _unit(max(p.nbytes for p in shown))
    x = _linear([p.nbytes for p in shown], _LEFT + 16, WIDTH - _RIGHT - 30)
    ends = [v for p in shown for v in (max(p.kl - p.stderr, p.kl / 2), p.kl + p.stderr)]
    y = _logarithmic(ends, _PLOT_HEIGHT - _BOTTOM - 10, _TOP + 10)
    parts = [_y_axis(y), _x_axis(x, unit, word)]
    order = sorted(shown, key=lambda p: p.strong)
    parts += [_mark(p, x(p.nbytes), y(p.kl), y) for p in order]
    parts += _names(sorted(shown, key=lambda p: not p.strong), x, y)
    return _svg(_PLOT_HEIGHT, "File size against KL divergence", parts)


class _Scale:
    """A value to a place on the page. `low` and `high` are the values at the ends of the axis."""

    def __init__(self, low: float, high: float, start: float, stop: float, *, log: bool) -> None:
        self.low, self.high, self._start, self._stop, self._log = low, high, start, stop, log

    def __call__(self, value: float) -> float:
        a, b, v = (math.log10(n) for n in (self.low, self.high, value)) if self._log else (self.low, self.high, value)
        return self._start + (v - a) / (b - a) * (self._stop - self._start)


def _linear(values: Sequence[float], start: float, stop: float) -> _Scale:
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or high * 0.1
    return _Scale(low - pad, high + pad, start, stop, log=False)


def _logarithmic(values: Sequence[float], start: float, stop: float) -> _Scale:
    low, high = min(values) / 1.2, max(values) * 1.2
    wider = max(1.0, math.sqrt(4 * low / high))  # one point alone still needs an axis
    return _Scale(low / wider, high * wider, start, stop, log=True)


def _unit(largest: float) -> tuple[int, str]:
    return next(((n, w) for n, w in ((GIB, "GiB"), (MIB, "MiB")) if largest >= n), (KIB, "KiB"))


def _x_axis(x: _Scale, unit: int, word: str) -> str:
    base = _PLOT_HEIGHT - _BOTTOM
    ticks = _round_ticks(x.low / unit, x.high / unit)
    parts = [el("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=base, y2=base, class_="axis")]
    parts += [label(x(t * unit), base + 16, f"{t:g}", "tick", "middle") for t in ticks]
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return "".join([*parts, label(middle, base + 36, f"file size in {word}", "name", "middle")])


def _y_axis(y: _Scale) -> str:
    parts = []
    for value in _log_ticks(y.low, y.high):
        at = y(value)
        parts.append(el("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(label(_LEFT - 8, at + 4, f"{value:g}", "tick", "end"))
    middle = (_PLOT_HEIGHT - _BOTTOM + _TOP) / 2
    turned = el(
        "text", "mean KL in nats per token", x=0, y=0, class_="name", text_anchor="middle",
        transform=f"translate(14 {middle:.0f}) rotate(-90)",
    )  # fmt: skip
    return "".join([*parts, turned])


def _round_ticks(low: float, high: float, count: int = 6) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= count)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1) if i >= 0]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade; only whole decades where those would be many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    skip = max(1, len(decades) // 8)
    ticks = [float(f"{s}e{d}") for d in decades if d % skip == 0 for s in steps]
    found = [t for t in ticks if low <= t <= high]
    return found if len(found) > 1 else _round_ticks(low, high, 4)


def _mark(p: Point, x: float, y: float, scale: _Scale) -> str:
    tip = el("title", escape(f"{p.name}: {show_bytes(p.nbytes)}, KL {p.kl:.3g} ± {p.stderr:.2g}"))
    parts = []
    if p.stderr > 0:
        top, bottom = scale(p.kl + p.stderr), scale(max(p.kl - p.stderr, p.kl / 2))
        parts.append(el("line", x1=x, x2=x, y1=top, y2=bottom, class_=f"error {_class(p.kind)}"))
    if p.strong:
        parts.append(el("circle", cx=x, cy=y, r=10.0, class_="shipped"))
    if p.kind == "random":
        cross = f"M{x - 4.5:.1f} {y - 4.5:.1f}l9 9m0-9l-9 9"
        parts.append(el("path", d=cross, class_="mark random"))
    else:
        parts.append(el("circle", cx=x, cy=y, r=5.0, class_=f"mark {_class(p.kind)}"))
    return el("g", tip, *parts)


def _class(kind: str) -> str:
    return kind if kind in ("preset", "random") else "ours"


def _names(points: Sequence[Point], x: _Scale, y: _Scale) -> list[str]:
    """A name beside each mark, on the first side where it covers neither a mark nor a name; none where none is free."""
    taken = [(x(p.nbytes) - 6, y(p.kl) - 6, x(p.nbytes) + 6, y(p.kl) + 6) for p in points]
    found = []
    for p in points:
        text = p.name if len(p.name) <= 24 else p.name[:23] + "…"
        width, px, py = len(text) * (_BOLD if p.strong else _CHAR), x(p.nbytes), y(p.kl)
        gap = 14 if p.strong else 9
        sides = (
            (px + gap, py + 4, "start", px + gap),
            (px - gap, py + 4, "end", px - gap - width),
            (px, py - gap - 2, "middle", px - width / 2),
            (px, py + gap + 10, "middle", px - width / 2),
        )
        for lx, ly, anchor, left in sides:
            box = (left, ly - 11, left + width, ly + 3)
            inside = box[0] >= _LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= _PLOT_HEIGHT - _BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found.append(label(lx, ly, text, "point strong" if p.strong else "point", anchor))
                break
    return found


_Box = tuple[float, float, float, float]


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# --- bits per layer --------------------------------------------------------------------------------------------------

STEPS = (2.2, 3.2, 4.2, 4.7, 5.8, 7.0, 10.0)
"""Bits per weight at which the next darker step of the heat map begins."""


def step(bits: float) -> int:
    """0 (fewest bits) to 7."""
    return sum(bits >= s for s in STEPS)


@dataclass(frozen=True, slots=True)
class Cell:
    """One tensor, or several of the same part and layer: bits per weight and what it is made of."""

    bits: float
    note: str


def heat_map(cells: Mapping[tuple[str, int], Cell], parts: Sequence[str]) -> str:
    """One row for each of `parts`, one column a layer; darker (in the dark: brighter) is more bits per weight."""
    layers = 1 + max((layer for _, layer in cells), default=-1)
    if not layers:
        return ""
    wide = 38.0 if layers <= 16 else 30.0 if layers <= 40 else 15.0
    left, high, top = 12 + max(len(p) for p in parts) * 7.0, 24.0, 22.0
    drawn = []
    for row, part in enumerate(parts):
        y = top + row * high
        drawn.append(label(left - 8, y + 16, part, "tick", "end"))
        found = ((layer, cells.get((part, layer))) for layer in range(layers))
        drawn += [_cell(left + layer * wide, y, wide, high, c, f"layer {layer} {part}") for layer, c in found if c]
    every = 1 if wide >= 30 else 5
    drawn += [
        label(left + (n + 0.5) * wide, top - 7, str(n), "tick", "middle") for n in range(0, layers, every)
    ]  # fmt: skip
    width = left + layers * wide + 4
    return _svg(top + len(parts) * high + 4, "Bits per weight by layer and part", drawn, width, 0.9 * width)


def _cell(x: float, y: float, wide: float, high: float, cell: Cell, where: str) -> str:
    s = step(cell.bits)
    tip = el("title", escape(f"{where}: {cell.note}, {cell.bits:.2f} bits per weight"))
    box = el("rect", x=x + 1, y=y + 1, width=wide - 2, height=high - 2, rx=3, class_=f"h{s}")
    number = label(x + wide / 2, y + 16, f"{cell.bits:.1f}", f"on{s}", "middle") if wide >= 30 else ""
    return el("g", tip, box, number)


# --- memory and speed ------------------------------------------------------------------------------------------------


def bar(parts: Sequence[tuple[str, float]], whole: float, title: str) -> str:
    """Parts of `whole` in a row, in their order: class m0, m1, ...; what is left stays empty."""
    drawn, x = [el("rect", x=0, y=0, width=WIDTH, height=26, rx=5, class_="empty")], 0.0
    for i, (name, n) in enumerate(parts):
        width = WIDTH * n / whole
        tip = el("title", escape(f"{name}: {show_bytes(n)}"))
        gap = 2.0 if width > 6 else 0.0
        shape = el("rect", tip, x=x, y=0, width=max(0.5, width - gap), height=26, class_=f"m{i % 5}")
        drawn.append(shape)
        x += width
    return el(
        "svg", el("title", escape(title)), *drawn, viewBox=f"0 0 {WIDTH} 26", role="img", class_="bar",
        preserveAspectRatio="none", xmlns="http://www.w3.org/2000/svg",
    )  # fmt: skip


def rate(tok_s: float) -> str:
    """Three digits, and none after the point where there are three before it."""
    return f"{tok_s:,.0f}" if tok_s >= 100 else f"{tok_s:.3g}"


@dataclass(frozen=True, slots=True)
class Lane:
    """One kind of speed in tokens/s: the forecast with its range, and measured (name, value, deviation)."""

    name: str
    forecast: tuple[float, float, float] | None
    measured: tuple[tuple[str, float, float], ...]


def lanes(rows: Sequence[Lane]) -> str:
    """Each row on its own scale from 0: a band for the forecast, a dot with its deviation for what was measured."""
    left, right, high = 76.0, 20.0, 58.0
    drawn = []
    for i, lane in enumerate(rows):
        y = i * high + 22
        tops = [lane.forecast[2]] if lane.forecast else []
        tops += [value + spread for _, value, spread in lane.measured]
        scale = _Scale(0.0, 1.08 * max(tops), left, WIDTH - right, log=False)
        drawn.append(label(0, y + 4, lane.name, "point"))
        drawn.append(el("line", x1=left, x2=WIDTH - right, y1=y, y2=y, class_="grid"))
        drawn += [
            label(scale(t), y + 26, f"{t:g}", "tick", "middle") for t in _round_ticks(0, scale.high, 5)
        ]  # fmt: skip
        if lane.forecast:
            low, middle, top = lane.forecast
            tip = el("title", escape(f"forecast {rate(middle)} tok/s, {rate(low)} to {rate(top)}"))
            width = scale(top) - scale(low)
            drawn.append(el("rect", tip, x=scale(low), y=y - 9, width=width, height=18, rx=4, class_="band"))
            drawn.append(el("line", x1=scale(middle), x2=scale(middle), y1=y - 9, y2=y + 9, class_="middle"))
        drawn += [_measured(scale, y, *m) for m in lane.measured]
    return _svg(len(rows) * high, "Forecast and measured speed", drawn)


def _measured(scale: _Scale, y: float, name: str, value: float, spread: float) -> str:
    tip = el("title", escape(f"{name}: {rate(value)} ± {rate(spread)} tok/s"))
    low, high = scale(max(0.0, value - spread)), scale(value + spread)
    line = el("line", x1=low, x2=high, y1=y, y2=y, class_="error ours")
    return el("g", tip, line, el("circle", cx=scale(value), cy=y, r=6.0, class_="mark ours"))
