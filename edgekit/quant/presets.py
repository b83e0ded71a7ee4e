"""llama-quantize's named mixes: which format each tensor of a model gets, decided from names and shapes alone.

Knows the rules of llama.cpp's src/llama-quant.cpp as of llama-cpp-python 0.3.36; knows no weights and encodes nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto
from math import prod
from typing import Any, Generic, Protocol, TypeVar

from edgekit.errors import EdgekitError, UnsupportedModel
from edgekit.quant.ggml import FORMATS
from edgekit.shelf import unknown


@dataclass(frozen=True, slots=True)
class Preset:
    """A named mix. `file_type` is LLAMA_FTYPE, the file's general.file_type; `default` is what most tensors get."""

    name: str
    file_type: int
    default: str
    note: str
    needs_importance: bool = False


_ALL = (
    Preset("F32", 0, "F32", "as computed; twice the bytes of any checkpoint"),
    Preset("F16", 1, "F16", "half precision; a BF16 checkpoint loses its largest and smallest values"),
    Preset("BF16", 32, "BF16", "what most checkpoints are published in; slow on CPUs without BF16 instructions"),
    Preset("Q8_0", 7, "Q8_0", "8.5 bits; not told apart from the source by perplexity; fast everywhere"),
    Preset("Q6_K", 18, "Q6_K", "6.6 bits; the usual choice where quality matters and Q8_0 does not fit"),
    Preset("Q5_K_M", 17, "Q5_K", "5.5 bits; half of the value and down projections in Q6_K"),
    Preset("Q5_K_S", 16, "Q5_K", "5.5 bits throughout, output in Q6_K"),
    Preset("Q5_1", 9, "Q5_1", "6.0 bits, blocks of 32 with a minimum; older than and about equal to Q5_K"),
    Preset("Q5_0", 8, "Q5_0", "5.5 bits, blocks of 32; for rows that k-quants cannot divide"),
    Preset("Q4_K_M", 15, "Q4_K", "4.5 bits; half of the value and down projections in Q6_K; the field's default"),
    Preset("Q4_K_S", 14, "Q4_K", "4.5 bits; Q5_K for the first value and down projections"),
    Preset("Q4_1", 3, "Q4_1", "5.0 bits, blocks of 32 with a minimum"),
    Preset("Q4_0", 2, "Q4_0", "4.5 bits, blocks of 32; the fastest on Arm, the coarsest of its size"),
    Preset("IQ4_NL", 25, "IQ4_NL", "4.5 bits on a curved grid, blocks of 32; repacked for Arm like Q4_0"),
    Preset("IQ4_XS", 30, "IQ4_XS", "4.25 bits on a curved grid; near Q4_K_S and a twentieth smaller"),
    Preset("MXFP4_MOE", 38, "MXFP4", "4.25-bit floats for experts, Q8_0 for the rest; meant for gpt-oss"),
    Preset("Q3_K_L", 13, "Q3_K", "3.4 bits; value, output and down projections in Q5_K"),
    Preset("Q3_K_M", 12, "Q3_K", "3.4 bits; value, output and down projections in Q4_K and Q5_K"),
    Preset("Q3_K_S", 11, "Q3_K", "3.4 bits throughout, output in Q6_K"),
    Preset("IQ3_M", 27, "IQ3_S", "3.4 bits; values, outputs and the first down projections in Q4_K"),
    Preset("IQ3_S", 26, "IQ3_S", "3.4 bits on a lattice; better than Q3_K_S where importance is known"),
    Preset("IQ3_XS", 22, "IQ3_S", "3.3 bits; queries, keys and the middle layers in IQ3_XXS", True),
    Preset("IQ3_XXS", 23, "IQ3_XXS", "3.06 bits on a lattice; queries and keys in IQ2_S", True),
    Preset("Q2_K", 10, "Q2_K", "2.6 bits; values, outputs and down projections in Q3_K or Q4_K"),
    Preset("Q2_K_S", 21, "Q2_K", "2.6 bits throughout", True),
    Preset("IQ2_M", 29, "IQ2_S", "2.6 bits; values, outputs and the first down projections in IQ3_S", True),
    Preset("IQ2_S", 28, "IQ2_XS", "2.3 bits; values, outputs and the first down projections in IQ3_S", True),
    Preset("IQ2_XS", 20, "IQ2_XS", "2.3 bits on a lattice; noticeably worse than the source", True),
    Preset("IQ2_XXS", 19, "IQ2_XXS", "2.06 bits on a lattice; for large models only", True),
    Preset("Q2_0", 41, "Q2_0", "2.25 bits, blocks of 64; for models trained with ternary weights"),
    Preset("TQ2_0", 37, "TQ2_0", "2.06 bits, ternary; for models trained with ternary weights"),
    Preset("TQ1_0", 36, "TQ1_0", "1.69 bits, ternary; for models trained with ternary weights"),
    Preset("IQ1_M", 31, "IQ1_M", "1.75 bits on a lattice; the edge of coherence on large models", True),
    Preset("IQ1_S", 24, "IQ1_S", "1.56 bits on a lattice; the edge of coherence on large models", True),
    Preset("Q1_0", 40, "Q1_0", "1.1 bits, signs only; for models trained with binary weights"),
)
PRESETS: dict[str, Preset] = {p.name: p for p in _ALL}
"""Every mix that llama-quantize offers but COPY, from most to fewest bits."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

LADDER = (
    *("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_S", "IQ3_XS"),
    *("IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)
"""Sensible candidates for an automatic choice where importance is known, from best to smallest."""

PLAIN_LADDER = (
    *("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q3_K_S", "Q2_K"),
)
"""The same where importance is not known."""


def get(name: str) -> Preset:
    """The preset of that name or alias, whatever its case. Raises UnknownName."""
    key = name.upper()
    found = PRESETS.get(ALIASES.get(key, key))
    if found is None:
        raise unknown("preset", name, PRESETS)
    return found


class Tensor(Protocol):
    """What a choice depends on: a `Made` of edgekit.arch, or anything alike."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def keep_f32(self) -> bool: ...
    @property
    def sources(self) -> Sequence[Any]: ...


