"""XLM-RoBERTa encoders and rerankers: BGE-M3, multilingual E5, BGE reranker v2. RoBERTa with a Unigram vocabulary."""

from __future__ import annotations

from pathlib import Path

from edgekit.arch import roberta
from edgekit.arch._config import Settings
from edgekit.arch._family import Family, Reading


def read(s: Settings, root: Path) -> Reading:
    """XLM-RoBERTa. `lora_adaptations` and the like belong to models that only share its class name."""
    for key in ("lora_adaptations", "load_trained_adapters"):
        s.needs(key, (None, False), "adapters inside the model are not merged")
    return roberta.read_as(s, root, "XLMRobertaForSequenceClassification")


FAMILY = Family(
    "bert",
    ("XLMRobertaModel", "XLMRobertaForMaskedLM", "XLMRobertaForSequenceClassification"),
    read,
    roberta.TABLE,
    roberta.DEFAULTS | {"vocab_size": 30522},
    roberta.LEFT_OUT,
    head="none",
    canonical=roberta.canonical,
)
