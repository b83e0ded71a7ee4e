"""How token vectors become the vector of a text, as the files of sentence-transformers beside a model say.

Reads those files with suspicion; pools, projects and normalises arrays. Knows no engine and no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint, UnknownName, UnsupportedModel
from edgekit.safetensors_file import open_safetensors

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.int64]

KINDS = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean")
"""Names of sentence-transformers' Pooling module."""

_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The older switches, in the order in which several of them are put side by side."""

FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""What sentence-transformers keeps at the top of a model's folder, beside the folders that modules.json names."""

_MAX_JSON = 1 << 20
_MAX_PROMPTS, _MAX_PROMPT = 256, 1 << 16
_MAX_WIDTH = 1 << 16
_MAX_LENGTH = 1 << 24
_TINY = 1e-12  # the floor of a norm in torch.nn.functional.normalize


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A layer behind the pooling: `activation` of x · weightᵀ + bias. float32 (out, in), (out,)."""

    weight: Floats
    bias: Floats | None
    activation: str


@dataclass(frozen=True, slots=True)
class Pooling:
    """One vector from many. `kinds`: of KINDS, put side by side if more than one. `max_length`: tokens of a text,
    special ones included; None: nobody says. `prompts`: texts put in front, by name; `default_prompt`: the name that
    applies unless another is given. `include_prompt` False: its tokens are read but not pooled. `lower`: texts are
    lower-cased first. `stated`: the model's folder says so; else these are sentence-transformers' defaults.
    """

    kinds: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_length: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    include_prompt: bool = True
    dense: tuple[Dense, ...] = ()
    lower: bool = False
    stated: bool = False

    @property
    def kind(self) -> str:
        """`mean`; several are written `cls+mean`."""
        return "+".join(self.kinds)

    def prompt(self, prompt: str | None = None, prompt_name: str | None = None) -> str:
        """The text that goes in front: `prompt` itself, the one called `prompt_name`, or the default. UnknownName."""
        if prompt is not None:
            return prompt
        name = prompt_name if prompt_name is not None else self.default_prompt
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none; give the text itself with prompt="
            raise UnknownName(f"the model has no prompt called {name!r}", f"known: {known}")
        return self.prompts[name]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_pooling(root: Path) -> Pooling:
    """What the files in `root` say; what they leave open is what sentence-transformers does with such a model.

    Raises UnsupportedModel for a module that is not known, CorruptCheckpoint for damaged or hostile files.
    """
    modules = _modules(root)
    paths = dict(modules)
    config = _object(root, "config.json") or {}
    folder = paths.get("Pooling", "1_Pooling" if not modules else "")
    pooled = _object(root, f"{folder}/config.json") if folder else None
    if pooled is None and "Pooling" in paths:
        raise CorruptCheckpoint(f"{root}: modules.json names {folder}/config.json, which is missing", "fetch it again")
    said = _object(root, "sentence_bert_config.json") or {}
    prompts, default = _prompts(root)
    return Pooling(
        kinds=_kinds(pooled) if pooled is not None else _default_kinds(config),
        normalize="Normalize" in paths,
        max_length=_max_length(root, said, config),
        prompts=prompts,
        default_prompt=default,
        include_prompt=bool((pooled or {}).get("include_prompt", True)),
        dense=tuple(_dense(root, path) for kind, path in modules if kind == "Dense"),
        lower=said.get("do_lower_case") is True,
        stated=bool(modules) or pooled is not None,
    )


def _modules(root: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module, in order. Empty without modules.json."""
    listed = _json(root, "modules.json")
    if listed is None:
        return []
    if not isinstance(listed, list) or not listed or not all(isinstance(m, dict) for m in listed):
        raise CorruptCheckpoint(f"{root / 'modules.json'} is not a list of objects")
    out = [(str(m.get("type", "")).rpartition(".")[2], str(m.get("path", ""))) for m in listed]
    kinds = [kind for kind, _ in out]
    for kind, path in out:
        if kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
            raise UnsupportedModel(
                f"modules.json: module {kind or '?'!r} is not known", "known: Pooling, Dense, Normalize"
            )
        _must_stay(path)
    order = [k for k in kinds if k != "Dense"]
    if order not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or "Dense" in kinds[:2]:
        raise UnsupportedModel(
            f"modules.json: {', '.join(kinds)}: the order Transformer, Pooling, Dense, Normalize is known"
        )
    if "Normalize" in kinds and kinds[-1] != "Normalize":
        raise UnsupportedModel("modules.json: Dense behind Normalize is not known")
    if out[0][1] not in ("", "."):
        raise UnsupportedModel(f"modules.json: the transformer is in {out[0][1]!r}", "name that folder as the model")
    return out


def files_of(root: Path) -> tuple[str, ...]:
    """Names of the files in `root` that `read_pooling` reads beside config and tokenizer: what an artefact has to keep.

    Raises as `read_pooling`.
    """
    listed = _modules(root)
    folders = [path for _, path in listed[1:]] if listed else ["1_Pooling"]
    inner = [f"{folder}/{name}" for folder in folders for name in ("config.json", "model.safetensors")]
    return tuple(name for name in (*FILES, *inner) if (root / name).is_file())


