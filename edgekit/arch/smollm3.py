"""SmolLM3: Llama with every fourth layer left unrotated."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import ENDS, GATED_FFN, INV_FREQ, NORMS, SILU, attention, keys, read_dims, rms, within_window
from edgekit.arch._family import Family, Reading
from edgekit.arch._rope import SCALED, read_rope
from edgekit.arch.llama import K, Q
from edgekit.arch.qwen2 import window

STEP = 4  # n_no_rope_layer_step, fixed in llama.cpp's graph
TABLE = (*ENDS, *NORMS, *attention(Q, K), *GATED_FFN)
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "no_rope_layer_interval": STEP,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}


def read(s: Settings, root: Path) -> Reading:
    """SmolLM3."""
    s.needs("hidden_act", SILU, "llama.cpp computes SwiGLU for this family")
    d = read_dims(s)
    rotated, every = s.numbers("no_rope_layers"), s.integer("no_rope_layer_interval")
    if rotated is None and every != STEP:
        s.refuse("no_rope_layer_interval", "llama.cpp leaves every fourth layer unrotated")
    if rotated is not None and [bool(r) for r in rotated] != [(i + 1) % STEP != 0 for i in range(d.layers)]:
        s.refuse("no_rope_layers", "llama.cpp leaves every fourth layer unrotated")
    rope = read_rope(s, d.head, d.context, SCALED)
    d, notes = within_window(s, d, window(s))
    return Reading(d, keys(d) | rms(s) | rope.metadata, notes=rope.notes + notes, tied=s.flag("tie_word_embeddings"))


FAMILY = Family("smollm3", ("SmolLM3ForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,))
