"""Encoders as ONNX: exported, compared with transformers on other shapes than they were traced with, laid out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgekit.errors import CorruptCheckpoint, UnsupportedModel
from edgekit.export.onnx import _encoder

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
for package in ("onnx", "onnxruntime", "onnxscript", "optimum", "torch", "transformers"):
    pytest.importorskip(package)

VOCAB = 200
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "num_labels": 3,
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "camembert": {"type_vocab_size": 1},
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    "mpnet": {},
    "albert": {"embedding_size": 32},
    "electra": {"embedding_size": 32},
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA
    | {
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "modernbert": {
        "global_attn_every_n_layers": 2,
        "local_attention": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "nomic_bert": {},
    "eurobert": {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "ernie": {},
    "convbert": {},
    "roformer": {"embedding_size": 64},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}
SHAPES = ((1, 1), (1, 9), (3, 30), (4, 71))


def save(root: Path, family: str, task: str, **more: Any) -> Path:
    """A model of noise as transformers itself saves it."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForSequenceClassification
    from transformers import AutoModelForTokenClassification as Tokens

    torch.manual_seed(7)
    config = CONFIG_MAPPING[family](**(SMALL | FAMILIES[family] | more))
    classes = {"text-classification": AutoModelForSequenceClassification, "token-classification": Tokens}
    model = classes.get(task, AutoModel).from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.6, 0.3)
    model.save_pretrained(root)
    return root


def reference(root: Path, task: str) -> Callable[[dict[str, npt.NDArray[np.int64]]], npt.NDArray[np.float32]]:
    """What transformers computes, with its own choice of attention."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

    classes = {
        "text-classification": AutoModelForSequenceClassification,
        "token-classification": AutoModelForTokenClassification,
    }
    model = classes.get(task, AutoModel).from_pretrained(root, dtype=torch.float32).eval()

    def run(feeds: dict[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            found = model(**{k: torch.tensor(v) for k, v in feeds.items()})
        return np.asarray((found.last_hidden_state if task == "feature-extraction" else found.logits).numpy())

    return run


def noise(names: tuple[str, ...], batch: int, length: int, pad: int) -> dict[str, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(batch * length)
    ids = rng.integers(5, VOCAB, (batch, length))
    mask = np.ones_like(ids)
    for row in range(batch):
        mask[row, max(1, length - 4 * row) :] = 0
    ids[mask == 0] = pad
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": rng.integers(0, 2, ids.shape)}
    return {name: feeds[name] for name in names}


def difference(graph: Path, root: Path, task: str) -> float:
    """Largest, relative to the largest value, over several batches and lengths; padding does not count."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = tuple(i.name for i in session.get_inputs())
    pad = json.loads((root / "config.json").read_text()).get("pad_token_id") or 0
    run, worst = reference(root, task), 0.0
    for batch, length in SHAPES:
        feeds = noise(names, batch, length, pad)
        wanted, found = run(feeds), session.run(None, feeds)[0]
        if wanted.ndim == 3:
            wanted, found = wanted[feeds["attention_mask"] == 1], found[feeds["attention_mask"] == 1]
        worst = max(worst, float(np.abs(wanted - found).max() / np.abs(wanted).max()))
    return worst


FAST = [("bert", "feature-extraction"), ("roberta", "text-classification")]
SLOW = [(family, "feature-extraction") for family in FAMILIES if family != "bert"]
SLOW += [(f, "text-classification") for f in ("bert", "distilbert", "xlm-roberta", "deberta-v2", "modernbert")]
SLOW += [(f, "token-classification") for f in ("bert", "electra", "xlm-roberta")]


@pytest.mark.parametrize(("family", "task"), [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_graph_is_the_model(family: str, task: str, tmp_path: Path) -> None:
    root = save(tmp_path / "model", family, task)
    steps: list[int] = []
    made = _encoder.export(root, tmp_path / "out", task=task, progress=lambda _, done, total: steps.append(done))
    assert difference(made.graph, root, task) <= 1e-4
    assert made.difference <= 1e-4
    assert steps == [1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data"]
    output = {"feature-extraction": "last_hidden_state"}.get(task, "logits")
    assert made.inputs == _named(made.graph, "input")
    assert _named(made.graph, "output") == (output,)


def _named(graph: Path, side: str) -> tuple[str, ...]:
    import onnx

    return tuple(v.name for v in getattr(onnx.load(graph, load_external_data=False).graph, side))
