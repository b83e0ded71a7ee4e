"""Where a model can be scaled without changing what it computes, and the model scaled so that it rounds better.

Knows which tensor feeds which in the graphs llama.cpp has for the families of `edgekit.arch`; chooses no format. How
scales are chosen is `edgekit.quant.folding`'s.

Channel c of what a norm gives is divided by s[c] and column c of every matrix that reads it multiplied; likewise rows
of the value and columns of the output projection (attention is linear in values), and rows of `ffn_up` and columns of
`ffn_down` where a gate multiplies (the product is linear in `up`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from edgekit.arch import Array, Blueprint, Made, Role
from edgekit.quant import Format, folding, ggml, gptq
from edgekit.units import Progress, silent

Index = npt.NDArray[np.intp]

KNOWN = frozenset(
    {"bert", "gemma", "gemma2", "gemma3", "gpt2", "gptneox", "granite", "llama", "olmo2", "phi3", "qwen2", "qwen2moe"}
    | {"qwen3", "qwen3moe", "smollm3", "stablelm", "starcoder2"}
)
"""Architectures whose graphs (src/models of llama.cpp) were read for this. In another, a tensor of the same name may
feed something else, or a clamp or a square may stand between."""

_FUSED_GATE = frozenset({"phi3"})  # rows of ffn_up: the gate's, then those it multiplies
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_FFN = (
    *("ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_inp_shexp"),
    *("ffn_gate_exps", "ffn_up_exps", "ffn_gate_shexp", "ffn_up_shexp"),
)
_OTHERS = (
    *("attn_norm", "attn_q_norm", "attn_k_norm", "attn_output", "attn_output_norm", "layer_output_norm"),
    *("post_attention_norm", "post_ffw_norm", "ffn_norm", "ffn_down", "ffn_down_exps", "ffn_down_shexp"),
)
_SAMPLE = 512  # rows of a matrix from which scales are chosen
_SAMPLE_EXPERT = 64  # rows of each expert, where experts share scales
_TRIAL = 8  # one row to try scales on for so many to choose them from
_SLAB = 4 << 20
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class Place:
    """Channels that may be scaled. `name`: what writes them, as `blk.0.attn_norm`.

    `writers`: tensor -> first of the `channels` rows (for vectors: values) that are divided, in each expert anew.
    `readers`: tensors whose columns are multiplied; column c by the scale of channel `ties[c]` (None: c).
    `experts`: of the writer, each with scales of its own; 0 where there is one set.
    """

    name: str
    writers: Mapping[str, int]
    readers: tuple[str, ...]
    channels: int
    ties: Index | None = field(default=None, compare=False)
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this place's scales: (channels,) or (experts, channels)."""
        return (self.experts, self.channels) if self.experts else (self.channels,)

    def columns(self, scales: Array) -> Array:
        """Scales by channel -> by the readers' columns."""
        return scales if self.ties is None else scales[..., self.ties]


@dataclass(frozen=True)
class Folded:
    """A model that computes the same. `blueprint`: same names and shapes, streams scaled; `importance`, `moments`: of
    the scaled inputs, the latter computed when asked for, None where none were given; `scales` by place, float32
    (channels,) or (experts, channels), only places where something was gained; `gains`: the rounding error of their
    readers as a share of what it was; `skipped`: (place, reason)."""

    blueprint: Blueprint
    importance: Mapping[str, Array]
    moments: Mapping[str, Array] | None
    scales: Mapping[str, Array]
    gains: Mapping[str, float]
    skipped: tuple[tuple[str, str], ...]


# --- places ----------------------------------------------------------------------------------------------------------


def places(blueprint: Blueprint) -> tuple[tuple[Place, ...], tuple[tuple[str, str], ...]]:
    """All places of a model in layer order, and (what, reason) for those it does not have."""
    if blueprint.arch not in KNOWN:
        return (), ((blueprint.arch, "it is not known here what feeds what in this architecture"),)
    layers: dict[int, dict[str, Made]] = {}
    strange: dict[int, str] = {}
    for made in blueprint.tensors:
        if found := re.match(r"blk\.(\d+)\.", made.name):
            layer = layers.setdefault(int(found[1]), {})
            part = _LAYER.match(made.name)
            if part is None or part[2] not in (*_ATTENTION, *_FFN, *_OTHERS):
                strange.setdefault(int(found[1]), made.name)
            elif part:
                layer[part[2] + ("" if part[3] == "weight" else ".bias")] = made
    there: list[Place] = []
    skipped: list[tuple[str, str]] = []
    for number, layer in sorted(layers.items()):
        if number in strange:
            skipped.append((f"blk.{number}", f"it is not known here what {strange[number]} does"))
            continue
        for name, found_or_why in _of_layer(_Layer(blueprint, number, layer)):
            if isinstance(found_or_why, Place):
                there.append(found_or_why)
            else:
                skipped.append((f"blk.{number}.{name}", found_or_why))
    if any(t.role is Role.OUTPUT for t in blueprint.tensors):
        skipped.append(("output_norm", "what it gives is also what embeddings are made from"))
    return tuple(there), tuple(skipped)


