"""Gemma 2: norms on both sides of each block, soft caps, every other layer with a sliding window."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import ENDS, GATED_FFN, GELU, INV_FREQ, B, L, attention, keys, read_dims, rms
from edgekit.arch._family import Dims, Family, Reading, output
from edgekit.arch._rope import PLAIN, read_rope
from edgekit.arch._types import Role
from edgekit.arch.gemma import DEFAULTS as GEMMA
from edgekit.arch.gemma import shifted
from edgekit.gguf_file import MetaValue

FOUR_NORMS = (
    output(B + "attn_norm.weight", Role.NORM, L + "input_layernorm.weight", "hidden"),
    output(B + "post_attention_norm.weight", Role.NORM, L + "post_attention_layernorm.weight", "hidden"),
    output(B + "ffn_norm.weight", Role.NORM, L + "pre_feedforward_layernorm.weight", "hidden"),
    output(B + "post_ffw_norm.weight", Role.NORM, L + "post_feedforward_layernorm.weight", "hidden"),
)
TABLE = (*shifted(ENDS), *shifted(FOUR_NORMS), *attention(), *GATED_FFN)
DEFAULTS = GEMMA | {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


def scaled_as_built_in(s: Settings, d: Dims, big: int) -> None:
    """Refuse a query scale other than the one llama.cpp has built in: by head width, or, for the model of `big` layers,
    by hidden_size over heads. Raises UnsupportedModel."""
    built_in = d.hidden // d.heads if d.layers == big else d.head
    if s.positive("query_pre_attn_scalar") != built_in:
        s.refuse("query_pre_attn_scalar", f"llama.cpp scales queries for {built_in} here and cannot be told otherwise")


def windowed(s: Settings, d: Dims, every: int) -> tuple[bool, ...]:
    """Which layers have a sliding window; without `layer_types`, all but each `every`-th. Raises UnsupportedModel."""
    kinds = s.numbers("layer_types")
    if kinds is None:
        return tuple((i + 1) % every != 0 for i in range(d.layers))
    if len(kinds) != d.layers or any(kind not in ("sliding_attention", "full_attention") for kind in kinds):
        s.refuse("layer_types", f"expected {d.layers} of 'sliding_attention' and 'full_attention'")
    return tuple(kind == "sliding_attention" for kind in kinds)


def window_keys(window: int, layers: tuple[bool, ...], built_in: int) -> dict[str, MetaValue]:
    """Keys of a sliding window; the pattern only where it is not the one that llama.cpp assumes."""
    found: dict[str, MetaValue] = {"attention.sliding_window": window}
    if layers != tuple((i + 1) % built_in != 0 for i in range(len(layers))):
        found["attention.sliding_window_pattern"] = list(layers)
    return found


def read(s: Settings, root: Path) -> Reading:
    """Gemma 2. Both soft caps are always on in llama.cpp's graph."""
    for key in ("hidden_act", "hidden_activation"):
        s.needs(key, (None, *GELU), "llama.cpp computes GeGLU for this family")
    d = read_dims(s)
    scaled_as_built_in(s, d, 46)
    window, layers = s.integer("sliding_window"), windowed(s, d, 2)
    rope = read_rope(s, d.head, d.context, PLAIN)
    caps: dict[str, MetaValue] = {}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if s.raw(key) is None:
            s.refuse(key, "llama.cpp's graph for this family cannot leave it out")
        caps[key] = s.positive(key)
    return Reading(
        d,
        keys(d) | rms(s) | rope.metadata | caps | window_keys(window, layers, 2),
        windows=tuple(window if on else None for on in layers),
        notes=rope.notes,
        tied=s.flag("tie_word_embeddings"),
    )


FAMILY = Family("gemma2", ("Gemma2ForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,), head="never")
