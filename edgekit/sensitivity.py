"""What each format costs each part of a model: KL divergence, measured in the running model one group at a time.

Knows groups, probes and how to reckon between them; writes no file and decides nothing (edgekit.mixing does).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.arch import Blueprint, Role
from edgekit.errors import CorruptCheckpoint, EdgekitError
from edgekit.quality import stderr_of_mean
from edgekit.quant import Format, ggml, presets
from edgekit.quant.allocation import Option
from edgekit.reference import CompactReference, record
from edgekit.runtime.llama_cpp import LlamaSession
from edgekit.runtime.rounding import Inputs, inputs
from edgekit.runtime.weights import Weights
from edgekit.shelf import unknown
from edgekit.units import Progress, silent

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Importance = Mapping[str, Array]
"""Mean squares of input columns by tensor name: float32 (cols,), or (experts, cols)."""
Assignment = Mapping[str, str]
"""Format name by tensor name; tensors that are not named stay as they are."""
Encode = Callable[[str, int, Array, Format], Bytes]
"""(tensor, which matrix of the stack, float32 rows of it (r, cols), format) -> uint8 (r, row_bytes).

Called with some rows of a matrix at a time, so a row must not depend on others."""

PASS = 4096
"""Tokens of one forward pass, as probes are counted."""

PROBES = (("Q2_K", "Q3_K", "Q4_K", "Q6_K"), ("Q2_K", "Q4_K"), ("Q3_K",))
"""Formats that are measured: as many as the effort allows for every matrix by itself, since formats follow one another
more closely than layers do (docs/sensitivity.md)."""

NARROW_PROBES = ("Q4_0", "Q8_0", "Q5_0")
"""The first of these, as many as asked for, where rows do not divide into blocks of 256."""

CONSIDERED = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
)
"""What a tensor may become, if it fits."""

COMBINED = ("Q4_K_M", "Q2_K")
"""Stock presets that are measured as a whole, whatever the file will be: what was measured serves files of any size."""

_BUDGET = {"low": (48, 1), "normal": (120, 1), "high": (480, 2)}  # passes in all, and passes a probe
_COMBINED = 4  # passes reserved for combinations, to see how far costs add up
_SKIP = 1 / 8  # of each chunk: predictions with next to no context are no model of use
_SAMPLE = 1 << 17  # weights of a tensor that are rounded to tell formats apart
_SLAB = 4 << 20
_LEAST = 1e-12  # nats: below what float32 logits can tell


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix whose format may be chosen: name, shape in numpy order, role."""

    name: str
    shape: tuple[int, ...]
    role: Role

    def fits(self, fmt: Format, importance: Importance) -> bool:
        return fmt.fits(self.shape) and (not fmt.needs_importance or self.name in importance)


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices of one role in neighbouring layers, tried together."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """KL divergence in nats a token, on calibration text, of one group in one format; and its standard error."""

    group: str
    format: str
    kl: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Combined:
    """A whole assignment, measured, beside what adding up gives: nats a token."""

    assignment: Assignment = field(repr=False)
    kl: float
    stderr: float
    added: float


# --- what is tried ---------------------------------------------------------------------------------------------------


def parts_of(blueprint: Blueprint) -> tuple[Part, ...]:
    """The matrices that presets quantise: no norm, bias, router or position table, whatever the preset."""
    chosen = presets.choose("Q8_0", blueprint)
    return tuple(Part(c.tensor.name, c.tensor.shape, c.tensor.role) for c in chosen if c.wanted == "Q8_0")


def combinations(blueprint: Blueprint, importance: Collection[str]) -> list[Assignment]:
    """The assignments of COMBINED; `importance`: names of the tensors that have it."""
    names = {p.name for p in parts_of(blueprint)}
    chosen = (presets.choose(preset, blueprint, importance=importance) for preset in COMBINED)
    return [{c.tensor.name: c.format for c in choices if c.tensor.name in names} for choices in chosen]


def group(parts: Sequence[Part], bands: int) -> tuple[Group, ...]:
    """Role by band: the layers cut into `bands` of equal length; what belongs to no layer is a group of its own."""
    last = max((_layer(p.name) for p in parts), default=-1)
    found: dict[str, list[Part]] = {}
    for part in parts:
        layer = _layer(part.name)
        band = layer * bands // (last + 1) if layer >= 0 else 0
        # widths that take other formats cannot share a probe
        where = f"{part.role} {band}" if layer >= 0 else part.name
        found.setdefault(where if part.shape[-1] % 256 == 0 else f"{where} narrow", []).append(part)
    return tuple(Group(name, tuple(members)) for name, members in found.items())


def choose_probes(parts: Sequence[Part], effort: str = "normal") -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """What to measure within the effort's passes: every matrix by itself in as many formats as possible; where not even
    one is, bands of layers in one format. Raises UnknownName."""
    limit, _ = _effort(effort)
    layers = 1 + max((_layer(p.name) for p in parts), default=0)
    for bands in range(layers, 0, -1):
        groups = group(parts, bands)
        for formats in PROBES if bands == layers else PROBES[-1:]:
            if passes(groups, formats, effort, combined=_COMBINED) <= limit:
                return groups, formats
    return group(parts, 1), PROBES[-1]


def passes(groups: Sequence[Group], formats: Sequence[str], effort: str = "normal", *, combined: int = 0) -> int:
    """Forward passes of 4,096 tokens that `measure` takes at most: probes, combinations, and the reference itself."""
    _, each = _effort(effort)
    return each * (1 + combined + sum(len(_probed(g, formats)) for g in groups))


def _effort(name: str) -> tuple[int, int]:
    if name not in _BUDGET:
        raise unknown("effort", name, _BUDGET)
    return _BUDGET[name]


def _layer(name: str) -> int:
    match = re.match(r"blk\.([0-9]+)\.", name)
    return int(match[1]) if match else -1


def _probed(members: Group, formats: Sequence[str]) -> tuple[str, ...]:
    """Formats that all matrices of a group take; if it takes none of those asked for, as many narrow ones."""
    for names in (formats, NARROW_PROBES[: len(formats)]):
        if found := tuple(n for n in names if all(ggml.get(n).fits(p.shape) for p in members.parts)):
            return found
    return ()


# --- what it costs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivity:
    """The measured cost of each (group, format), and what follows for each tensor and for formats in between.

    `errors`: tensor -> format -> squared rounding error weighted by importance, the proxy by which a group's cost is
    shared out among its tensors, and by which formats are placed between those measured (log cost over log error;
    beyond the ends cost is in proportion to error). `combined`: whole assignments that were measured too.
    `inputs`: tensor -> block size -> squared error of its outputs, in the same unit, that rounding its inputs to 8 bits
    makes. Probes do not have it, since floats are not rounded; files on CPUs do, and `cpu=True` adds it in.
    """

    groups: tuple[Group, ...]
    probes: tuple[Probe, ...]
    errors: Mapping[str, Mapping[str, float]] = field(repr=False)
    assignments: tuple[tuple[Assignment, float, float], ...] = field(default=(), repr=False)
    tokens: int = 0
    inputs: Mapping[str, Mapping[int, float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_of", {p.name: g for g in self.groups for p in g.parts})
        object.__setattr__(self, "_curves", {g.name: self._curve(g) for g in self.groups})
        object.__setattr__(self, "_correction", _fit([(c.added, c.kl) for c in self.combined]))

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(p for g in self.groups for p in g.parts)

    @property
    def combined(self) -> tuple[Combined, ...]:
        return tuple(Combined(a, kl, stderr, self.added(a)) for a, kl, stderr in self.assignments)

    @property
    def correction(self) -> tuple[float, float]:
        """(scale, power): what is measured of a combination is about scale x (sum of costs) ^ power."""
        found: tuple[float, float] = self.__dict__["_correction"]
        return found

    def formats(self, tensor: str) -> tuple[str, ...]:
        """What `tensor` may become. Raises UnknownName."""
        return tuple(self._errors(tensor))

    def cost(self, tensor: str, format: str, *, cpu: bool = False) -> float:
        """Nats a token that `tensor` in `format` adds. 0 for the floats. Raises UnknownName."""
        if format in ("F32", "F16", "BF16"):
            return 0.0
        own = self._errors(tensor)
        if format not in own:
            raise unknown(f"format that was considered for {tensor}", format, own)
        members: Group = self.__dict__["_of"][tensor]
        total = sum(self.errors[p.name].get(format, own[format]) for p in members.parts)
        curve: tuple[tuple[float, float], ...] = self.__dict__["_curves"][members.name]
        found = _along(curve, total) * own[format] / total
        if cpu:
            # small errors cost in proportion, whether a weight or an input was rounded
            found += self.inputs.get(tensor, {}).get(_input_block(format), 0.0) * curve[0][1] / curve[0][0]
        return found

    def options(self, tensor: str, formats: Iterable[str] | None = None, *, cpu: bool = False) -> list[Option]:
        """Every way to store `tensor` (of those named in `formats`), with its bytes and its cost in nats a token."""
        part = next(p for p in self.__dict__["_of"][tensor].parts if p.name == tensor)
        allowed = self._errors(tensor) if formats is None else [f for f in formats if f in self._errors(tensor)]
        return [Option(f, ggml.get(f).nbytes(part.shape), self.cost(tensor, f, cpu=cpu)) for f in allowed]

    def added(self, assignment: Assignment, *, cpu: bool = False) -> float:
        """The sum of costs, nats a token."""
        return math.fsum(self.cost(name, fmt, cpu=cpu) for name, fmt in assignment.items())

    def predict(self, assignment: Assignment, *, cpu: bool = False) -> float:
        """The KL divergence of a whole assignment, nats a token: the sum of costs, corrected by the combinations.

        `cpu`: of a file that llama.cpp's CPU backend runs, which rounds inputs too.
        """
        scale, power = self.correction
        return float(scale * max(self.added(assignment, cpu=cpu), _LEAST) ** power)

    def as_json(self) -> dict[str, Any]:
        """Plain values, of which `from_json` makes the same again."""
        return {
            "groups": [[g.name, [[p.name, list(p.shape), p.role.value] for p in g.parts]] for g in self.groups],
            "probes": [[p.group, p.format, p.kl, p.stderr] for p in self.probes],
            "errors": {name: dict(by) for name, by in self.errors.items()},
            "assignments": [[dict(a), kl, stderr] for a, kl, stderr in self.assignments],
            "tokens": self.tokens,
            "inputs": {name: [list(pair) for pair in by.items()] for name, by in self.inputs.items()},
        }

    def _errors(self, tensor: str) -> Mapping[str, float]:
        if tensor not in self.errors:
            raise unknown("matrix that was measured", tensor, self.errors)
        return self.errors[tensor]

    def _curve(self, members: Group) -> tuple[tuple[float, float], ...]:
        """(error, cost) of the probes of a group, by error; costs that drown in their noise are lifted, see `_lift`."""
        found = [
            (sum(self.errors[p.name][probe.format] for p in members.parts), probe.kl, probe.stderr)
            for probe in self.probes
            if probe.group == members.name
        ]
        return _lift(sorted(found))


def from_json(data: Mapping[str, Any]) -> Sensitivity:
    """What `Sensitivity.as_json` made. Raises CorruptCheckpoint for anything else."""
    try:
        groups = tuple(
            Group(name, tuple(Part(part, tuple(shape), Role(role)) for part, shape, role in parts))
            for name, parts in data["groups"]
        )
        return Sensitivity(
            groups,
            tuple(Probe(*probe) for probe in data["probes"]),
            data["errors"],
            tuple((dict(a), float(kl), float(stderr)) for a, kl, stderr in data["assignments"]),
            int(data["tokens"]),
            {name: {int(block): float(error) for block, error in by} for name, by in data["inputs"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CorruptCheckpoint(f"these are no measured costs: {e}", "measure them again") from None


def _input_block(format: str) -> int:
    """Values that share a step when the CPU rounds the input of a matrix in `format` (vec_dot_type, ggml-cpu.c)."""
    return 256 if ggml.get(format).block == 256 else 32


def _lift(points: Sequence[tuple[float, float, float]]) -> tuple[tuple[float, float], ...]:
    """(error, KL, its standard error) by rising error -> (error, cost). A KL that is below twice its standard error
    counts at least as much as the next coarser probe predicts, cost being in proportion to error."""
    above: tuple[float, float] | None = None
    found = []
    for error, kl, stderr in reversed(points):
        noisy = kl < 2 * stderr or kl <= _LEAST
        floor = above[1] * error / above[0] if above and noisy else _LEAST
        above = (error, max(kl, floor, _LEAST))
        found.append(above)
    return tuple(reversed(found))


def _along(curve: Sequence[tuple[float, float]], error: float) -> float:
    """Cost at `error` on a curve of (error, cost): straight in logarithms, of slope 1 beyond both ends."""
    if error <= curve[0][0] or len(curve) == 1:
        return curve[0][1] * error / curve[0][0]
    if error >= curve[-1][0]:
        return curve[-1][1] * error / curve[-1][0]
    x, y = np.log(np.array(curve)).T
    return float(np.exp(np.interp(math.log(error), x, y)))


def _fit(seen: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares in logarithms of (sum, measured): (scale, power). A power needs sums that differ by half."""
    points = [(math.log(a), math.log(b)) for a, b in seen if a > _LEAST and b > _LEAST]
    if not points:
        return 1.0, 1.0
    x, y = np.array(points).T
    spread = x - x.mean()
    power = float(spread @ y / (spread @ spread)) if np.ptp(x) > 0.4 else 1.0
    return float(np.exp(y.mean() - power * x.mean())), power


# --- measuring -------------------------------------------------------------------------------------------------------


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
    each = _effort(effort)[1]
    text = _first_tokens(chunks, each * PASS)
    jobs = {f"probe {g.name}, {f}": (g, f) for g in groups for f in _probed(g, formats)}
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
    wanted = min(rows, max(1, _SAMPLE // (cols * experts)))
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
