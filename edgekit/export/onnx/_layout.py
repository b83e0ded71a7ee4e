"""A graph as transformers.js wants it: with its weights inside, or with one data file that config.json announces.

Knows files and external data; knows no model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.checkpoint._files import inside, read_json
from edgekit.errors import CorruptCheckpoint
from edgekit.export.onnx._tensors import read_graph

if TYPE_CHECKING:
    from onnx import ModelProto


def write_one_file(graph: Path, out: Path) -> None:
    """`graph` with its weights inside."""
    import onnx

    out.write_bytes(onnx.load(graph).SerializeToString())


def write_two_files(graph: Path, out: Path, change: Callable[[ModelProto], None] | None = None) -> None:
    """The graph, `change`d, and its one data file as transformers.js calls it. Raises CorruptCheckpoint."""
    model = read_graph(graph)
    name = f"{out.name}_data"
    found = set()
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                found.add(entry.value)
                entry.value = name
    if len(found) != 1:
        raise CorruptCheckpoint(f"{graph} keeps its weights in {len(found)} files, not in one", "export it again")
    if change is not None:
        change(model)
    shutil.copyfile(inside(graph.parent, found.pop()), out.with_name(name))
    out.write_bytes(model.SerializeToString())


def announce(config: Path, *names: str) -> None:
    """Tell transformers.js of one data file beside each of these graphs."""
    said = read_json(config.parent, config.name)
    said["transformers.js_config"] = {"use_external_data_format": dict.fromkeys(names, 1)}
    config.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
