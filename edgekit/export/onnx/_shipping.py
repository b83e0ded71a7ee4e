"""The shipping form of a decoder: edits of its graph and genai_config.json, no weight is read or written.

Knows the names that onnxruntime-genai's builder gives (final norm, caches, rotary tables) and no operator of a linear
layer: whatever a quantizer made of those stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import CorruptCheckpoint, EdgekitError
from edgekit.export.onnx._genai_child import COUNT, ROTARY
from edgekit.export.onnx._tensors import read_graph

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

ALL_POSITIONS = "model_all.onnx"
FINAL_NORM = "/final_norm_layernorm/"
TABLES = ("cos_cache", "sin_cache")


def ship(folder: Path, *, context: int, threads: int | None = None) -> None:
    """Turn the graph of `build`, quantized or not, in `folder` into what ships, in place.

    model.onnx gets logits of the last position alone, float32 (batch, 1, vocabulary), and, where layers slide a window
    shorter than `context` tokens, caches of the window's length that only onnxruntime-genai can fill. model_all.onnx
    has logits of every position and caches that plain onnxruntime grows from length 0. Both read the same data file.
    genai_config.json gets `context` as its limit, `threads` (None: the engine's choice, half of the cores), the
    sampling and the ends of generation of generation_config.json.
    Raises EdgekitError for a graph that is not `build`'s or is in this form already, CorruptCheckpoint.
    """
    path = folder / "model.onnx"
    model, config = read_graph(path), _read_config(folder)
    if not 0 < context <= config["model"]["context_length"]:
        limit = config["model"]["context_length"]
        raise EdgekitError(f"{folder}: a context of {context} tokens; the model has {limit}", "ask for less")
    _require_unpruned(path, model.graph)
    _save(model, folder / ALL_POSITIONS)
    prune_head(model.graph)
    windowed = _window_caches(model.graph, context)
    _configure(config, windowed, context, threads)
    _set_generation(config, _optional_json(folder / "generation_config.json"))
    _save(model, path)
    _write(folder / "genai_config.json", json.dumps(config, indent=2).encode())


def shorten_rope(path: Path, context: int) -> int:
    """Cut the rotary tables of the graph at `path` to `context` positions, in place -> positions cut.

    A row depends on its position alone, so the rows kept stay what they were; scaling by the full context included.
    Tables are computed when the graph is loaded, or stored: rows in the external data file become dead bytes there,
    which the quantizer does not copy.
    """
    model = read_graph(path)
    fewer = [_count_less(tensor, context) for tensor in _counts(model.graph)]
    fewer += [_cut(table, context) for table in _tables(model.graph)]
    cut = max(fewer, default=0)
    for value in model.graph.value_info:
        if value.name.startswith(TABLES):
            value.type.tensor_type.shape.dim[0].Clear()
    if cut:
        _save(model, path)
    return cut


# --- the graph -----------------------------------------------------------------------------------------------------


def prune_head(graph: GraphProto) -> None:
    """Let only the last position through the head: what the builder's `prune_lm_head` makes, after quantization."""
    from onnx import helper, numpy_helper

    at, norm = _final_norm(graph)
    hidden, last = norm.output[0], "/lm_head/prune/Unsqueeze/output_0"
    rewired = _downstream(graph, {hidden})
    for node in graph.node:
        node.input[:] = [last if name == hidden else name for name in node.input]
    index, axis = "/lm_head/prune/index", "/lm_head/prune/axis"
    row = "/lm_head/prune/Gather/output_0"
    graph.initializer.append(numpy_helper.from_array(_int64(-1), index))
    graph.initializer.append(numpy_helper.from_array(_int64([1]), axis))
    graph.node.insert(at + 1, helper.make_node("Gather", [hidden, index], [row], "/lm_head/prune/Gather", axis=1))
    graph.node.insert(at + 2, helper.make_node("Unsqueeze", [row, axis], [last], "/lm_head/prune/Unsqueeze"))
    kept = [value for value in graph.value_info if value.name not in rewired]  # shapes with the whole sequence
    del graph.value_info[:]
    graph.value_info.extend(kept)
    dimension = _logits(graph).type.tensor_type.shape.dim[1]
    dimension.Clear()
    dimension.dim_value = 1


def _int64(value: int | list[int]) -> Any:
    import numpy as np

    return np.array(value, np.int64)


def _final_norm(graph: GraphProto) -> tuple[int, NodeProto]:
    found = [(i, node) for i, node in enumerate(graph.node) if FINAL_NORM in node.name]
    if len(found) != 1:
        raise EdgekitError(f"the graph has {len(found)} final norms, not one", "export the model again")
    return found[0]


def _downstream(graph: GraphProto, reached: set[str]) -> set[str]:
    """Names of all values computed from `reached`; nodes are in topological order, as ONNX demands."""
    start, reached = reached, set(reached)
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
    return reached - start


def _window_caches(graph: GraphProto, context: int) -> dict[int, int]:
    """Bound the caches of sliding layers to their window -> {layer: tokens}. None where `context` fits in it."""
    from onnx import helper

    windowed = {}
    for node in graph.node:
        window = _attribute(node, "local_window_size") if node.op_type == "GroupQueryAttention" else -1
        if 0 < window < context:
            layer = int(node.input[3].split(".")[1])  # past_key_values.LAYER.key
            windowed[layer] = window
            node.attribute.append(helper.make_attribute("sliding_window_cache", 1))
    for value in (*graph.input, *graph.output):
        parts = value.name.split(".")
        if parts[0] in ("past_key_values", "present") and parts[-1] in ("key", "value") and int(parts[1]) in windowed:
            length = value.type.tensor_type.shape.dim[2]
            length.dim_param = length.dim_param.replace("sequence", "sliding")  # a length of its own
    if len(set(windowed.values())) > 1:
        raise EdgekitError(f"layers slide windows of {sorted(set(windowed.values()))} tokens; the engine knows one")
    return windowed


def _attribute(node: NodeProto, name: str) -> int:
    return next((a.i for a in node.attribute if a.name == name), -1)


def _logits(graph: GraphProto) -> ValueInfoProto:
    found: list[ValueInfoProto] = [value for value in graph.output if value.name == "logits"]
    if found:
        return found[0]
    raise EdgekitError("the graph has no output named logits", "export the model again")


def _require_unpruned(path: Path, graph: GraphProto) -> None:
    if _logits(graph).type.tensor_type.shape.dim[1].dim_value == 1:
        raise EdgekitError(f"{path} gives logits of the last position only: it is in its shipping form already")


def _counts(graph: GraphProto) -> Iterator[TensorProto]:
    """How many rows computed rotary tables have, int64 scalars."""
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0].startswith(ROTARY) and node.output[0].endswith(f"/{COUNT}"):
            yield node.attribute[0].t


