"""Logits into scores with names: classifiers, token classifiers, rerankers. Knows config.json; knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint

Floats = npt.NDArray[np.float32]

_MAX_LABELS = 1 << 16
_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "none", "Softmax": "softmax"}
"""torch.nn modules by class name, as cross-encoders write them into config.json."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What the columns of the logits are called, and the `function` that makes scores of them: softmax, sigmoid,
    none."""

    names: tuple[str, ...]
    function: str


def read_labels(config: Mapping[str, Any], *, rerank: bool = False) -> Labels:
    """Names from `id2label`; the function as transformers' text-classification pipeline chooses it: a sigmoid for one
    label or `multi_label_classification`, nothing for `regression`, else a softmax. `rerank`: as the CrossEncoder of
    sentence-transformers does, a sigmoid for one label, else nothing, unless config.json names an activation.
    Raises CorruptCheckpoint."""
    names = _names(config)
    if rerank:
        return Labels(names, _stated(config) or ("sigmoid" if len(names) == 1 else "none"))
    kind = config.get("problem_type")
    if kind == "regression":
        return Labels(names, "none")
    return Labels(names, "sigmoid" if kind == "multi_label_classification" or len(names) == 1 else "softmax")


def _names(config: Mapping[str, Any]) -> tuple[str, ...]:
    table = config.get("id2label")
    if table is None:
        number = config.get("num_labels", 2)  # PretrainedConfig's own default
        if not isinstance(number, int) or not 1 <= number <= _MAX_LABELS:
            raise CorruptCheckpoint(f"config.json: num_labels is {number!r}")
        return tuple(f"LABEL_{i}" for i in range(number))
    if not isinstance(table, dict) or not 1 <= len(table) <= _MAX_LABELS:
        raise CorruptCheckpoint("config.json: id2label is not a table of names")
    try:
        by_id = {int(k): str(v) for k, v in table.items()}
    except ValueError:
        raise CorruptCheckpoint("config.json: id2label has a key that is no number") from None
    if sorted(by_id) != list(range(len(table))):
        raise CorruptCheckpoint(f"config.json: id2label does not number its {len(table)} names from 0 on")
    return tuple(by_id[i] for i in range(len(by_id)))


def _stated(config: Mapping[str, Any]) -> str | None:
    """The activation that a cross-encoder was saved with, in either of the places where it was kept."""
    inside = config.get("sentence_transformers")
    named = inside.get("activation_fn") if isinstance(inside, dict) else None
    named = named or config.get("sbert_ce_default_activation_function")
    return _ACTIVATIONS.get(str(named).rpartition(".")[2]) if named else None


def is_reranker(config: Mapping[str, Any]) -> bool:
    """Whether a classifier looks like one that scores a question with a document: one label, or saved as one."""
    marked = "sbert_ce_default_activation_function" in config or "sentence_transformers" in config
    return marked or len(_names(config)) == 1


def scores(logits: Floats, labels: Labels) -> Floats:
    """float32 (..., labels) -> the same shape: probabilities, or the logits themselves. Raises CorruptCheckpoint."""
    if logits.shape[-1] != len(labels.names):
        raise CorruptCheckpoint(f"the model gives {logits.shape[-1]} scores, config.json names {len(labels.names)}")
    x = logits.astype(np.float64)
    if labels.function == "sigmoid":
        x = np.exp(-np.logaddexp(0, -x))
    elif labels.function == "softmax":
        x = np.exp(x - x.max(axis=-1, keepdims=True))
        x /= x.sum(axis=-1, keepdims=True)
    return x.astype(np.float32)
