"""The process that exports an encoder with torch.onnx.export and compares the graph with transformers.

    python -m edgekit.export.onnx._torch_child MODEL_FOLDER OUTPUT_FOLDER TASK

A process of its own because torch keeps its memory until it ends and prints all the time. Stdout carries lines of JSON:
{"step": n} as it goes on, then {"inputs": [...], "difference": d} or {"refused": "why"}; all else goes to stderr.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

OPSET = 21
STEPS = 4  # load, export, write, compare

OUTPUTS = {"feature-extraction": "last_hidden_state", "text-classification": "logits", "token-classification": "logits"}
"""Task -> name of the graph's output, which is transformers' and transformers.js' name for it."""

_SHAPES = ((1, 1), (1, 7), (3, 20), (2, 70))
"""Batch and length to compare with; the graph is traced with another. Windowed attention gets a longer text too."""

_LONGEST = 1500
_STORED = 128  # integers from which on a count is not kept as a tensor

_TRACED = (2, 13)


def main(root: str, folder: str, task: str) -> None:
    """Write folder/model.onnx and model.onnx.data, float32, with free batch and length."""
    report = _own_stdout()
    try:
        _export(Path(root), Path(folder), task, report)
    except Refused as e:
        report({"refused": str(e)})


class Refused(Exception):
    """One sentence why this model has no graph."""


def _own_stdout() -> Callable[[dict[str, Any]], None]:
    """A function that writes lines of JSON where stdout leads; everything else that prints goes to stderr."""
    lines: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(value: dict[str, Any]) -> None:
        lines.write(json.dumps(value) + "\n")
        lines.flush()

    return report


def _export(root: Path, folder: Path, task: str, report: Callable[[dict[str, Any]], None]) -> None:
    import torch

    model = _load(root, task)
    report({"step": 1})
    names = input_names(model)
    wrapped = _wrapper(model, names, OUTPUTS[task])
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.onnx.export(
            wrapped,
            tuple(_inputs(model.config, names, *_TRACED)),
            dynamo=True,
            dynamic_shapes=(tuple(free for _ in names),),
            opset_version=OPSET,
            input_names=list(names),
            output_names=[OUTPUTS[task]],
            verbose=False,
        )
    report({"step": 2})
    assert program is not None
    _tidy(program.model, names, OUTPUTS[task])
    program.save(folder / "model.onnx", external_data=True)
    del program
    report({"step": 3})
    difference = _compare(wrapped, names, folder / "model.onnx")
    report({"step": 4})
    report({"inputs": list(names), "difference": difference})


def _load(root: Path, task: str) -> Any:
    """The model in float32 with plain attention, which every family has and quantizers read best."""
    import torch
    import transformers
    from optimum.exporters.tasks import TasksManager

    family = json.loads((root / "config.json").read_text(encoding="utf-8")).get("model_type")
    if family not in transformers.CONFIG_MAPPING:
        raise Refused(f"transformers {transformers.__version__} knows no {family}; code of a model's own is never run")
    config = transformers.AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    loader = TasksManager.get_model_class_for_task(task, model_type=config.model_type)
    if type(config) not in loader._model_mapping:
        raise Refused(f"transformers has no {task} model of type {config.model_type}")
    model, info = loader.from_pretrained(
        root,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    lost = sorted(k for k in info["missing_keys"] if not k.rpartition("pooler.")[1] or task != "feature-extraction")
    if lost:
        raise Refused(f"the checkpoint has no {lost[0]}, which {task} needs ({type(model).__name__})")
    if unfit := sorted(str(k) for k in info["mismatched_keys"]):
        raise Refused(f"{unfit[0]} has another shape than config.json says")
    return model.eval()


def input_names(model: Any) -> tuple[str, ...]:
    """What the graph reads: token types only where the model tells two of them apart."""
    known = inspect.signature(model.forward).parameters
    types = "token_type_ids" in known and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))


def _wrapper(model: Any, names: Sequence[str], output: str) -> Any:
    """A module that takes the inputs by place and gives one tensor."""
    import torch

    fixed: dict[str, Any] = {"return_dict": True}
    if "use_cache" in inspect.signature(model.forward).parameters:
        fixed["use_cache"] = False

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return getattr(self.model(**dict(zip(names, inputs, strict=True)), **fixed), output)

    return Graph().eval()


