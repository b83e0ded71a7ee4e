"""What encoders end in: a vector, or the scores of a classifier. Knows llama.cpp's keys for them; knows no family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgekit.arch._config import Settings
from edgekit.arch._family import Output, output
from edgekit.arch._types import Role
from edgekit.classify import is_reranker, read_labels
from edgekit.embedding import read_pooling
from edgekit.errors import UnsupportedModel
from edgekit.gguf_file import MetaValue

POOLING = {"mean": 1, "cls": 2, "lasttoken": 3}
"""llama_pooling_type by the name in sentence-transformers."""

RANK = 4
"""llama_pooling_type of a model that gives scores."""

CLASSIFIER = "classifier"
"""The switch of a Reading under which there is a head that scores."""


@dataclass(frozen=True)
class Head:
    """`metadata` without the architecture's prefix; `labels`: columns of the scores, 0 for an embedding model."""

    metadata: dict[str, MetaValue]
    labels: int = 0

    @property
    def switches(self) -> frozenset[str]:
        return frozenset({CLASSIFIER} if self.labels else ())


def read_head(s: Settings, root: Path, classifier: str) -> Head:
    """Pooling as the files of sentence-transformers say; labels and scores where the config's class is `classifier`.

    Raises UnsupportedModel for pooling or modules that llama.cpp does not compute, CorruptCheckpoint.
    """
    if classifier not in (s.numbers("architectures") or ()):
        return Head(pooling(root))
    keys = ("id2label", "num_labels", "problem_type", "sentence_transformers", "sbert_ce_default_activation_function")
    config = {key: value for key in keys if (value := s.raw(key)) is not None}
    labels = read_labels(config, rerank=is_reranker(config))
    metadata: dict[str, MetaValue] = {
        "pooling_type": RANK,
        "classifier.output_labels": labels.names,
        "classifier.function": labels.function,
    }
    return Head(metadata, len(labels.names))


def pooling(root: Path) -> dict[str, MetaValue]:
    """How token vectors become one, as the files of sentence-transformers say. Empty where there are none.

    Raises UnsupportedModel for pooling or modules that llama.cpp does not compute, CorruptCheckpoint.
    """
    said = read_pooling(root)
    if not said.stated:
        return {}
    if len(said.kinds) > 1 or said.kinds[0] not in POOLING:
        raise UnsupportedModel(f"pooling {said.kind}: llama.cpp computes {', '.join(POOLING)}", "try --format onnx")
    if said.dense:
        raise UnsupportedModel("modules.json: Dense: llama.cpp computes nothing after pooling", "try --format onnx")
    if not said.include_prompt:
        raise UnsupportedModel("pooling without the prompt: llama.cpp pools every token", "try --format onnx")
    return {"pooling_type": POOLING[said.kinds[0]]}


def scored(name: str, source: str, rows: str, *, bias: bool = True) -> tuple[Output, ...]:
    """A layer of the head that scores: `cls` or `cls.output`, with its bias."""
    weight = output(f"{name}.weight", Role.OTHER, f"{source}.weight", rows, "hidden", when=CLASSIFIER)
    if not bias:
        return (weight,)
    return weight, output(f"{name}.bias", Role.BIAS, f"{source}.bias", rows, when=CLASSIFIER)