class _Layer(Protocol):
    @property
    def kv_heads(self) -> int: ...


class _Geometry(Protocol):
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def layers(self) -> Sequence[_Layer]: ...


T = TypeVar("T", bound=Tensor)
T_co = TypeVar("T_co", bound=Tensor, covariant=True)


class Model(Protocol[T_co]):
    """A `Blueprint` of edgekit.arch, or anything alike."""

    @property
    def arch(self) -> str: ...
    @property
    def tensors(self) -> Sequence[T_co]: ...
    @property
    def geometry(self) -> _Geometry: ...


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """What one tensor becomes. `wanted != format`: the preset's rule did not fit the rows and a coarser block did."""

    tensor: T
    format: str
    wanted: str
    reason: str

    @property
    def nbytes(self) -> int:
        return FORMATS[self.format].nbytes(self.tensor.shape)


def choose(
    preset: Preset | str, blueprint: Model[T], *, importance: Collection[str] | None = None
) -> tuple[Choice[T], ...]:
    """A format for every tensor, in the blueprint's order, as llama_model_quantize chooses it.

    `importance`: names of the tensors with an importance vector; none or empty is "no imatrix", which changes some
    rules. Raises EdgekitError when the preset needs importance for a tensor that has none, or when no format of the
    preset takes a tensor's rows; UnsupportedModel when a tensor of an expert model names no layer.
    """
    preset = get(preset) if isinstance(preset, str) else preset
    mix = _Mix.of(preset, blueprint, importance or ())
    chosen = {t.name: _choice(mix, t) for t in sorted(blueprint.tensors, key=lambda t: _loader_order(t.name))}
    return tuple(chosen[t.name] for t in blueprint.tensors)