def _tables(graph: GraphProto) -> Iterator[TensorProto]:
    """Stored rotary tables, float32 (positions, rotated dimensions / 2): initializers, or in the branches of an If."""
    for tensor in graph.initializer:
        if tensor.name.startswith(TABLES):
            yield tensor
    for node in graph.node:
        if node.op_type == "If":
            for branch in node.attribute:
                for constant in branch.g.node:
                    if constant.op_type == "Constant" and constant.output[0].startswith(TABLES):
                        yield constant.attribute[0].t


def _count_less(count: TensorProto, rows: int) -> int:
    """Let a table be computed with fewer rows -> rows fewer."""
    from onnx import numpy_helper

    extra = int(numpy_helper.to_array(count)) - rows
    if extra <= 0:
        return 0
    count.CopyFrom(numpy_helper.from_array(_int64(rows), count.name))
    return extra


def _cut(table: TensorProto, rows: int) -> int:
    """Drop rows from the end of a matrix -> rows dropped."""
    from onnx import TensorProto

    extra = table.dims[0] - rows
    if extra <= 0:
        return 0
    kept = rows * 4 * table.dims[1]
    table.dims[0] = rows
    if table.data_location == TensorProto.EXTERNAL:
        length = next(entry for entry in table.external_data if entry.key == "length")
        length.value = str(kept)
    else:
        table.raw_data = table.raw_data[:kept]
    return int(extra)


# --- genai_config.json ---------------------------------------------------------------------------------------------


def _configure(config: dict[str, Any], windowed: Mapping[int, int], context: int, threads: int | None) -> None:
    decoder = config["model"]["decoder"]
    config["model"]["context_length"] = config["search"]["max_length"] = context
    if threads is not None:
        decoder["session_options"]["intra_op_num_threads"] = threads
    decoder.pop("sliding_window", None)
    if windowed:
        decoder["sliding_window"] = {
            "window_size": next(iter(windowed.values())),
            "slide_key_value_cache": False,
            "slide_inputs": False,
            "layers": sorted(windowed),
            "cache_slack": 0,
        }


def _set_generation(config: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    """Sampling as the model's makers set it, greedy if they did not; generation ends at any end they name."""
    search = config["search"]
    search["do_sample"] = wanted.get("do_sample") is True
    for key in ("temperature", "top_k", "top_p", "repetition_penalty"):
        value = wanted.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            search[key] = value
    ends = [*_ids(wanted.get("eos_token_id")), *_ids(config["model"].get("eos_token_id"))]
    if ends := list(dict.fromkeys(ends)):
        config["model"]["eos_token_id"] = ends if len(ends) > 1 else ends[0]


def _ids(value: object) -> list[int]:
    found = value if isinstance(value, list) else [value]
    return [i for i in found if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


# --- files ---------------------------------------------------------------------------------------------------------


def _save(model: ModelProto, path: Path) -> None:
    _write(path, model.SerializeToString())


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(data)
    beside.replace(path)


def _read_config(folder: Path) -> dict[str, Any]:
    config = _optional_json(folder / "genai_config.json")
    decoder = config.get("model", {}).get("decoder", {})
    if not (isinstance(config.get("search"), dict) and isinstance(decoder.get("session_options"), dict)):
        raise CorruptCheckpoint(f"{folder / 'genai_config.json'} is missing or not the builder's", "export again")
    return config


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_bytes())
    except ValueError as e:
        raise CorruptCheckpoint(f"{path} is not JSON: {e}") from None
    return parsed if isinstance(parsed, dict) else {}
