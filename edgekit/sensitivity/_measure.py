"""Measuring what formats cost: KL divergence in the running model, one group of matrices at a time.

Knows the loaded model and its text; reckons nothing in between (edgekit.sensitivity._costs does) and writes no file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from edgekit.quality import stderr_of_mean
from edgekit.quant import Format, ggml
from edgekit.reference import CompactReference, record
from edgekit.runtime.llama_cpp import LlamaSession
from edgekit.runtime.rounding import Inputs, inputs
from edgekit.runtime.weights import Weights
from edgekit.sensitivity._costs import Probe, Sensitivity
from edgekit.sensitivity._groups import (
    CONSIDERED,
    PASS,
    Array,
    Assignment,
    Bytes,
    Encode,
    Group,
    Importance,
    Part,
    find_effort,
    probed,
)
from edgekit.units import Progress, silent

_SKIP = 1 / 8  # of each chunk: predictions with next to no context are no model of use
SAMPLE = 1 << 17
"""Weights of a tensor that are rounded to tell formats apart."""

_SLAB = 4 << 20


def measure(
    session: LlamaSession,
    groups: Sequence[Group],
    formats: Sequence[str],
    chunks: Sequence[Sequence[int]],
    importance: Importance,
    *,
    effort: str = "normal",
    considered: Sequence[str] = CONSIDERED,
    combined: Sequence[Assignment] = (),
    encode: Encode | None = None,
    moments: Mapping[str, Array] | None = None,
    kept: MutableMapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Sensitivity:
    """Measure every group in every format of `formats` that it fits, on the first tokens of `chunks` (token ids).

    `session`: the unquantised model, opened with mmap=False; it is as before afterwards, also on an error. `encode`:
    what the final file will be encoded with, ggml's own kernels with `importance` unless given; an encoder with error
    feedback needs `moments` beside it, XᵀX (cols, cols) or (experts, cols, cols) by tensor name, by which formats that
    it improves and formats that it does not are compared. `combined`: whole assignments, a pass each, to correct
    predictions with. `kept`: gets every measured figure by a name, and what it holds already is not measured again; it
    must be of the same input. The same input gives the same result. Memory beside the model: the predictions of the
    text (a few MB), and one slab of a matrix. Progress: passes, as `passes` counts them.
    Raises RuntimeFailed where the weights cannot be overwritten, UnknownName for a matrix that the model lacks.
    """
    each = find_effort(effort)[1]
    text = _first_tokens(chunks, each * PASS)
    jobs = {f"probe {g.name}, {f}": (g, f) for g in groups for f in probed(g, formats)}
    whole = {f"whole {_digest(a)}": a for a in combined}
    kept = {} if kept is None else kept
    assignments = {name: {p.name: f for p in g.parts} for name, (g, f) in jobs.items()} | whole
    with Weights(session) as weights:
        rounded = encode or _plain(importance)
        _keep_errors(
            kept, session, weights, groups, {*considered, *(f for _, f in jobs.values())}, importance, text[0], rounded,
            moments or {},
        )  # fmt: skip
        _keep_costs(kept, session, weights, text, assignments, rounded, each, progress)
    return Sensitivity(
        tuple(groups),
        tuple(Probe(g.name, f, *kept[name]) for name, (g, f) in jobs.items()),
        kept["errors"],
        tuple((dict(a), *kept[name]) for name, a in whole.items()),
        sum(map(len, text)),
        {name: dict(pairs) for name, pairs in kept["inputs"].items()},
    )


def _digest(assignment: Assignment) -> str:
    return hashlib.sha256(json.dumps(sorted(assignment.items())).encode()).hexdigest()[:16]


def _keep_errors(
    kept: MutableMapping[str, Any],
    session: LlamaSession,
    weights: Weights,
    groups: Sequence[Group],
    formats: Iterable[str],
    importance: Importance,
    chunk: Sequence[int],
    encode: Encode,
    moments: Mapping[str, Array],
) -> None:
    """`errors` and `inputs` of a Sensitivity, the latter as pairs: keys of JSON objects are text."""
    if "errors" in kept and "inputs" in kept:
        return
    read = inputs(session, chunk)
    kept["errors"] = rounding_errors(weights, groups, formats, importance, read, encode, moments)
    names = [p.name for g in groups for p in g.parts]
    kept["inputs"] = {name: list(map(list, _from_inputs(weights, name, read).items())) for name in names}


def _keep_costs(
    kept: MutableMapping[str, Any],
    session: LlamaSession,
    weights: Weights,
    text: Sequence[Sequence[int]],
    assignments: Mapping[str, Assignment],
    encode: Encode,
    each: int,
    progress: Progress,
) -> None:
    """[KL, standard error] by the name of a probe or combination, each a pass; the reference is another."""
    todo = {name: a for name, a in assignments.items() if name not in kept}
    total = each * (1 + len(assignments))
    if not todo:
        progress("sensitivity", total, total)
        return
    reference = record(session, text, skip=_SKIP)
    done = total - each * len(todo)
    progress("sensitivity", done, total)
    for name, assignment in todo.items():
        kept[name] = list(_try(session, weights, reference, assignment, encode))
        done += each
        progress("sensitivity", done, total)


def rounding_errors(
    weights: Weights,
    groups: Sequence[Group],
    formats: Iterable[str],
    importance: Importance,
    read: Mapping[str, Inputs],
    encode: Encode,
    moments: Mapping[str, Array],
) -> dict[str, dict[str, float]]:
    """Tensor -> format -> the mean squared error of its outputs, summed over rows, reckoned from at most 131,072
    weights of each tensor and the mean squares of its inputs; from the full second moment where there is one."""
    found: dict[str, dict[str, float]] = {}
    order = [name for name in ggml.FORMATS if name in set(formats)]
    for part in (p for g in groups for p in g.parts):
        cost = found[part.name] = dict.fromkeys((n for n in order if part.fits(ggml.get(n), importance)), 0.0)
        for expert, rows, stands_for in _sample(weights, part):
            squares = _squares(part.name, expert, rows.shape[1], importance, read)
            moment = _of_expert(moments.get(part.name), expert, 2)
            for name in cost:
                data = encode(part.name, expert, rows, ggml.get(name))
                error = rows - ggml.decode(data, name, rows.shape[1])
                cost[name] += stands_for * _output_error(error, squares, moment)
        for name in cost:
            cost[name] = max(cost[name], 1e-30)  # a matrix of zeros costs nothing, but has a logarithm
    return found


def _output_error(error: Array, squares: npt.NDArray[np.float64], moment: Array | None) -> float:
    if moment is None:
        return float(np.square(error).sum(axis=0, dtype=np.float64) @ squares)
    scale = float(squares.mean()) / max(float(np.diag(moment).mean(dtype=np.float64)), 1e-30)
    return max(float(np.einsum("rc,rc->", error @ moment, error, dtype=np.float64)) * scale, 0.0)


def _squares(
    name: str, expert: int, cols: int, importance: Importance, read: Mapping[str, Inputs]
) -> npt.NDArray[np.float64]:
    """Mean squares of the inputs: as read just now, else the importance, else 1."""
    if name in read:
        return read[name].squares
    of = _of_expert(importance.get(name), expert, 1)
    return np.ones(cols) if of is None else of.astype(np.float64)


def _of_expert(values: Array | None, expert: int, dimensions: int) -> Array | None:
    return values[expert] if values is not None and values.ndim > dimensions else values


def _from_inputs(weights: Weights, name: str, read: Mapping[str, Inputs]) -> dict[int, float]:
    """Block size -> the mean squared error of the outputs of a matrix, summed over rows, that rounding inputs makes."""
    seen = read.get(name)
    if seen is None:
        return {}
    rows, cols = weights.shape(name)
    squares, step = np.zeros(cols), max(1, _SLAB // cols)
    for start in range(0, rows, step):
        squares += np.square(weights.read(name, start, min(rows, start + step))).sum(axis=0, dtype=np.float64)
    by = {32: seen.by_32, 256: seen.by_256}
    return {block: float(squares @ error) for block, error in by.items() if error is not None}


def _sample(weights: Weights, part: Part) -> Iterator[tuple[int, Array, float]]:
    """(expert, some of its rows at even distances, how many rows each stands for)."""
    experts = part.shape[0] if len(part.shape) > 2 else 1
    rows, cols = part.shape[-2:]
    wanted = min(rows, max(1, SAMPLE // (cols * experts)))
    for expert in range(experts):
        at = (np.arange(wanted) * rows // wanted + expert * rows).tolist()
        picked = np.concatenate([weights.read(part.name, row, row + 1) for row in at])
        yield expert, picked, rows / wanted


def _try(
    session: LlamaSession, weights: Weights, reference: CompactReference, assignment: Assignment, encode: Encode
) -> tuple[float, float]:
    """(KL, standard error) in nats a token of the model with `assignment` in place."""
    try:
        for name, fmt in assignment.items():
            _round(weights, name, ggml.get(fmt), encode)
        divergence = reference.columns(session).kl
    finally:
        weights.restore_all()
    return float(divergence.mean()), stderr_of_mean(divergence)


def _round(weights: Weights, name: str, fmt: Format, encode: Encode) -> None:
    """Send a tensor to `fmt` and back, in the running model."""
    shape = weights.shape(name)
    experts, (rows, cols) = prod(shape[:-2]), shape[-2:]
    step = max(1, _SLAB // cols // 512) * 512
    for expert in range(experts):
        for start in range(0, rows, step):
            first, last = expert * rows + start, expert * rows + min(start + step, rows)
            data = encode(name, expert, weights.read(name, first, last), fmt)
            weights.replace(name, ggml.decode(data, fmt, cols), first)


def _plain(importance: Importance) -> Encode:
    def encode(name: str, expert: int, rows: Array, fmt: Format) -> Bytes:
        return ggml.encode(rows, fmt, _of_expert(importance.get(name), expert, 1))

    return encode


def _first_tokens(chunks: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    found: list[Sequence[int]] = []
    for chunk in chunks:
        if tokens < 32:
            break
        found.append(chunk[:tokens])
        tokens -= len(found[-1])
    if not found:
        raise EdgekitError("there is no text to measure on", "give a longer --calibration FILE")
    return found