def describe(choices: Iterable[Choice[T]]) -> dict[str, int]:
    """Bytes in each format, most first. Tensor data only: no padding, no metadata."""
    total: Counter[str] = Counter()
    for c in choices:
        total[c.format] += c.nbytes
    return dict(total.most_common())


def bits_per_weight(choices: Iterable[Choice[T]]) -> float:
    """Mean bits a weight over all tensors, norms included; 0 for no tensors."""
    choices = list(choices)
    weights = sum(prod(c.tensor.shape) for c in choices)
    return 8 * sum(c.nbytes for c in choices) / weights if weights else 0.0


# --- what a name says -------------------------------------------------------------------------------------------------


class _Kind(StrEnum):
    """llama-quant.cpp's tensor_category; the value is the reason shown to a reader."""

    OUTPUT = "output matrix"
    EMBED = "token embedding"
    VALUE = "attention value"
    KEY = "attention key"
    QUERY = "attention query"
    ATTN_OUT = "attention output"
    UP = "feed-forward up"
    GATE = "feed-forward gate"
    DOWN = "feed-forward down"
    OTHER = auto()


_EMBEDDINGS = frozenset({"token_embd.weight", "per_layer_token_embd.weight"})
# First match wins. Fused query-key-value and MLA's kv_b are as sensitive as values and counted with them.
_PARTS = (
    ("attn_qkv.weight", _Kind.VALUE),
    ("attn_kv_b.weight", _Kind.VALUE),
    ("attn_v.weight", _Kind.VALUE),
    ("attn_k.weight", _Kind.KEY),
    ("attn_q.weight", _Kind.QUERY),
    ("attn_output.weight", _Kind.ATTN_OUT),
    ("ffn_up", _Kind.UP),
    ("ffn_gate", _Kind.GATE),
    ("ffn_down", _Kind.DOWN),
)
# Matrices that stay as they are (tensor_allows_quantization): small, or read by kernels that take floats only.
_UNTOUCHED = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *(f"time_mix_{part}.weight" for part in ("first", "lerp_fused", "decay_w1", "decay_w2", "g1", "g2")),
    *(f"time_mix_{part}{i}.weight" for part in "wva" for i in range(3)),
    *(".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger"),
    *("a.rvq.codebook", "mm.a.code_embd"),
)
_UNTOUCHED_NAMES = frozenset({"position_embd.weight", "token_types.weight"})


def _kind(name: str) -> _Kind:
    if name == "output.weight":
        return _Kind.OUTPUT
    if name in _EMBEDDINGS:
        return _Kind.EMBED
    return next((kind for part, kind in _PARTS if part in name), _Kind.OTHER)


def _layer(name: str) -> int | None:
    match = re.match(r"blk\.([0-9]+)", name)
    return int(match[1]) if match else None


def _loader_order(name: str) -> tuple[int, bytes]:
    """The order in which llama.cpp's loader visits tensors, hence counts them: outside layers first, then by name."""
    layer = _layer(name)
    return (-1 if layer is None else layer, name.encode())


def _is_row(tensor: Tensor) -> bool:
    """Whether ggml_n_dims is one: leading axes of one do not count."""
    return prod(tensor.shape[:-1]) == 1


def _untouched(tensor: Tensor) -> str:
    """Why a tensor is not quantized at all, or nothing."""
    if _is_row(tensor):
        return "norm" if "norm" in tensor.name else "bias" if tensor.name.endswith("bias") else "one row"
    name = tensor.name
    if not name.endswith("weight"):
        return "not a weight matrix"
    part = next((p for p in _UNTOUCHED if p in name), name if name in _UNTOUCHED_NAMES else "")
    return f"{part.strip('._')} is never quantized" if part else ""


def _as_stored(tensor: Tensor) -> str:
    """The 16-bit format all its sources have, or F32: what is not quantized loses nothing."""
    stored = {str(source.dtype) for source in tensor.sources}
    return stored.pop() if len(stored) == 1 and stored <= {"F16", "BF16"} else "F32"


