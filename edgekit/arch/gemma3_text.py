"""Gemma 3, text: five layers with a sliding window and a rope base of their own to each one without."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch import gemma2
from edgekit.arch._config import Settings
from edgekit.arch._decoder import ENDS, GATED_FFN, GELU, INV_FREQ, QK_NORMS, attention, keys, read_dims, rms
from edgekit.arch._family import Dims, Family, Reading
from edgekit.arch._rope import Rope, parameters, read_rope
from edgekit.arch.gemma import shifted
from edgekit.gguf_file import MetaValue

TABLE = (*shifted(ENDS), *shifted(gemma2.FOUR_NORMS), *shifted(QK_NORMS), *attention(), *GATED_FFN)
DEFAULTS = gemma2.DEFAULTS | {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 131072,
    "num_hidden_layers": 26,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1e6,
    "vocab_size": 262208,
}


def read(s: Settings, root: Path) -> Reading:
    """Gemma 3's text model."""
    s.needs("hidden_activation", GELU, "llama.cpp computes GeGLU for this family")
    d = read_dims(s)
    gemma2.scaled_as_built_in(s, d, 62)
    every = s.integer("sliding_window_pattern", "_sliding_window_pattern", default=6)
    layers = gemma2.windowed(s, d, every)
    rope, window, swa = _full_rope(s, d), s.optional("sliding_window"), {}
    if any(layers):
        if window is None:
            s.refuse("sliding_window", "some layers are to have one")
        swa = gemma2.window_keys(window, layers, 6) | {"rope.freq_base_swa": _local_theta(s, d)}
    return Reading(
        d,
        keys(d) | rms(s) | rope.metadata | swa | _final_cap(s),
        windows=tuple(window if on else None for on in layers),
        notes=rope.notes,
        tied=s.flag("tie_word_embeddings"),
    )


def _full_rope(s: Settings, d: Dims) -> Rope:
    """Layers without a window; llama.cpp applies linear scaling to these alone, as the model does."""
    return read_rope(s, d.head, d.context, {"default", "linear"}, layer="full_attention")


def _local_theta(s: Settings, d: Dims) -> float:
    """Rope base of layers with a window: never scaled."""
    nested = s.table("rope_parameters") or {}
    if "sliding_attention" not in nested:
        return s.positive("rope_local_base_freq")
    if not parameters(s, "sliding_attention"):
        s.refuse("rope_parameters", "nothing on sliding_attention")
    return read_rope(s, d.head, d.context, {"default"}, layer="sliding_attention").theta


def _final_cap(s: Settings) -> dict[str, MetaValue]:
    cap = s.raw("final_logit_softcapping")
    return {} if not cap else {"final_logit_softcapping": s.positive("final_logit_softcapping")}


FAMILY = Family("gemma3", ("Gemma3ForCausalLM",), read, TABLE, DEFAULTS, (INV_FREQ,))
