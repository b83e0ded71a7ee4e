"""Qwen1.5-MoE and Qwen2-MoE: routed experts, and one that every token passes, behind a gate of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekit.arch import qwen2
from edgekit.arch._config import Settings
from edgekit.arch._decoder import (
    COPIED_HEAD,
    ENDS,
    INV_FREQ,
    NORMS,
    B,
    L,
    attention,
    expert_keys,
    experts,
    qkv_bias,
    read_dims,
    square_heads,
    switches,
)
from edgekit.arch._family import MAX_EXPERTS, Dims, Family, Reading, output
from edgekit.arch._types import Role

_SHARED = L + "mlp.shared_expert."
ROUTED = (
    output(B + "ffn_gate_inp.weight", Role.ROUTER, L + "mlp.gate.weight", "experts", "hidden"),
    *experts("mlp", gate="gate_proj", up="up_proj", down="down_proj", ffn="expert_ffn"),
)
SHARED = (
    output(B + "ffn_gate_inp_shexp.weight", Role.ROUTER, L + "mlp.shared_expert_gate.weight", 1, "hidden"),
    output(B + "ffn_gate_shexp.weight", Role.FFN_GATE, _SHARED + "gate_proj.weight", "shared", "hidden"),
    output(B + "ffn_up_shexp.weight", Role.FFN_UP, _SHARED + "up_proj.weight", "shared", "hidden"),
    output(B + "ffn_down_shexp.weight", Role.FFN_DOWN, _SHARED + "down_proj.weight", "hidden", "shared"),
)
TABLE = (*ENDS, *COPIED_HEAD, *NORMS, *attention(), *qkv_bias("qkv_bias"), *ROUTED, *SHARED)


def routed(s: Settings, d: Dims) -> Dims:
    """Sizes of the experts; llama.cpp has them in every layer. Raises UnsupportedModel."""
    s.needs("decoder_sparse_step", (1,), "llama.cpp has experts in every layer")
    s.needs("mlp_only_layers", ([],), "llama.cpp has experts in every layer")
    count = s.integer("num_experts", "num_local_experts", high=MAX_EXPERTS)
    used = s.integer("num_experts_per_tok", high=count)
    return replace(d, experts=count, experts_used=used, expert_ffn=s.integer("moe_intermediate_size"))


def read(s: Settings, root: Path) -> Reading:
    """Qwen2-MoE: the gates' softmax is not scaled back to one after the choice."""
    s.needs("norm_topk_prob", (False,), "llama.cpp leaves the chosen experts' weights as they are in this family")
    d = routed(s, read_dims(s))
    square_heads(s, d)
    dense = qwen2.rotating(s, replace(d, shared=s.integer("shared_expert_intermediate_size")))
    d = dense.dims
    sizes = {"expert_feed_forward_length": d.expert_ffn, "expert_shared_feed_forward_length": d.shared}
    return replace(dense, metadata={**dense.metadata, **expert_keys(d), **sizes}, switches=switches(s, "qkv_bias"))


SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False}
DEFAULTS = (
    qwen2.DEFAULTS
    | SPARSE
    | {"num_key_value_heads": 16, "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4}
    | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
)
FAMILY = Family("qwen2moe", ("Qwen2MoeForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,), head="required")
