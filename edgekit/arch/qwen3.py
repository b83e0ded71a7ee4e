"""Qwen3: no biases, and each head of q and k is normed."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch import qwen2
from edgekit.arch._config import Settings
from edgekit.arch._decoder import ENDS, GATED_FFN, INV_FREQ, NORMS, QK_NORMS, attention, read_dims
from edgekit.arch._family import Family, Reading

TABLE = (*ENDS, *NORMS, *attention(), *QK_NORMS, *GATED_FFN)
DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


def read(s: Settings, root: Path) -> Reading:
    """Qwen3."""
    return qwen2.rotating(s, read_dims(s))


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,))
