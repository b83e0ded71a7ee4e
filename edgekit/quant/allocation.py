"""Bits as a budget problem: one format for each group of tensors, least total cost, no more bytes than allowed.

An exact multiple-choice knapsack (Pisinger 1995 calls it MCKP), solved by dynamic programming over undominated partial
sums, cut with a Lagrangian bound. Pure; knows no model and no format, only names, bytes and costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.errors import DoesNotFit
from edgekit.units import show_bytes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a group: its `nbytes`, and what that costs (nats of KL divergence, or anything additive)."""

    name: str
    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """One option for every group. `gap`: how far the cost can be from the optimum, 0 unless `limit` cut the search."""

    chosen: Mapping[str, Option]
    nbytes: int
    cost: float
    gap: float


def allocate(groups: Mapping[str, Sequence[Option]], budget: int, *, limit: int = 200_000) -> Allocation:
    """The cheapest choice of at most `budget` bytes. `limit` bounds the states kept, and so memory.

    Raises DoesNotFit with the smallest possible size when even that is above the budget.
    """
    names = list(groups)
    options = [_undominated(groups[name]) for name in names]
    smallest = sum(o[0].nbytes for o in options)
    if smallest > budget:
        raise DoesNotFit(
            f"{show_bytes(budget)} is less than the smallest possible, {show_bytes(smallest)} ({smallest:,} bytes)",
            f"allow at least {smallest} bytes, or choose a smaller model",
        )
    price, start = _lagrange(options, budget)
    best_cost = sum(o[i].cost for o, i in zip(options, start, strict=True))
    picks, gap = _search(options, budget, price, best_cost, limit)
    indices = picks if picks is not None else start
    chosen = {name: o[i] for name, o, i in zip(names, options, indices, strict=True)}
    return Allocation(chosen, sum(o.nbytes for o in chosen.values()), sum(o.cost for o in chosen.values()), gap)


def _undominated(options: Sequence[Option]) -> list[Option]:
    """By bytes, each cheaper in cost than all smaller ones."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _lagrange(options: Sequence[Sequence[Option]], budget: int) -> tuple[float, list[int]]:
    """The price of a byte at which the relaxed problem spends the budget, and a feasible choice to start from.

    The greedy order of the convex hulls is the relaxation's optimum: upgrades by falling gain per byte. The choice
    then spends what is left on whatever still fits.
    """
    steps = sorted(
        (step for g, o in enumerate(options) for step in _hull_steps(g, o)), key=lambda s: (-s.gain / s.nbytes, s.group)
    )
    at = [0] * len(options)
    left = budget - sum(o[0].nbytes for o in options)
    price = 0.0
    for step in steps:
        if step.nbytes > left:
            price = price or step.gain / step.nbytes
            continue
        if at[step.group] == step.start:
            at[step.group], left = step.stop, left - step.nbytes
    return price, _spend(options, at, left)


def _spend(options: Sequence[Sequence[Option]], at: list[int], left: int) -> list[int]:
    """Upgrade by the best gain that still fits, until none does."""
    while True:
        gains = [
            (o[at[g]].cost - o[j].cost, g, j)
            for g, o in enumerate(options)
            for j in range(at[g] + 1, len(o))
            if o[j].nbytes - o[at[g]].nbytes <= left
        ]
        if not gains:
            return at
        _, g, j = max(gains)
        left -= options[g][j].nbytes - options[g][at[g]].nbytes
        at[g] = j


@dataclass(frozen=True, slots=True)
class _Step:
    group: int
    start: int
    stop: int
    nbytes: int
    gain: float


def _hull_steps(group: int, options: Sequence[Option]) -> list[_Step]:
    """Upgrades along the lower convex hull of (bytes, cost): each gains less a byte than the one before."""
    steps, i = [], 0
    while i < len(options) - 1:
        here = options[i]
        j = max(
            range(i + 1, len(options)), key=lambda k: (here.cost - options[k].cost) / (options[k].nbytes - here.nbytes)
        )
        steps.append(_Step(group, i, j, options[j].nbytes - here.nbytes, here.cost - options[j].cost))
        i = j
    return steps


def _search(
    options: Sequence[Sequence[Option]], budget: int, price: float, best: float, limit: int
) -> tuple[list[int] | None, float]:
    """Undominated partial sums, group by group; a state is dropped when no completion can beat `best`.

    The bound of a state: its cost and priced bytes, plus the least priced cost of every group to come, less the priced
    budget (Lagrangian relaxation, a true lower bound for any price >= 0). Returns the choice, or None if nothing beats
    `best`, and the gap that `limit` may have opened.
    """
    order = sorted(range(len(options)), key=lambda g: options[g][-1].nbytes - options[g][0].nbytes, reverse=True)
    priced = [min(o.cost + price * o.nbytes for o in options[g]) for g in order]
    to_come = np.append(np.cumsum(priced[::-1])[::-1], 0.0)
    room = np.append(np.cumsum([options[g][0].nbytes for g in order][::-1])[::-1], 0)
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []
    gap = 0.0
    for k, g in enumerate(order):
        size, cost, parent, pick = _extend(size, cost, options[g])
        bound = cost + price * size + to_come[k + 1] - price * budget
        keep = np.flatnonzero((size + room[k + 1] <= budget) & (bound < best))
        keep = keep[_front(size[keep], cost[keep])]
        if len(keep) > limit:
            keep = keep[np.sort(np.argsort(bound[keep], kind="stable")[:limit])]
            gap = max(gap, best - float(bound[keep].min()))
        if not len(keep):
            return None, gap
        size, cost = size[keep], cost[keep]
        trail.append((parent[keep], pick[keep]))
    state = int(np.argmin(cost))
    if cost[state] >= best:
        return None, gap
    chosen = [0] * len(options)
    for g, (parent, pick) in zip(reversed(order), reversed(trail), strict=True):
        chosen[g], state = int(pick[state]), int(parent[state])
    return chosen, gap


def _extend(size: Ints, cost: Floats, options: Sequence[Option]) -> tuple[Ints, Floats, Ints, Ints]:
    """Every state with every option, by (bytes, cost): sizes, costs, parent states, option indices."""
    extra = np.array([o.nbytes for o in options], np.int64)
    price = np.array([o.cost for o in options])
    sizes, costs = (size[:, None] + extra).reshape(-1), (cost[:, None] + price).reshape(-1)
    order = np.lexsort((costs, sizes))
    return sizes[order], costs[order], order // len(options), order % len(options)


def _front(size: Ints, cost: Floats) -> Ints:
    """Indices of states that are cheaper than all that are no larger; `size` is ascending."""
    if not len(size):
        return np.zeros(0, np.int64)
    before = np.concatenate(([np.inf], np.minimum.accumulate(cost)[:-1]))
    return np.flatnonzero(cost < before)
