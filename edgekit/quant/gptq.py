"""Error feedback on ggml's own grids: weights rounded column after column, each rounding made good by later columns.

Knows one matrix and the second moment of its input; writes blocks that every llama.cpp reads; knows nothing of models.

The method is GPTQ (Frantar et al., 2022, arXiv:2210.17323) in the form of LDLQ (Chee et al., 2023, arXiv:2307.13304,
which proves them equal): with H = U·D·Uᵀ, U unit upper triangular, the error E of a row costs E·H·Eᵀ = Σ D[k]·r[k]²,
r[k] being what rounding column k leaves of the weight after the errors of earlier columns, U[j, k]·E[j], are added.
So every group's scale can be chosen by its exact cost. Coordinate descent on the same objective follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from edgekit.quant import Format, ggml
from edgekit.quant._blocks import LAYOUTS, Blocks, Bytes, Floats, Layout
from edgekit.quant._grid import Grid, Group, choose, divide, inverse, to_half

Errors = npt.NDArray[np.float64]

FORMATS = frozenset(LAYOUTS)
"""Names of the formats that error feedback improves; the others have no grid of single weights."""

_PANEL = 256  # columns whose incoming errors come from one matrix product; a super-block of the k-quants
_ROWS = 512  # rows a task: fixed, so that no sum depends on the number of threads
_PASSES = 3  # of coordinate descent: 6, 3 and 1 % of the error


@dataclass(frozen=True, slots=True)
class Curvature:
    """A second moment made ready, to be used by every matrix that reads the same input.

    `hessian` (cols, cols): XᵀX damped, its mean diagonal scaled to about 1; `unit`: strictly upper part of U and
    `pivots`: D of hessian = U·D·Uᵀ; `diagonal`: that of XᵀX as it came; `unscale` gives costs in its units back.
    """

    hessian: Floats
    unit: Floats
    pivots: Floats
    diagonal: Floats
    unscale: float


@dataclass(frozen=True, slots=True)
class Encoded:
    """`data`: uint8 (rows, row_bytes). `error`, `plain_error`: float64 (rows,), the squared error that each row makes
    in its output over the calibration tokens (damping included), of `data` and of ggml's own encoding."""

    data: Bytes
    error: Errors
    plain_error: Errors


def prepare(moment: npt.NDArray[np.floating], damp: float = 0.02) -> Curvature:
    """XᵀX (cols, cols), of any scale -> its factors. `damp`: share of the mean diagonal that is added to it.

    Columns that saw nothing are left to the damping: nothing is pushed into or out of them. More damping is added if
    rounding made the moment indefinite. Raises EdgekitError when it is no second moment at all.
    """
    hessian = np.array(moment, np.float32)
    square = hessian.ndim == 2 and hessian.shape[0] == hessian.shape[1] > 0
    if not square or not np.isfinite(hessian).all() or np.diag(hessian).min() < 0:
        raise EdgekitError(
            f"an array of shape {moment.shape} is no second moment: square, finite, no negative diagonal",
            "calibrate again",
        )
    diagonal = np.diag(hessian).copy()
    mean = float(diagonal.mean(dtype=np.float64))
    hessian /= np.float32(mean or 1)
    scaled = np.diag(hessian).copy()
    for more in (1, 10, 100, 1000):
        hessian[np.diag_indices_from(hessian)] = scaled + np.float32(more * damp if mean > 0 else 1)
        try:
            # H = J·L·Lᵀ·J for the factor L of H reversed by J: J·L·J is upper triangular
            upper = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            continue
        root = np.diag(upper).astype(np.float32)
        unit = np.ascontiguousarray(upper / root, np.float32)
        unit[np.diag_indices_from(unit)] = 0
        return Curvature(hessian, unit, root * root, diagonal, mean or 1.0)
    raise EdgekitError("the second moment is not positive definite", "calibrate again, with more text")


def encode(
    w: Floats,
    fmt: Format | str,
    moment: npt.NDArray[np.floating] | Curvature,
    *,
    importance: Floats | None = None,
    damp: float = 0.02,
    threads: int = 1,
) -> Encoded:
    """float32 (rows, cols), and XᵀX of its input (or that `prepare`d) -> the bytes of `fmt`, as ggml lays them out.

    No row is worse than ggml's own encoding with `importance` (float32 (cols,); None: the diagonal of the moment):
    where the search does not win, the row is ggml's. The bytes do not depend on `threads`. Formats without a grid of
    single weights (not in FORMATS) get ggml's encoding. Raises EdgekitError as `ggml.encode` and `prepare` do.
    """
    fmt = ggml.get(fmt) if isinstance(fmt, str) else fmt
    curvature = moment if isinstance(moment, Curvature) else prepare(moment, damp)
    cols = len(curvature.pivots)
    if w.ndim != 2 or w.shape[1] != cols:
        raise EdgekitError(f"weights of shape {w.shape} for a second moment of {cols} columns", "calibrate this model")
    if importance is None:
        importance = curvature.diagonal
    data = ggml.encode(w, fmt, importance, threads)
    error, plain = np.zeros(len(w)), np.zeros(len(w))

    def work(start: int) -> None:
        rows = slice(start, min(start + _ROWS, len(w)))
        data[rows], error[rows], plain[rows] = _best_rows(w[rows], fmt, curvature, data[rows])

    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="gptq") as pool:
        for _ in pool.map(work, range(0, len(w), _ROWS)):
            pass
    return Encoded(data, error, plain)


