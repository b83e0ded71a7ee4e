"""The page: sections in the order of a reader's questions, and the style sheet.

Every text that comes from an artefact is escaped here; the policy in the head forbids scripts and any connection, so
that a hostile name stays a name. Measures nothing and reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from edgekit.report._charts import Cell, Lane, bar, heat_map, lanes, rate, step
from edgekit.report._facts import Answer, Candidate, Facts, Figure, Tensor
from edgekit.report._scatter import Point, best_presets, read_line, scatter
from edgekit.report._style import STYLE
from edgekit.units import show_bytes, show_count

MARK = '<meta name="generator" content="edgekit report">'
"""By which a report is known again, so that it may be replaced."""

_HEAD = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    + MARK
    + "\n<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
    'img-src data:">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
)
_ABSENT = "–"


def page(found: Sequence[Facts]) -> str:
    """The whole document."""
    title = found[0].name if len(found) == 1 else f"{len(found)} artefacts"
    body = [_artefact(found[0])] if len(found) == 1 else [_several(found), *(_folded(f) for f in found)]
    return (
        f"{_HEAD}<title>{escape(title)} · edgekit</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{''.join(body)}\n<footer>Written by <code>edgekit report</code>. The page is complete: nothing is loaded "
        "from anywhere.</footer>\n</main>\n</body>\n</html>\n"
    )


# --- several artefacts -----------------------------------------------------------------------------------------------


def _several(found: Sequence[Facts]) -> str:
    points, note = _points(found)
    parts = [f"<header><h1>{len(found)} artefacts side by side</h1></header>"]
    head = ("artefact", "device", "preset", "size", "bits", "memory", "decode", "KL")
    rows = [
        (
            _label(f, found), f.device, f.preset, _bytes(f.file_bytes), _plain(f.bits_per_weight, ".2f"),
            _bytes(f.memory_total or None), _decode(f), _error(f.kl, ".4f"),
        )
        for f in found
    ]  # fmt: skip
    parts.append(_section("Comparison", _table(head, rows, numbers=range(3, 8))))
    plot = scatter(points)
    legend = _legend(_kinds(points)) if any(p.kind == "preset" for p in points) else ""
    body = _scroll(plot) + legend + _note(note) if plot else _note(_NO_DIVERGENCE)
    parts.append(_section(_SIZE, body))
    return "".join(parts)


def _points(found: Sequence[Facts]) -> tuple[list[Point], str]:
    """What to draw of several artefacts. Where all come from one model and were chosen on one text, the figures of that
    choice, which share a scale with the stock presets; else the best known figure of each."""
    shipped = [next((c for c in f.candidates if c.shipped), None) for f in found]
    if len({(f.digest, f.learned) for f in found}) == 1 and found[0].digest and all(shipped):
        points = [_point(c, _label(f, found), "ours") for f, c in zip(found, shipped, strict=True) if c]
        stock = {c.name: c for f in found for c in f.measured if c.kind == "preset" and not c.shipped}
        return [*points, *(_point(c) for c in stock.values())], f"One model, {found[0].learned or 'one text'}."
    known = [(f, f.file_bytes, f.kl) for f in found]
    points = [
        Point(_label(f, found), "ours", nbytes, kl.value, kl.stderr or 0.0)
        for f, nbytes, kl in known
        if nbytes is not None and kl is not None
    ]
    return points, "Divergences are comparable only where model, text and reference are the same."


def _point(c: Candidate, name: str = "", kind: str = "") -> Point:
    return Point(name or c.name, kind or c.kind, c.nbytes, c.kl, c.stderr, c.shipped and not name)


_SIZE = "Size against KL divergence"
_NO_DIVERGENCE = (
    "No divergence was measured: convert with --verify full, or run edgekit eval with --keep, and write the page again."
)


def _label(f: Facts, found: Sequence[Facts]) -> str:
    """The folder's name: what tells artefacts of one model apart."""
    same = sum(other.folder == f.folder for other in found)
    return f.folder if same == 1 else f"{f.folder} {f.preset}"


def _decode(f: Facts) -> str:
    measured = [s for s in f.speeds if s.decode]
    if measured:
        return f"{rate(measured[0].tok_s)} tok/s"
    return f"{rate(f.decode)} tok/s forecast" if f.decode else _ABSENT


def _folded(f: Facts) -> str:
    return f"<details class=whole><summary>{escape(f.folder)}</summary>{_artefact(f)}</details>"


# --- one artefact ----------------------------------------------------------------------------------------------------


def _artefact(f: Facts) -> str:
    parts = (
        _title(f), _proof(f), _quality(f), _candidates(f), _memory(f), _speed(f), _bits(f), _flips(f), _origin(f),
    )  # fmt: skip
    return "".join(parts)


