"""StarCoder2: biases everywhere, a plain feed-forward. Its window has no counterpart in llama.cpp."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import (
    ENDS,
    GELU,
    INV_FREQ,
    NORMS,
    B,
    L,
    attention,
    keys,
    layer_norm,
    qkv_bias,
    read_dims,
    square_heads,
    within_window,
)
from edgekit.arch._family import Family, Reading, output
from edgekit.arch._rope import PLAIN, read_rope
from edgekit.arch._types import Role

TABLE = (
    *ENDS,
    output("output_norm.bias", Role.NORM, "model.norm.bias", "hidden"),
    *NORMS,
    output(B + "attn_norm.bias", Role.NORM, L + "input_layernorm.bias", "hidden"),
    output(B + "ffn_norm.bias", Role.NORM, L + "post_attention_layernorm.bias", "hidden"),
    *attention(),
    *qkv_bias(""),
    output(B + "attn_output.bias", Role.BIAS, L + "self_attn.o_proj.bias", "hidden"),
    output(B + "ffn_up.weight", Role.FFN_UP, L + "mlp.c_fc.weight", "ffn", "hidden"),
    output(B + "ffn_up.bias", Role.BIAS, L + "mlp.c_fc.bias", "ffn"),
    output(B + "ffn_down.weight", Role.FFN_DOWN, L + "mlp.c_proj.weight", "hidden", "ffn"),
    output(B + "ffn_down.bias", Role.BIAS, L + "mlp.c_proj.bias", "hidden"),
)
DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "use_bias": True,
}


def read(s: Settings, root: Path) -> Reading:
    """StarCoder2."""
    s.needs("hidden_act", GELU, "llama.cpp computes GELU for this family")
    s.needs("use_bias", (True,), "llama.cpp has biases in this family")
    d = read_dims(s)
    square_heads(s, d)
    rope = read_rope(s, d.head, d.context, PLAIN)
    d, notes = within_window(s, d, s.optional("sliding_window"))
    return Reading(
        d,
        keys(d) | layer_norm(s, "norm_epsilon") | rope.metadata,
        notes=rope.notes + notes,
        tied=s.flag("tie_word_embeddings"),
    )


FAMILY = Family("starcoder2", ("Starcoder2ForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,))
