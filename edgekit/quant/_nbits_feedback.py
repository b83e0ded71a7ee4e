"""Error feedback (GPTQ) on the grids of MatMulNBits: scale, zero point and integers of a block by their exact cost.

Knows blocks of one matrix and the second moment of its input. The method, and the search inside a block, are those of
gptq.py and _grid.py; here scales are float32 and zero points integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgekit.quant import Format
from edgekit.quant._blocks import Bytes, Floats, Layout
from edgekit.quant._grid import Choice, Grid, Group, better, divide, first_trials, refit, try_all
from edgekit.quant.gptq import Curvature, cost, move_integers
from edgekit.quant.nbits import NBits, Quantised, _search, _values

_REFINE = (0.97, 0.985, 1.015, 1.03)  # steps around the best scale
_NOTHING = np.float32(1e-30)  # what is pushed into zeros fades, and steps of a few 1e-40 have no reciprocal
_PASSES = 3  # of coordinate descent


@dataclass(frozen=True, slots=True)
class Line(Grid):
    """value = scale·(q - zero): `scale` any float32, `minimum` of the search being the zero point, 0 to `top`, or None
    where it is fixed (the levels are then counted from it)."""

    def snap(self, step: Floats, offset: Floats | None) -> tuple[Floats, Floats | None]:
        step = step.astype(np.float32)
        if offset is None or self.layout.minima is None:
            return step, None
        return step, np.clip(np.rint(divide(-offset, step)), *self.layout.minima)

    def values(self, scale: Floats, minimum: Floats | None) -> tuple[Floats, Floats | None]:
        return scale, None if minimum is None else -scale * minimum


def _line(fmt: NBits) -> Line:
    levels = np.arange(fmt.top + 1, dtype=np.float32)
    minima = None if fmt.symmetric else (0, fmt.top)
    name = f"int{fmt.bits}"
    return Line(
        Layout(
            Format(name, -1, fmt.block, 0),
            fmt.block,
            levels - fmt.zero if fmt.symmetric else levels,
            (1, 1),
            minima,
            1,
            _no_bytes,
            _no_bytes,
        )
    )


def _no_bytes(*_: Any) -> Any:
    raise AssertionError("this grid has no ggml bytes")


def method(fmt: NBits, curvature: Curvature) -> Callable[[Floats], Quantised]:
    """What quantises blocks float32 (rows, blocks, block); no row gets worse than by the search without feedback."""
    padded = _pad(curvature, fmt)
    importance = padded.diagonal + np.float32(1e-3 * float(padded.diagonal.mean()) or 1.0)
    return lambda w: _quantise(w, fmt, padded, importance.reshape(1, -1, fmt.block))


def _pad(curvature: Curvature, fmt: NBits) -> Curvature:
    """Columns of padding: they neither take nor give errors, and cost something, so that they stay zero."""
    cols = len(curvature.pivots)
    more = fmt.blocks(cols) * fmt.block - cols
    if not more:
        return curvature
    hessian = np.pad(curvature.hessian, ((0, more), (0, more)))
    hessian[range(cols, cols + more), range(cols, cols + more)] = 1
    return replace(
        curvature,
        hessian=hessian,
        unit=np.pad(curvature.unit, ((0, more), (0, more))),
        pivots=np.pad(curvature.pivots, (0, more), constant_values=1),
        diagonal=np.pad(curvature.diagonal, (0, more)),
    )


def _quantise(w: Floats, fmt: NBits, curvature: Curvature, importance: Floats) -> Quantised:
    rows = len(w)
    weights = np.ascontiguousarray(w.reshape(rows, -1).T)
    made = _sweep(weights, fmt, curvature)
    _descend(made, weights, curvature)
    q = np.ascontiguousarray(made.q.T).reshape(w.shape)
    zeros = np.full(w.shape[:2], fmt.zero, np.uint8) if made.zero is None else made.zero.T.astype(np.uint8)
    found: Quantised = q, np.ascontiguousarray(made.scale.T), zeros
    plain = _search(w, fmt, importance)
    after, before = (cost(weights - _values(each).reshape(rows, -1).T, curvature) for each in (found, plain))
    worse = ~(after < before)
    for mine, theirs in zip(found, plain, strict=True):
        mine[worse] = theirs[worse]
    return found


@dataclass(slots=True)
class _Made:
    """A matrix in the making, columns first. `scale`, `zero`: (blocks, rows); q, error: (cols, rows), error being
    weight - value."""

    grid: Line
    scale: Floats
    zero: Floats | None
    q: Bytes
    error: Floats

    def stored(self, block: int) -> tuple[Floats, Floats | None]:
        return self.scale[block], None if self.zero is None else self.zero[block]


def _sweep(weights: Floats, fmt: NBits, curvature: Curvature) -> _Made:
    """Round all columns from first to last, each block with the scale and zero point that cost least there."""
    cols, rows = weights.shape
    count, size, unit = cols // fmt.block, fmt.block, curvature.unit
    made = _Made(
        _line(fmt),
        np.zeros((count, rows), np.float32),
        None if fmt.symmetric else np.zeros((count, rows), np.float32),
        np.zeros((cols, rows), np.uint8),
        np.zeros((cols, rows), np.float32),
    )
    for block in range(count):
        a, b = block * size, (block + 1) * size
        start = weights[a:b] + unit[:a, a:b].T @ made.error[:a]
        start[np.abs(start) < _NOTHING] = 0
        found = _choose(Group(weights[a:b], start, unit[a:b, a:b], curvature.pivots[a:b]), made.grid)
        made.scale[block] = found.scale
        if made.zero is not None and found.minimum is not None:
            made.zero[block] = found.minimum
        made.q[a:b], made.error[a:b] = found.q, found.error
    return made


def _choose(group: Group, grid: Line) -> Choice:
    """The cheapest of some scales and zero points for each row, every one tried with the error pushed on."""
    best = try_all(group, grid, [grid.snap(*first_trials(group, grid))])
    trials = [grid.snap(*refit(group, grid, best.q))]
    trials += [(best.scale * np.float32(factor), best.minimum) for factor in _REFINE]
    if best.minimum is not None:
        top = grid.layout.levels[-1]
        trials += [(best.scale, np.clip(best.minimum + by, 0, top)) for by in (-1, 1)]
    return better(best, try_all(group, grid, trials))


def _descend(made: _Made, weights: Floats, curvature: Curvature) -> None:
    """Passes over all columns: each integer, then each scale, takes the best value given all others."""
    hessian, size = curvature.hessian, made.grid.layout.group
    slope = hessian @ made.error  # half the derivative of the cost by the error
    for _ in range(_PASSES):
        for block in range(len(made.scale)):
            here = slice(block * size, (block + 1) * size)
            before = made.error[here].copy()
            _descend_block(made, block, weights[here], slope[here], hessian[here, here])
            slope += hessian[here].T @ (made.error[here] - before)


def _descend_block(made: _Made, block: int, target: Floats, slope: Floats, hessian: Floats) -> None:
    size = len(target)
    here = slice(block * size, (block + 1) * size)
    scale, zero = made.stored(block)
    q, error = made.q[here], made.error[here]
    change = move_integers(made.grid, made.grid.values(scale, zero), q, error, target, slope, hessian)
    now = slope + hessian @ change
    level = made.grid.layout.levels[q] if zero is None else made.grid.layout.levels[q] - zero
    # an error moves by -level·Δscale
    gain, curve = (now * level).sum(axis=0), ((hessian @ level) * level).sum(axis=0)
    move = divide(gain, np.maximum(curve, 0))
    scale += move
    error -= level * move
