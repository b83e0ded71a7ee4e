"""GPT-NeoX and Pythia: q, k and v fused head by head, attention and feed-forward side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import GELU, INV_FREQ, B, keys, layer_norm, read_dims, square_heads
from edgekit.arch._family import Family, Reading, output
from edgekit.arch._make import head_major_qkv
from edgekit.arch._rope import PLAIN, read_rope
from edgekit.arch._types import Role

_X, _L = "gpt_neox.", "gpt_neox.layers.{l}."
_QKV = "attention.query_key_value."
TABLE = (
    output("token_embd.weight", Role.EMBED, _X + "embed_in.weight", "vocab", "hidden"),
    output("output_norm.weight", Role.NORM, _X + "final_layer_norm.weight", "hidden"),
    output("output_norm.bias", Role.NORM, _X + "final_layer_norm.bias", "hidden"),
    output("output.weight", Role.OUTPUT, "lm_head.weight", "vocab", "hidden", when="head"),
    output("output.weight", Role.OUTPUT, _X + "embed_in.weight", "vocab", "hidden", when="copied_head"),
    output(B + "attn_norm.weight", Role.NORM, _L + "input_layernorm.weight", "hidden"),
    output(B + "attn_norm.bias", Role.NORM, _L + "input_layernorm.bias", "hidden"),
    output(B + "attn_qkv.weight", Role.ATTN_QKV, _L + _QKV + "weight", "qkv", "hidden", make=head_major_qkv),
    output(B + "attn_qkv.bias", Role.BIAS, _L + _QKV + "bias", "qkv", make=head_major_qkv),
    output(B + "attn_output.weight", Role.ATTN_O, _L + "attention.dense.weight", "hidden", "hidden"),
    output(B + "attn_output.bias", Role.BIAS, _L + "attention.dense.bias", "hidden"),
    output(B + "ffn_norm.weight", Role.NORM, _L + "post_attention_layernorm.weight", "hidden"),
    output(B + "ffn_norm.bias", Role.NORM, _L + "post_attention_layernorm.bias", "hidden"),
    output(B + "ffn_up.weight", Role.FFN_UP, _L + "mlp.dense_h_to_4h.weight", "ffn", "hidden"),
    output(B + "ffn_up.bias", Role.BIAS, _L + "mlp.dense_h_to_4h.bias", "ffn"),
    output(B + "ffn_down.weight", Role.FFN_DOWN, _L + "mlp.dense_4h_to_h.weight", "hidden", "ffn"),
    output(B + "ffn_down.bias", Role.BIAS, _L + "mlp.dense_4h_to_h.bias", "hidden"),
)
DEFAULTS = {
    "attention_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
}


def canonical(name: str) -> str:
    """transformers 5 has another name for the output matrix in memory than in files."""
    return name.replace("embed_out.", "lm_head.") if name.startswith("embed_out.") else name


def read(s: Settings, root: Path) -> Reading:
    """GPT-NeoX."""
    s.needs("hidden_act", GELU, "llama.cpp computes GELU for this family")
    s.needs("attention_bias", (True,), "llama.cpp has biases in this family")
    d = read_dims(s)
    square_heads(s, d)
    d = replace(d, kv_heads=d.heads)
    rope = read_rope(s, d.head, d.context, PLAIN, partial=True)
    parallel = s.flag("use_parallel_residual")
    return Reading(
        d,
        keys(d) | layer_norm(s, "layer_norm_eps") | rope.metadata | {"use_parallel_residual": parallel},
        notes=rope.notes,
        tied=s.flag("tie_word_embeddings"),
        parallel_residual=parallel,
    )


_LEFT_OUT = (INV_FREQ, "*.attention.bias", "*.attention.masked_bias", "*.attention.rotary_emb.*")
FAMILY = Family(
    "gptneox", ("GPTNeoXForCausalLM",), read, TABLE, DEFAULTS, _LEFT_OUT, head="required", canonical=canonical
)
