"""Decoders as float32 ONNX graphs, through optimum-onnx in an environment of its own: families that others do not do.

Knows which families it does exactly, where its Python is, and how a config.json reads to the older transformers there.
Knows nothing of quantization or of the shipping form.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from edgekit.checkpoint._files import inside, read_json
from edgekit.errors import EdgekitError, MissingExtra, RuntimeFailed, UnsupportedModel
from edgekit.export.onnx._child import OFFLINE, carry, failure, follow
from edgekit.onnx_file import OnnxFile, open_onnx
from edgekit.units import Progress, show_bytes, silent

VARIABLE = "EDGEKIT_OPTIMUM_PYTHON"
"""The environment variable that names the Python in which optimum-onnx is installed."""

CONSTRAINTS = Path(__file__).with_name("constraints-optimum.txt")
CHILD = Path(__file__).with_name("_optimum_child.py")

FAMILIES: Mapping[str, str] = {
    "bloom": "BloomForCausalLM",
    "codegen": "CodeGenForCausalLM",
    "falcon": "FalconForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gptj": "GPTJForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "opt": "OPTForCausalLM",
    "stablelm": "StableLmForCausalLM",
}
"""`model_type` -> its causal language model: the families whose logits equal transformers' in the tests. Graphs are
traced from transformers' own code: most settings of a family need no list here."""

POSITIONS: Mapping[str, int] = {
    "bloom": 2048, "codegen": 2048, "falcon": 2048, "gpt2": 1024, "gpt_bigcode": 1024, "gpt_neox": 2048, "gptj": 2048,
    "olmo2": 2048, "opt": 2048, "stablelm": 4096,
}  # fmt: skip
"""Tokens of context where config.json names none: the defaults of transformers' config classes; BLOOM has no limit."""

ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})

PINNED = ("optimum", "optimum-onnx", "torch", "transformers")
"""Packages whose other releases could export something else without a word."""


def supported(config: Mapping[str, Any]) -> str | None:
    """None if optimum-onnx does the model of this config.json exactly, else one sentence why not."""
    family = config.get("model_type")
    if not isinstance(family, str):
        return "config.json names no model_type"
    if config.get("is_encoder_decoder"):
        return f"{family} is an encoder-decoder, which is another task: text2text-generation"
    if family not in FAMILIES:
        return f"optimum-onnx was not tried for {family}, only for {', '.join(FAMILIES)}"
    named = config.get("architectures")
    if named and named != [FAMILIES[family]]:
        return f"{named} is not a causal language model ({FAMILIES[family]})"
    if config.get("quantization_config"):
        return f"this {family} is quantized already: export the model that it was made from"
    return _unsupported_setting(family, config)


def _unsupported_setting(family: str, config: Mapping[str, Any]) -> str | None:
    """A setting under which the traced graph is not the model, as a sentence."""
    changed = [
        key
        for key in ("add_cross_attention", "reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx")
        if config.get(key)
    ]
    if changed:
        return f"{changed[0]} = {config[changed[0]]!r} of {family} was not tried with optimum-onnx"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = (rope.get("rope_type") or rope.get("type") or "default") if isinstance(rope, Mapping) else rope
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        return f"rope type {kind!r} depends on the length of the text: a traced graph would keep that of the example"
    return None


def available() -> Path | None:
    """The Python that has optimum-onnx: the one named by EDGEKIT_OPTIMUM_PYTHON, else this one if it has it, else None.

    Raises EdgekitError where the variable names no file.
    """
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise EdgekitError(f"{VARIABLE} is {named!r}, which is no program", f"{install()}, or unset {VARIABLE}")
        return path
    try:
        metadata.version("optimum-onnx")
    except metadata.PackageNotFoundError:
        return None
    return Path(sys.executable)


def install() -> str:
    """The commands that make the environment and point to it, in one line of shell."""
    where = "$HOME/edgekit-optimum"
    return (
        f"python3 -m venv {where} && {where}/bin/pip install -c {CONSTRAINTS} torch optimum-onnx onnxruntime && "
        f"export {VARIABLE}={where}/bin/python"
    )


def require() -> Path:
    """The Python to build with, its packages checked. Raises MissingExtra, or EdgekitError for untested releases."""
    python = available()
    if python is None:
        raise MissingExtra(
            "this family is exported by optimum-onnx, which needs a transformers older than this environment's: "
            f"make one for it, and name its Python in {VARIABLE}",
            install(),
        )
    found, pins = versions(python), _pins()
    if absent := [package for package, version in found.items() if version is None]:
        raise MissingExtra(f"{', '.join(absent)} not installed for {python} ({VARIABLE})", install())
    for package in PINNED:
        if str(found[package]).partition("+")[0] != pins[package]:
            raise EdgekitError(
                f"{python} has {package} {found[package]}, not the tested {pins[package]}: its graphs could be wrong "
                "without a word",
                f"{python} -m pip install -c {CONSTRAINTS} torch optimum-onnx onnxruntime",
            )
    return python


