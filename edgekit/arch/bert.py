"""BERT encoders for embeddings: MiniLM, BGE and the like. The pooler and the pre-training heads are left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import GELU, B, keys, layer_norm, read_dims, square_heads
from edgekit.arch._family import Dims, Family, Output, Reading, output
from edgekit.arch._heads import pooling
from edgekit.arch._types import Role
from edgekit.gguf_file import MetaValue

_E, _L = "embeddings.", "encoder.layer.{l}."


def normed(name: str, source: str) -> tuple[Output, Output]:
    """A norm's weight and bias."""
    return (
        output(name + ".weight", Role.NORM, source + ".weight", "hidden"),
        output(name + ".bias", Role.NORM, source + ".bias", "hidden"),
    )


def _linear(name: str, role: Role, source: str, rows: str, cols: str) -> tuple[Output, Output]:
    return (
        output(B + name + ".weight", role, _L + source + ".weight", rows, cols),
        output(B + name + ".bias", Role.BIAS, _L + source + ".bias", rows),
    )


TABLE = (
    output("token_embd.weight", Role.EMBED, _E + "word_embeddings.weight", "vocab", "hidden"),
    output("position_embd.weight", Role.POSITION, _E + "position_embeddings.weight", "context", "hidden"),
    output("token_types.weight", Role.TOKEN_TYPE, _E + "token_type_embeddings.weight", "types", "hidden"),
    *normed("token_embd_norm", _E + "LayerNorm"),
    *_linear("attn_q", Role.ATTN_Q, "attention.self.query", "hidden", "hidden"),
    *_linear("attn_k", Role.ATTN_K, "attention.self.key", "hidden", "hidden"),
    *_linear("attn_v", Role.ATTN_V, "attention.self.value", "hidden", "hidden"),
    *_linear("attn_output", Role.ATTN_O, "attention.output.dense", "hidden", "hidden"),
    *normed(B + "attn_output_norm", _L + "attention.output.LayerNorm"),
    *_linear("ffn_up", Role.FFN_UP, "intermediate.dense", "ffn", "hidden"),
    *_linear("ffn_down", Role.FFN_DOWN, "output.dense", "hidden", "ffn"),
    *normed(B + "layer_output_norm", _L + "output.LayerNorm"),
)
DEFAULTS = {
    "hidden_act": "gelu",
    "is_decoder": False,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}


def canonical(name: str) -> str:
    """Names without the `bert.` prefix and TensorFlow's words for a norm's weight and bias."""
    name = name.removeprefix("bert.")
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def needed(s: Settings) -> None:
    """What llama.cpp's graph has built in. Raises UnsupportedModel."""
    s.needs("hidden_act", GELU, "llama.cpp computes GELU for this family")
    s.needs("is_decoder", (False,), "llama.cpp attends in both directions in this family")


def read_sizes(s: Settings) -> Dims:
    """Sizes of BERT and its kin, which has no groups of heads."""
    d = read_dims(s)
    square_heads(s, d)
    return replace(d, kv_heads=d.heads, types=s.integer("type_vocab_size"))


def metadata(s: Settings, d: Dims) -> dict[str, MetaValue]:
    """Keys of BERT and its kin, without what comes behind the last layer."""
    return keys(d) | layer_norm(s, "layer_norm_eps") | {"attention.causal": False}


def read(s: Settings, root: Path) -> Reading:
    """BERT; pooling as the files of sentence-transformers beside it say."""
    needed(s)
    d = read_sizes(s)
    return Reading(d, metadata(s, d) | pooling(root), causal=False)


_LEFT_OUT = ("embeddings.position_ids", "pooler.*", "cls.*")
FAMILY = Family(
    "bert", ("BertModel", "BertForMaskedLM"), read, TABLE, DEFAULTS, _LEFT_OUT, head="none", canonical=canonical
)
