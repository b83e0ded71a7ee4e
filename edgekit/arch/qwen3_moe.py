"""Qwen3 mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekit.arch import qwen2
from edgekit.arch._config import Settings
from edgekit.arch._decoder import ENDS, INV_FREQ, NORMS, QK_NORMS, attention, expert_keys, read_dims
from edgekit.arch._family import Family, Reading
from edgekit.arch.qwen2_moe import ROUTED, SPARSE, routed

TABLE = (*ENDS, *NORMS, *attention(), *QK_NORMS, *ROUTED)


def read(s: Settings, root: Path) -> Reading:
    """Qwen3-MoE: the chosen experts' weights sum to one."""
    s.needs("norm_topk_prob", (True,), "llama.cpp scales the chosen experts' weights to sum to one in this family")
    dense = qwen2.rotating(s, routed(s, read_dims(s)))
    d = dense.dims
    sizes = {"expert_feed_forward_length": d.expert_ffn}
    return replace(dense, metadata={**dense.metadata, **expert_keys(d), **sizes})


DEFAULTS = qwen2.DEFAULTS | SPARSE | {"num_key_value_heads": 4}
FAMILY = Family("qwen3moe", ("Qwen3MoeForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,))
