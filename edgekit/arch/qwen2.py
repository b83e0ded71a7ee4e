"""Qwen 1.5, 2 and 2.5: biases on q, k and v alone."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import (
    ENDS,
    GATED_FFN,
    INV_FREQ,
    NORMS,
    SILU,
    attention,
    keys,
    qkv_bias,
    read_dims,
    rms,
    square_heads,
    within_window,
)
from edgekit.arch._family import Dims, Family, Reading
from edgekit.arch._rope import SCALED, read_rope

TABLE = (*ENDS, *NORMS, *attention(), *qkv_bias(""), *GATED_FFN)
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def window(s: Settings) -> int | None:
    """Tokens that layers with a sliding window see: the window counts only where it is switched on."""
    size, on = s.optional("sliding_window"), s.flag("use_sliding_window")
    kinds = s.numbers("layer_types")
    if not on or (kinds and "sliding_attention" not in kinds):
        return None
    return size


def rotating(s: Settings, d: Dims) -> Reading:
    """What Qwen2, Qwen3 and their mixtures share."""
    s.needs("hidden_act", SILU, "llama.cpp computes SwiGLU for this family")
    rope = read_rope(s, d.head, d.context, SCALED)
    d, notes = within_window(s, d, window(s))
    return Reading(
        d,
        keys(d) | rms(s) | rope.metadata,
        notes=rope.notes + notes,
        tied=s.flag("tie_word_embeddings"),
    )


def read(s: Settings, root: Path) -> Reading:
    """Qwen2. transformers does not look at attention_bias here: the biases are a part of the family."""
    s.raw("attention_bias")
    d = read_dims(s)
    square_heads(s, d)
    return rotating(s, d)


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,))
