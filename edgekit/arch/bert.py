"""BERT encoders for embeddings: MiniLM, BGE and the like. The pooler and the pre-training heads are left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from edgekit.arch._config import Settings
from edgekit.arch._decoder import GELU, B, keys, layer_norm, read_dims, square_heads
from edgekit.arch._family import Family, Output, Reading, output
from edgekit.arch._types import Role
from edgekit.errors import CorruptCheckpoint, UnsupportedModel
from edgekit.gguf_file import MetaValue

_E, _L = "embeddings.", "encoder.layer.{l}."


def _normed(name: str, source: str) -> tuple[Output, Output]:
    return (
        output(name + ".weight", Role.NORM, source + ".weight", "hidden"),
        output(name + ".bias", Role.NORM, source + ".bias", "hidden"),
    )


def _linear(name: str, role: Role, source: str, rows: str, cols: str) -> tuple[Output, Output]:
    return (
        output(B + name + ".weight", role, _L + source + ".weight", rows, cols),
        output(B + name + ".bias", Role.BIAS, _L + source + ".bias", rows),
    )


TABLE = (
    output("token_embd.weight", Role.EMBED, _E + "word_embeddings.weight", "vocab", "hidden"),
    output("position_embd.weight", Role.POSITION, _E + "position_embeddings.weight", "context", "hidden"),
    output("token_types.weight", Role.TOKEN_TYPE, _E + "token_type_embeddings.weight", "types", "hidden"),
    *_normed("token_embd_norm", _E + "LayerNorm"),
    *_linear("attn_q", Role.ATTN_Q, "attention.self.query", "hidden", "hidden"),
    *_linear("attn_k", Role.ATTN_K, "attention.self.key", "hidden", "hidden"),
    *_linear("attn_v", Role.ATTN_V, "attention.self.value", "hidden", "hidden"),
    *_linear("attn_output", Role.ATTN_O, "attention.output.dense", "hidden", "hidden"),
    *_normed(B + "attn_output_norm", _L + "attention.output.LayerNorm"),
    *_linear("ffn_up", Role.FFN_UP, "intermediate.dense", "ffn", "hidden"),
    *_linear("ffn_down", Role.FFN_DOWN, "output.dense", "hidden", "ffn"),
    *_normed(B + "layer_output_norm", _L + "output.LayerNorm"),
)
DEFAULTS = {
    "hidden_act": "gelu",
    "is_decoder": False,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}

POOLING = {"mean": 1, "cls": 2, "lasttoken": 3}
"""llama_pooling_type by the name in sentence-transformers."""
_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
_HARMLESS_MODULES = ("Transformer", "Pooling", "Normalize")
_MAX_JSON = 1 << 20


def canonical(name: str) -> str:
    """Names without the `bert.` prefix and TensorFlow's words for a norm's weight and bias."""
    name = name.removeprefix("bert.")
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def read(s: Settings, root: Path) -> Reading:
    """BERT; pooling as the files of sentence-transformers beside it say."""
    s.needs("hidden_act", GELU, "llama.cpp computes GELU for this family")
    s.needs("is_decoder", (False,), "llama.cpp attends in both directions in this family")
    d = read_dims(s)
    square_heads(s, d)
    d = replace(d, kv_heads=d.heads, types=s.integer("type_vocab_size"))
    metadata = keys(d) | layer_norm(s, "layer_norm_eps") | {"attention.causal": False} | pooling(root)
    return Reading(d, metadata, causal=False)


def pooling(root: Path) -> dict[str, MetaValue]:
    """How token vectors become one: `modules.json` names the folder, else it is `1_Pooling`. Empty if neither is there.

    Raises UnsupportedModel for pooling or modules that llama.cpp does not compute, CorruptCheckpoint.
    """
    folder = "1_Pooling"
    if (modules := _json(root / "modules.json")) is not None:
        folder = _pooling_folder(modules)
    config = _json(root / folder / "config.json") if folder else None
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise CorruptCheckpoint(f"{root / folder / 'config.json'} is not an object")
    chosen = {key for key, on in config.items() if key.startswith("pooling_mode_") and on}
    name = config.get("pooling_mode") or _FLAGS.get(next(iter(chosen), ""))
    if len(chosen) > 1 or not isinstance(name, str) or name not in POOLING:
        raise UnsupportedModel(f"pooling {sorted(chosen) or name!r}: llama.cpp computes {', '.join(POOLING)}")
    return {"pooling_type": POOLING[name]}


def _pooling_folder(modules: Any) -> str:
    """The folder of the Pooling module, within the model's own. Raises UnsupportedModel, CorruptCheckpoint."""
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise CorruptCheckpoint("modules.json is not a list of objects")
    folder = ""
    for module in modules:
        kind, path = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        if kind not in _HARMLESS_MODULES:
            raise UnsupportedModel(f"modules.json: module {kind or '?'!r}: llama.cpp computes nothing after pooling")
        if kind == "Pooling":
            folder = path
    if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts or "\\" in folder:
        raise CorruptCheckpoint(f"modules.json: path {folder!r} points out of the model's folder")
    return folder


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_JSON:
        raise CorruptCheckpoint(f"{path}: more than {_MAX_JSON} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise CorruptCheckpoint(f"{path}: not JSON: {e}") from None


_LEFT_OUT = ("embeddings.position_ids", "pooler.*", "cls.*")
FAMILY = Family(
    "bert", ("BertModel", "BertForMaskedLM"), read, TABLE, DEFAULTS, _LEFT_OUT, head="none", canonical=canonical
)
