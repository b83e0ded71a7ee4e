"""What each format costs each part of a model: KL divergence, measured in the running model one group at a time.

Knows groups, probes and how to reckon between them; writes no file and decides nothing (edgekit.mixing does).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt

from edgekit.arch import Blueprint, Role
from edgekit.errors import EdgekitError
from edgekit.quality import stderr_of_mean
from edgekit.quant import Format, ggml, presets
from edgekit.quant.allocation import Option
from edgekit.reference import CompactReference, record
from edgekit.runtime.llama_cpp import LlamaSession
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

Called with all rows of a matrix in order, in slabs of a multiple of 512 rows."""

PASS = 4096
"""Tokens of one forward pass, as probes are counted."""

PROBES = ("Q2_K", "Q3_K", "Q4_K", "Q6_K")
NARROW_PROBES = ("Q4_0", "Q5_0", "Q8_0")
"""What is measured unless told otherwise; the second where rows do not divide into blocks of 256."""

CONSIDERED = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
)
"""What a tensor may become, if it fits."""

_BUDGET = {"low": (12, 1), "normal": (30, 1), "high": (120, 2)}  # passes a format, and passes a probe
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


def groups_for(parts: Sequence[Part], formats: Sequence[str] = PROBES, effort: str = "normal") -> tuple[Group, ...]:
    """As many bands as the effort allows, one for each layer at most. Raises UnknownName."""
    limit, each = _effort(effort)
    layers = 1 + max((_layer(p.name) for p in parts), default=0)
    best = group(parts, 1)
    for bands in range(2, layers + 1):
        finer = group(parts, bands)
        if passes(finer, formats, effort) + _COMBINED * each > limit * len(formats):
            break
        best = finer
    return best


def passes(groups: Sequence[Group], formats: Sequence[str] = PROBES, effort: str = "normal", combined: int = 0) -> int:
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


def _probed(members: Group, formats: Iterable[str]) -> tuple[str, ...]:
    """Formats that all matrices of a group take; if it takes none of those asked for, the narrow ones."""
    for names in (formats, NARROW_PROBES):
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
    """

    groups: tuple[Group, ...]
    probes: tuple[Probe, ...]
    errors: Mapping[str, Mapping[str, float]] = field(repr=False)
    assignments: tuple[tuple[Assignment, float, float], ...] = field(default=(), repr=False)
    tokens: int = 0

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

    def cost(self, tensor: str, format: str) -> float:
        """Nats a token that `tensor` in `format` adds. 0 for the floats. Raises UnknownName."""
        if format in ("F32", "F16", "BF16"):
            return 0.0
        own = self._errors(tensor)
        if format not in own:
            raise unknown(f"format that was considered for {tensor}", format, own)
        members: Group = self.__dict__["_of"][tensor]
        total = sum(self.errors[p.name].get(format, own[format]) for p in members.parts)
        curve: tuple[tuple[float, float], ...] = self.__dict__["_curves"][members.name]
        return _along(curve, total) * own[format] / total

    def options(self, tensor: str, formats: Iterable[str] | None = None) -> list[Option]:
        """Every way to store `tensor` (of those named in `formats`), with its bytes and its cost in nats a token."""
        part = next(p for p in self.__dict__["_of"][tensor].parts if p.name == tensor)
        allowed = self._errors(tensor) if formats is None else [f for f in formats if f in self._errors(tensor)]
        return [Option(f, ggml.get(f).nbytes(part.shape), self.cost(tensor, f)) for f in allowed]

    def added(self, assignment: Assignment) -> float:
        """The sum of costs, nats a token."""
        return math.fsum(self.cost(name, fmt) for name, fmt in assignment.items())

    def predict(self, assignment: Assignment) -> float:
        """The KL divergence of a whole assignment, nats a token: the sum of costs, corrected by the combinations."""
        scale, power = self.correction
        return float(scale * max(self.added(assignment), _LEAST) ** power)

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
    progress: Progress = silent,
) -> Sensitivity:
    """Measure every group in every format of `formats` that it fits, on the first tokens of `chunks` (token ids).

    `session`: the unquantised model, opened with mmap=False; it is as before afterwards, also on an error. `encode`:
    what the final file will be encoded with, ggml's own kernels with `importance` unless given. `combined`: whole
    assignments, a pass each, to correct predictions with. The same input gives the same result. Memory beside the
    model: the predictions of the text (a few MB), and one slab of a matrix. Progress: passes, as `passes` counts them.
    Raises RuntimeFailed where the weights cannot be overwritten, UnknownName for a matrix that the model lacks.
    """
    each = _effort(effort)[1]
    text = _first_tokens(chunks, each * PASS)
    jobs = [(g, f) for g in groups for f in _probed(g, formats)]
    total, done = each * (1 + len(jobs) + len(combined)), 0
    rounded = encode or _plain(importance)

    def advance() -> None:
        nonlocal done
        done += each
        progress("sensitivity", done, total)

    with Weights(session) as weights:
        errors = rounding_errors(weights, groups, {*considered, *(f for _, f in jobs)}, importance)
        reference = record(session, text, skip=_SKIP)
        advance()

        def tried(assignment: Assignment) -> tuple[float, float]:
            found = _try(session, weights, reference, assignment, rounded)
            advance()
            return found

        probes = [Probe(g.name, f, *tried({p.name: f for p in g.parts})) for g, f in jobs]
        whole = [(a, *tried(a)) for a in combined]
    return Sensitivity(tuple(groups), tuple(probes), errors, tuple(whole), reference.tokens)


def rounding_errors(
    weights: Weights, groups: Sequence[Group], formats: Iterable[str], importance: Importance
) -> dict[str, dict[str, float]]:
    """Tensor -> format -> Σ importance x (weight - rounded)², reckoned from at most 131,072 weights of each tensor."""
    found: dict[str, dict[str, float]] = {}
    order = [name for name in ggml.FORMATS if name in set(formats)]
    for part in (p for g in groups for p in g.parts):
        blocks = list(_sample(weights, part))
        of = importance.get(part.name)
        cost = found[part.name] = dict.fromkeys((n for n in order if part.fits(ggml.get(n), importance)), 0.0)
        for expert, rows, stands_for in blocks:
            column = None if of is None else of[expert] if of.ndim > 1 else of
            for name in cost:
                back = ggml.decode(ggml.encode(rows, name, column), name, rows.shape[1])
                square = np.square(rows - back).sum(axis=0, dtype=np.float64)
                cost[name] += stands_for * float(square.sum() if column is None else square @ column)
        for name in cost:
            cost[name] = max(cost[name], 1e-30)  # a matrix of zeros costs nothing, but has a logarithm
    return found


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
        of = importance.get(name)
        return ggml.encode(rows, fmt, of[expert] if of is not None and of.ndim > 1 else of)

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
