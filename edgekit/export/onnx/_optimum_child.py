"""The process that runs optimum-onnx's exporter. It knows that package and nothing of edgekit: it runs with the Python
of an environment in which edgekit is not installed.

    PYTHON -I _optimum_child.py versions
    PYTHON -I _optimum_child.py build MODEL_FOLDER OUTPUT_FOLDER
    PYTHON -I _optimum_child.py build_pair MODEL_FOLDER OUTPUT_FOLDER

Lines that begin with `edgekit:` say how far it is; everything else is the exporter's. A traceback is the report of a
failure.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("onnx", "onnxruntime", "optimum", "optimum-onnx", "torch", "transformers")


def versions() -> None:
    """Print the versions of PACKAGES as one JSON object, null for what is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    _say(json.dumps(found))


def build(root: str, folder: str) -> None:
    """Write the float32 graph of the checkpoint in `root` into `folder`: model.onnx, its weights in model.onnx.data."""
    work = _export(root, folder, "text-generation-with-past")
    model = _load(work / "model.onnx")
    name_final_norm(model.graph)
    _save(model, Path(folder, "model.onnx"))


def build_pair(root: str, folder: str) -> None:
    """Write the float32 graphs of the encoder-decoder in `root` into `folder`: encoder_model.onnx, decoder_model.onnx,
    the weights of each in a file of its own, NAME.data."""
    work = _export(root, folder, "text2text-generation-with-past")
    _save(_load(work / "encoder_model.onnx"), Path(folder, "encoder_model.onnx"))
    joined = join(_load(work / "decoder_model.onnx"), _load(work / "decoder_with_past_model.onnx"))
    _save(joined, Path(folder, "decoder_model.onnx"))


def _export(root: str, folder: str, task: str) -> Path:
    """Graphs as optimum-onnx lays them out -> the folder that they are in."""
    _say("edgekit: 1/3 importing")
    from optimum.exporters.onnx import main_export

    _say("edgekit: 2/3 tracing")
    work = Path(folder, "optimum")
    main_export(
        root,
        work,
        task=task,
        dtype="fp32",
        device="cpu",
        framework="pt",
        library_name="transformers",
        local_files_only=True,
        do_validation=False,  # edgekit proves the graph itself, against its own transformers
        no_post_process=task.startswith("text2text"),  # `join` makes one decoder of two, with every weight once
    )
    _say("edgekit: 3/3 writing")
    return work


def _load(path: Path) -> Any:
    import onnx

    model = onnx.load(path)  # above 2 GB the weights lie in a file of optimum's own naming
    look_tokens_up(model.graph)
    return model


def _save(model: Any, path: Path) -> None:
    import onnx

    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=f"{path.name}.data",
        size_threshold=1024,
    )


def join(first: Any, later: Any) -> Any:
    """`later`, the decoder with a past, computing the keys and values of the encoder's states itself, as `first`, the
    decoder without one, does -> one decoder for every step.

    The inputs `past_key_values.N.encoder.*` go, the input `encoder_hidden_states` and the outputs `present.N.encoder.*`
    come; an empty past of the decoder's own makes it the first step.
    """
    graph, other = later.graph, first.graph
    count_texts_alike(other)
    outputs = [value for value in other.output if ".encoder." in value.name]
    kept = {value.name for value in outputs} | {value.name for value in other.input}
    nodes = behind(other, {value.name for value in outputs})
    if any("input_ids" in node.input for node in nodes):
        raise ValueError("the keys of the encoder's states depend on what is written: two graphs do not become one")
    taken = {node.name for node in graph.node}
    for node in nodes:
        node.name = f"/cross{node.name}" if node.name in taken else node.name
        for names in (node.input, node.output):
            names[:] = [name if not name or name in kept else f"cross.{name}" for name in names]
    read = {name for node in nodes for name in node.input}
    for tensor in other.initializer:
        if f"cross.{tensor.name}" in read:
            tensor.name = f"cross.{tensor.name}"
            graph.initializer.append(tensor)
    past = {value.name.replace("present", "past_key_values", 1): value.name for value in outputs}
    for node in graph.node:
        node.input[:] = [past.get(name, name) for name in node.input]
    own = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *own])
    given = [value for value in graph.input if value.name not in past]
    given += [value for value in other.input if value.name in read and value.name not in {v.name for v in given}]
    copies = [_copy(value) for value in given]
    del graph.input[:]
    graph.input.extend(copies)
    # the later one was traced with a single token and says so of its logits
    whole = [next((o for o in other.output if o.name == value.name == "logits"), value) for value in graph.output]
    whole = [_copy(value) for value in (*whole, *outputs)]
    del graph.output[:]
    graph.output.extend(whole)
    return later


def count_texts_alike(graph: Any) -> None:
    """Let every node that asks how many texts there are ask the encoder's states. Of the decoder's own states that is
    the same number, but they take whole layers to compute."""
    from onnx import numpy_helper

    known = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            known[node.output[0]] = next(each.t for each in node.attribute if each.name == "value")
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def counts(node: Any) -> bool:
        index = known.get(node.input[1]) if node.op_type == "Gather" else None
        return index is not None and not index.dims and numpy_helper.to_array(index) == 0

    for node in graph.node:
        if node.op_type == "Shape" and all(counts(reader) for reader in readers.get(node.output[0], [])):
            node.input[0] = "encoder_hidden_states"


def behind(graph: Any, names: set[str]) -> list[Any]:
    """The nodes that `names` are computed by, in the order of the graph."""
    needed, found = set(names), []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            found.append(node)
    return found[::-1]


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def name_final_norm(graph: Any) -> None:
    """Name the node that feeds the head as onnxruntime-genai's builder does: by that name the shipping form finds where
    it can leave out every position but the last."""
    made_by = {name: node for node in graph.node for name in node.output}
    head = made_by["logits"]
    while head.op_type not in ("MatMul", "Gemm"):  # a bias, a scale
        head = next(made_by[name] for name in head.input if name in made_by)
    norm = made_by[head.input[0]]
    norm.name = f"/model/final_norm_layernorm/{norm.op_type}"


def look_tokens_up(graph: Any) -> None:
    """Let the token table take `input_ids` itself where the model reshapes them to what they are, (batch, sequence):
    a table so indexed is known for one of tokens, and is quantised."""
    reshaped = {n.output[0] for n in graph.node if n.op_type == "Reshape" and n.input[0] == "input_ids"}
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Gather" and node.input[1] in reshaped and len(weights.get(node.input[0], ())) == 2:
            node.input[1] = "input_ids"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "versions":
        versions()
    else:
        {"build": build, "build_pair": build_pair}[sys.argv[1]](*sys.argv[2:])