def _must_stay(path: str) -> None:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path or "\0" in path:
        raise CorruptCheckpoint(f"modules.json: path {path!r} points out of the model's folder")


def _kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for flag, name in _FLAGS.items() if config.get(flag)] or ["mean"]
        unknown = [k for k, on in config.items() if k.startswith("pooling_mode_") and on and k not in _FLAGS]
        if unknown:
            raise UnsupportedModel(f"pooling {unknown[0]!r} is not known", f"known: {', '.join(_FLAGS)}")
    kinds = [mode] if isinstance(mode, str) else mode
    if not isinstance(kinds, list) or not 1 <= len(kinds) <= len(KINDS) or not all(k in KINDS for k in kinds):
        raise UnsupportedModel(f"pooling {mode!r} is not known", f"known: {', '.join(KINDS)}")
    return tuple(kinds)


def _default_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The mean; the last token of a decoder (sentence-transformers: SentenceTransformer._load_default_modules)."""
    named = config.get("architectures")
    decoder = isinstance(named, list) and bool(named) and str(named[0]).endswith("ForCausalLM")
    return ("lasttoken",) if decoder and config.get("is_causal", True) else ("mean",)


def _max_length(root: Path, said: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """`max_seq_length`, else the tokenizer's limit; never more than there are positions."""
    stated = _count(said.get("max_seq_length"), "sentence_bert_config.json: max_seq_length")
    limits = [stated]
    if stated is None:
        told = (_object(root, "tokenizer_config.json") or {}).get("model_max_length")
        limits = [int(told)] if isinstance(told, int | float) and 0 < told <= _MAX_LENGTH else []
    if stated is None or not _relative(config):
        limits.append(positions(config))
    return min((n for n in limits if n), default=None)


_OFFSET = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text", "longformer", "ibert")
"""Families whose positions start behind the padding token's id (create_position_ids_from_input_ids)."""


def positions(config: Mapping[str, Any]) -> int | None:
    """The tokens that a model has positions for, special ones included; None if its config does not say."""
    rows = _count(config.get("max_position_embeddings"), "config.json: max_position_embeddings", least=-1)
    if rows is None or rows <= 0:
        return None
    if config.get("model_type") not in _OFFSET:
        return rows
    pad = config.get("pad_token_id", 1)
    return max(1, rows - 1 - pad) if isinstance(pad, int) and 0 <= pad < rows else rows


def _relative(config: Mapping[str, Any]) -> bool:
    """Whether positions are only differences, so that a longer text has them too."""
    keys = ("rope_theta", "rope_parameters", "global_rope_theta", "rotary_emb_base", "relative_attention")
    return any(config.get(key) for key in keys)


def _count(value: object, what: str, least: int = 1) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MAX_LENGTH:
        raise CorruptCheckpoint(f"{what} is {value!r}, not a number of tokens")
    return value


def _prompts(root: Path) -> tuple[dict[str, str], str | None]:
    said = _object(root, "config_sentence_transformers.json") or {}
    prompts, default = said.get("prompts") or {}, said.get("default_prompt_name")
    sound = isinstance(prompts, dict) and len(prompts) <= _MAX_PROMPTS
    prompts = {k: v or "" for k, v in prompts.items()} if sound else {}
    if not sound or not all(isinstance(v, str) and len(v) <= _MAX_PROMPT for v in prompts.values()):
        raise CorruptCheckpoint(f"{root / FILES[2]}: prompts is not a table of at most {_MAX_PROMPTS} short texts")
    if default is not None and default not in prompts:
        raise CorruptCheckpoint(f"{root / FILES[2]}: default_prompt_name {default!r} is none of its prompts")
    return prompts, default


_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: np.asarray(1 / (1 + np.exp(-x)), np.float32),
}
"""torch.nn modules by class name."""


def _dense(root: Path, path: str) -> Dense:
    config = _object(root, f"{path}/config.json") or {}
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    inside = (config.get("module_input_name") or "sentence_embedding", config.get("module_output_name"))
    if activation not in _ACTIVATIONS or config.get("use_residual") or inside[0] != "sentence_embedding":
        raise UnsupportedModel(
            f"{path}/config.json: this Dense module is not known", f"known: {', '.join(_ACTIVATIONS)}"
        )
    if inside[1] not in (None, "sentence_embedding"):
        raise UnsupportedModel(f"{path}/config.json: module_output_name {inside[1]!r} is not known")
    file = root / path / "model.safetensors"
    if not file.is_file():
        raise UnsupportedModel(f"{root}: {path} has no model.safetensors", "pickles are not opened: save it again")
    weight = _matrix(file, "linear.weight", 2)
    bias = _matrix(file, "linear.bias", 1) if config.get("bias", True) else None
    if bias is not None and len(bias) != len(weight):
        raise CorruptCheckpoint(f"{file}: linear.bias has {len(bias)} values for {len(weight)} rows")
    return Dense(weight, bias, activation)


