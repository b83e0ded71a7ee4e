"""The process that runs optimum-onnx's exporter. It knows that package and nothing of edgekit: it runs with the Python
of an environment in which edgekit is not installed.

    PYTHON -I _optimum_child.py versions
    PYTHON -I _optimum_child.py build MODEL_FOLDER OUTPUT_FOLDER

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
    _say("edgekit: 1/3 importing")
    import onnx
    from optimum.exporters.onnx import main_export

    _say("edgekit: 2/3 tracing")
    work = Path(folder, "optimum")
    main_export(
        root,
        work,
        task="text-generation-with-past",
        dtype="fp32",
        device="cpu",
        framework="pt",
        library_name="transformers",
        local_files_only=True,
        do_validation=False,  # edgekit proves the graph itself, against its own transformers
    )
    _say("edgekit: 3/3 writing")
    model = onnx.load(work / "model.onnx")  # above 2 GB the weights lie in a file of optimum's own naming
    name_final_norm(model.graph)
    look_tokens_up(model.graph)
    onnx.save_model(
        model,
        Path(folder, "model.onnx"),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="model.onnx.data",
        size_threshold=1024,
    )


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
        build(*sys.argv[2:])
