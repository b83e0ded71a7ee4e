"""ModernBERT encoders and rerankers: rotary positions, no biases, two layers of three attend within a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import GELU, SILU, B, keys, layer_norm, read_dims, square_heads
from edgekit.arch._family import Dims, Family, Reading, output
from edgekit.arch._heads import CLASSIFIER, read_head, scored
from edgekit.arch._rope import read_rope
from edgekit.arch._types import Role
from edgekit.gguf_file import MetaValue

_L = "layers.{l}."
TABLE = (
    output("token_embd.weight", Role.EMBED, "embeddings.tok_embeddings.weight", "vocab", "hidden"),
    output("token_embd_norm.weight", Role.NORM, "embeddings.norm.weight", "hidden"),
    output("output_norm.weight", Role.NORM, "final_norm.weight", "hidden"),
    output(B + "attn_norm.weight", Role.NORM, _L + "attn_norm.weight", "hidden", first=1),
    output(B + "attn_qkv.weight", Role.ATTN_QKV, _L + "attn.Wqkv.weight", "qkv", "hidden"),
    output(B + "attn_output.weight", Role.ATTN_O, _L + "attn.Wo.weight", "hidden", "hidden"),
    output(B + "ffn_norm.weight", Role.NORM, _L + "mlp_norm.weight", "hidden"),
    output(B + "ffn_up.weight", Role.FFN_UP, _L + "mlp.Wi.weight", "2ffn", "hidden"),
    output(B + "ffn_down.weight", Role.FFN_DOWN, _L + "mlp.Wo.weight", "hidden", "ffn"),
    *scored("cls", "head.dense", "hidden", bias=False),
    output("cls.norm.weight", Role.NORM, "head.norm.weight", "hidden", when=CLASSIFIER),
    *scored("cls.output", "classifier", "labels"),
)
DEFAULTS = {
    "classifier_activation": "gelu",
    "classifier_pooling": "cls",
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160_000.0,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "intermediate_size": 1152,
    "local_attention": 128,
    "local_rope_theta": 10_000.0,
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "vocab_size": 50368,
}
_POOLED = {"mean": 1, "cls": 2}  # llama_pooling_type of what the head that scores reads


def canonical(name: str) -> str:
    """Names without the prefix that models with a head have."""
    return name.removeprefix("model.")


def read(s: Settings, root: Path) -> Reading:
    """ModernBERT. The feed-forward block is a gated one: GELU as in the paper, SiLU in some descendants."""
    s.needs("hidden_activation", (*GELU, *SILU), "llama.cpp computes GeGLU or SwiGLU for this family")
    s.needs("norm_bias", (None, False), "llama.cpp's norms have no bias in this family")
    d = read_dims(s)
    square_heads(s, d)
    head = read_head(s, root, "ModernBertForSequenceClassification")
    d = replace(d, kv_heads=d.heads, labels=head.labels)
    window, layers = s.integer("local_attention", low=2), _windowed(s, d)
    metadata = keys(d) | layer_norm(s, "norm_eps") | {"attention.causal": False} | head.metadata
    metadata["hidden_activation"] = "silu" if s.raw("hidden_activation") in SILU else "gelu"
    metadata |= _ropes(s, d) | _window_keys(window, layers)
    if head.labels:
        metadata |= _scores(s)
    windows = tuple(window if on else None for on in layers)
    return Reading(d, metadata, head.switches, windows, causal=False)


def _windowed(s: Settings, d: Dims) -> tuple[bool, ...]:
    """Which layers attend within the window: by `layer_types`, or all but the first of every few."""
    kinds, every = s.numbers("layer_types"), s.integer("global_attn_every_n_layers")
    if kinds is None:
        return tuple(i % every != 0 for i in range(d.layers))
    if len(kinds) != d.layers or any(kind not in ("sliding_attention", "full_attention") for kind in kinds):
        s.refuse("layer_types", f"expected {d.layers} of 'sliding_attention' and 'full_attention'")
    if "full_attention" not in kinds:
        s.refuse("layer_types", "llama.cpp ends the process where every layer of this family has a window")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _window_keys(window: int, layers: tuple[bool, ...]) -> dict[str, MetaValue]:
    """The window, unless no layer has one: llama.cpp ends the process over a mask that no layer uses. The pattern only
    where it is not the one that llama.cpp assumes."""
    if not any(layers):
        return {}
    found: dict[str, MetaValue] = {"attention.sliding_window": window}
    if layers != tuple(i % 3 != 0 for i in range(len(layers))):
        found["attention.sliding_window_pattern"] = list(layers)
    return found


def _ropes(s: Settings, d: Dims) -> dict[str, MetaValue]:
    """Two bases, that of layers with a window apart; neither is scaled."""
    full = read_rope(s, d.head, d.context, {"default"}, layer="full_attention")
    read_rope(s, d.head, d.context, {"default"}, layer="sliding_attention")
    bases = {kind: _theta(s, kind, key) for kind, key in _BASES.items()}
    found: dict[str, MetaValue] = full.metadata | {"rope.scaling.type": "none"}
    return found | {"rope.freq_base": bases["full_attention"], "rope.freq_base_swa": bases["sliding_attention"]}


_BASES = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
"""Where transformers 4 keeps the base of each kind of layer, and version 5 where it keeps none of its own."""


def _theta(s: Settings, kind: str, key: str) -> float:
    nested = (s.table("rope_parameters") or {}).get(kind)
    stated = nested.get("rope_theta") if isinstance(nested, Mapping) else None
    return float(stated) if stated is not None else s.positive(key)  # read_rope has looked at it


def _scores(s: Settings) -> dict[str, MetaValue]:
    """The head that scores: pooled, a layer without bias, GELU, a norm, the labels."""
    s.needs("classifier_activation", GELU, "llama.cpp computes GELU in the head that scores")
    s.needs("classifier_bias", (None, False), "llama.cpp's head that scores has no bias here")
    s.needs("classifier_pooling", tuple(_POOLED), "llama.cpp pools no other way before the head that scores")
    return {"classifier.pooling_type": _POOLED[s.raw("classifier_pooling")]}


_LEFT_OUT = ("head.*", "decoder.*")  # of a language model; a classifier's head is in the table
FAMILY = Family(
    "modern-bert",
    ("ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification"),
    read,
    TABLE,
    DEFAULTS,
    _LEFT_OUT,
    head="none",
    canonical=canonical,
)