def _matrix(path: Path, name: str, dims: int) -> Floats:
    file = open_safetensors(path)
    entry = file.entries.get(name)
    if entry is None or entry.dtype not in ("F32", "F16", "BF16") or len(entry.shape) != dims:
        raise CorruptCheckpoint(f"{path}: {name} is not a float tensor of {dims} dimensions")
    if not 0 < max(entry.shape) <= _MAX_WIDTH or 0 in entry.shape:
        raise CorruptCheckpoint(f"{path}: {name} has shape {list(entry.shape)}; up to {_MAX_WIDTH} are allowed")
    with path.open("rb") as opened:
        opened.seek(entry.start)
        raw = opened.read(entry.stop - entry.start)
    if len(raw) != entry.stop - entry.start:
        raise CorruptCheckpoint(f"{path} shrank while it was read")
    if entry.dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)
    return np.frombuffer(raw, "<f4" if entry.dtype == "F32" else "<f2").astype(np.float32).reshape(entry.shape)


def _object(root: Path, name: str) -> dict[str, Any] | None:
    value = _json(root, name)
    if value is not None and not isinstance(value, dict):
        raise CorruptCheckpoint(f"{root / name} is not an object")
    return value


def _json(root: Path, name: str) -> Any:
    """The parsed file; None where there is none. Raises CorruptCheckpoint."""
    path = root / name
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _MAX_JSON:
            raise CorruptCheckpoint(f"{path}: more than {_MAX_JSON} bytes")
        return json.loads(path.read_bytes())
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise CorruptCheckpoint(f"{path}: not JSON: {e}") from None


# --- computing -------------------------------------------------------------------------------------------------------


def pool(hidden: Floats, mask: Mask, pooling: Pooling, *, skip: int = 0) -> Floats:
    """Token vectors float32 (b, s, d) where `mask` (b, s) is 1 -> float32 (b, d · kinds).

    `skip`: tokens at the start of each text, a prompt's, that are not pooled. A text must have one token at least.
    """
    seen = mask.astype(bool)
    starts = seen.argmax(axis=1)
    counted = seen
    if skip:
        counted = seen & (np.arange(seen.shape[1]) >= (starts + skip)[:, None])
    parts = [_pooled(kind, hidden, counted, starts) for kind in pooling.kinds]
    return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _pooled(kind: str, hidden: Floats, seen: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]) -> Floats:
    rows = np.arange(len(hidden))
    if kind == "cls":
        return np.asarray(hidden[rows, seen.argmax(axis=1)])
    if kind == "lasttoken":
        return np.asarray(hidden[rows, seen.shape[1] - 1 - seen[:, ::-1].argmax(axis=1)])
    if kind == "max":
        return np.asarray(np.where(seen[:, :, None], hidden, -np.inf).max(axis=1), np.float32)
    weights = seen.astype(np.float32)
    if kind == "weightedmean":  # the n-th token counts n times
        weights *= np.arange(1, seen.shape[1] + 1, dtype=np.float32) - starts[:, None]
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    if kind == "mean_sqrt_len_tokens":
        total = np.sqrt(total)
    summed = np.einsum("bsd,bs->bd", hidden, weights, optimize=True)
    return np.asarray(summed / total, np.float32)


def finish(vectors: Floats, pooling: Pooling, *, normalize: bool | None = None) -> Floats:
    """Pooled vectors (b, d) through the model's Dense layers; of length 1 if `normalize`, None: as the model says."""
    for layer in pooling.dense:
        if vectors.shape[1] != layer.weight.shape[1]:
            raise CorruptCheckpoint(
                f"a Dense layer of {layer.weight.shape[1]} inputs behind vectors of {vectors.shape[1]}"
            )
        summed = vectors @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        vectors = np.asarray(_ACTIVATIONS[layer.activation](summed), np.float32)
    if pooling.normalize if normalize is None else normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _TINY)
    return np.asarray(vectors, np.float32)


def shortened(tokens: Sequence[int], bare: Sequence[int], length: int) -> list[int]:
    """`tokens` cut to `length`, the special ones around kept. `bare`: the same text without special tokens."""
    extra = len(tokens) - len(bare)
    if len(tokens) <= length:
        return list(tokens)
    lead = next((n for n in range(extra + 1) if list(tokens[n : n + len(bare)]) == list(bare)), extra)
    tail = extra - lead
    return [*tokens[: max(0, length - tail)], *tokens[len(tokens) - tail :]][:length]


def shortened_pair(first: Sequence[int], second: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """Both cut to `room` tokens together: the longer one first, then both, as `tokenizers` does (longest_first)."""
    small = min(len(first), len(second))
    if len(first) + len(second) > room:
        small = min(small, room // 2)
    large = max(0, room - small)
    a, b = (large, small) if len(first) > len(second) else (small, large)
    return list(first[:a]), list(second[:b])
