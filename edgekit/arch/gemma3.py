"""Gemma 3 with vision: the text model inside. The vision tower and the projector are left out."""

from __future__ import annotations

from edgekit.arch import gemma3_text
from edgekit.arch._decoder import INV_FREQ
from edgekit.arch._family import Family


def canonical(name: str) -> str:
    """Names of the text model alone; transformers 4 and 5 nest it differently."""
    for old, new in (
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


FAMILY = Family(
    "gemma3",
    ("Gemma3ForConditionalGeneration",),
    gemma3_text.read,
    gemma3_text.TABLE,
    gemma3_text.DEFAULTS,
    (INV_FREQ, "vision_tower.*", "multi_modal_projector.*"),
    section="text_config",
    canonical=canonical,
)