@dataclass(frozen=True, slots=True)
class _Layer:
    blueprint: Blueprint
    number: int
    parts: Mapping[str, Made]  # by name within the layer, biases with .bias

    def named(self, *parts: str) -> tuple[str, ...]:
        return tuple(self.parts[p].name for p in parts if p in self.parts)

    def place(self, writer: str, readers: Sequence[str], channels: int, first: int = 0) -> Place:
        written = dict.fromkeys(self.named(writer, f"{writer}.bias"), first)
        return Place(f"blk.{self.number}.{writer}", written, self.named(*readers), channels)


def _of_layer(layer: _Layer) -> Iterator[tuple[str, Place | str]]:
    """(part, its place or why there is none)."""
    parts, arch = layer.parts, layer.blueprint.arch
    for norm, readers in (("attn_norm", _ATTENTION), ("ffn_norm", _FFN)):
        if norm not in parts:
            if norm == "attn_norm" or arch != "stablelm":
                yield norm, "there is no norm before the matrices: what they read is the residual itself"
            continue
        # StableLM without the second norm: both branches read the first
        shared = norm == "attn_norm" and arch == "stablelm" and "ffn_norm" not in parts
        yield norm, layer.place(norm, (*readers, *_FFN) if shared else readers, parts[norm].values)
    yield _values(layer)
    for suffix in ("", "_exps", "_shexp"):
        if f"ffn_down{suffix}" in parts:
            yield f"ffn_up{suffix}", _up(layer, suffix)


def _values(layer: _Layer) -> tuple[str, Place | str]:
    """Rows of the value projection, in attn_v or last in attn_qkv, each read by all query heads of its group."""
    parts, geometry = layer.parts, layer.blueprint.geometry
    writer = "attn_v" if "attn_v" in parts else "attn_qkv"
    if writer not in parts or "attn_output" not in parts or layer.number >= len(geometry.layers):
        return writer, "the layer has no value and output projection"
    cache = geometry.layers[layer.number]
    channels, cols = cache.kv_heads * cache.value, parts["attn_output"].shape[-1]
    rows = parts[writer].shape[0]
    fits = channels and cols == geometry.heads * cache.value and geometry.heads % cache.kv_heads == 0
    if not fits or rows < channels or (writer == "attn_v" and rows != channels):
        return writer, f"{rows} rows and {cols} columns are not {cache.kv_heads} heads of {cache.value}"
    group = geometry.heads // cache.kv_heads
    heads = np.arange(geometry.heads, dtype=np.intp) // group
    ties = (heads[:, None] * cache.value + np.arange(cache.value, dtype=np.intp)).reshape(-1)
    place = layer.place(writer, ("attn_output",), channels, rows - channels)
    return writer, replace(place, ties=ties if group > 1 else None)


def _up(layer: _Layer, suffix: str) -> Place | str:
    parts, arch = layer.parts, layer.blueprint.arch
    up, down = f"ffn_up{suffix}", f"ffn_down{suffix}"
    if up not in parts:
        return "there is no such matrix"
    channels, rows = parts[down].shape[-1], parts[up].shape[-2]
    first = rows - channels if arch in _FUSED_GATE else 0
    if first == 0 and f"ffn_gate{suffix}" not in parts:
        return "no gate multiplies: scales do not pass through the activation"
    if first not in (0, channels) or rows != first + channels:
        return f"{rows} rows do not match the {channels} columns of {down}"
    experts = parts[down].shape[0] if len(parts[down].shape) == 3 else 0
    return replace(layer.place(up, (down,), channels, first), experts=experts)


# --- scaling ---------------------------------------------------------------------------------------------------------


