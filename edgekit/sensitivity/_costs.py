"""What formats cost, reckoned from what was measured: in between, added up, and as plain values.

Knows curves and sums; measures nothing and decides nothing (edgekit.mixing does).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.arch import Role
from edgekit.errors import CorruptCheckpoint
from edgekit.quant import ggml
from edgekit.quant.allocation import Option
from edgekit.sensitivity._groups import Assignment, Group, Part
from edgekit.shelf import unknown

_LEAST = 1e-12  # nats: below what float32 logits can tell


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
