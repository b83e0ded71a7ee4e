"""Decoders as float32 ONNX graphs, through onnxruntime-genai's model builder in a process of its own.

Knows which families that builder does exactly, and what it cannot. Knows nothing of quantization.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.errors import EdgekitError, MissingExtra, RuntimeFailed, UnsupportedModel
from edgekit.export.onnx._child import OFFLINE, carry, failure, follow
from edgekit.export.onnx._tokenizer import restore
from edgekit.units import Progress, show_bytes, silent

BUILDER = "onnxruntime-genai"
TESTED = "0.18"
"""The release whose classes `_genai_child` repairs; another one may be right, or wrong in other places."""

FAMILIES: Mapping[str, str] = {
    "ernie4_5": "Ernie4_5ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "olmo": "OlmoForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""`model_type` -> its causal language model: the families whose logits equal transformers' in the tests."""

ACTIVATIONS = frozenset({"gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "swish"})
ROPE_TYPES = frozenset({"default", "dynamic", "linear", "llama3", "longrope", "yarn"})
LONGROPE_SWITCH = 4096
"""Where genai, while it generates, computes the whole cache again with a longrope's other factors: a fixed number."""
LAYER_TYPES = frozenset({"attention", "conv", "full_attention", "sliding_attention"})
OTHER_SENSES = ("audio_config", "speech_config", "vision_config", "vision_tower", "visual")

PACKAGES = ("onnx", "onnx-ir", BUILDER, "onnxruntime", "torch", "transformers")
INSTALL = 'pip install "edgekit[onnx]"'


def supported(config: Mapping[str, Any]) -> str | None:
    """None if the builder does the model of this config.json exactly, else one sentence why not."""
    family = config.get("model_type")
    if not isinstance(family, str):
        return "config.json names no model_type"
    if config.get("is_encoder_decoder"):
        return f"{family} is an encoder-decoder: {BUILDER} builds decoders"
    if senses := [key for key in OTHER_SENSES if config.get(key)]:
        return f"{family} is not a text model alone (it has {senses[0]}): only text models are exported"
    if config.get("quantization_config"):
        return f"this {family} is quantized already: export the model that it was made from"
    if family not in FAMILIES:
        return f"{BUILDER} {TESTED} has no exact builder for {family}"
    named = _texts(config, "architectures") or [FAMILIES[family]]
    if named[0] != FAMILIES[family]:
        return f"{named[0]} is not a causal language model ({FAMILIES[family]})"
    return _unsupported_setting(family, config)


def _unsupported_setting(family: str, config: Mapping[str, Any]) -> str | None:
    """A setting that the builder reads wrongly or not at all, as a sentence."""
    activation = str(config.get("hidden_activation") or config.get("hidden_act") or "silu")
    kinds = set(_texts(config, "layer_types"))
    neutral = {"clip_qkv": None, "qk_layernorm": False, "use_bidirectional_attention": False}
    changed = [key for key, value in neutral.items() if config.get(key) not in (value, None)]
    if changed:
        return f"{BUILDER} does not know {changed[0]} = {config[changed[0]]!r} of {family}"
    if family == "nemotron" and config.get("mlp_bias"):
        return f"{BUILDER} leaves out the MLP biases of {family}"
    if config.get("num_local_experts") or config.get("num_experts"):
        return f"this {family} is a mixture of experts: its experts would stay float32"
    if activation not in ACTIVATIONS:
        return f"{BUILDER} does not know the activation {activation!r}"
    if unknown := sorted(kinds - LAYER_TYPES):
        return f"{BUILDER} does not know layers of type {unknown[0]!r} in {family}"
    if family == "granitemoehybrid" and not kinds:  # transformers' default there
        return f"{BUILDER} does not know the mamba layers of {family}"
    return _unsupported_rope(family, config)


_ORIGINAL = "original_max_position_embeddings"


def _unsupported_rope(family: str, config: Mapping[str, Any]) -> str | None:
    ropes = list(_ropes(config))
    for rope in ropes:
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        if kind not in ROPE_TYPES or (kind == "longrope" and family != "phi3"):
            return f"{BUILDER} does not know rope type {kind!r} in {family}"
        original = _number(config, _ORIGINAL) or _number(rope, _ORIGINAL) or LONGROPE_SWITCH
        if kind == "longrope" and original not in (LONGROPE_SWITCH, _number(config, "max_position_embeddings")):
            return f"{BUILDER} changes longrope factors at {LONGROPE_SWITCH} tokens, this {family} at {original}"
    positions = config.get("position_embedding_type", None if family == "granitemoehybrid" else "rope")
    if positions != "rope":  # the builder rotates all the same
        return f"{BUILDER} does not know position_embedding_type {positions!r} of {family}"
    head, rotated = _head(config, ropes)
    if head % 16 or rotated % 16:  # what GroupQueryAttention checks when it runs
        return (
            f"this {family} has heads of {head} dimensions, {rotated} of them rotated: "
            "onnxruntime's attention wants multiples of 16"
        )
    return None


def _ropes(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Rope settings under their new or old key; one a layer type where types differ."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        return
    nested = [value for value in found.values() if isinstance(value, Mapping)]
    yield from nested or [found]


def _head(config: Mapping[str, Any], ropes: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Dimensions of a head, and how many of them rotate; 0 where the config leaves it to a default of its class."""
    heads = _number(config, "num_attention_heads")
    head = _number(config, "head_dim") or (_number(config, "hidden_size") // heads if heads else 0)
    for source in (*ropes, config):
        part = source.get("partial_rotary_factor")
        if isinstance(part, float) and 0 < part <= 1:
            return head, int(head * part)
    return head, head


def _texts(config: Mapping[str, Any], key: str) -> list[str]:
    """A list of the config as texts, empty where it is absent or no list."""
    value = config.get(key)
    return [str(item) for item in value] if isinstance(value, list) else []


def _number(config: Mapping[str, Any], key: str) -> int:
    """A count of the config, 0 where it is absent or no count."""
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def require() -> None:
    """Raise MissingExtra without the builder and what it needs, EdgekitError for an untested builder."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise MissingExtra(f"ONNX export needs {package}", INSTALL) from None
    if found[BUILDER].split(".")[:2] != TESTED.split("."):
        raise EdgekitError(
            f"{BUILDER} {found[BUILDER]} is not the tested {TESTED}: its graphs could be wrong without a word",
            f'pip install "{BUILDER}=={TESTED}.*"',
        )


def build(root: Path, folder: Path, *, progress: Progress = silent) -> Path:
    """Write the checkpoint in `root` as a float32 graph into `folder` (new or empty) -> folder/model.onnx.

    Logits of every position, float32 (batch, sequence, vocabulary). Beside it model.onnx.data, genai_config.json and
    the model's own config, tokenizer and chat template. Runs in plain onnxruntime with caches of length 0.
    Raises UnsupportedModel, MissingExtra, RuntimeFailed with the end of what the builder said.
    """
    checkpoint = open_checkpoint(root)
    if why := supported(checkpoint.config):
        raise UnsupportedModel(f"{checkpoint.name}: {why}")
    require()
    folder.mkdir(parents=True, exist_ok=True)
    graph = folder / "model.onnx"
    _run(checkpoint, folder, progress)
    if not (graph.is_file() and (folder / "genai_config.json").is_file()):
        raise RuntimeFailed(f"{BUILDER} ended without writing {graph}", "this is a bug; please report it")
    shutil.rmtree(folder / "cache", ignore_errors=True)
    carry(root, folder)
    restore(root, folder / "tokenizer.json")
    return graph


def _run(checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    places = [str(checkpoint.root.absolute()), str(folder.absolute())]
    layers = _number(checkpoint.config, "num_hidden_layers")

    def understood(line: str) -> bool:
        """Progress bars come as lines too: they end in a return."""
        if layer := re.match(r"Reading layer (\d+)", line):
            progress("building the float32 graph", min(int(layer[1]) + 1, layers), layers)
        elif bar := re.match(r"Saving .*\s(\d+)/(\d+) \[", line):
            progress("writing the float32 graph", int(bar[1]), int(bar[2]))
        else:
            return False
        return True

    command = [sys.executable, "-m", "edgekit.export.onnx._genai_child", *places]
    status, said = follow(command, _environment(), understood)
    if status:
        needs = show_bytes(build_bytes(checkpoint.parameters, checkpoint.dtype))
        raise failure(BUILDER, "build", checkpoint.name, f"which needs about {needs} of memory", status, said)


def _environment() -> dict[str, str]:
    """The child finds this package, stays offline, and is heard at once."""
    package = str(Path(__file__).resolve().parents[3])
    inherited = os.environ.get("PYTHONPATH", "")
    heard = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    return os.environ | OFFLINE | heard | {"PYTHONPATH": package + (os.pathsep + inherited if inherited else "")}


BASE_BYTES = 450 << 20
BYTES_PER_PARAMETER = {"BF16": 4.1, "F16": 4.1}
"""Peak resident size of the child, less the 436 MiB of a model of nothing: 3.9 B/parameter for a tied Llama of 135 M in
BF16, 3.4 for an untied one of 331 M, 5.3 for the first in F32 (builder 0.18, torch 2.13, x86-64 Linux)."""


def build_bytes(parameters: int, dtype: str) -> int:
    """Memory that `build` needs for a checkpoint of `parameters` values, mostly of `dtype` (safetensors' name)."""
    return BASE_BYTES + int(parameters * BYTES_PER_PARAMETER.get(dtype, 5.6))
