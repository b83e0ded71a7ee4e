"""Rows of every matrix before and after quantization: does what lies in the file decode to the weights it stands for?

Knows where a graph keeps its matrices and how MatMulNBits and GatherBlockQuantized store them (ONNX Runtime's
ContribOperators.md); decodes on its own, apart from what encoded them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import VerificationFailed
from edgekit.onnx_file import Initializer, Node, OnnxFile, open_onnx

Floats = npt.NDArray[np.float32]

VALUES = 1 << 16
"""Weights that are compared of each matrix, at least LEAST rows."""
LEAST = 8
SLACK = 1.5
"""Sampled rows may be this much worse than the quantizer reports of the whole matrix."""
COARSEST = {8: 0.03, 4: 0.4}
"""Bits -> relative error from where on no rounding explains it, where nothing is reported: blocks of 256 and error
feedback are at a third of it."""

_SLAB = 4 << 20
_AGAIN = "please report this with `edgekit doctor --json`"


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some rows (outputs, or entries of a table) of a matrix: `values` float32 (rows, cols)."""

    indices: npt.NDArray[np.int64]
    values: Floats


def sample(graph: Path) -> dict[str, Rows]:
    """Rows of every float32 matrix and table in `graph`, spread evenly, by the name of the node that reads it.

    The file is read once, some MiB at a time.
    """
    file = open_onnx(graph)
    return {node.name: _rows(file, tensor, columns) for node, tensor, columns in _constants(file)}


def check(file: OnnxFile, samples: Mapping[str, Rows], reported: Mapping[str, float]) -> dict[str, float]:
    """Decode those rows from a quantised graph -> {format: largest relative error}.

    `reported`: what the quantizer says of each node. Raises VerificationFailed for rows that are further from their
    source than that, or than any rounding; and where no node of the samples' names is quantised.
    """
    worst: dict[str, float] = {}
    for node in file.every_node():
        rows = samples.get(node.name)
        if rows is None or node.op not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        bits, block = int(node.attributes.get("bits", 4)), int(node.attributes.get("block_size", 128))
        size = float(np.linalg.norm(rows.values))
        error = float(np.linalg.norm(_decoded(file, node, rows) - rows.values)) / size if size else 0.0
        bound = SLACK * reported[node.name] + 1e-4 if node.name in reported else COARSEST.get(bits, 1.0)
        if not error <= min(bound, COARSEST.get(bits, 1.0)):
            raise VerificationFailed(
                f"{file.path.name}: the weights of {node.name} differ from the source by {error:.3f} of their size "
                f"(at most {bound:.3f} is rounding)",
                _AGAIN,
            )
        name = f"int{bits} b{block}"
        worst[name] = max(error, worst.get(name, 0.0))
    if samples and not worst:
        raise VerificationFailed(f"{file.path.name}: no matrix of the source is quantised in it", _AGAIN)
    return worst


def _constants(file: OnnxFile) -> Iterator[tuple[Node, Initializer, bool]]:
    """(node, its float32 matrix, whether the outputs are its columns) of MatMul, Gemm and Gather."""
    turned = {n.outputs[0]: n.inputs[0] for n in file.nodes if n.op == "Transpose"}
    for node in file.nodes:
        if node.op not in ("MatMul", "Gemm", "Gather"):
            continue
        name = node.inputs[0 if node.op == "Gather" else 1]
        columns = node.op != "Gather" and not (node.op == "Gemm" and node.attributes.get("transB") == 1)
        if name in turned and turned[name] in file.initializers:
            name, columns = turned[name], not columns
        tensor = file.initializers.get(name)
        if tensor is not None and tensor.dtype == "float32" and len(tensor.shape) == 2 and tensor.storage != "typed":
            yield node, tensor, columns


def _rows(file: OnnxFile, tensor: Initializer, columns: bool) -> Rows:
    rows, cols = tensor.shape[::-1] if columns else tensor.shape
    count = min(rows, max(LEAST, VALUES // max(cols, 1)))
    indices = np.unique(np.linspace(0, rows - 1, count).round().astype(np.int64))
    if not columns:
        return Rows(indices, _picked(file, tensor, np.dtype(np.float32), tensor.shape[1], indices))
    step = max(1, _SLAB // max(rows, 1))
    parts = []
    for start in range(0, cols, step):
        slab = _read(file, tensor, np.dtype(np.float32), start * rows, min(step, cols - start) * rows)
        parts.append(slab.reshape(-1, rows)[:, indices].T)
    return Rows(indices, np.ascontiguousarray(np.concatenate(parts, axis=1)))


def _picked(
    file: OnnxFile, tensor: Initializer, kind: np.dtype[Any], width: int, indices: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    """(len(indices), width): rows of `width` values of a tensor."""
    return np.stack([_read(file, tensor, kind, int(i) * width, width) for i in indices])


def _read(file: OnnxFile, tensor: Initializer, kind: np.dtype[Any], start: int, count: int) -> npt.NDArray[Any]:
    path = file.path if tensor.file is None else file.external_files()[tensor.file]
    found = np.fromfile(path, kind, count, offset=tensor.offset + start * kind.itemsize)
    if len(found) != count:
        raise VerificationFailed(f"{path.name} ends inside {tensor.name}", "convert again")
    return found


def _decoded(file: OnnxFile, node: Node, rows: Rows) -> Floats:
    """float32 (rows, cols) of the quantised node: (q - zero) · scale, the first value in the low bits."""
    bits, block = int(node.attributes.get("bits", 4)), int(node.attributes.get("block_size", 128))
    cols = rows.values.shape[1]
    blocks = -(-cols // block)
    table = node.op == "GatherBlockQuantized"
    data, scales = _tensor(file, node, 0 if table else 1), _tensor(file, node, 2)
    bytes_ = _picked(file, data, np.dtype(np.uint8), blocks * block * bits // 8, rows.indices)
    scale = _picked(file, scales, np.dtype(np.float32), blocks, rows.indices)
    zero = np.full(scale.shape, 1 << (bits - 1), np.float32)
    if len(node.inputs) > 3 and node.inputs[3]:
        width = -(-blocks * bits // 8)
        packed = _picked(file, _tensor(file, node, 3), np.dtype(np.uint8), width, rows.indices)
        zero = _unpacked(packed, bits)[:, :blocks]
    values = _unpacked(bytes_, bits).reshape(len(rows.indices), blocks, block)
    return np.asarray(((values - zero[..., None]) * scale[..., None]).reshape(len(rows.indices), -1)[:, :cols])


def _unpacked(packed: npt.NDArray[Any], bits: int) -> Floats:
    if bits == 8:
        return packed.astype(np.float32)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1).astype(np.float32)


def _tensor(file: OnnxFile, node: Node, index: int) -> Initializer:
    """The initializer behind an input, through the Reshape of a shared table."""
    name = node.inputs[index]
    shaped = {n.outputs[0]: n.inputs[0] for n in file.nodes if n.op == "Reshape"}
    found = file.initializers.get(shaped.get(name, name))
    if found is None or found.storage == "typed":
        raise VerificationFailed(f"{file.path.name}: input {name!r} of {node.name} is not a weight in the file", _AGAIN)
    return found
