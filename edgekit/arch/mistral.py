"""Mistral 7B and Nemo: Llama's graph. Its sliding window (7B v0.1) has no counterpart there: the context is limited."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekit.arch import llama
from edgekit.arch._config import Settings
from edgekit.arch._decoder import INV_FREQ, keys, within_window
from edgekit.arch._family import Family, Reading


def read(s: Settings, root: Path) -> Reading:
    """Llama's reading with the context cut to the window."""
    full = llama.read(s, root)
    d, notes = within_window(s, full.dims, s.optional("sliding_window"))
    return replace(full, dims=d, metadata={**full.metadata, **keys(d)}, notes=full.notes + notes)


DEFAULTS = llama.DEFAULTS | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
FAMILY = Family("llama", ("MistralForCausalLM",), read, llama.TABLE, DEFAULTS, (INV_FREQ,))