def _best_rows(w: Floats, fmt: Format, curvature: Curvature, plain: Bytes) -> tuple[Bytes, Errors, Errors]:
    """(bytes, error, plain error) of some rows, each as the search or as `plain` has it, whichever costs less."""
    weights = np.ascontiguousarray(w.T, np.float32)
    decoded = ggml.decode(plain, fmt, w.shape[1])
    plain_error = cost(weights - decoded.T, curvature)
    layout = LAYOUTS.get(fmt.name)
    if layout is None:
        return plain, plain_error, plain_error
    columns = _sweep(weights, layout, curvature)
    _descend(columns, weights, curvature)
    data = layout.pack(columns.blocks())
    # from the bytes, not from the running sums: what is promised is what a reader sees
    error = cost(weights - ggml.decode(data, fmt, w.shape[1]).T, curvature)
    worse = ~(error < plain_error)
    data[worse], error[worse] = plain[worse], plain_error[worse]
    return data, error, plain_error


def cost(error: Floats, curvature: Curvature) -> Errors:
    """E·H·Eᵀ of each row, E given columns first, as Σ D·r²."""
    total = np.zeros(error.shape[1])
    for low, high in _panels(len(error)):
        r = error[low:high] + curvature.unit[:high, low:high].T @ error[:high]
        total += (curvature.pivots[low:high, None] * np.square(r)).sum(axis=0, dtype=np.float64)
    return total * curvature.unscale


def _panels(cols: int) -> Iterator[tuple[int, int]]:
    for low in range(0, cols, _PANEL):
        yield low, min(low + _PANEL, cols)


@dataclass(slots=True)
class _Columns:
    """A matrix in the making, columns first. `d`, `dmin`: (blocks, rows), exact halves in float32; `scale`, `minimum`:
    (groups, rows), integers in float32; q, error (cols, rows), error being weight - value."""

    layout: Layout
    d: Floats
    dmin: Floats | None
    scale: Floats
    minimum: Floats | None
    q: Bytes
    error: Floats

    @classmethod
    def empty(cls, layout: Layout, cols: int, rows: int) -> _Columns:
        blocks, groups = cols // layout.format.block, cols // layout.group
        dmin, minimum = None, None
        if layout.minima is not None:
            dmin, minimum = np.zeros((blocks, rows), np.float32), np.ones((groups, rows), np.float32)
        return cls(
            layout,
            np.zeros((blocks, rows), np.float32),
            dmin,
            np.ones((groups, rows), np.float32),
            minimum,
            np.zeros((cols, rows), np.uint8),
            np.zeros((cols, rows), np.float32),
        )

    def grid(self, group: int) -> Grid:
        """The grid that `group` lies on, given its super-block."""
        if not self.layout.stored_scales:
            return Grid(self.layout)
        block = group // self.layout.groups
        return Grid(self.layout, self.d[block], None if self.dmin is None else self.dmin[block])

    def stored(self, group: int) -> tuple[Floats, Floats | None]:
        """(scale, minimum) of a group, as its grid has them."""
        if self.layout.stored_scales:
            return self.scale[group], None if self.minimum is None else self.minimum[group]
        return self.d[group], None if self.dmin is None else self.dmin[group]

    def store(self, group: int, scale: Floats, minimum: Floats | None) -> None:
        first, second = self.stored(group)
        first[:] = scale
        if second is not None and minimum is not None:
            second[:] = minimum

    def blocks(self) -> Blocks:
        rows = self.q.shape[1]
        shape = (rows, len(self.d), self.layout.groups)
        return Blocks(
            np.ascontiguousarray(self.d.T).astype(np.float16),
            None if self.dmin is None else np.ascontiguousarray(self.dmin.T).astype(np.float16),
            np.ascontiguousarray(self.scale.T).astype(np.int16).reshape(shape),
            None if self.minimum is None else np.ascontiguousarray(self.minimum.T).astype(np.int16).reshape(shape),
            np.ascontiguousarray(self.q.T).reshape(rows, len(self.d), self.layout.format.block),
        )


