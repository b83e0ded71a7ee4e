"""Encoders as float32 ONNX graphs: embeddings, classifiers, token classifiers, rerankers. Laid out as transformers.js
reads them.

Knows tasks, the process that exports, and which files go beside a graph; knows no quantization.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from edgekit.checkpoint._files import inside, read_json
from edgekit.embedding import FILES, files_of
from edgekit.errors import (
    EdgekitError,
    MissingExtra,
    RuntimeFailed,
    UnsupportedModel,
    VerificationFailed,
)
from edgekit.export.onnx import _layout
from edgekit.export.onnx._child import OFFLINE
from edgekit.units import Progress, show_bytes, silent

EMBED, CLASSIFY, CLASSIFY_TOKENS = "feature-extraction", "text-classification", "token-classification"
TASKS = (EMBED, CLASSIFY, CLASSIFY_TOKENS)
"""Names of transformers' pipelines. A reranker is a text classifier of pairs."""

_ENDINGS = {
    "ForSequenceClassification": CLASSIFY,
    "ForTokenClassification": CLASSIFY_TOKENS,
    "ForMaskedLM": EMBED,
    "ForPreTraining": EMBED,
    "LMHeadModel": None,
    "Model": EMBED,
}
"""How the class names of transformers end -> the task, None where it writes text (GPT2LMHeadModel); the head of a
pre-training class is left out."""

TOLERANCE = 1e-3
"""Largest difference from transformers, relative to the largest value; exact graphs are at 1e-6."""

GRAPH = "onnx/model_quantized.onnx"
"""Where transformers.js looks for an 8-bit model."""

CARRIED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
"""Files of the model's folder that ship beside the graph, as they are, where they exist."""

PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "onnxscript", "optimum", "torch", "transformers")
INSTALL = 'pip install "edgekit[onnx]"'

_SENSES = ("audio_config", "speech_config", "vision_config", "vision_tower", "visual")
_ONE_FILE = 1_900_000_000  # protobuf ends at 2 GiB


@dataclass(frozen=True, slots=True)
class Exported:
    """A float32 graph and what was found about it. `difference`: from transformers, largest, relative."""

    graph: Path
    inputs: tuple[str, ...]
    difference: float


def task_of(config: Mapping[str, Any], root: Path | None = None) -> str | None:
    """What the model is for, by the class it was saved as; None for another purpose, such as writing text.

    Files of sentence-transformers in `root` make it an embedding model whatever class its config names, except a
    classifier.
    """
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    task = next((t for ending, t in _ENDINGS.items() if name.endswith(ending)), None)
    if task in (CLASSIFY, CLASSIFY_TOKENS):
        return task
    return EMBED if root is not None and (root / FILES[0]).is_file() else task


def supported(config: Mapping[str, Any], task: str) -> str | None:
    """None if the export may be tried, else one sentence why not. The graph itself is compared once it is there."""
    family = config.get("model_type")
    if not isinstance(family, str):
        return "config.json names no model_type"
    if task not in TASKS:
        return f"{task!r} is not an encoder's task: {', '.join(TASKS)}"
    if config.get("is_encoder_decoder"):
        return f"{family} is an encoder-decoder, which is more than one graph"
    if senses := [key for key in _SENSES if config.get(key)]:
        return f"{family} is not a text model alone (it has {senses[0]}): only text models are exported"
    if config.get("quantization_config"):
        return f"this {family} is quantized already: export the model that it was made from"
    return None


def require() -> None:
    """Raise MissingExtra without what the export needs."""
    for package in PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise MissingExtra(f"ONNX export needs {package}", INSTALL) from None


def build(root: Path, folder: Path, *, task: str, progress: Progress = silent) -> Path:
    """Write the checkpoint in `root` as a float32 graph into `folder` (new or empty) -> folder/model.onnx.

    Inputs int64 (batch, sequence): input_ids, attention_mask and, where the model knows them, token_type_ids; output
    float32 `last_hidden_state` (batch, sequence, width) or `logits`. The weights are in model.onnx.data. Raises
    UnsupportedModel, MissingExtra, VerificationFailed when the graph is not what transformers computes, RuntimeFailed.
    """
    return export(root, folder, task=task, progress=progress).graph


