"""What the descendants of Llama have in common: table rows and keys. Knows transformers' names for them."""

from __future__ import annotations

from dataclasses import replace

from edgekit.arch._config import Settings
from edgekit.arch._family import MAX_LAYERS, Dims, Output, Source, output
from edgekit.arch._make import Maker, as_is, part, stacked
from edgekit.arch._types import Role
from edgekit.gguf_file import MetaValue

SILU = ("silu", "swish")
GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""ggml computes all of these with its one tanh approximation, off a float16 table (`ggml_vec_gelu_f32`): the distance
between the exact and the approximate function is below that table's rounding."""

INV_FREQ = "*.rotary_emb.inv_freq"

L = "model.layers.{l}."
B = "blk.{l}."

ENDS = (
    output("token_embd.weight", Role.EMBED, "model.embed_tokens.weight", "vocab", "hidden"),
    output("output_norm.weight", Role.NORM, "model.norm.weight", "hidden"),
    output("output.weight", Role.OUTPUT, "lm_head.weight", "vocab", "hidden", when="head"),
)
NORMS = (
    output(B + "attn_norm.weight", Role.NORM, L + "input_layernorm.weight", "hidden"),
    output(B + "ffn_norm.weight", Role.NORM, L + "post_attention_layernorm.weight", "hidden"),
)
GATED_FFN = (
    output(B + "ffn_gate.weight", Role.FFN_GATE, L + "mlp.gate_proj.weight", "ffn", "hidden"),
    output(B + "ffn_up.weight", Role.FFN_UP, L + "mlp.up_proj.weight", "ffn", "hidden"),
    output(B + "ffn_down.weight", Role.FFN_DOWN, L + "mlp.down_proj.weight", "hidden", "ffn"),
)
GATED_FFN_BIAS = (
    output(B + "ffn_gate.bias", Role.BIAS, L + "mlp.gate_proj.bias", "ffn", when="mlp_bias"),
    output(B + "ffn_up.bias", Role.BIAS, L + "mlp.up_proj.bias", "ffn", when="mlp_bias"),
    output(B + "ffn_down.bias", Role.BIAS, L + "mlp.down_proj.bias", "hidden", when="mlp_bias"),
)
QK_NORMS = (
    output(B + "attn_q_norm.weight", Role.NORM, L + "self_attn.q_norm.weight", "head"),
    output(B + "attn_k_norm.weight", Role.NORM, L + "self_attn.k_norm.weight", "head"),
)
COPIED_HEAD = (
    output("output.weight", Role.OUTPUT, "model.embed_tokens.weight", "vocab", "hidden", when="copied_head"),
)


def attention(q: Maker = as_is, k: Maker = as_is) -> tuple[Output, ...]:
    """Separate projections; `q` and `k` re-order rows where the runtime rotates other pairs of values."""
    return (
        output(B + "attn_q.weight", Role.ATTN_Q, L + "self_attn.q_proj.weight", "q", "hidden", make=q),
        output(B + "attn_k.weight", Role.ATTN_K, L + "self_attn.k_proj.weight", "kv", "hidden", make=k),
        output(B + "attn_v.weight", Role.ATTN_V, L + "self_attn.v_proj.weight", "kv", "hidden"),
        output(B + "attn_output.weight", Role.ATTN_O, L + "self_attn.o_proj.weight", "hidden", "q"),
    )


def qkv_bias(when: str, q: Maker = as_is, k: Maker = as_is) -> tuple[Output, ...]:
    """Biases of the three projections."""
    return (
        output(B + "attn_q.bias", Role.BIAS, L + "self_attn.q_proj.bias", "q", make=q, when=when),
        output(B + "attn_k.bias", Role.BIAS, L + "self_attn.k_proj.bias", "kv", make=k, when=when),
        output(B + "attn_v.bias", Role.BIAS, L + "self_attn.v_proj.bias", "kv", when=when),
    )