def _sweep(weights: Floats, layout: Layout, curvature: Curvature) -> _Columns:
    """Round all columns from first to last; super-block scales are those ggml gives the weights as they then are."""
    cols, rows = weights.shape
    columns, unit, size = _Columns.empty(layout, cols, rows), curvature.unit, layout.group
    for low, high in _panels(cols):
        pushed = unit[:low, low:high].T @ columns.error[:low]
        start = weights[low:high] + pushed
        if layout.stored_scales:
            own = layout.unpack(ggml.encode(start.T, layout.format, curvature.pivots[low:high]))
            block = low // layout.format.block
            columns.d[block] = own.d[:, 0]
            if columns.dmin is not None and own.dmin is not None:
                columns.dmin[block] = own.dmin[:, 0]
        for a in range(low, high, size):
            b = a + size
            if a > low:
                start[a - low : b - low] += unit[low:a, a:b].T @ columns.error[low:a]
            group = Group(weights[a:b], start[a - low : b - low], unit[a:b, a:b], curvature.pivots[a:b])
            found = choose(group, columns.grid(a // size))
            columns.store(a // size, found.scale, found.minimum)
            columns.q[a:b], columns.error[a:b] = found.q, found.error
    return columns


def _descend(columns: _Columns, weights: Floats, curvature: Curvature) -> None:
    """Passes over all columns: each integer, then each scale and minimum, takes the best value given all others."""
    hessian, size = curvature.hessian, columns.layout.group
    if _PASSES:
        slope = hessian @ columns.error  # half the derivative of the cost by the error
    for left in range(_PASSES, 0, -1):
        for low, high in _panels(len(weights)):
            moved = np.zeros((high - low, weights.shape[1]), np.float32)
            for a in range(low, high, size):
                here = slice(a, a + size)
                local = slope[here] + hessian[low:a, here].T @ moved[: a - low]
                before = columns.error[here].copy()
                _descend_group(columns, a // size, weights[here], local, hessian[here, here])
                moved[a - low : a - low + size] = columns.error[here] - before
            stale = 0 if left > 1 else high  # in the last pass nobody asks for earlier columns again
            slope[stale:] += hessian[low:high, stale:].T @ moved


def _descend_group(columns: _Columns, group: int, target: Floats, slope: Floats, hessian: Floats) -> None:
    grid, here = columns.grid(group), slice(group * len(target), (group + 1) * len(target))
    scale, minimum = columns.stored(group)
    step, offset = grid.values(scale, minimum)
    q, error = columns.q[here], columns.error[here]
    change = move_integers(grid, (step, offset), q, error, target, slope, hessian)
    slope += hessian @ change
    levels = grid.layout.levels[q]
    # an error moves by -levels·Δstep and by -1·Δoffset
    gain, curve = (slope * levels).sum(axis=0), ((hessian @ levels) * levels).sum(axis=0)
    scale = _move(grid, scale, step, gain, curve, minimum=False)
    change = levels * (step - grid.values(scale, minimum)[0])
    error += change
    if minimum is not None and offset is not None:
        slope += hessian @ change
        curve = np.full_like(gain, hessian.sum())
        minimum = _move(grid, minimum, offset, slope.sum(axis=0), curve, minimum=True)
        moved = grid.values(scale, minimum)[1]
        assert moved is not None
        error += offset - moved
    columns.store(group, scale, minimum)


def move_integers(
    grid: Grid,
    values: tuple[Floats, Floats | None],
    q: Bytes,
    error: Floats,
    target: Floats,
    slope: Floats,
    hessian: Floats,
) -> Floats:
    """Give each integer of a group its best value, in place; returns by how much each error changed."""
    step, offset = values
    reciprocal = inverse(step)
    change = np.zeros_like(error)
    for k in range(len(q)):
        here = slope[k] + hessian[:k, k] @ change[:k]
        wanted = target[k] - error[k] + here / hessian[k, k]
        new, value = grid.nearest(wanted, reciprocal, offset)
        value *= step
        if offset is not None:
            value += offset
        delta = target[k] - value - error[k]
        gains = delta * (2 * here + hessian[k, k] * delta) < 0
        np.copyto(q[k], new, where=gains)
        np.multiply(delta, gains, out=change[k])
        error[k] += change[k]
    return change


def _move(grid: Grid, stored: Floats, value: Floats, gain: Floats, curve: Floats, *, minimum: bool) -> Floats:
    """The storable number nearest to the optimum where that lowers the cost, else `stored`.

    `value` is the step (or offset) `stored` means; moving it by x costs x·(x·curve - 2·gain).
    """
    wanted = value + divide(gain, np.maximum(curve, 0))
    if grid.d is None:
        new = to_half(wanted)
        x = new - value
    else:
        unit = grid.layout.sign * grid.dmin if minimum and grid.dmin is not None else grid.d
        bounds = grid.layout.minima if minimum and grid.layout.minima is not None else grid.layout.scales
        new = np.clip(np.rint(divide(wanted, unit)), *bounds)
        x = unit * new - value
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(x * (x * curve - 2 * gain) < 0, new, stored)
