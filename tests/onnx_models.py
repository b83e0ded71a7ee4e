"""ONNX graphs to test with: onnxruntime-genai's builder run on small checkpoints, and ONNX made by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

DEMO = Path(__file__).parents[1] / "edgekit" / "demo"


def genai(root: Path, out: Path, precision: str = "fp32", **options: str) -> Path:
    """model.onnx as `onnxruntime_genai.models.builder` makes it for the CPU."""
    for package in ("onnxruntime_genai", "torch", "transformers", "onnx_ir"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(root), "-o", str(out)]
    command += ["-p", precision, "-e", "cpu", "-c", str(out.parent / "cache")]
    if options:
        command += ["--extra_options", *(f"{k}={v}" for k, v in options.items())]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "model.onnx"


def everything() -> Any:
    """A ModelProto with every kind of tensor, attribute and nesting that the schema has. Not meant to run."""
    import numpy as np
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper as nh

    rng = np.random.default_rng(0)
    tensors = []
    for code in set(T.DataType.values()) - {T.UNDEFINED, T.STRING, T.FLOAT6E2M3, T.FLOAT6E3M2}:
        name = T.DataType.Name(code)
        values = rng.integers(0, 2, 15)
        for raw in (False, True):
            kind = h.tensor_dtype_to_np_dtype(code)
            tensor = nh.from_array(values.astype(kind).reshape(3, 5), f"{name}.{raw}")
            if not raw:
                tensor = h.make_tensor(f"{name}.{raw}", code, (3, 5), values.astype(kind).reshape(-1))
            tensors.append(tensor)
    tensors.append(h.make_tensor("texts", T.STRING, (2,), [b"one", "zwölf".encode()]))
    tensors.append(h.make_tensor("negative", T.INT64, (3,), [-1, 2**62, -(2**63)]))
    tensors.append(h.make_tensor("minus", T.INT8, (2,), [-128, 127]))
    tensors.append(h.make_tensor("nibbles", T.INT4, (3,), [-8, 7, -1]))
    tensors.append(h.make_tensor("scalar", T.FLOAT, (), [1.5]))
    tensors.append(h.make_tensor("none", T.FLOAT, (0, 4), []))
    inner = h.make_graph(
        [h.make_node("Identity", ["c"], ["y"], name="in")], "inner", [],
        [h.make_value_info("y", h.make_tensor_type_proto(1, [1]))],
        [h.make_tensor("c", T.FLOAT, (1,), [2.0])],
    )  # fmt: skip
    nodes = [
        h.make_node("If", ["cond"], ["z"], name="if", then_branch=inner, else_branch=inner),
        h.make_node(
            "Every", ["x", "", "w"], ["a", "b"], name="every", domain="com.example", f=1.5, i=-7, s="text",
            s2=b"\xff\xfe", floats=[0.5, -1.0], ints=[1, -2, 3], strings=["a", b"\xff"], t=tensors[0],
            tensors=tensors[:2], graphs=[inner],
        ),
        h.make_node("Constant", [], ["k"], name="k", value=h.make_tensor("k", T.INT64, (1,), [3])),
    ]  # fmt: skip
    inputs = [
        h.make_tensor_value_info("x", T.FLOAT16, ["batch", None, 4]),
        h.make_tensor_value_info("shapeless", T.INT64, None),
        h.make_tensor_sequence_value_info("many", T.FLOAT, ["n"]),
    ]
    graph = h.make_graph(nodes, "outer", inputs, [h.make_tensor_value_info("z", T.FLOAT, [1])], tensors)
    opsets = [h.make_opsetid("", 21), h.make_opsetid("com.example", 3)]
    function = h.make_function(
        "com.example", "Twice", ["p"], ["q"], [h.make_node("Add", ["p", "p"], ["q"])], opsets[:1]
    )
    model = h.make_model(graph, opset_imports=opsets, producer_name="us", producer_version="1", functions=[function])
    h.set_model_props(model, {"key": "value"})
    return model