def apply(blueprint: Blueprint, scales: Mapping[str, Array]) -> Blueprint:
    """`blueprint` with `scales` (by place, as in `Folded.scales`) folded in. Raises KeyError for no place of it."""
    there = {p.name: p for p in places(blueprint)[0]}
    columns: dict[str, Array] = {}
    rows: dict[str, Array] = {}
    shapes = {t.name: t.shape for t in blueprint.tensors}
    for name, s in scales.items():
        place = there[name]
        if s.shape != place.shape or not (np.isfinite(s).all() and (s > 0).all()):
            raise ValueError(f"{name}: scales must be {place.shape}, positive and finite")
        for reader in place.readers:
            columns[reader] = place.columns(s)
        for writer, first in place.writers.items():
            rows[writer] = _rows(shapes[writer], first, s)
    tensors = tuple(
        _scaled(t, columns.get(t.name), rows.get(t.name)) if t.name in columns or t.name in rows else t
        for t in blueprint.tensors
    )
    return replace(blueprint, tensors=tensors)


def _rows(shape: tuple[int, ...], first: int, scales: Array) -> Array:
    """One number for each row of a tensor seen as 2-D, or for each value of a vector."""
    per_expert = shape[0] if len(shape) < 3 else shape[1]
    found = np.ones((scales.shape[0] if scales.ndim == 2 else 1, per_expert), np.float32)
    found[:, first : first + scales.shape[-1]] = scales
    return found.reshape(-1)


