"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, LongRoPE, a part of each head rotated."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._decoder import (
    ENDS,
    INV_FREQ,
    NORMS,
    SILU,
    B,
    L,
    keys,
    read_dims,
    rms,
    square_heads,
    within_window,
)
from edgekit.arch._family import Family, Reading, output
from edgekit.arch._rope import read_rope
from edgekit.arch._types import Role

TABLE = (
    *ENDS,
    *NORMS,
    output(B + "attn_qkv.weight", Role.ATTN_QKV, L + "self_attn.qkv_proj.weight", "qkv", "hidden"),
    output(B + "attn_output.weight", Role.ATTN_O, L + "self_attn.o_proj.weight", "hidden", "q"),
    output(B + "ffn_up.weight", Role.FFN_UP, L + "mlp.gate_up_proj.weight", "2ffn", "hidden"),
    output(B + "ffn_down.weight", Role.FFN_DOWN, L + "mlp.down_proj.weight", "hidden", "ffn"),
)
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def read(s: Settings, root: Path) -> Reading:
    """Phi-3. Early configs call LongRoPE `su` or `yarn`."""
    s.needs("hidden_act", SILU, "llama.cpp computes SwiGLU for this family")
    d = read_dims(s)
    square_heads(s, d)
    rope = read_rope(s, d.head, d.context, {"default", "longrope"}, partial=True, aliases={"yarn": "longrope"})
    original = s.integer("original_max_position_embeddings")
    notes = rope.notes
    if rope.tensors:
        notes += (
            f"opened for more than {original} tokens, llama.cpp uses LongRoPE's long factors for short texts too",
        )
    window = s.optional("sliding_window")
    d, cut = within_window(s, d, window)
    own = {"rope.scaling.original_context_length": original, "attention.sliding_window": window or 0}
    return Reading(
        d,
        keys(d) | rms(s) | own | rope.metadata,
        extra=rope.tensors,
        notes=notes + cut,
        tied=s.flag("tie_word_embeddings"),
    )


FAMILY = Family("phi3", ("Phi3ForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,))
