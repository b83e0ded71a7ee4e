"""Scales of input channels that make matrices easier to round: more room for columns whose errors cost more.

Knows matrices that read one input, their formats and what is known of the input; knows no model and no names.

A matrix W with input x may as well be W·diag(s) with input x/s (AWQ, Lin et al., 2023, arXiv:2306.00978). Rounding
moves the weights of a group by up to a step, which the group's range sets; so with s the error costs, but for a
constant, Σ over rows and groups of (range of the group's W·s)² · Σ over its columns of cost[c]/s[c]². That needs no
grid of guesses: given all other scales, the best of one channel is found exactly.

With error feedback the cost of a column is its pivot in H = U·D·Uᵀ, for then the error is Σ D[k]·r[k]² with r[k] a
plain rounding error (see gptq), and D becomes D/s² when H becomes H/(s·sᵀ). Without it, it is the mean square. What is
forecast in this way is then tried with the encoder itself, and kept only where it wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgekit.quant import Format, ggml, gptq
from edgekit.quant._blocks import LAYOUTS, Floats

FORMATS = frozenset(LAYOUTS)
"""Names of the formats whose groups are ranges of single weights: those that scales can help."""

LIMIT = 4.0
"""Largest scale, and inverse of the smallest: activations and caches in half precision stay in range."""

Index = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]
Costs = npt.NDArray[np.float64]

_SWEEPS = (0.5, 0.25, 0.125)  # steps of each sweep over all channels, in powers of two
_STEPS = (0, -1, 1, -2, 2)  # tried for each channel; of equal costs, as of a dead channel, the first wins
_STRENGTHS = (1.0, 0.5)  # powers of the scales that are tried with the encoder until one wins
_WORTH = 0.995  # of the error: less gain than that is chance


@dataclass(frozen=True, slots=True)
class Reader:
    """A matrix, or rows taken from it, float32 (rows, cols), and what is known of its input: `importance` float32
    (cols,), mean squares, and with `curvature` the second moment by which error feedback will encode it.

    `trial`: rows that scales are tried on. Where `rows` are a part of the matrix it should be others: a few hundred
    rows can be fitted by a few percent more than the matrix that they come from. None: `rows`."""

    rows: Floats
    format: Format
    importance: Floats
    curvature: gptq.Curvature | None = None
    trial: Floats | None = None

    @property
    def costs(self) -> Floats:
        """Of a squared rounding error in each column, float32 (cols,)."""
        return self.importance if self.curvature is None else self.curvature.pivots

    def scaled(self, scales: Floats) -> Reader:
        """The same matrix with columns times `scales` (cols,), reading an input divided by them."""
        curvature = None if self.curvature is None else divided(self.curvature, scales)
        importance = (self.importance / np.square(scales)).astype(np.float32)
        trial = None if self.trial is None else self.trial * scales
        return Reader(self.rows * scales, self.format, importance, curvature, trial)

    def error(self) -> float:
        """What encoding the trial rows adds to the squares of their outputs, in units of importance or moment."""
        rows = self.rows if self.trial is None else self.trial
        if self.curvature is not None:
            found = gptq.encode(rows, self.format, self.curvature, importance=self.importance)
            return float(found.error.sum())
        data = ggml.encode(rows, self.format, self.importance)
        difference = rows - ggml.decode(data, self.format, rows.shape[1])
        return float((np.square(difference).sum(axis=0, dtype=np.float64) * self.importance).sum())


@dataclass(frozen=True, slots=True)
class Fit:
    """Scales float32 (channels,), and the error with them as a share of the error without: `forecast` by the ranges
    of groups, `measured` with the encoder, on trial rows; both are means over readers. All scales are 1 where nothing
    was gained."""

    scales: Floats
    forecast: float
    measured: float


def fit(readers: Sequence[Reader], ties: Index | None = None, *, whole_powers: bool = False) -> Fit:
    """The scales, within [1/4, 4], with which rounding all `readers` of one input costs least.

    `ties` (cols,): the channel of each column, where several columns must have one scale; None: each has its own.
    `whole_powers`: only powers of two, which change no digit of a binary number. Each reader counts by how much
    cheaper it becomes, so that one with large outputs does not drown the others. All formats must be in FORMATS.
    """
    ties = np.arange(readers[0].rows.shape[1]) if ties is None else ties
    parts = [_Part.of(reader) for reader in readers]
    best = _descend(parts, ties)
    before = [r.error() for r in readers]
    for strength in _STRENGTHS:
        scales = _even(best**strength, whole_powers)
        after = [r.scaled(scales[ties]).error() for r in readers]
        measured = float(np.mean([a / b if b > 0 else 1.0 for a, b in zip(after, before, strict=True)]))
        if measured < _WORTH:
            return Fit(scales, float(np.mean([p.total(scales[ties]) for p in parts])), measured)
    return Fit(np.ones_like(best), 1.0, 1.0)


def divided(curvature: gptq.Curvature, scales: Floats) -> gptq.Curvature:
    """The curvature of an input divided by `scales` (cols,): that of H/(s·sᵀ), its damping divided alike.

    H = U·D·Uᵀ makes S⁻¹·H·S⁻¹ = (S⁻¹·U·S)·(S⁻¹·D·S⁻¹)·(S⁻¹·U·S)ᵀ, the first factor unit upper triangular again.
    """
    inverse = np.reciprocal(scales)
    return gptq.Curvature(
        curvature.hessian * inverse[:, None] * inverse,
        curvature.unit * inverse[:, None] * scales,
        curvature.pivots * inverse * inverse,
        curvature.diagonal * inverse * inverse,
        curvature.unscale,
    )


def _even(scales: Floats, whole_powers: bool) -> Floats:
    """Scales whose geometric mean is 1, within the limit."""
    logs = np.log2(scales)
    logs -= logs.mean()
    if whole_powers:
        logs = np.rint(logs)
    even: Floats = np.exp2(np.clip(logs, -np.log2(LIMIT), np.log2(LIMIT))).astype(np.float32)
    return even


def _descend(parts: Sequence[_Part], ties: Index) -> Floats:
    """Coordinate descent on the forecast, channels that share no group moving at once."""
    scales = np.ones(int(ties.max()) + 1, np.float32)
    turns = list(_turns(ties, max(p.group for p in parts)))
    for step in _SWEEPS:
        factors = np.exp2(np.array(_STEPS, np.float32) * np.float32(step))
        for channels in turns:
            moved = np.isin(ties, channels)
            cost = np.zeros((len(factors), len(scales)))
            for part in parts:
                cost += part.moving(factors, moved, scales[ties], ties, len(scales))
            beyond = np.abs(np.log2(scales * factors[:, None])) > np.log2(LIMIT) + 1e-6
            cost[beyond] = np.inf
            scales[channels] *= factors[cost[:, channels].argmin(axis=0)]
    return scales


def _turns(ties: Index, size: int) -> Iterator[Index]:
    """Channels in turns, such that no two of a turn have columns in the same group of `size`."""
    groups: list[set[int]] = [set() for _ in range(int(ties.max()) + 1)]
    for column, channel in enumerate(ties.tolist()):
        groups[channel].add(column // size)
    turns: list[tuple[set[int], list[int]]] = []
    for channel, own in enumerate(groups):
        free = next((turn for turn in turns if not turn[0] & own), None)
        if free is None:
            free = (set(), [])
            turns.append(free)
        free[0].update(own)
        free[1].append(channel)
    for _, members in turns:
        yield np.array(members, np.intp)


@dataclass(frozen=True, slots=True)
class _Part:
    """A reader cut into groups. `sides` (rows, groups, group): how far weights reach from 0, in one array where the
    sign does not matter, else upwards and downwards. `costs` (groups, group) make the total 1 before any scaling."""

    group: int
    sides: tuple[Floats, ...]
    costs: Floats

    @classmethod
    def of(cls, reader: Reader) -> _Part:
        layout = LAYOUTS[reader.format.name]
        w = reader.rows.reshape(len(reader.rows), -1, layout.group)
        sides = (np.abs(w),) if layout.minima is None else (np.maximum(w, 0), np.maximum(-w, 0))
        part = cls(layout.group, sides, reader.costs.reshape(-1, layout.group).astype(np.float32))
        before = part.total(np.ones(part.costs.size, np.float32))
        return replace(part, costs=part.costs * np.float32(1 / before if before > 0 else 0))

    def total(self, scales: Floats) -> float:
        """The forecast with `scales` (cols,)."""
        s = scales.reshape(self.costs.shape)
        reach = sum((side * s).max(axis=2) for side in self.sides)
        emphasis = (self.costs / np.square(s)).sum(axis=1)
        return float((np.square(reach).sum(axis=0, dtype=np.float64) * emphasis).sum())

    def moving(self, factors: Floats, moved: Mask, scales: Floats, ties: Index, channels: int) -> Costs:
        """(factors, channels): the forecast of all groups in which `moved` columns lie, were these times a factor."""
        inside = moved.reshape(self.costs.shape)
        touched = np.flatnonzero(inside.any(axis=1))
        inside, s = inside[touched], scales.reshape(self.costs.shape)[touched]
        emphasis = self.costs[touched] / np.square(s)
        own, other = (emphasis * inside).sum(axis=1), (emphasis * ~inside).sum(axis=1)
        reach = [((a * (s * inside)).max(axis=2), (a * (s * ~inside)).max(axis=2)) for a in self._only(touched)]
        channel = ties.reshape(self.costs.shape)[touched, inside.argmax(axis=1)]
        found = np.zeros((len(factors), channels))
        for i, f in enumerate(factors):
            total = sum(np.maximum(f * mine, rest) for mine, rest in reach)
            squares = np.square(total).sum(axis=0, dtype=np.float64)
            np.add.at(found[i], channel, squares * (other + own / (f * f)))
        return found

    def _only(self, groups: Index) -> Iterator[Floats]:
        for side in self.sides:
            yield side if len(groups) == side.shape[1] else side[:, groups]
