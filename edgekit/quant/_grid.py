"""The numbers one group of columns may take in a format, and the search for its scale, minimum and integers.

Knows a group at a time, all rows at once, columns first; knows nothing of files or of the other groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edgekit.quant._blocks import IQ4, Bytes, Floats, Layout

_TRIES = 8  # scales tried for each group before the neighbours of the best; twice as many gain 1 % of the error
_REFINE = (0.97, 0.985, 1.015, 1.03)  # steps around the best scale where scales are half-precision numbers
# IQ4's value for each rounded quotient from -128 to 127; ties, a step of 1/127 wide, go to the smaller
_IQ4_INDEX = np.abs(np.arange(-128, 128)[:, None] - np.array(IQ4)[None]).argmin(axis=1).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Group:
    """Columns that share a scale: `target` weights and `start`, the same with the errors of earlier columns pushed in.

    Both float32 (columns, rows). A residual r[k] = start[k] + Σ_{j<k} unit[j, k]·error[j] - value[k] costs
    pivots[k]·r[k]², error being target - value.
    """

    target: Floats
    start: Floats
    unit: Floats
    pivots: Floats


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found for each row: the stored `scale` and `minimum`, q (columns, rows), error (columns, rows), cost."""

    scale: Floats
    minimum: Floats | None
    q: Bytes
    error: Floats
    cost: Floats


@dataclass(frozen=True, slots=True)
class Grid:
    """value = step·level[q] + offset. What is stored for a group are integers under the super-block's half-precision
    `d` and `dmin` (float32, one a row) in k-quants, and in formats without super-blocks (d None) the halves themselves.
    """

    layout: Layout
    d: Floats | None = None
    dmin: Floats | None = None

    def snap(self, step: Floats, offset: Floats | None) -> tuple[Floats, Floats | None]:
        """The nearest (scale, minimum) that can be stored."""
        if self.d is None:
            return to_half(step), None if offset is None else to_half(offset)
        scale = np.clip(np.rint(divide(step, self.d)), *self.layout.scales)
        if offset is None or self.dmin is None or self.layout.minima is None:
            return scale, None
        return scale, np.clip(np.rint(divide(offset * self.layout.sign, self.dmin)), *self.layout.minima)

    def values(self, scale: Floats, minimum: Floats | None) -> tuple[Floats, Floats | None]:
        """(step, offset) of what is stored, with the decoder's roundings."""
        if self.d is None:
            return scale, minimum
        offset = None if minimum is None or self.dmin is None else self.layout.sign * (self.dmin * minimum)
        return self.d * scale, offset

    def nearest(self, x: Floats, reciprocal: Floats, offset: Floats | None) -> tuple[Bytes, Floats]:
        """(q, level) whose value is nearest to `x`; `reciprocal` is 1/step, or 0 where the step is."""
        levels = self.layout.levels
        quotient = (x if offset is None else x - offset) * reciprocal
        if self.layout.format.name.startswith("IQ4"):
            np.rint(quotient, out=quotient)
            q = _IQ4_INDEX[np.clip(quotient, -128, 127).astype(np.int16) + 128]
            return q, levels[q]
        np.rint(quotient, out=quotient)
        np.maximum(quotient, levels[0], out=quotient)  # np.clip takes four times as long on so few numbers
        level = np.minimum(quotient, levels[-1], out=quotient)
        return (level - levels[0]).astype(np.uint8), level


def choose(group: Group, grid: Grid) -> Choice:
    """The cheapest of some scales for each row, every one tried with the error pushed on inside the group."""
    best = try_all(group, grid, [grid.snap(*first_trials(group, grid))])
    return better(best, try_all(group, grid, _neighbours(group, grid, best)))


def to_half(x: Floats) -> Floats:
    """Rounded to half precision; infinite beyond its range, which no search will prefer."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def divide(a: Floats, b: Floats) -> Floats:
    """a / b, and 0 where b is 0."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    return np.divide(a, b, out=np.zeros(shape, np.float32), where=b != 0)


def inverse(x: Floats) -> Floats:
    """1 / x, and 0 where x is 0."""
    return divide(np.ones_like(x), x)


def first_trials(group: Group, grid: Grid) -> tuple[Floats, Floats | None]:
    """Steps and offsets (tries, rows): the range of the group stretched and shrunk, then fitted by least squares to
    the integers it gives, as make_qkx3_quants and make_qx_quants of ggml-quants.c do, errors costing the pivots."""
    levels, v = grid.layout.levels, group.start
    if grid.layout.minima is not None:
        low, high = v.min(axis=0), v.max(axis=0)
        if grid.d is not None:
            low = np.minimum(low, 0)  # k-quants subtract a minimum that is not negative
        shrink = np.linspace(-1.0, 0.9, _TRIES, dtype=np.float32)[:, None]
        step = (high - low) / (levels[-1] + shrink)
        offset = np.broadcast_to(low, step.shape)
        level = grid.nearest(v[:, None], inverse(step), offset)[1]
        return _fit(group.pivots, level, v[:, None], np.ones((len(v), 1, 1), np.float32), grid, step)
    # the largest weight goes to either end of the levels, or a little beyond
    peak = np.take_along_axis(v, np.abs(v).argmax(axis=0)[None], axis=0)[0]
    unit = 14.0 if grid.layout.format.name.startswith("IQ4") else 1.0  # mean distance of levels
    upper = _TRIES // 3
    ends = np.concatenate(
        (levels[0] - unit * np.linspace(-1.5, 1.0, _TRIES - upper), levels[-1] + unit * np.linspace(-1.5, 0.5, upper))
    )
    step = peak / ends.astype(np.float32)[:, None]
    level = grid.nearest(v[:, None], inverse(step), None)[1]
    return _fit(group.pivots, level, v[:, None], None, grid, step)


