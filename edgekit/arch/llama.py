"""Llama 1 to 3.x, TinyLlama, SmolLM and SmolLM2."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import (
    ENDS,
    GATED_FFN,
    GATED_FFN_BIAS,
    INV_FREQ,
    NORMS,
    SILU,
    B,
    L,
    attention,
    keys,
    qkv_bias,
    read_dims,
    rms,
    switches,
)
from edgekit.arch._family import Family, Reading, output
from edgekit.arch._make import rotary
from edgekit.arch._rope import LLAMA3, read_rope
from edgekit.arch._types import Role

Q, K = rotary("heads"), rotary("kv_heads")
ATTENTION = (
    *attention(Q, K),
    *qkv_bias("attention_bias", Q, K),
    output(B + "attn_output.bias", Role.BIAS, L + "self_attn.o_proj.bias", "hidden", when="attention_bias"),
)
TABLE = (*ENDS, *NORMS, *ATTENTION, *GATED_FFN, *GATED_FFN_BIAS)
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def read(s: Settings, root: Path) -> Reading:
    """Every Llama: biases and a head width of their own are possible."""
    s.needs("hidden_act", SILU, "llama.cpp computes SwiGLU for this family")
    d = read_dims(s)
    rope = read_rope(s, d.head, d.context, LLAMA3)
    return Reading(
        d,
        keys(d) | rms(s) | rope.metadata,
        switches(s, "attention_bias", "mlp_bias"),
        extra=rope.tensors,
        notes=rope.notes,
        tied=s.flag("tie_word_embeddings"),
    )


FAMILY = Family("llama", ("LlamaForCausalLM", "LLaMAForCausalLM"), read, TABLE, DEFAULTS, (INV_FREQ,))