def _title(f: Facts) -> str:
    tiles = [
        ("size", _bytes(f.file_bytes), f"{_plain(f.bits_per_weight, '.2f')} bits per weight"),
        ("memory", _bytes(f.memory_total or None), f"with {_plain(f.context, ',.0f')} tokens of context"),
        ("decode", *_speed_tile(f)),
        ("KL", f"{f.kl.value:.3g}" if f.kl else "not measured", _kl_note(f)),
    ]
    shown = "".join(
        f"<li><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></li>"
        for name, value, note in tiles
    )
    sub = " · ".join(
        escape(part)
        for part in (
            f.device and f"for {f.device}",
            f.preset,
            f.parameters and f"{show_count(f.parameters)} parameters",
            f.architecture,
        )
        if part
    )
    return f"<header><h1>{escape(f.name)}</h1><p>{sub}</p><ul class=tiles>{shown}</ul></header>"


def _speed_tile(f: Facts) -> tuple[str, str]:
    measured = [s for s in f.speeds if s.decode]
    if measured:
        return f"{rate(measured[0].tok_s)} tok/s", "measured"
    return (
        (f"{rate(f.decode)} tok/s", f"forecast, ± {_plain(f.band, '.0f')} %") if f.decode else (_ABSENT, "no forecast")
    )


def _kl_note(f: Facts) -> str:
    if f.kl is None:
        return "edgekit eval measures it"
    return "nats per token" + (f", ± {f.kl.stderr:.2g}" if f.kl.stderr else "")


def _proof(f: Facts) -> str:
    if f.level in ("", "none") or not f.checks:
        body = _note("Not verified: converted with --verify none.")
    else:
        items = "".join(
            f"<li><b>{escape(name)}</b> <span>{escape(detail)}</span></li>" for name, detail in f.checks
        )  # fmt: skip
        body = f"<ul class=checks>{items}</ul>"
    if f.warnings:
        body += f"<ul class=warnings>{''.join(f'<li>{escape(w)}</li>' for w in f.warnings)}</ul>"
    return _section("Proof", body, f"verified: {f.level}" if f.level else "")


_QUALITY = (
    ("ppl_candidate", "perplexity", ".4f", 1),
    ("ppl_reference", "perplexity of the reference", ".4f", 1),
    ("ln_ratio", "ln of their ratio", ".5f", 1),
    ("kl_mean", "KL divergence, mean", ".6f", 1),
    ("kl_median", "KL divergence, median", ".6f", 1),
    ("kl_p99", "KL divergence, 99 %", ".6f", 1),
    ("kl_max", "KL divergence, max", ".6f", 1),
    ("top1", "the same top token, %", ".2f", 100),
    ("cosine", "cosine of the vectors, lowest", ".5f", 1),
    ("delta_p_mean", "Δp mean, %", ".3f", 100),
    ("delta_p_rms", "Δp RMS, %", ".3f", 100),
    ("cosine_mean", "cosine of the vectors, mean", ".5f", 1),
    ("cosine_min", "cosine of the vectors, lowest", ".5f", 1),
    ("spearman", "Spearman over pairs of sentences", ".5f", 1),
)


def _quality(f: Facts) -> str:
    if not f.figures:
        return _section("Quality", _note(_NO_DIVERGENCE))
    rows = [
        (name, _error(f.figures[key], digits, factor)) for key, name, digits, factor in _QUALITY if key in f.figures
    ]
    floors = (("noise floor of KL", f.floor, f.floor_method), ("own noise of KL", f.jitter, f.jitter_method))
    rows += [(name, f"{_error(floor, '.6f')} ({method})") for name, floor, method in floors if floor]
    body = _table(("figure", "value"), rows, numbers=())
    if f.tasks:
        scores = [(task, metric, _error(own, ".4f"), _error(other, ".4f")) for task, metric, own, other in f.tasks]
        body += _table(("task", "metric", "this", "reference"), scores, numbers=(2, 3))
    return _section("Quality", body, f.figures_from)


def _candidates(f: Facts) -> str:
    if not f.measured:
        return _section(
            _SIZE, _note("No comparison was made: candidates are measured where text is given to learn from.")
        )
    points = [_point(c) for c in f.measured]
    rows = [
        (c.name, c.kind, show_bytes(c.nbytes), _error(Figure(c.kl, c.stderr), ".4f"), "shipped" if c.shipped else "")
        for c in sorted(f.measured, key=lambda c: (c.nbytes, c.kl))
    ]
    table = _table(("candidate", "kind", "size", "mean KL", ""), rows, numbers=(2, 3))
    parts = [_scroll(scatter(points)), _legend(_kinds(points)), _note(" ".join(_reading(points))), table]
    if f.doubt is not None:
        parts.append(_note(f"Chance that the one shipped is no better than the stock preset: {f.doubt:.2%}."))
    return _section(_SIZE, "".join(parts), f.learned or "lower and further left is better")


