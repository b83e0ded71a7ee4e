"""Granite 3 and 4 dense: Llama with four multipliers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekit.arch import llama
from edgekit.arch._config import Settings
from edgekit.arch._decoder import INV_FREQ
from edgekit.arch._family import Family, Reading

_SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def read(s: Settings, root: Path) -> Reading:
    """Llama's reading and the multipliers; llama.cpp takes zero for absent, so they must be above it."""
    scales = {key: s.positive(name) for name, key in _SCALES.items()}
    dense = llama.read(s, root)
    return replace(dense, metadata={**dense.metadata, **scales})


DEFAULTS = llama.DEFAULTS | dict.fromkeys(_SCALES, 1.0)
FAMILY = Family("granite", ("GraniteForCausalLM",), read, llama.TABLE, DEFAULTS, (INV_FREQ,))