def export(root: Path, folder: Path, *, task: str, progress: Progress = silent) -> Exported:
    """As `build`, with what was found on the way."""
    config = read_json(root, "config.json")
    if why := supported(config, task):
        raise UnsupportedModel(f"{root.name}: {why}")
    if not any(root.glob("*.safetensors")):
        raise UnsupportedModel(f"{root} holds no *.safetensors", "save the model with transformers first")
    require()
    folder.mkdir(parents=True, exist_ok=True)
    found = _run(root, folder, task, progress)
    graph = folder / "model.onnx"
    if "refused" in found:
        raise UnsupportedModel(f"{root.name}: {found['refused']}", "name another task, or another checkpoint")
    difference = float(found["difference"])
    if not difference <= TOLERANCE:
        raise VerificationFailed(
            f"the graph of {root.name} differs from transformers by {difference:.2g} of the largest value",
            "this family does not survive the export; make a GGUF, or report it",
        )
    return Exported(graph, tuple(found["inputs"]), difference)


def _run(root: Path, folder: Path, task: str, progress: Progress) -> dict[str, Any]:
    """Start the exporting process, follow its steps -> what it reported last."""
    command = [
        sys.executable,
        "-m",
        "edgekit.export.onnx._torch_child",
        str(root.absolute()),
        str(folder.absolute()),
        task,
    ]
    log = folder / "export.log"
    with log.open("wb") as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | OFFLINE | {"TOKENIZERS_PARALLELISM": "false"},
        )
        with child:
            try:
                found = _follow(child.stdout, progress)
                status = child.wait()
            finally:
                child.kill()  # Ctrl-C; nothing if it has ended
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-30:]
    log.unlink()
    if status or not ("refused" in found or "difference" in found):
        raise _failure(root, status, said)
    return found


def _follow(lines: IO[bytes] | None, progress: Progress) -> dict[str, Any]:
    from edgekit.export.onnx._torch_child import STEPS

    found: dict[str, Any] = {}
    for line in lines or ():
        found = json.loads(line)
        if "step" in found:
            progress("export", int(found["step"]), STEPS)
    return found


def _failure(root: Path, status: int, said: list[str]) -> EdgekitError:
    if status == -9:  # SIGKILL: on Linux nearly always the kernel's out-of-memory killer
        weights = sum(path.stat().st_size for path in root.glob("*.safetensors"))
        return RuntimeFailed(
            f"the export of {root.name}, whose weights have {show_bytes(weights)}, was killed",
            "free memory, or take a machine with more",
        )
    raised = [line for line in said if re.match(r"[\w.]+(Error|Exception)\b", line)]
    why = next(reversed(raised or said), f"status {status}")
    return UnsupportedModel(f"torch could not export {root.name}: {why}", "it said:\n" + "\n".join(said[-12:]))


BASE_BYTES = 540 << 20
BYTES_PER_PARAMETER = 8.5


def build_bytes(parameters: int) -> int:
    """Memory that `build` needs for a checkpoint of `parameters` values: 0.69 GB were seen for 22.6 M, 1.38 GB for
    109.5 M."""
    return BASE_BYTES + int(parameters * BYTES_PER_PARAMETER)


# --- the folder that ships -------------------------------------------------------------------------------------------


def ship(root: Path, graph: Path, stage: Path) -> Path:
    """Lay out `stage` as transformers.js reads a model: `graph` as onnx/model_quantized.onnx, the files of `root`
    beside it -> the graph's new place.

    Weights go into the graph's own file where that stays below 2 GB, else into one beside it that config.json
    announces. Raises CorruptCheckpoint.
    """
    carry(root, stage)
    out = stage / GRAPH
    out.parent.mkdir(parents=True, exist_ok=True)
    data = [path for path in graph.parent.glob(f"{graph.name}*") if path != graph]
    if graph.stat().st_size + sum(path.stat().st_size for path in data) <= _ONE_FILE:
        _layout.write_one_file(graph, out)
    else:
        _layout.write_two_files(graph, out)
        _layout.announce(stage / "config.json", out.name)
    return out


def carry(root: Path, stage: Path) -> tuple[str, ...]:
    """Copy the files of a model's folder that a runtime reads beside the weights -> their names."""
    names = [name for name in CARRIED if (root / name).is_file()]
    if task_of(read_json(root, "config.json"), root) == EMBED:  # a cross-encoder's modules are other ones
        names += files_of(root)
    for name in names:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(root, name), stage / name)
    return tuple(names)