# --- the rules --------------------------------------------------------------------------------------------------------

_TINY = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
_UPPER_TINY = frozenset({"IQ2_S", "IQ2_M"})
# Layers at which a model of that family is llama.cpp's LLM_TYPE_70B (load_arch_hparams in src/models/)
_LARGE = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}

_EMBED_RULE = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"),
}
_GROUPED_VALUE_RULE = {"Q2_K_S": "Q4_K", "IQ3_XS": "Q4_K", "IQ3_S": "Q4_K", "IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
_ATTN_OUT_RULE = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
_EIGHT_EXPERT_ATTN_OUT = frozenset(
    {"Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS"}
)
_QUERY_KEY_RULE = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}
# tensor_type_fallback: what a format becomes where rows do not divide into its blocks
_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}
# tensor_requires_imatrix: the formats that llama-quantize refuses to make blindly, outside the embedding and output
_BLIND = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})


@dataclass
class _Mix:
    """A preset on one model. `seen` counts the tensors of a kind met so far: rules speak of the first and last ones."""

    preset: Preset
    arch: str
    grouping: int
    experts: int
    layers: int
    values: int
    tied: bool
    importance: Collection[str]
    seen: Counter[_Kind] = field(default_factory=Counter)

    @classmethod
    def of(cls, preset: Preset, model: Model[T], importance: Collection[str]) -> _Mix:
        geometry, kinds = model.geometry, Counter(_kind(t.name) for t in model.tensors)
        if model.arch in {"glm5-next", "bailingmoe3"}:  # llama-quant.cpp has rules of its own for these two
            raise UnsupportedModel(f"no preset is known for the family {model.arch}")
        kv_heads = geometry.layers[0].kv_heads if geometry.layers else geometry.kv_heads
        return cls(
            preset=preset,
            arch=model.arch,
            grouping=geometry.heads // kv_heads if kv_heads else 0,
            experts=geometry.experts,
            layers=len(geometry.layers),
            values=kinds[_Kind.VALUE],
            tied=not kinds[_Kind.OUTPUT],
            importance=importance,
        )

    @property
    def name(self) -> str:
        return self.preset.name

    @property
    def large(self) -> bool:
        """LLM_TYPE_70B. Llama's own needs grouped heads, and is something else with eight experts."""
        if self.layers != _LARGE.get(self.arch):
            return False
        return not self.arch.startswith("llama") or (self.grouping != 1 and self.experts != 8)

    def next(self, kind: _Kind) -> int:
        """How many of that kind came before; counts this one."""
        self.seen[kind] += 1
        return self.seen[kind] - 1

    def layer(self, kind: _Kind, name: str) -> int:
        """The layer of a feed-forward tensor: counted, or read from the name where a layer has many (experts)."""
        at = self.next(kind)
        if self.experts <= 1:
            return at
        layer = _layer(name)
        if layer is None or layer >= self.layers:
            raise UnsupportedModel(f"tensor {name} belongs to none of the model's {self.layers} layers")
        return layer


def _choice(mix: _Mix, tensor: T) -> Choice[T]:
    if tensor.keep_f32:
        return Choice(tensor, "F32", "F32", _untouched(tensor) or "kept in float32")
    if reason := _untouched(tensor):
        stored = "F32" if _is_row(tensor) else _as_stored(tensor)
        return Choice(tensor, stored, stored, reason)
    default = mix.preset.default
    if default in {"F32", "F16", "BF16"}:
        return Choice(tensor, default, default, "preset")
    kind = _kind(tensor.name)
    wanted = _wanted(mix, tensor, kind)
    reason = "preset" if wanted == default else f"{kind.value}: more than the preset's {default}"
    if wanted != default and FORMATS[wanted].bits < FORMATS[default].bits:
        reason = f"{kind.value}: less than the preset's {default}"
    final = _fallback(mix, tensor, wanted)
    if final != wanted:
        reason = f"rows of {tensor.shape[-1]} do not divide into {wanted} blocks of {FORMATS[wanted].block}"
    _check_importance(mix, tensor, kind, final)
    return Choice(tensor, final, wanted, reason)


