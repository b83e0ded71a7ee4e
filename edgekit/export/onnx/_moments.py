"""Second moments of what the matrices of an ONNX graph multiply, collected by running the graph on token ids.

Knows the inputs of decoder and encoder graphs; knows neither text nor number formats. Keys are tensor names of the
graph, so that matrices which read the same tensor share one moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit.artifact import readable_os_errors
from edgekit.errors import CorruptCheckpoint, EdgekitError, RuntimeFailed
from edgekit.export.onnx._matrices import drop_unused, find_uses
from edgekit.export.onnx._running import empty_cache
from edgekit.export.onnx._tensors import FLOAT, read_graph
from edgekit.ort_library import failures, onnxruntime, options
from edgekit.quant import nbits
from edgekit.units import GIB, Progress, silent

if TYPE_CHECKING:
    from onnx import ModelProto

Moment = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Batch = Ids | Mapping[str, Ids]
"""Token ids (sequences, tokens), all of them seen; or the graph's inputs by name, `attention_mask` saying which are."""

_INDEX = "moments.json"

MEMORY = 2 * GIB
"""Bytes that moments in the making and the activations of a batch may take."""


def observe(
    graph: Path,
    batches: Sequence[Batch],
    *,
    spill: Path | None = None,
    memory: int = MEMORY,
    threads: int = 1,
    progress: Progress = silent,
) -> dict[str, Moment]:
    """Float32 graph and batches of ids -> XᵀX, float32 (cols, cols), of each tensor that a constant matrix multiplies.

    X has a row for every token that a batch's mask keeps. Tensors are taken in groups that need at most `memory` bytes,
    each group reading all batches with the part of the graph that it needs; a moment that alone would be too large is
    its diagonal, float32 (cols,). `spill`: a folder for finished moments, which are then mapped from there instead of
    kept. `progress` counts batches. Raises EdgekitError for inputs that nobody here knows, MissingExtra, RuntimeFailed.
    """
    sizes = _sizes(graph)
    if not sizes or not batches:
        raise EdgekitError(f"{graph} has no matrix to observe, or there is no text", "calibrate with more text")
    tokens = max(_mask(batch).size for batch in batches)
    groups = list(_groups(sizes, tokens, memory))
    found: dict[str, Moment] = {}
    for number, group in enumerate(groups):
        session = _session(graph, group, threads)
        sums = {name: np.zeros((cols, cols) if full else cols, np.float32) for name, (cols, full) in group.items()}
        for done, batch in enumerate(batches):
            _add(session, graph, batch, sums)
            progress("observe", number * len(batches) + done + 1, len(groups) * len(batches))
        del session
        found.update(sums if spill is None else _spilled(sums, spill, len(found)))
    if spill is not None:
        (spill / _INDEX).write_text(json.dumps(list(found)), encoding="utf-8")
    return found


def open_moments(folder: Path) -> dict[str, Moment]:
    """What `observe` left in `folder`, mapped. Raises OSError, ValueError for what it did not write."""
    names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return {name: np.load(folder / f"{number}.npy", mmap_mode="r") for number, name in enumerate(names)}


def moment_bytes(graph: Path) -> int:
    """Bytes that the moments of `graph` take, at most."""
    return sum(4 * cols * cols for cols in _sizes(graph).values())


def _spilled(sums: Mapping[str, Moment], folder: Path, first: int) -> dict[str, Moment]:
    """Moments written to numbered files in `folder` and mapped from there."""
    found: dict[str, Moment] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with readable_os_errors(folder):
        for number, (name, total) in enumerate(sums.items(), first):
            np.save(folder / f"{number}.npy", total)
            found[name] = np.load(folder / f"{number}.npy", mmap_mode="r")
    return found


def _sizes(graph: Path) -> dict[str, int]:
    """Tensor -> columns, in the order of the graph."""
    uses = find_uses(read_graph(graph).graph, graph.parent)
    return {
        str(use.node.input[0]): use.matrix.cols
        for use in uses
        if not use.table and nbits.worthwhile(use.matrix.rows, use.matrix.cols)
    }


def _groups(sizes: Mapping[str, int], tokens: int, memory: int) -> Iterator[dict[str, tuple[int, bool]]]:
    """Runs of tensors with (columns, whether the moment is kept in full) that fit together, at least one each."""
    group: dict[str, tuple[int, bool]] = {}
    used = 0
    for name, cols in sizes.items():
        activations = 2 * 4 * tokens * cols  # the runtime's and the copy without masked tokens
        full = 4 * cols * cols + activations <= memory
        need = activations + 4 * cols * (cols if full else 1)
        if group and used + need > memory:
            yield group
            group, used = {}, 0
        group[name] = cols, full
        used += need
    yield group


def _session(graph: Path, wanted: Mapping[str, Any], threads: int) -> Any:
    """A session of the part of `graph` that leads to `wanted`, which are its outputs."""
    model = read_graph(graph)
    _ask_for(model, wanted)
    settings = options(threads)
    # without it external data would be looked for in the working directory
    settings.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.parent.resolve())
    )
    library = onnxruntime()
    try:
        return library.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    except failures() as refused:
        raise RuntimeFailed(f"onnxruntime does not load {graph}: {refused}", "export the model again") from refused


def _ask_for(model: ModelProto, wanted: Mapping[str, Any]) -> None:
    from onnx import helper

    graph = model.graph
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in wanted)
    drop_unused(graph)


def _add(session: Any, graph: Path, batch: Batch, sums: Mapping[str, Moment]) -> None:
    """Run one batch and add what the tensors hold to their sums."""
    feeds = _feeds(session, graph, batch)
    seen = _mask(batch) != 0
    try:
        outputs = session.run(list(sums), feeds)
    except failures() as refused:
        raise RuntimeFailed(f"onnxruntime does not run {graph}: {refused}", "export the model again") from refused
    for name, values in zip(sums, outputs, strict=True):
        x = _kept(values, seen)
        if not np.isfinite(x.sum(dtype=np.float64)):
            raise CorruptCheckpoint(f"{name} of {graph} is not finite on calibration text", "check the checkpoint")
        total = sums[name]
        total += x.T @ x if total.ndim == 2 else np.square(x).sum(axis=0)


def _kept(values: Moment, seen: npt.NDArray[np.bool_]) -> Moment:
    """Activations (..., cols) -> a row for each token that counts; where rows are no tokens (a pooler's), all."""
    x = values.reshape(-1, values.shape[-1])
    return x[seen.ravel()] if len(x) == seen.size and not seen.all() else x


def _mask(batch: Batch) -> Ids:
    if isinstance(batch, Mapping):
        return batch.get("attention_mask", np.ones_like(batch["input_ids"]))
    return np.ones_like(batch)


def _feeds(session: Any, graph: Path, batch: Batch) -> dict[str, npt.NDArray[Any]]:
    """Every input the graph asks for: as given, or what it is at the start of a text."""
    given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    mask = _mask(batch)
    given.setdefault("attention_mask", mask)
    given.setdefault("position_ids", np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    given.setdefault("token_type_ids", np.zeros_like(mask))
    feeds: dict[str, npt.NDArray[Any]] = {}
    for wanted in session.get_inputs():
        if wanted.name in given:
            kind = np.int32 if wanted.type == "tensor(int32)" else np.int64
            feeds[wanted.name] = given[wanted.name].astype(kind)
        elif wanted.name.startswith("past"):
            feeds[wanted.name] = empty_cache(wanted, len(mask), graph)
        else:
            raise EdgekitError(
                f"{graph} has an input {wanted.name!r} that nobody here knows", "convert without --calibration"
            )
    return feeds