def _scaled(made: Made, columns: Array | None, rows: Array | None) -> Made:
    """`made` with rows divided and columns multiplied; `columns` may be (experts, cols)."""
    vector = len(made.shape) == 1
    per_expert = made.shape[-2] if columns is not None and columns.ndim == 2 else 0

    def stream(max_values: int) -> Iterator[Array]:
        at = 0
        for slab in made.stream(max_values):
            count = slab.shape[0]
            out = slab
            if rows is not None:
                out = out / (rows if vector else rows[at : at + count, None])
            if columns is not None:
                out = out * (columns[np.arange(at, at + count) // per_expert] if per_expert else columns)
            at += count
            yield np.ascontiguousarray(out, np.float32)

    return replace(made, stream=stream)


class _Divided(Mapping[str, Array]):
    """Second moments of scaled inputs, H/(s·sᵀ), one computed at a time; what shares a moment and scales shares one."""

    def __init__(self, moments: Mapping[str, Array], columns: Mapping[str, tuple[str, Array]]) -> None:
        self._moments, self._columns = moments, columns
        self._last: tuple[Array, str, Array] | None = None

    def __getitem__(self, name: str) -> Array:
        moment = self._moments[name]
        if name not in self._columns:
            return moment
        place, scales = self._columns[name]
        if self._last is None or self._last[0] is not moment or self._last[1] != place:
            # the last goes only when the next is there: who remembers an array by its address is not deceived
            self._last = (moment, place, _divided(moment, scales))
        return self._last[2]

    def __contains__(self, name: object) -> bool:
        return name in self._moments

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)


def _divided(moment: Array, scales: Array) -> Array:
    inverse = np.reciprocal(scales)
    out = np.empty(moment.shape, np.float32)
    np.multiply(moment, inverse[..., :, None], out=out)
    out *= inverse[..., None, :]
    return out


def _importance(importance: Mapping[str, Array], columns: Mapping[str, tuple[str, Array]]) -> dict[str, Array]:
    found = dict(importance)
    for name, (_, scales) in columns.items():
        if name in found:
            found[name] = np.asarray(found[name] / np.square(scales), np.float32)
    return found


# --- choosing --------------------------------------------------------------------------------------------------------


def fold(
    blueprint: Blueprint,
    importance: Mapping[str, Array],
    moments: Mapping[str, Array] | None,
    formats: Mapping[str, Format],
    *,
    progress: Progress = silent,
) -> Folded:
    """Choose scales for `formats` (by tensor name; what is not named stays float32) and fold them in.

    `importance`: mean squares of input columns, float32 (cols,) or (experts, cols); a place with a reader that has none
    is skipped. `moments`: second moments by which error feedback will encode, float32 (cols, cols); with them scales
    are chosen for what feedback leaves. Stacked experts are judged by importance alone. Memory: rows sampled from the
    readers of one place, and one second moment with its factors. The same input gives the same scales.
    """
    there, absent = places(blueprint)
    chooser = _Chooser({t.name: t for t in blueprint.tensors}, importance, moments, formats)
    scales: dict[str, Array] = {}
    gains: dict[str, float] = {}
    skipped = list(absent)
    for done, place in enumerate(there):
        progress("fold", done, len(there))
        found = chooser.choose(place)
        if isinstance(found, str):
            skipped.append((place.name, found))
        else:
            scales[place.name], gains[place.name] = found
    progress("fold", len(there), len(there))
    columns = {r: (p.name, p.columns(scales[p.name])) for p in there if p.name in scales for r in p.readers}
    return Folded(
        apply(blueprint, scales),
        _importance(importance, columns),
        None if moments is None else _Divided(moments, columns),
        scales,
        gains,
        tuple(skipped),
    )


@dataclass(frozen=True, slots=True)
class _Chooser:
    tensors: Mapping[str, Made]
    importance: Mapping[str, Array]
    moments: Mapping[str, Array] | None
    formats: Mapping[str, Format]

    def choose(self, place: Place) -> tuple[Array, float] | str:
        """(scales, share of the error that is left), or why there are none."""
        rounded = [r for r in place.readers if self._format(r).block > 1]
        if not rounded:
            return "nothing that reads it is rounded to blocks"
        for name in rounded:
            if (fmt := self._format(name).name) not in folding.FORMATS:
                return f"{name} in {fmt}: not a format of single weights"
            if name not in self.importance:
                return f"no importance is known for {name}"
        exact = any(self._format(n).name in ("F16", "BF16") for n in (*place.readers, *place.writers))
        fits = [folding.fit(r, place.ties, whole_powers=exact) for r in self._readers(place, rounded)]
        scales = np.stack([f.scales for f in fits]).reshape(place.shape)
        gain = float(np.mean([f.measured for f in fits]))
        return (scales, gain) if (scales != 1).any() else "no scales lower the error"

    def _format(self, name: str) -> Format:
        return self.formats.get(name, ggml.FORMATS["F32"])

    def _readers(self, place: Place, names: Sequence[str]) -> list[list[folding.Reader]]:
        """What each set of scales of the place is chosen by: one set, or one an expert."""
        matrices = [n for n in names if len(self.tensors[n].shape) == 2]
        count = _SAMPLE if place.experts else _SAMPLE_EXPERT
        stacks = [list(self._experts(n, count)) for n in names if len(self.tensors[n].shape) == 3]
        if place.experts:
            return [list(readers) for readers in zip(*stacks, strict=True)]
        seen: list[tuple[Array, gptq.Curvature]] = []
        return [[self._matrix(n, seen) for n in matrices] + [r for stack in stacks for r in stack]]

    def _matrix(self, name: str, seen: list[tuple[Array, gptq.Curvature]]) -> folding.Reader:
        """Sampled rows of a matrix; `seen` keeps the factors of moments that several matrices share."""
        fmt, curvature = self._format(name), None
        if self.moments is not None and name in self.moments:
            moment = self.moments[name]
            curvature = next((c for m, c in seen if m is moment), None)
            if curvature is None:
                curvature = gptq.prepare(moment)
                seen.append((moment, curvature))
        rows, trial = _sampled(self.tensors[name], 1, _SAMPLE)
        return folding.Reader(rows[0], fmt, self.importance[name], curvature, trial[0])

    def _experts(self, name: str, count: int) -> Iterator[folding.Reader]:
        made, fmt = self.tensors[name], self._format(name)
        squares = np.broadcast_to(self.importance[name], (made.shape[0], made.shape[2]))
        for rows, trial, importance in zip(*_sampled(made, made.shape[0], count), squares, strict=True):
            yield folding.Reader(rows, fmt, importance, trial=trial)


def _sampled(made: Made, experts: int, count: int) -> tuple[Array, Array]:
    """At most `count` rows of each expert, and rows to try scales on, both float32 (experts, rows, cols).

    Evenly spread. The latter are other rows, but where all rows of the matrix are among the former.
    """
    height = made.shape[-2]
    chosen = _spread(np.arange(height), count)
    trial = _spread(chosen if len(chosen) == height else np.setdiff1d(np.arange(height), chosen), count // _TRIAL)
    union = np.union1d(chosen, trial)
    wanted = (np.arange(experts)[:, None] * height + union).reshape(-1)
    kept, at = [], 0
    for slab in made.stream(_SLAB):
        first, last = np.searchsorted(wanted, (at, at + len(slab)))
        kept.append(slab[wanted[first:last] - at])
        at += len(slab)
    rows = np.concatenate(kept).reshape(experts, len(union), -1)
    return rows[:, np.searchsorted(union, chosen)], rows[:, np.searchsorted(union, trial)]


def _spread(rows: Index, count: int) -> Index:
    """At most `count` of `rows`, from the first to the last."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.intp)]