def _wanted(mix: _Mix, tensor: Tensor, kind: _Kind) -> str:
    """llama_tensor_get_type_impl: the preset's rule for one tensor, before its rows are looked at."""
    if kind is _Kind.OUTPUT or (mix.tied and kind is _Kind.EMBED):
        return _output(mix, tensor)
    if mix.name == "MXFP4_MOE":
        return "MXFP4" if len(tensor.shape) > 2 and tensor.shape[-3] > 1 else "Q8_0"
    if kind is _Kind.EMBED:
        return _EMBED_RULE.get(mix.name, mix.preset.default)
    if mix.name in _TINY:
        return _tiny(mix, kind)
    if kind is _Kind.VALUE:
        return _value(mix)
    if kind is _Kind.KEY and mix.experts == 8:
        return "Q8_0"
    if kind in {_Kind.KEY, _Kind.QUERY}:
        return _QUERY_KEY_RULE.get(mix.name, mix.preset.default)
    if kind is _Kind.ATTN_OUT:
        return _attention_output(mix)
    if kind is _Kind.DOWN:
        return _down(mix, mix.layer(kind, tensor.name))
    if kind in {_Kind.UP, _Kind.GATE}:
        middle = mix.layers // 8 <= mix.layer(kind, tensor.name) < 7 * mix.layers // 8
        return "IQ3_XXS" if middle and mix.name == "IQ3_XS" else mix.preset.default
    return mix.preset.default


def _often(at: int, count: int) -> bool:
    """use_more_bits: the first and last eighth, and every third in between."""
    eighth = count // 8
    return at < eighth or at >= 7 * count // 8 or (at - eighth) % 3 == 2


def _output(mix: _Mix, tensor: Tensor) -> str:
    """The output matrix, or the embedding that serves as one."""
    default = mix.preset.default
    if mix.name == "MXFP4_MOE" or mix.arch == "falcon" or tensor.shape[-1] % FORMATS[default].block:
        return "Q8_0"
    if mix.name in _TINY or mix.name == "IQ3_XXS":
        return "Q5_K"
    return "Q8_0" if default == "Q8_0" else "Q6_K"


def _tiny(mix: _Mix, kind: _Kind) -> str:
    """Presets under three bits: values, outputs and the first down projections are spared."""
    spared = "IQ3_S" if mix.name in _UPPER_TINY else "Q2_K"
    if kind is _Kind.VALUE:
        return "Q4_K" if mix.grouping >= 4 or mix.experts >= 4 else spared
    if kind is _Kind.KEY and mix.experts == 8:
        return "Q4_K"
    if kind is _Kind.DOWN and mix.next(kind) < mix.layers // 8:
        return spared
    if kind is _Kind.ATTN_OUT and mix.experts == 8:
        return "Q5_K"
    if kind is _Kind.ATTN_OUT and mix.name in {"IQ1_S", "IQ1_M"}:
        return "IQ2_XXS"
    if kind is _Kind.ATTN_OUT and mix.name in _UPPER_TINY:
        return "IQ3_S"
    return mix.preset.default


def _value(mix: _Mix) -> str:
    at = mix.next(_Kind.VALUE)
    if mix.experts == 8:  # eight experts share one small value matrix
        return "Q8_0"
    wanted = _value_rule(mix, at)
    return "Q5_K" if mix.large and wanted in {"Q3_K", "Q4_K"} else wanted


