"""Nomic Embed text v1 and v1.5: BERT with rotary positions, a gated feed-forward block and no biases in its layers."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import SILU, B, keys, layer_norm
from edgekit.arch._family import MAX_LAYERS, Dims, Family, Reading, output
from edgekit.arch._heads import pooling
from edgekit.arch._rope import read_rope
from edgekit.arch._types import Role
from edgekit.arch.bert import normed

_E, _L = "embeddings.", "encoder.layers.{l}."

TABLE = (
    output("token_embd.weight", Role.EMBED, _E + "word_embeddings.weight", "vocab", "hidden"),
    output("token_types.weight", Role.TOKEN_TYPE, _E + "token_type_embeddings.weight", "types", "hidden"),
    *normed("token_embd_norm", "emb_ln"),
    output(B + "attn_qkv.weight", Role.ATTN_QKV, _L + "attn.Wqkv.weight", "qkv", "hidden"),
    output(B + "attn_output.weight", Role.ATTN_O, _L + "attn.out_proj.weight", "hidden", "hidden"),
    *normed(B + "attn_output_norm", _L + "norm1"),
    output(B + "ffn_up.weight", Role.FFN_UP, _L + "mlp.fc11.weight", "ffn", "hidden"),
    output(B + "ffn_gate.weight", Role.FFN_GATE, _L + "mlp.fc12.weight", "ffn", "hidden"),
    output(B + "ffn_down.weight", Role.FFN_DOWN, _L + "mlp.fc2.weight", "hidden", "ffn"),
    *normed(B + "layer_output_norm", _L + "norm2"),
)
DEFAULTS = {"rotary_emb_base": 1000.0}
BUILT_IN: dict[str, tuple[object, ...]] = {
    "causal": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "moe_every_n_layers": (0,),
    "parallel_block": (False,),
    "prenorm": (False,),
    "qkv_proj_bias": (False,),
    "rotary_emb_fraction": (1.0,),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (),
    "rotary_scaling_factor": (),
    "use_rms_norm": (False,),
}
"""Settings of the model's own code, with what llama.cpp's graph has built in, beside null."""


def canonical(name: str) -> str:
    """Names without the prefixes that models with a head have."""
    return name.removeprefix("nomic_bert.").removeprefix("bert.")


def read(s: Settings, root: Path) -> Reading:
    """Both spellings: that of the model's own code (`n_embd`), and that of transformers 5 (`hidden_size`)."""
    for key, allowed in BUILT_IN.items():
        s.needs(key, (None, *allowed), "llama.cpp's graph for this family cannot be told otherwise")
    if s.raw("activation_function") is not None:
        s.needs("activation_function", ("swiglu",), "llama.cpp computes SwiGLU for this family")
    else:
        s.needs("hidden_act", SILU, "llama.cpp computes SwiGLU for this family")
    d = _sizes(s)
    rope = read_rope(s, d.head, d.context, {"default"})
    metadata = keys(d) | layer_norm(s, "layer_norm_eps", "layer_norm_epsilon") | {"attention.causal": False}
    return Reading(d, metadata | rope.metadata | pooling(root), causal=False)


def _sizes(s: Settings) -> Dims:
    hidden, heads = s.integer("hidden_size", "n_embd"), s.integer("num_attention_heads", "n_head")
    if s.integer("head_dim", default=hidden // heads) * heads != hidden:
        s.refuse("head_dim", f"this family's {heads} heads must make up a width of {hidden}")
    positions = s.integer("max_position_embeddings", "n_positions")
    return Dims(
        hidden=hidden,
        layers=s.integer("num_hidden_layers", "n_layer", high=MAX_LAYERS),
        heads=heads,
        kv_heads=heads,
        head=hidden // heads,
        ffn=s.integer("intermediate_size", "n_inner"),
        vocab=s.integer("vocab_size"),
        context=min(positions, s.integer("max_trained_positions", default=positions)),  # beyond, other angles
        types=s.integer("type_vocab_size"),
    )


FAMILY = Family(
    "nomic-bert",
    ("NomicBertModel", "NomicBertForMaskedLM"),
    read,
    TABLE,
    DEFAULTS,
    ("pooler.*", "cls.*"),
    head="none",
    canonical=canonical,
)