def _fit(
    cost: Floats, a: Floats, y: Floats, b: Floats | None, grid: Grid, fallback: Floats
) -> tuple[Floats, Floats | None]:
    """Least squares y ≈ step·a + offset·b over the first axis, each row of it weighted with `cost`."""
    weighted = cost.reshape(-1, *[1] * (a.ndim - 1)) * a
    saa, say = (weighted * a).sum(axis=0), (weighted * y).sum(axis=0)
    alone = np.where(saa > 0, divide(say, saa), fallback)
    if b is None:
        return alone, None
    emphasis = cost.reshape(-1, *[1] * (b.ndim - 1)) * b
    sbb, sab, sby = (emphasis * b).sum(axis=0), (weighted * b).sum(axis=0), (emphasis * y).sum(axis=0)
    determinant = saa * sbb - sab * sab
    solvable = determinant > 1e-6 * saa * sbb
    step = np.where(solvable, divide(say * sbb - sby * sab, np.where(solvable, determinant, 1)), fallback)
    offset = (sby - step * sab) / sbb
    if grid.d is not None:  # a minimum cannot be added: the best without one
        step, offset = np.where(offset > 0, alone, step), np.minimum(offset, 0)
    return step, offset


def _neighbours(group: Group, grid: Grid, best: Choice) -> Iterable[tuple[Floats, Floats | None]]:
    """What to try after `best`: the exact optimum for its integers, and what can be stored beside its scale."""
    yield grid.snap(*refit(group, grid, best.q))
    scale, minimum = best.scale, best.minimum
    if grid.d is None:
        for factor in _REFINE if minimum is None else _REFINE[::3]:
            yield to_half(scale * np.float32(factor)), minimum
            if minimum is not None:
                yield scale, to_half(minimum * np.float32(factor))
        return
    around = (-1, 0, 1)
    for i in around:
        for j in around if minimum is not None else (0,):
            if i or j:
                beside = None if minimum is None else np.clip(minimum + j, *(grid.layout.minima or (0, 0)))
                yield np.clip(scale + i, *grid.layout.scales), beside


def refit(group: Group, grid: Grid, q: Bytes) -> tuple[Floats, Floats | None]:
    """Step and offset that cost least with these integers: the residuals are linear in both."""
    push = np.ascontiguousarray(group.unit.T)
    push[np.diag_indices_from(push)] = 1
    y = push @ group.target + (group.start - group.target)
    b = push.sum(axis=1)[:, None] if grid.layout.minima is not None else None
    return _fit(group.pivots, push @ grid.layout.levels[q], y, b, grid, np.zeros(q.shape[1], np.float32))


def try_all(group: Group, grid: Grid, stored: Iterable[tuple[Floats, Floats | None]]) -> Choice:
    """Round all rows with each (scale, minimum), column after column, and keep the cheapest for each row."""
    pairs = list(stored)
    scale = np.concatenate([np.atleast_2d(a) for a, _ in pairs])
    minima = [np.atleast_2d(b) for _, b in pairs if b is not None]
    minimum = np.concatenate(minima) if minima else None
    step, offset = grid.values(scale, minimum)
    reciprocal = inverse(step)
    columns, rows = group.start.shape
    q = np.empty((columns, *scale.shape), np.uint8)
    error = np.empty((columns, *scale.shape), np.float32)
    cost = np.zeros(scale.shape, np.float32)
    for k in range(columns):
        pushed = group.unit[:k, k] @ error[:k].reshape(k, scale.size)
        wanted = pushed.reshape(scale.shape) + group.start[k]
        q[k], value = grid.nearest(wanted, reciprocal, offset)
        value *= step
        if offset is not None:
            value += offset
        np.subtract(group.target[k], value, out=error[k])
        wanted -= value
        np.square(wanted, out=wanted)
        wanted *= group.pivots[k]
        cost += wanted
    cost[~np.isfinite(cost)] = np.inf
    first, row = cost.argmin(axis=0), np.arange(rows)
    kept = None if minimum is None else minimum[first, row]
    return Choice(scale[first, row], kept, q[:, first, row], error[:, first, row], cost[first, row])


def better(a: Choice, b: Choice) -> Choice:
    """For each row the cheaper of two."""
    use = b.cost < a.cost
    minimum = None if a.minimum is None or b.minimum is None else np.where(use, b.minimum, a.minimum)
    return Choice(
        np.where(use, b.scale, a.scale),
        minimum,
        np.where(use, b.q, a.q),
        np.where(use, b.error, a.error),
        np.where(use, b.cost, a.cost),
    )