def _value_rule(mix: _Mix, at: int) -> str:
    name, grouped = mix.name, mix.grouping >= 4
    if name == "Q2_K":
        return "Q4_K" if grouped else "Q3_K"
    if name == "IQ3_XXS":
        return "Q4_K" if grouped else "IQ3_XXS" if mix.importance else "IQ3_S"
    if grouped and name in _GROUPED_VALUE_RULE:
        return _GROUPED_VALUE_RULE[name]
    if name == "IQ3_M":
        return "Q4_K"
    if name == "Q3_K_M":
        return "Q5_K" if at < 2 else "Q4_K"
    if name == "Q3_K_L" or (name == "Q4_K_S" and at < 4):
        return "Q5_K"
    if name in {"Q4_K_M", "Q5_K_M"} and _often(at, mix.values):
        return "Q6_K"
    return mix.preset.default


def _attention_output(mix: _Mix) -> str:
    if mix.arch == "falcon":
        return "Q4_K" if mix.name == "Q3_K_L" else mix.preset.default
    if mix.experts == 8:
        return "Q5_K" if mix.name in _EIGHT_EXPERT_ATTN_OUT else mix.preset.default
    return _ATTN_OUT_RULE.get(mix.name, mix.preset.default)


def _down(mix: _Mix, at: int) -> str:
    """Down projections, whose outliers cost most: the first eighth of the layers, often more."""
    name, falcon = mix.name, mix.arch == "falcon"
    first, sixteenth, often = at < mix.layers // 8, at < mix.layers // 16, _often(at, mix.layers)
    rules: dict[str, str | None] = {
        "Q2_K": "Q3_K",
        "Q2_K_S": "Q4_K" if first else None,
        "IQ3_XXS": None if mix.importance else "Q4_K" if first else "Q3_K",
        "Q3_K_M": "Q5_K" if sixteenth else "Q4_K" if often or not falcon else "Q3_K",
        "Q3_K_L": "Q4_K" if falcon else "Q5_K",
        "IQ3_M": "Q4_K" if first or (often and mix.experts == 8) else None,
        "Q4_K_M": _falcon_down(sixteenth, often) if falcon else "Q6_K" if often else None,
        "Q5_K_M": "Q6_K" if often else None,
        "Q4_K_S": "Q5_K" if first and not falcon else None,
        "IQ4_NL": "Q5_K" if first and not mix.importance else None,
        "IQ4_XS": "Q5_K" if first and not mix.importance else None,
        # with importance alone: without it these two must give what they always gave
        "Q4_0": "Q4_1" if first and mix.importance else None,
        "Q5_0": "Q5_1" if first and mix.importance else None,
    }
    return rules.get(name) or mix.preset.default


def _falcon_down(sixteenth: bool, often: bool) -> str:
    return "Q6_K" if sixteenth else "Q5_K" if often else "Q4_K"


def _fallback(mix: _Mix, tensor: Tensor, wanted: str) -> str:
    """tensor_type_fallback: a format with smaller blocks where rows do not divide, F16 where even 32 does not."""
    cols = tensor.shape[-1]
    if cols % FORMATS[wanted].block == 0:
        return wanted
    if FORMATS[wanted].block > 32 and wanted not in _FALLBACK:
        raise EdgekitError(
            f"{tensor.name} has rows of {cols} weights, which {wanted} blocks of {FORMATS[wanted].block} do not divide,"
            f" and {mix.name} has nothing to fall back on",
            "choose another preset, for example Q4_0",
        )
    fallback = _FALLBACK.get(wanted, wanted)
    return "F16" if cols % FORMATS[fallback].block else fallback


def _check_importance(mix: _Mix, tensor: Tensor, kind: _Kind, final: str) -> None:
    """tensor_requires_imatrix: what llama-quantize refuses, we refuse."""
    if kind in {_Kind.OUTPUT, _Kind.EMBED} or tensor.name in mix.importance:
        return
    if final in _BLIND or (final == "Q2_K" and mix.name == "Q2_K_S"):
        raise EdgekitError(
            f"{mix.name} makes {tensor.name} {final}, which needs importance for it, and there is none",
            "calibrate (--calibration FILE), or choose a preset that does without: IQ4_XS, Q3_K_M or Q2_K",
        )
