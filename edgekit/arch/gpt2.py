"""GPT-2: learned positions, and weights that transformers keeps as (in, out)."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import GELU, B, keys, layer_norm
from edgekit.arch._family import MAX_LAYERS, Dims, Family, Reading, output
from edgekit.arch._make import transposed
from edgekit.arch._types import Role

_H = "h.{l}."
TABLE = (
    output("token_embd.weight", Role.EMBED, "wte.weight", "vocab", "hidden"),
    output("position_embd.weight", Role.POSITION, "wpe.weight", "context", "hidden"),
    output("output_norm.weight", Role.NORM, "ln_f.weight", "hidden"),
    output("output_norm.bias", Role.NORM, "ln_f.bias", "hidden"),
    output("output.weight", Role.OUTPUT, "lm_head.weight", "vocab", "hidden", when="head"),
    output(B + "attn_norm.weight", Role.NORM, _H + "ln_1.weight", "hidden"),
    output(B + "attn_norm.bias", Role.NORM, _H + "ln_1.bias", "hidden"),
    output(B + "attn_qkv.weight", Role.ATTN_QKV, _H + "attn.c_attn.weight", "hidden", "qkv", make=transposed),
    output(B + "attn_qkv.bias", Role.BIAS, _H + "attn.c_attn.bias", "qkv"),
    output(B + "attn_output.weight", Role.ATTN_O, _H + "attn.c_proj.weight", "hidden", "hidden", make=transposed),
    output(B + "attn_output.bias", Role.BIAS, _H + "attn.c_proj.bias", "hidden"),
    output(B + "ffn_norm.weight", Role.NORM, _H + "ln_2.weight", "hidden"),
    output(B + "ffn_norm.bias", Role.NORM, _H + "ln_2.bias", "hidden"),
    output(B + "ffn_up.weight", Role.FFN_UP, _H + "mlp.c_fc.weight", "hidden", "ffn", make=transposed),
    output(B + "ffn_up.bias", Role.BIAS, _H + "mlp.c_fc.bias", "ffn"),
    output(B + "ffn_down.weight", Role.FFN_DOWN, _H + "mlp.c_proj.weight", "ffn", "hidden", make=transposed),
    output(B + "ffn_down.bias", Role.BIAS, _H + "mlp.c_proj.bias", "hidden"),
)
DEFAULTS = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_positions": 1024,
    "tie_word_embeddings": True,
}


def canonical(name: str) -> str:
    """Published files lack the prefix that transformers writes."""
    return name.removeprefix("transformer.")


def read(s: Settings, root: Path) -> Reading:
    """GPT-2."""
    s.needs("activation_function", GELU, "llama.cpp computes GELU for this family")
    hidden, heads = s.integer("n_embd"), s.integer("n_head")
    if hidden % heads:
        s.refuse("n_head", f"does not divide n_embd {hidden}")
    d = Dims(
        hidden=hidden,
        layers=s.integer("n_layer", high=MAX_LAYERS),
        heads=heads,
        kv_heads=heads,
        head=hidden // heads,
        ffn=s.integer("n_inner", default=4 * hidden),
        vocab=s.integer("vocab_size"),
        context=s.integer("n_positions", "n_ctx"),
    )
    return Reading(d, keys(d) | layer_norm(s, "layer_norm_epsilon"), tied=s.flag("tie_word_embeddings"))


_MASKS = ("h.*.attn.bias", "h.*.attn.masked_bias")
FAMILY = Family("gpt2", ("GPT2LMHeadModel",), read, TABLE, DEFAULTS, _MASKS, canonical=canonical)
