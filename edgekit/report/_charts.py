"""Charts as inline SVG, drawn by arithmetic: bits per layer, speed, memory; and the pieces that every chart is made of.

Colours are classes of the page's style sheet, so that light and dark need no second drawing. Knows no artefact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from edgekit.units import show_bytes

WIDTH = 520


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


def svg(height: float, title: str, parts: Iterable[str], width: float = WIDTH, least: float = 420.0) -> str:
    """Drawn at least `least` pixels wide, so that its words stay readable: a narrow screen scrolls."""
    return el(
        "svg", el("title", escape(title)), *parts, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img",
        xmlns="http://www.w3.org/2000/svg", style=f"min-width:{min(width, least):.0f}px;max-width:{1.4 * width:.0f}px",
    )  # fmt: skip


# --- scales ----------------------------------------------------------------------------------------------------------


class Scale:
    """A value to a place on the page. `low` and `high` are the values at the ends of the axis."""

    def __init__(self, low: float, high: float, start: float, stop: float, *, log: bool) -> None:
        self.low, self.high, self._start, self._stop, self._log = low, high, start, stop, log

    def __call__(self, value: float) -> float:
        a, b, v = (math.log10(n) for n in (self.low, self.high, value)) if self._log else (self.low, self.high, value)
        return self._start + (v - a) / (b - a) * (self._stop - self._start)


def round_ticks(low: float, high: float, count: int = 6) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= count)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1) if i >= 0]


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
    return svg(top + len(parts) * high + 4, "Bits per weight by layer and part", drawn, width, 0.9 * width)


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
        scale = Scale(0.0, 1.08 * max(tops), left, WIDTH - right, log=False)
        drawn.append(label(0, y + 4, lane.name, "point"))
        drawn.append(el("line", x1=left, x2=WIDTH - right, y1=y, y2=y, class_="grid"))
        drawn += [
            label(scale(t), y + 26, f"{t:g}", "tick", "middle") for t in round_ticks(0, scale.high, 5)
        ]  # fmt: skip
        if lane.forecast:
            low, middle, top = lane.forecast
            tip = el("title", escape(f"forecast {rate(middle)} tok/s, {rate(low)} to {rate(top)}"))
            width = scale(top) - scale(low)
            drawn.append(el("rect", tip, x=scale(low), y=y - 9, width=width, height=18, rx=4, class_="band"))
            drawn.append(el("line", x1=scale(middle), x2=scale(middle), y1=y - 9, y2=y + 9, class_="middle"))
        drawn += [_measured(scale, y, *m) for m in lane.measured]
    return svg(len(rows) * high, "Forecast and measured speed", drawn)


def _measured(scale: Scale, y: float, name: str, value: float, spread: float) -> str:
    tip = el("title", escape(f"{name}: {rate(value)} ± {rate(spread)} tok/s"))
    low, high = scale(max(0.0, value - spread)), scale(value + spread)
    line = el("line", x1=low, x2=high, y1=y, y2=y, class_="error ours")
    return el("g", tip, line, el("circle", cx=scale(value), cy=y, r=6.0, class_="mark ours"))
