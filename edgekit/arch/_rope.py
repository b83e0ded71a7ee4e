"""Rotary embeddings: what a config says of them, and the keys and tensors by which llama.cpp does the same.

Reads both spellings of transformers: `rope_theta` + `rope_scaling` (4.x) and `rope_parameters` (5.x, per layer type
for models that have several). Definitions: transformers `modeling_rope_utils`; llama.cpp: `llama_context`'s
constructor (yarn), `llama_model::get_rope_factors` (factor tensors), ggml `rope_yarn`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.arch._config import MAX_SIZE, Settings, checked_number
from edgekit.arch._types import Array, Made, Role
from edgekit.errors import CorruptCheckpoint, UnsupportedModel
from edgekit.gguf_file import MetaValue

PLAIN = frozenset({"default", "linear", "dynamic"})
SCALED = PLAIN | {"yarn"}
LLAMA3 = SCALED | {"llama3"}

_KNOWN = frozenset(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}
    | {"low_freq_factor", "high_freq_factor", "long_factor", "short_factor", "long_mscale", "short_mscale"}
    | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"}
)
_ALIASES = {"none": "default", "ntk": "dynamic", "su": "longrope"}
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # YaRN, arXiv:2309.00071, section 3.2; few graphs can be told others


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings of one model. `metadata` without the architecture's prefix; `width` of a head is rotated."""

    width: int
    theta: float
    metadata: dict[str, MetaValue] = field(default_factory=dict)
    tensors: tuple[Made, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Parameters:
    """`rope_parameters` of one layer type, the loose keys of 4.x merged in."""

    settings: Settings
    values: Mapping[str, Any]
    theta: float
    context: int
    width: int

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        return checked_number(f"config.json: rope parameter {key}", default if value is None else value)

    def above(self, key: str, floor: float, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= floor:
            raise CorruptCheckpoint(f"config.json: rope parameter {key} is {value!r}, expected more than {floor:g}")
        return value

    def original(self) -> int:
        """Context length before scaling; the config's own key goes before the nested one, as in transformers."""
        if self.settings.raw("original_max_position_embeddings") is not None:
            return self.settings.integer("original_max_position_embeddings")
        value = self.values.get("original_max_position_embeddings")
        if value is None:
            return self.context
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < MAX_SIZE:
            raise CorruptCheckpoint(f"config.json: original_max_position_embeddings is {value!r}, not a token count")
        return value

    def factors(self, key: str) -> list[float]:
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != self.width // 2:
            got = len(value) if isinstance(value, list) else value
            raise CorruptCheckpoint(f"config.json: rope {key} needs {self.width // 2} numbers, has {got!r}")
        numbers = [checked_number(f"config.json: rope {key}", v) for v in value]
        if min(numbers) <= 0:
            raise CorruptCheckpoint(f"config.json: rope {key} holds {min(numbers)!r}, expected numbers above zero")
        return numbers


@dataclass(frozen=True)
class Bands:
    """Llama 3.1's scaling: all of `factor` for waves above original/low tokens, none below original/high."""

    factor: float
    low: float
    high: float
    original: int


def read_rope(
    s: Settings,
    head: int,
    context: int,
    kinds: Collection[str],
    *,
    partial: bool = False,
    layer: str = "",
    aliases: Mapping[str, str] | None = None,
) -> Rope:
    """Rotary embeddings for heads of width `head`.

    `kinds`: rope types that the family's graph can do; `partial`: whether it can rotate a part of a head; `layer`:
    layer type to read where parameters are nested; `aliases`: names of rope types that mean another one here.
    Raises UnsupportedModel, CorruptCheckpoint.
    """
    values = parameters(s, layer)
    kind = str(values.get("rope_type") or values.get("type") or "default").lower()
    kind = (_ALIASES | dict(aliases or {})).get(kind, kind)
    if kind not in kinds:
        raise UnsupportedModel(f"config.json: rope type {kind!r}: this family can do {', '.join(sorted(kinds))}")
    if unknown := sorted(set(values) - _KNOWN):
        raise UnsupportedModel(f"config.json: rope parameter {unknown[0]!r} is not understood")
    width = _rotated(s, values, head, partial)
    given = (values.get("rope_theta"), s.raw("rope_theta"), s.raw("rotary_emb_base"), 10000.0)
    theta = checked_number("config.json: rope_theta", next(g for g in given if g is not None))
    p = _Parameters(s, values, theta, context, width)
    if p.theta <= 0:
        raise CorruptCheckpoint(f"config.json: rope_theta is {p.theta!r}, expected a number above zero")
    base: dict[str, MetaValue] = {"rope.dimension_count": width, "rope.freq_base": p.theta}
    metadata, tensors, notes = _SCALINGS[kind](p)
    return Rope(width, p.theta, base | metadata, tensors, notes)


def parameters(s: Settings, layer: str = "") -> Mapping[str, Any]:
    """Rope parameters, those of layer type `layer` where they are nested. Empty without any."""
    values = s.table("rope_parameters") or s.table("rope_scaling") or {}
    nested = {k: v for k, v in values.items() if isinstance(v, Mapping)}
    if not nested:
        return values
    if layer not in nested:
        raise UnsupportedModel(f"config.json: rope parameters per layer type ({', '.join(sorted(nested))}) here")
    return nested[layer]


def _rotated(s: Settings, values: Mapping[str, Any], head: int, partial: bool) -> int:
    """Values of a head that are rotated (`int(head_dim * partial_rotary_factor)` in transformers)."""
    given = (values.get("partial_rotary_factor"), s.raw("partial_rotary_factor"), s.raw("rotary_pct"), 1.0)
    share = checked_number("config.json: partial_rotary_factor", next(g for g in given if g is not None))
    width = int(head * share)
    if not 0 < width <= head or width % 2:
        raise CorruptCheckpoint(f"config.json: partial_rotary_factor is {share!r}: {width} of {head} values rotated")
    if width != head and not partial:
        raise UnsupportedModel(f"config.json: partial_rotary_factor is {share!r}: this family's graph rotates all")
    return width


_Scaling = tuple[dict[str, MetaValue], tuple[Made, ...], tuple[str, ...]]


def _default(p: _Parameters) -> _Scaling:
    return {}, (), ()


def _linear(p: _Parameters) -> _Scaling:
    return {"rope.scaling.type": "linear", "rope.scaling.factor": p.above("factor", 0)}, (), ()


def _dynamic(p: _Parameters) -> _Scaling:
    p.above("factor", 0)
    return {}, (), (f"dynamic rope scaling takes effect beyond {p.context} tokens only; llama.cpp has none",)


def _yarn(p: _Parameters) -> _Scaling:
    """llama.cpp itself applies 1 + 0.1 ln(factor); `attn_factor` multiplies that, `yarn_attn_factor` is overwritten."""
    if p.values.get("truncate") is False:
        raise UnsupportedModel("config.json: rope parameter truncate is False: ggml rounds the correction range")
    original = p.original()
    factor = p.above("factor", 0, default=p.context / original)
    metadata: dict[str, MetaValue] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
    }
    for key, default in _BETAS.items():
        if (value := p.number(key, default) or default) != default:
            raise UnsupportedModel(f"config.json: rope parameter {key} is {value!r}: llama.cpp has {default:g} here")
    wanted, applied = _yarn_attention(p, factor), _mscale(factor, 1.0)
    if not math.isclose(wanted, applied, rel_tol=1e-6):
        metadata["rope.scaling.attn_factor"] = wanted / applied
    return metadata, (), ()


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention(p: _Parameters, factor: float) -> float:
    """What cos and sin are multiplied with (transformers `_compute_yarn_parameters`)."""
    if p.values.get("attention_factor") is not None:
        return p.above("attention_factor", 0)
    mscale, all_dim = p.number("mscale", 0.0), p.number("mscale_all_dim", 0.0)
    return _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)