def versions(python: Path) -> dict[str, str | None]:
    """What is installed for `python`: package -> version, None where it is absent. Raises EdgekitError."""
    try:
        done = subprocess.run(
            [python, "-I", CHILD, "versions"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=_environment(),
        )
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        found = None
    if not isinstance(found, dict):
        raise EdgekitError(f"{python} ({VARIABLE}) does not run as a Python of 3.9 or later", install())
    return found


def _pins() -> dict[str, str]:
    lines = (line.partition("==") for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines())
    return {name.lower(): version for name, equals, version in lines if equals and not name.startswith("#")}


# --- building --------------------------------------------------------------------------------------------------------


def build(root: Path, folder: Path, *, progress: Progress = silent) -> Path:
    """Write the checkpoint in `root` as a float32 graph into `folder` (new or empty) -> folder/model.onnx.

    Takes `input_ids`, and where the family wants them `attention_mask` and `position_ids`, and the cache as
    `past_key_values.N.key` and `.value`, float32 (batch, kv heads, tokens, width); gives `logits` of every position,
    float32 (batch, sequence, vocabulary), and the longer cache as `present.N.key` and `.value`. Beside it
    model.onnx.data, a genai_config.json with which onnxruntime-genai runs it, and the model's own config, tokenizer and
    chat template.
    Raises UnsupportedModel, MissingExtra, RuntimeFailed with the end of what the exporter said.
    """
    config = read_json(root, "config.json")
    if why := supported(config):
        raise UnsupportedModel(f"{root.name}: {why}")
    python = require()
    run("build", python, root, older(config, FAMILIES[config["model_type"]]), folder, progress)
    graph = folder / "model.onnx"
    if not graph.is_file():
        raise RuntimeFailed(f"optimum-onnx ended without writing {graph}", "this is a bug; please report it")
    carry(root, folder)
    described = json.dumps(genai_config(open_onnx(graph), config, folder), indent=4)
    (folder / "genai_config.json").write_text(described + "\n", encoding="utf-8")
    return graph


def genai_config(graph: OnnxFile, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What onnxruntime-genai must know of a graph whose cache grows by concatenation. Its type `decoder` (ModelType in
    its model_type.h) is any decoder whose inputs and outputs are named here; every step makes a new cache."""
    shapes = {value.name: value.shape or () for value in graph.inputs}
    caches = [shape for name, shape in shapes.items() if name.startswith("past_key_values.") and name.endswith(".key")]
    kv_heads, width = (int(axis or 0) for axis in (caches[0][1], caches[0][3]))
    heads = config.get("num_attention_heads") or config.get("n_head") or kv_heads
    length = config.get("max_position_embeddings") or config.get("n_positions") or POSITIONS[config["model_type"]]
    logits = next(value.shape or () for value in graph.outputs if value.name == "logits")
    generation = read_json(folder, "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    special = {
        key: generation.get(key, config.get(key))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if generation.get(key, config.get(key)) is not None
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": width,
        "hidden_size": config.get("hidden_size") or config.get("n_embd") or heads * width,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in shapes}
        | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": heads,
        "num_hidden_layers": len(caches),
        "num_key_value_heads": kv_heads,
    }
    model = {"type": "decoder", "context_length": length, "vocab_size": logits[-1], "decoder": decoder}
    search = {"max_length": length, "past_present_share_buffer": False, "do_sample": False, "num_beams": 1}
    return {"model": model | special, "search": search}


def _lay_out(root: Path, config: Mapping[str, Any], folder: Path) -> None:
    """A model folder for the older transformers: `config` in its spelling, and links to the weights; nothing else that
    it might load."""
    weights = sorted(path.name for path in root.glob("*.safetensors"))
    if not weights:
        raise UnsupportedModel(f"{root} holds no *.safetensors", "save the model with transformers first")
    folder.mkdir()
    for name in (*weights, "model.safetensors.index.json"):
        if (root / name).is_file():
            _link(inside(root, name).absolute(), folder / name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _link(source: Path, name: Path) -> None:
    try:
        name.symlink_to(source)
    except OSError:  # Windows without the right to make links
        shutil.copyfile(source, name)


def older(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The config.json of a model of the class `architecture` as transformers 4 spells it: version 5's `rope_parameters`
    is unknown there and would be ignored without a word, and with it the base and the share of a head that rotates."""
    found = {key: value for key, value in config.items() if key not in ("transformers_version", "auto_map")}
    found["architectures"] = [architecture]
    if "dtype" in found:
        found["torch_dtype"] = found.pop("dtype")
    rope = found.pop("rope_parameters", None)
    if not isinstance(rope, Mapping):
        return found
    loose = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found["rope_scaling"] = None if kind == "default" else {k: v for k, v in rope.items() if k not in loose}
    if found["model_type"] == "gpt_neox":
        named = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        loose = {named[key]: value for key, value in loose.items()}
    return found | loose


def _environment() -> dict[str, str]:
    """The child is offline, and sees no package of this environment."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return kept | OFFLINE | {"TOKENIZERS_PARALLELISM": "false"}


def run(
    verb: str, python: Path, root: Path, config: Mapping[str, Any], folder: Path, progress: Progress = silent
) -> None:
    """Let the child do `verb` with the weights in `root` and the `config` that is spelled for it, into `folder`.

    Raises RuntimeFailed with the end of what the exporter said, UnsupportedModel for weights that are no safetensors.
    """

    def understood(line: str) -> bool:
        step = re.match(r"edgekit: (\d)/(\d) ", line)
        if step:
            progress("building the float32 graph", int(step[1]) - 1, int(step[2]))
        return step is not None

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="optimum-", dir=folder) as work:
        model = Path(work, "model")
        _lay_out(root, config, model)
        command: list[str | Path] = [python, "-I", "-u", "-X", "utf8", CHILD, verb, model.absolute(), folder.absolute()]
        status, said = follow(command, _environment(), understood)
    progress("building the float32 graph", 1, 1)
    shutil.rmtree(folder / "optimum", ignore_errors=True)
    if status:
        weights = sum(path.stat().st_size for path in root.glob("*.safetensors"))
        raise failure("optimum-onnx", "export", root.name, f"whose weights have {show_bytes(weights)}", status, said)