def experts(block: str, gate: str, up: str, down: str, ffn: str) -> tuple[Output, ...]:
    """Stacked experts, from one tensor an expert or from transformers 5's fused 3-D tensors.

    `block` is the module in a per-expert checkpoint; fused ones always sit in `mlp`.
    """
    one, fused = L + block + ".experts.{e}.", L + "mlp.experts."
    both = fused + "gate_up_proj"
    wide = ("experts", "2" + ffn, "hidden")
    return (
        Output(
            B + "ffn_gate_exps.weight",
            Role.FFN_GATE,
            (Source(one + gate + ".weight", (ffn, "hidden"), stacked), Source(both, wide, part(0, 2))),
        ),
        Output(
            B + "ffn_up_exps.weight",
            Role.FFN_UP,
            (Source(one + up + ".weight", (ffn, "hidden"), stacked), Source(both, wide, part(1, 2))),
        ),
        Output(
            B + "ffn_down_exps.weight",
            Role.FFN_DOWN,
            (
                Source(one + down + ".weight", ("hidden", ffn), stacked),
                Source(fused + "down_proj", ("experts", "hidden", ffn)),
            ),
        ),
    )


def read_dims(s: Settings) -> Dims:
    """Sizes under the names that most families use."""
    hidden, heads = s.integer("hidden_size"), s.integer("num_attention_heads")
    head = s.optional("head_dim")
    if head is None:
        if hidden % heads:
            s.refuse("num_attention_heads", f"does not divide hidden_size {hidden}, and there is no head_dim")
        head = hidden // heads
    kv_heads = s.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        s.refuse("num_key_value_heads", f"does not divide num_attention_heads {heads}")
    return Dims(
        hidden=hidden,
        layers=s.integer("num_hidden_layers", high=MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        ffn=s.integer("intermediate_size"),
        vocab=s.integer("vocab_size"),
        context=s.integer("max_position_embeddings"),
    )


def square_heads(s: Settings, d: Dims) -> None:
    """Refuse a head width that llama.cpp's graph for the family cannot have. Raises UnsupportedModel."""
    if d.head * d.heads != d.hidden:
        s.refuse("head_dim", f"this family's heads ({d.heads} of {d.head}) must make up hidden_size {d.hidden}")


def within_window(s: Settings, d: Dims, window: int | None) -> tuple[Dims, tuple[str, ...]]:
    """For a graph without sliding windows: the context up to which full attention is the same thing, and a note."""
    if window is None or window >= d.context:
        return d, ()
    note = (
        f"the model attends to the last {window} tokens, llama.cpp's graph for it to all: they are the same up to a "
        f"context of {window}, which is set instead of {d.context}"
    )
    return replace(d, context=window), (note,)


def keys(d: Dims) -> dict[str, MetaValue]:
    """Sizes as every architecture spells them in a GGUF."""
    return {
        "block_count": d.layers,
        "context_length": d.context,
        "embedding_length": d.hidden,
        "feed_forward_length": d.ffn,
        "attention.head_count": d.heads,
        "attention.head_count_kv": d.kv_heads,
        "attention.key_length": d.head,
        "attention.value_length": d.head,
        "vocab_size": d.vocab,
    }


def rms(s: Settings) -> dict[str, MetaValue]:
    """RMSNorm's epsilon."""
    return {"attention.layer_norm_rms_epsilon": s.positive("rms_norm_eps")}


def layer_norm(s: Settings, *names: str) -> dict[str, MetaValue]:
    """LayerNorm's epsilon."""
    return {"attention.layer_norm_epsilon": s.positive(*names)}


def expert_keys(d: Dims) -> dict[str, MetaValue]:
    """Numbers of experts."""
    return {"expert_count": d.experts, "expert_used_count": d.experts_used}


def switches(s: Settings, *flags: str) -> frozenset[str]:
    """Those of `flags` that the config sets."""
    return frozenset(flag for flag in flags if s.flag(flag))