def _llama3(p: _Parameters) -> _Scaling:
    factors = llama3_factors(p.theta, p.width, _llama3_bands(p))
    if not (np.isfinite(factors).all() and factors.min() > 0):
        raise CorruptCheckpoint("config.json: rope parameters give frequencies that are no numbers above zero")
    return {}, (_constant("rope_freqs.weight", factors),), ()


def _llama3_bands(p: _Parameters) -> Bands:
    bands = Bands(p.above("factor", 0), p.above("low_freq_factor", 0), p.above("high_freq_factor", 0), p.original())
    if bands.high <= bands.low:
        raise CorruptCheckpoint(
            f"config.json: rope high_freq_factor {bands.high:g} is not above low_freq_factor {bands.low:g}"
        )
    return bands


def llama3_factors(theta: float, width: int, bands: Bands) -> Array:
    """Divisors of the rotary frequencies, float32 (width / 2,).

    1 where a wave is shorter than original/high tokens, `factor` where it is longer than original/low, and between
    them such that the frequency is interpolated linearly in original/wavelength (transformers
    `_compute_llama3_parameters`). Published files hold what PyTorch computes in float32, where a number over a tensor
    is its reciprocal times the number: the same steps here give the same bits.
    """
    one = np.float32(1)
    with np.errstate(all="ignore"):
        low, high = np.float32(bands.low), np.float32(bands.high)
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        frequency = one / np.power(theta, exponents.astype(np.float64)).astype(np.float32)
        wave = (one / frequency) * np.float32(2 * math.pi)
        smooth = ((one / wave) * np.float32(bands.original) - low) / (high - low)
        between = one / ((one - smooth) / np.float32(bands.factor) + smooth)
        longer = np.where(wave > np.float32(bands.original / bands.low), np.float32(bands.factor), between)
        return np.where(wave < np.float32(bands.original / bands.high), one, longer).astype(np.float32)


def _longrope(p: _Parameters) -> _Scaling:
    """LongRoPE, arXiv:2402.13753: one divisor per frequency, for short and for long contexts."""
    original = p.original()
    factor = p.above("factor", 0, default=p.context / original)
    implied = 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))
    metadata: dict[str, MetaValue] = {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": p.above("attention_factor", 0, default=implied),
    }
    tensors = tuple(
        _constant(f"rope_factors_{length}.weight", np.array(p.factors(f"{length}_factor"), dtype=np.float32))
        for length in ("long", "short")
    )
    return metadata, tensors, ()


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _constant(name: str, values: Array) -> Made:
    def stream(max_values: int) -> Iterator[Array]:
        yield values.reshape(1, -1).copy()

    return Made(name, values.shape, Role.ROPE, (), stream, keep_f32=True)
