"""The process that asks transformers what a checkpoint computes, as it is and with its weights rounded.

    python -m edgekit.export.onnx._reference REQUEST.json ANSWER.npz

A process of its own, so that torch and the weights are gone from memory before a graph is loaded. Reads local files
only and runs no code of the model. Rounding is done here in torch, independently of what writes the graphs.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.export.onnx._predictions import Request

AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
}
"""Task -> transformers class; every other task takes AutoModel."""

_PER_TENSOR = 0


def main(request: str, answer: str) -> None:
    """Answer one request: arrays `NUMBER:NAME`, and again as `rounded:NUMBER:NAME` where rounding is asked for."""
    import torch

    asked = Request(**json.loads(Path(request).read_text(encoding="utf-8")))
    torch.set_num_threads(asked.threads)
    with torch.inference_mode():
        model = _load(asked)
        found = _outputs(model, asked, "")
        if asked.rounding:
            _round(model, asked.rounding)
            found |= _outputs(model, asked, "rounded:")
    arrays: dict[str, Any] = {**found}
    np.savez(answer, **arrays)


def _load(asked: Request) -> Any:
    """Float32, local files, no code but transformers' own. Eager attention: the one that knows every soft cap."""
    import torch
    import transformers

    kind = getattr(transformers, AUTO.get(asked.task, "AutoModel"))
    return kind.from_pretrained(
        asked.root,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        attn_implementation="eager",
        low_cpu_mem_usage=True,
    ).eval()


def _outputs(model: Any, asked: Request, prefix: str) -> dict[str, npt.NDArray[np.float32]]:
    import torch

    found = {}
    settings: dict[str, Any] = {}
    known = inspect.signature(model.forward).parameters
    if asked.positions and "logits_to_keep" in known:
        settings["logits_to_keep"] = torch.tensor(asked.positions)
    if "use_cache" in known:
        settings["use_cache"] = False
    for number, ids in enumerate(asked.texts):
        given = torch.tensor([ids])
        if asked.targets:
            settings["decoder_input_ids"] = torch.tensor([asked.targets[number]])
        answer = model(input_ids=given, attention_mask=torch.ones_like(given), **settings)
        for name, value in answer.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
                rows = value[0].float()
                if asked.positions and len(rows) == len(ids) and "logits_to_keep" not in settings:
                    rows = rows[list(asked.positions)]
                found[f"{prefix}{number}:{name}"] = rows.numpy()
    return found


# --- rounding --------------------------------------------------------------------------------------------------------


def _round(model: Any, rounding: Mapping[str, Sequence[int] | None]) -> None:
    """Round to nearest, in place: what a plain quantizer of these formats would lose, activations included."""
    import torch

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    done: set[int] = set()
    for module in model.modules():
        kind = "linear"
        if module is head:
            kind = "head"
        elif isinstance(module, torch.nn.Embedding):
            tied = head is not None and module is embedding and module.weight is head.weight
            kind = "head" if tied else "embedding"
        fmt = rounding.get(kind)
        matrices = _matrices(module)
        if fmt is None or not matrices:
            continue
        bits, block, activations = fmt
        for weight in matrices:
            if weight.data_ptr() not in done:
                done.add(weight.data_ptr())
                transposed = type(module).__name__ == "Conv1D"  # GPT-2's: (inputs, outputs)
                rows = weight.data.mT if transposed else weight.data
                rows.copy_(nearest(rows, bits, block))
        if kind != "embedding" and not isinstance(module, torch.nn.Embedding) and activations >= 0:
            module.register_forward_pre_hook(_rounded_input(activations))


def _matrices(module: Any) -> list[Any]:
    """Weights that a module multiplies with: those of linear layers, and experts' stacks of them."""
    import torch

    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, torch.nn.Embedding | torch.nn.Linear) or type(module).__name__ == "Conv1D":
        return [own["weight"]]
    return [p for p in own.values() if p.ndim == 3 and not isinstance(module, torch.nn.Conv1d)]


def nearest(rows: Any, bits: int, block: int) -> Any:
    """torch float32 (..., cols) -> the nearest of 2^bits - 1 steps around zero, a scale for every `block` values.

    `block` 0: one scale a row; -1: one scale for all.
    """
    import torch

    shape = rows.shape
    if block < 0:
        return nearest(rows.reshape(1, -1), bits, 0).reshape(shape)
    block = block or shape[-1]
    padded = torch.nn.functional.pad(rows, (0, -shape[-1] % block))
    parts = padded.reshape(*shape[:-1], -1, block)
    top = 2 ** (bits - 1) - 1
    scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
    return ((parts / scale).round().clamp(-top, top) * scale).reshape(padded.shape)[..., : shape[-1]]


def _rounded_input(block: int) -> Any:
    def hook(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        import torch

        if not given or not isinstance(given[0], torch.Tensor) or not given[0].is_floating_point():
            return given
        x = given[0]
        if block != _PER_TENSOR:
            return (nearest(x, 8, block), *given[1:])
        low, high = x.min().clamp_max(0), x.max().clamp_min(0)
        step = ((high - low) / 255).clamp_min(1e-30)
        return (((x - low) / step).round() * step + low, *given[1:])

    return hook


if __name__ == "__main__":
    main(*sys.argv[1:])