def _kinds(points: Sequence[Point]) -> list[tuple[str, str]]:
    """The legend of the marks that are there."""
    kinds = {p.kind if p.kind in ("preset", "random") else "ours" for p in points if p.kl > 0}
    stock = "stock presets; the line joins the best" if len(best_presets(points)) > 1 else "stock preset"
    names = (("preset", stock), ("ours", "edgekit"), ("random", "random allocation"))
    ring = [("ring", "shipped")] if any(p.strong and p.kl > 0 for p in points) else []
    return [(f"dot {kind}", name) for kind, name in names if kind in kinds] + ring


def _reading(points: Sequence[Point]) -> Iterator[str]:
    """What the line of stock presets would give instead of what was shipped; nothing where it does not reach."""
    own = next((p for p in points if p.strong and p.kl > 0 and p.kind != "preset"), None)
    if own is None:
        return
    kl, nbytes = read_line(best_presets(points), own.nbytes, own.kl)
    if kl is not None:
        share = f"{own.kl / kl:.2f} of it"
        yield f"At this size the line through the stock presets stands at KL {kl:.3g}; what is shipped has {share}."
    if nbytes is not None:
        more = nbytes / own.nbytes - 1
        yield f"On that line this KL takes {show_bytes(nbytes)}, {abs(more):.0%} {'more' if more >= 0 else 'less'}."


def _memory(f: Facts) -> str:
    if not f.memory:
        return ""
    total, usable = f.memory_total, f.usable
    entries = [(f"key m{i % 5}", f"{name} {show_bytes(n)}") for i, (name, n) in enumerate(f.memory)]
    body = bar(f.memory, total, "Memory by use") + _legend(entries)
    if usable:
        share = f"{show_bytes(total)} of the {show_bytes(usable)} that {f.device or 'the device'} can spare"
        whole = max(usable, total)
        body += bar([(share, total)], whole, "Share of usable memory") + _note(share + _headroom(total, usable))
    else:
        body += _note(f"{show_bytes(total)} in all; what the device can spare is not known.")
    return _section("Memory", body, f"with {_plain(f.context, ',.0f')} tokens of context")


def _headroom(total: float, usable: float) -> str:
    left = usable - total
    return f": {show_bytes(left)} left." if left >= 0 else f": {show_bytes(-left)} too much."


def _speed(f: Facts) -> str:
    rows = []
    for name, forecast, decode in (("decode", f.decode, True), ("prefill", f.prefill, False)):
        seen = tuple((s.name, s.tok_s, s.stddev) for s in f.speeds if s.decode is decode)
        share = min(f.band or 0.0, 100.0) / 100
        band = (forecast * (1 - share), forecast, forecast * (1 + share)) if forecast else None
        if band or seen:
            rows.append(Lane(name, band, seen))
    if not rows:
        return _section("Speed", _note("No forecast for this device, and nothing measured: edgekit bench --keep."))
    legend = _legend([("key band", "forecast"), ("dot ours", "measured")][: 2 if f.speeds else 1])
    body = _scroll(lanes(rows)) + legend
    if f.speeds:
        table = [(s.name, f"{rate(s.tok_s)} ± {rate(s.stddev)}", s.machine) for s in f.speeds]
        body += _table(("test", "tok/s", "measured on"), table, numbers=(1,))
        body += _note(f"The forecast is for {f.device or f.target}; compare it with a measurement on that device.")
    else:
        body += _note("Not measured yet: edgekit bench ARTIFACT --keep, and write the page again.")
    return _section("Speed in tokens per second", body, f.basis and f"forecast from {f.basis}")


# --- bits ------------------------------------------------------------------------------------------------------------

_ORDER = (
    "attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_gate_up", "ffn_down",
    "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_down_exps", "ffn_gate_inp",
)  # fmt: skip
_MOST_LAYERS, _MOST_PARTS = 512, 60


