"""Gemma 1: norms multiply by one plus their weight, the output matrix is the embedding."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import ENDS, GATED_FFN, GELU, INV_FREQ, NORMS, attention, keys, read_dims, rms
from edgekit.arch._family import Family, Output, Reading, Source
from edgekit.arch._make import plus_one
from edgekit.arch._rope import PLAIN, read_rope
from edgekit.arch._types import Role


def shifted(table: tuple[Output, ...]) -> tuple[Output, ...]:
    """A table whose norms get one added: ggml multiplies by the weight itself."""
    return tuple(
        Output(o.name, o.role, tuple(Source(s.name, s.shape, plus_one) for s in o.sources), o.when)
        if o.role is Role.NORM
        else o
        for o in table
    )


TABLE = (*shifted(ENDS), *shifted(NORMS), *attention(), *GATED_FFN)
DEFAULTS = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "vocab_size": 256000,
}


def read(s: Settings, root: Path) -> Reading:
    """Gemma 1. Its first configs say `gelu` where the tanh approximation is meant."""
    for key in ("hidden_act", "hidden_activation"):
        s.needs(key, (None, *GELU), "llama.cpp computes GeGLU for this family")
    d = read_dims(s)
    rope = read_rope(s, d.head, d.context, PLAIN)
    return Reading(d, keys(d) | rms(s) | rope.metadata, notes=rope.notes, tied=s.flag("tie_word_embeddings"))


FAMILY = Family("gemma", ("GemmaForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,), head="never")
