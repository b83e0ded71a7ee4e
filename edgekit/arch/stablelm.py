"""StableLM: LayerNorm, a part of each head rotated; the 12B norms each head and has one norm for both branches."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import (
    COPIED_HEAD,
    ENDS,
    GATED_FFN,
    INV_FREQ,
    SILU,
    B,
    L,
    attention,
    keys,
    layer_norm,
    qkv_bias,
    read_dims,
    square_heads,
    switches,
)
from edgekit.arch._family import Family, Reading, output
from edgekit.arch._make import stacked
from edgekit.arch._rope import PLAIN, read_rope
from edgekit.arch._types import Role

_Q, _K = L + "self_attn.q_layernorm.norms.{h}.weight", L + "self_attn.k_layernorm.norms.{k}.weight"
_AFTER = L + "post_attention_layernorm."
TABLE = (
    *ENDS,
    *COPIED_HEAD,
    output("output_norm.bias", Role.NORM, "model.norm.bias", "hidden"),
    output(B + "attn_norm.weight", Role.NORM, L + "input_layernorm.weight", "hidden"),
    output(B + "attn_norm.bias", Role.NORM, L + "input_layernorm.bias", "hidden"),
    output(B + "ffn_norm.weight", Role.NORM, _AFTER + "weight", "hidden", when="sequential"),
    output(B + "ffn_norm.bias", Role.NORM, _AFTER + "bias", "hidden", when="sequential"),
    *attention(),
    *qkv_bias("use_qkv_bias"),
    output(B + "attn_q_norm.weight", Role.NORM, _Q, "head", make=stacked, when="qk_layernorm"),
    output(B + "attn_k_norm.weight", Role.NORM, _K, "head", make=stacked, when="qk_layernorm"),
    *GATED_FFN,
)
DEFAULTS = {
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
}


def read(s: Settings, root: Path) -> Reading:
    """StableLM. llama.cpp runs both branches side by side where the second norm is absent."""
    s.needs("hidden_act", SILU, "llama.cpp computes SwiGLU for this family")
    d = read_dims(s)
    square_heads(s, d)
    rope = read_rope(s, d.head, d.context, PLAIN, partial=True)
    parallel = s.flag("use_parallel_residual")
    return Reading(
        d,
        keys(d) | layer_norm(s, "layer_norm_eps") | rope.metadata | {"use_parallel_residual": parallel},
        switches(s, "use_qkv_bias", "qk_layernorm") | (set() if parallel else {"sequential"}),
        notes=rope.notes,
        tied=s.flag("tie_word_embeddings"),
        parallel_residual=parallel,
    )


FAMILY = Family("stablelm", ("StableLmForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,), head="required")
