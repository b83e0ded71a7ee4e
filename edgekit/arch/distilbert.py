"""DistilBERT encoders: BERT with half the layers, other names and no token types."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import GELU, B, keys
from edgekit.arch._family import MAX_LAYERS, Dims, Family, Output, Reading, output
from edgekit.arch._heads import pooling
from edgekit.arch._types import Role

_E, _L = "embeddings.", "transformer.layer.{l}."


def _pair(name: str, role: Role, source: str, *shape: str) -> tuple[Output, Output]:
    """A weight and its bias, which is as long as the weight has rows."""
    bias = Role.NORM if role is Role.NORM else Role.BIAS
    return output(f"{name}.weight", role, f"{source}.weight", *shape), output(
        f"{name}.bias", bias, f"{source}.bias", shape[0]
    )


TABLE = (
    output("token_embd.weight", Role.EMBED, _E + "word_embeddings.weight", "vocab", "hidden"),
    output("position_embd.weight", Role.POSITION, _E + "position_embeddings.weight", "context", "hidden"),
    *_pair("token_embd_norm", Role.NORM, _E + "LayerNorm", "hidden"),
    *_pair(B + "attn_q", Role.ATTN_Q, _L + "attention.q_lin", "hidden", "hidden"),
    *_pair(B + "attn_k", Role.ATTN_K, _L + "attention.k_lin", "hidden", "hidden"),
    *_pair(B + "attn_v", Role.ATTN_V, _L + "attention.v_lin", "hidden", "hidden"),
    *_pair(B + "attn_output", Role.ATTN_O, _L + "attention.out_lin", "hidden", "hidden"),
    *_pair(B + "attn_output_norm", Role.NORM, _L + "sa_layer_norm", "hidden"),
    *_pair(B + "ffn_up", Role.FFN_UP, _L + "ffn.lin1", "ffn", "hidden"),
    *_pair(B + "ffn_down", Role.FFN_DOWN, _L + "ffn.lin2", "hidden", "ffn"),
    *_pair(B + "layer_output_norm", Role.NORM, _L + "output_layer_norm", "hidden"),
)
DEFAULTS = {
    "activation": "gelu",
    "dim": 768,
    "hidden_dim": 3072,
    "max_position_embeddings": 512,
    "n_heads": 12,
    "n_layers": 6,
    "vocab_size": 30522,
}
EPSILON = 1e-12  # a constant of transformers' class


def canonical(name: str) -> str:
    """Names without the prefix that models with a head have."""
    return name.removeprefix("distilbert.")


def read(s: Settings, root: Path) -> Reading:
    """DistilBERT; pooling as the files of sentence-transformers beside it say."""
    s.needs("activation", GELU, "llama.cpp computes GELU for this family")
    hidden, heads = s.integer("dim"), s.integer("n_heads")
    if hidden % heads:
        s.refuse("n_heads", f"does not divide dim {hidden}")
    d = Dims(
        hidden=hidden,
        layers=s.integer("n_layers", high=MAX_LAYERS),
        heads=heads,
        kv_heads=heads,
        head=hidden // heads,
        ffn=s.integer("hidden_dim"),
        vocab=s.integer("vocab_size"),
        context=s.integer("max_position_embeddings"),
    )
    metadata = keys(d) | {"attention.layer_norm_epsilon": EPSILON, "attention.causal": False} | pooling(root)
    return Reading(d, metadata, causal=False)


_LEFT_OUT = ("vocab_transform.*", "vocab_layer_norm.*", "vocab_projector.*")
FAMILY = Family(
    "bert",
    ("DistilBertModel", "DistilBertForMaskedLM"),
    read,
    TABLE,
    DEFAULTS,
    _LEFT_OUT,
    head="none",
    canonical=canonical,
)
