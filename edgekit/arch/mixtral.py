"""Mixtral: Mistral with a mixture of experts, in Llama's graph (top-k of the softmax, scaled to sum to one)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekit.arch import llama, mistral
from edgekit.arch._config import Settings
from edgekit.arch._decoder import ENDS, INV_FREQ, NORMS, B, L, expert_keys, experts
from edgekit.arch._family import MAX_EXPERTS, Family, Output, Reading, Source
from edgekit.arch._types import Role

_ROUTER = ("experts", "hidden")
TABLE = (
    *ENDS,
    *NORMS,
    *llama.ATTENTION,
    Output(
        B + "ffn_gate_inp.weight",
        Role.ROUTER,
        (Source(L + "block_sparse_moe.gate.weight", _ROUTER), Source(L + "mlp.gate.weight", _ROUTER)),
    ),
    *experts("block_sparse_moe", gate="w1", up="w3", down="w2", ffn="ffn"),
)


def read(s: Settings, root: Path) -> Reading:
    """Mistral's reading and the experts."""
    dense = mistral.read(s, root)
    count = s.integer("num_local_experts", high=MAX_EXPERTS)
    d = replace(dense.dims, experts=count, experts_used=s.integer("num_experts_per_tok", high=count))
    return replace(dense, dims=d, metadata={**dense.metadata, **expert_keys(d)})


_DEFAULTS = llama.DEFAULTS | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
FAMILY = Family("llama", ("MixtralForCausalLM",), read, TABLE, _DEFAULTS, (INV_FREQ,))