def _inputs(config: Any, names: Sequence[str], batch: int, length: int) -> list[Any]:
    """Noise, int64 (batch, length) each; every row after the first ends in padding."""
    import torch

    noise = torch.Generator().manual_seed(batch * 1000 + length)
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=noise)
    ids[ids == pad] = (pad + 1) % config.vocab_size
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, max(1, length - 2 - 3 * row) :] = 0
    ids[mask == 0] = pad
    types = torch.randint(0, 2, (batch, length), generator=noise)
    return [ids, mask, types][: len(names)]


def _tidy(model: Any, names: Sequence[str], output: str) -> None:
    """Name axes, matrices and their nodes after what they are in the model; forget stack traces with local paths."""
    import onnx_ir as ir

    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(["batch_size", "sequence_length", *list(value.shape)[2:]][: len(value.shape)])
    _compute_counts(graph)
    given = set(names) | {output} | set(graph.initializers)
    taken: set[str] = set()
    for node in graph.all_nodes():
        _name(node, given, taken, graph)
        node.metadata_props.clear()
        node.doc_string = None
    for value in graph.initializers.values():
        value.metadata_props.clear()


def _compute_counts(graph: Any) -> None:
    """Positions 0, 1, 2 ... and rows of one token type, which some models keep as tensors: computed, not stored."""
    import numpy as np
    import onnx_ir as ir

    for value in list(graph.initializers.values()):
        if value.dtype != ir.DataType.INT64 or value.const_value.size < _STORED:
            continue
        held = value.const_value.numpy()
        if held.ndim != 2 or len(held) != 1:
            continue
        if np.array_equal(held[0], np.arange(held.shape[1])):
            made = [
                ir.node("Range", [_constant(graph, f"{value.name}_{n}", np.int64(n)) for n in (0, held.shape[1], 1)])
            ]
            made.append(
                ir.node("Unsqueeze", [made[0].outputs[0], _constant(graph, f"{value.name}_axis", np.array([0]))])
            )
        elif (held == held[0, 0]).all():
            parts = _constant(graph, f"{value.name}_value", held[:, :1]), np.array(held.shape)
            made = [ir.node("Expand", [parts[0], _constant(graph, f"{value.name}_shape", parts[1])])]
        else:
            continue
        graph.insert_before(graph[0], made)
        ir.convenience.replace_all_uses_with(value, made[-1].outputs[0])
        del graph.initializers[value.name]


def _constant(graph: Any, name: str, number: Any) -> Any:
    import numpy as np
    import onnx_ir as ir

    value = ir.val(name, const_value=ir.tensor(np.asarray(number, np.int64), name=name))
    graph.register_initializer(value)
    return value


def _name(node: Any, given: set[str], taken: set[str], graph: Any) -> None:
    scopes = [s.strip(" '\"[]") for s in (node.metadata_props.get("pkg.torch.onnx.name_scopes") or "").split(",")]
    inner = [s for s in scopes[:-1] if s]
    path = inner[-1].removeprefix("model.") if inner else ""
    weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") and len(node.inputs) > 1 else None
    if weight is None or not path or weight.name not in graph.initializers or f"{path}.matrix" in taken:
        return
    taken.add(f"{path}.matrix")
    node.name = path
    if weight.name.startswith("val_") and f"{path}.matrix" not in given:
        held = graph.initializers.pop(weight.name)
        held.name = f"{path}.matrix"
        graph.initializers[held.name] = held


def _shapes(config: Any) -> list[tuple[int, int]]:
    """What to compare with, within the model's positions; some families keep a few of those for themselves."""
    most = getattr(config, "max_position_embeddings", None) or 512
    window = getattr(config, "local_attention", None) or getattr(config, "sliding_window", None) or 0
    longer = [(1, min(window + 30, _LONGEST))] if window else []
    return [(batch, max(1, min(length, most - 4))) for batch, length in (*_SHAPES, *longer)]


def _compare(wrapped: Any, names: Sequence[str], path: Path) -> float:
    """Largest difference of the graph from the model over unmasked positions, relative to the largest value."""
    import numpy as np
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, length in _shapes(wrapped.model.config):
        inputs = _inputs(wrapped.model.config, names, batch, length)
        with torch.no_grad():
            wanted = wrapped(*inputs).numpy()
        found = session.run(None, {n: v.numpy() for n, v in zip(names, inputs, strict=True)})[0]
        if found.shape != wanted.shape or not np.isfinite(found).all():
            return float("inf")
        if wanted.ndim == 3:
            seen = inputs[1].numpy().astype(bool)
            wanted, found = wanted[seen], found[seen]
        worst = max(worst, float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-9)))
    return worst


if __name__ == "__main__":
    main(*sys.argv[1:])
