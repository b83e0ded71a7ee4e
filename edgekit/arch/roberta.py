"""RoBERTa encoders and classifiers: BERT whose positions begin behind the padding token's id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekit.arch import bert
from edgekit.arch._config import Settings
from edgekit.arch._family import Family, Output, Reading, Source
from edgekit.arch._heads import read_head, scored
from edgekit.arch._make import behind

POSITIONS = "embeddings.position_embeddings.weight"
HEAD = (*scored("cls", "classifier.dense", "hidden"), *scored("cls.output", "classifier.out_proj", "labels"))


def _behind_padding(o: Output) -> Output:
    if o.sources[0].name != POSITIONS:
        return o
    return replace(o, sources=(Source(POSITIONS, ("positions", "hidden"), behind("skipped")),))


TABLE = (*map(_behind_padding, bert.TABLE), *HEAD)
DEFAULTS = bert.DEFAULTS | {"pad_token_id": 1, "vocab_size": 50265}
LEFT_OUT = ("embeddings.position_ids", "pooler.*", "lm_head.*")


def canonical(name: str) -> str:
    """Names without the prefix that models with a head have."""
    return bert.canonical(name.removeprefix("roberta."))


def read_as(s: Settings, root: Path, classifier: str) -> Reading:
    """The first token's position is `pad_token_id` + 1 (transformers `create_position_ids_from_input_ids`): llama.cpp
    counts from 0, so the rows before are cut off. `classifier`: the class of the family that scores."""
    bert.needed(s)
    skipped = s.integer("pad_token_id", low=0) + 1
    rows = s.integer("max_position_embeddings")
    if rows <= skipped:
        s.refuse("max_position_embeddings", f"pad_token_id + 1 = {skipped} rows are before the first position")
    head = read_head(s, root, classifier)
    d = replace(bert.read_sizes(s), context=rows - skipped, skipped=skipped, labels=head.labels)
    return Reading(d, bert.metadata(s, d) | head.metadata, head.switches, causal=False)


def read(s: Settings, root: Path) -> Reading:
    """RoBERTa."""
    return read_as(s, root, "RobertaForSequenceClassification")


FAMILY = Family(
    "bert",
    ("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification"),
    read,
    TABLE,
    DEFAULTS,
    LEFT_OUT,
    head="none",
    canonical=canonical,
)