def _bits(f: Facts) -> str:
    matrices = [t for t in f.tensors if t.dims > 1]
    if not matrices:
        return ""
    inside = [t for t in matrices if t.layer is not None and t.layer < _MOST_LAYERS]
    seen = dict.fromkeys(t.part for t in inside)
    parts = sorted(seen, key=lambda part: _ORDER.index(part) if part in _ORDER else len(_ORDER))[:_MOST_PARTS]
    cells = {(part, layer): cell for part, layer, cell in _cells(inside, set(parts))}
    formats: dict[str, float] = {}
    for t in matrices:
        formats.setdefault(t.format, t.bits)
    ramp = [(f"key h{step(bits)}", f"{name} {bits:.3g}") for name, bits in sorted(formats.items(), key=lambda p: p[1])]
    rows = [(t.part, t.format, f"{t.bits:.2f}", show_bytes(t.nbytes)) for t in matrices if t.layer is None]
    body = _scroll(heat_map(cells, parts)) + _legend(ramp) if cells else ""
    if rows:
        body += _table(("outside the layers", "format", "bits", "size"), rows[:100], numbers=(2, 3))
    vectors = sum(t.nbytes for t in f.tensors if t.dims <= 1)
    if vectors:
        body += _note(f"Norms and biases are vectors, {show_bytes(vectors)} in all, and not shown.")
    return _section("Bits per weight", body, f"{f.preset}: {f.why}" if f.why else f.preset)


def _cells(tensors: Sequence[Tensor], parts: set[str]) -> Iterator[tuple[str, int, Cell]]:
    for t in tensors:
        if t.part in parts and t.layer is not None:
            yield t.part, t.layer, Cell(t.bits, f"{t.format}, {show_bytes(t.nbytes)}")


# --- answers ---------------------------------------------------------------------------------------------------------


def _flips(f: Facts) -> str:
    if f.prompts is None:
        return _section("Changed answers", _note("No answers were compared: edgekit eval --keep compares them."))
    head = f"{len(f.answers)} of {f.prompts} greedy answers differ from the reference's"
    if not f.answers:
        return _section("Changed answers", _note("Every greedy answer is the reference's."), head)
    note = _note("What both say alike is dim. One changed token changes everything that follows it.")
    return _section("Changed answers", note + "".join(_pair(a) for a in f.answers), head)


def _pair(a: Answer) -> str:
    same = _alike(a.reference, a.candidate)
    sides = (("reference", a.reference), ("this artefact", a.candidate))
    shown = "".join(
        f"<div><h4>{who}</h4><p dir=auto><i>{escape(text[:same])}</i>{escape(text[same:]) or _END}</p></div>"
        for who, text in sides
    )
    head = f"<summary><span dir=auto>{escape(a.prompt)}</span> <small>from token {a.at}</small></summary>"
    return f"<details class=pair>{head}<div class=sides>{shown}</div></details>"


def _alike(a: str, b: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


_END = "<small>(ends here)</small>"

# --- versions --------------------------------------------------------------------------------------------------------


def _origin(f: Facts) -> str:
    rows = [("source", f.source), ("target", f.target), *f.versions]
    body = _table(("", "version"), [r for r in rows if r[1]], numbers=())
    files = [(name, show_bytes(n), sha[:16] + "…") for name, n, sha in f.files]
    return _section("Versions and files", body + _table(("file", "size", "sha256"), files, numbers=(1,)))


# --- pieces ----------------------------------------------------------------------------------------------------------


def _section(title: str, body: str, sub: str = "") -> str:
    shown = f"<p class=sub>{escape(sub)}</p>" if sub else ""
    return f"<section><h2>{escape(title)}</h2>{shown}{body}</section>\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int]) -> str:
    cls = dict.fromkeys(numbers, " class=n")
    top = "".join(f"<th{cls.get(i, '')}>{escape(name)}</th>" for i, name in enumerate(head))
    body = "".join(
        f"<tr>{''.join(f'<td{cls.get(i, str())}>{escape(cell)}</td>' for i, cell in enumerate(row))}</tr>"
        for row in rows
    )
    return _scroll(f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>")


def _scroll(inside: str) -> str:
    return f"<div class=scroll tabindex=0>{inside}</div>" if inside else ""


def _note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>" if text else ""


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><span class="{cls}"></span>{escape(name)}</li>' for cls, name in entries)
    return f"<ul class=legend>{items}</ul>"


def _bytes(n: float | None) -> str:
    return show_bytes(n) if n else _ABSENT


def _plain(value: float | None, spec: str) -> str:
    return _ABSENT if value is None else format(value, spec)


def _error(figure: Figure | None, spec: str, factor: int = 1) -> str:
    """`value ± error`, with as many digits more than `spec` as the error needs to show two of its own."""
    if figure is None:
        return _ABSENT
    value, error = factor * figure.value, factor * (figure.stderr or 0.0)
    digits = int(spec[1:-1])
    if 0 < error < 1:
        digits = min(10, max(digits, 1 - math.floor(math.log10(error))))
    text = f"{value:.{digits}f}"
    return f"{text} ± {error:.{digits}f}" if error else text
