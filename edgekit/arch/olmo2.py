"""OLMo 2: norms after each block instead of before, and across all heads of q and k."""

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
    read_dims,
    rms,
    square_heads,
)
from edgekit.arch._family import Family, Reading, output
from edgekit.arch._rope import SCALED, read_rope
from edgekit.arch._types import Role

TABLE = (
    *ENDS,
    *COPIED_HEAD,
    *attention(),
    output(B + "attn_q_norm.weight", Role.NORM, L + "self_attn.q_norm.weight", "q"),
    output(B + "attn_k_norm.weight", Role.NORM, L + "self_attn.k_norm.weight", "kv"),
    output(B + "post_attention_norm.weight", Role.NORM, L + "post_attention_layernorm.weight", "hidden"),
    *GATED_FFN,
    output(B + "post_ffw_norm.weight", Role.NORM, L + "post_feedforward_layernorm.weight", "hidden"),
)
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def read(s: Settings, root: Path) -> Reading:
    """OLMo 2."""
    s.needs("hidden_act", SILU, "llama.cpp computes SwiGLU for this family")
    d = read_dims(s)
    square_heads(s, d)
    rope = read_rope(s, d.head, d.context, SCALED)
    return Reading(d, keys(d) | rms(s) | rope.metadata, notes=rope.notes, tied=s.flag("tie_word_embeddings"))


FAMILY = Family("olmo2", ("Olmo2ForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,), head="required")
