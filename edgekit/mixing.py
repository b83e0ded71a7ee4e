"""One format for every matrix, under an exact size: the cheapest by measured costs, or a random one to compare with.

Decides, from a plan and a sensitivity; measures nothing and writes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgekit.arch import Role
from edgekit.errors import DoesNotFit
from edgekit.forecast import CLASSES
from edgekit.gguf_file import ALIGNMENT
from edgekit.planning import Plan
from edgekit.quant.allocation import Allocation, Option, allocate
from edgekit.sensitivity import Sensitivity
from edgekit.shelf import unknown
from edgekit.target import Target
from edgekit.units import show_bytes

PREFERENCES = ("quality", "speed")
CLOSE = 0.005
"""How far below the size asked for a file may stay, where its tensors allow it to come nearer."""

GIVEN = 1.5
"""How many times the best predicted divergence `speed` may cost."""

_TRIES, _STEPS = 64, 16


@dataclass(frozen=True, slots=True)
class _Task:
    """`options` by tensor, their bytes as they lie in the file; `room` for all of them together."""

    options: Mapping[str, Sequence[Option]]
    room: int


def mix(
    plan: Plan, sensitivity: Sensitivity, budget: int, target: Target | None = None, *, prefer: str = "quality"
) -> dict[str, str]:
    """Format by tensor name for every measured matrix of `plan`: the least predicted divergence whose file has at most
    `budget` bytes, header and padding included. Everything else stays as planned.

    Where the target (None: this machine) computes on its CPU, the rounding of inputs counts as well.
    With a `target`, formats that it runs slowly are left out where another fits, and `speed` takes the choice that
    decodes fastest, by edgekit.forecast's format factors, of those whose predicted divergence is at most 1.5 times the
    best; it may stay below the budget. Without one it is `quality`. Raises DoesNotFit (exit 3) with the
    smallest possible size, UnknownName.
    """
    if prefer not in PREFERENCES:
        raise unknown("preference", prefer, PREFERENCES)
    task = _task(plan, sensitivity, budget, target)
    best = allocate(task.options, task.room)
    if prefer == "speed" and target is not None:
        best = _quicker(task, best, _times(task, plan, target))
    return {name: option.name for name, option in best.chosen.items()}


def random_mix(
    plan: Plan, sensitivity: Sensitivity, budget: int, target: Target | None = None, *, seed: int = 0
) -> dict[str, str]:
    """A mix of the same kinds within the same size that knows nothing of costs: what `mix` has to beat.

    Formats are drawn evenly, then random tensors are made smaller until the file fits, and larger until nothing fits
    any more. The same seed gives the same mix. Raises as `mix`.
    """
    task = _task(plan, sensitivity, budget, target)
    dice = random.Random(seed)
    best: dict[str, Option] = {}
    for _ in range(_TRIES):
        found = _draw(task, dice)
        if _bytes(found) > _bytes(best):
            best = found
        if _bytes(best) >= task.room - CLOSE * budget:
            break
    return {name: option.name for name, option in best.items()}


def _task(plan: Plan, sensitivity: Sensitivity, budget: int, target: Target | None) -> _Task:
    chosen = {p.name for p in sensitivity.parts}
    fixed = plan.file_bytes - sum(_padded(t.nbytes) for t in plan.tensors if t.name in chosen)
    options = {t.name: _options(t.name, sensitivity, target) for t in plan.tensors if t.name in chosen}
    task = _Task(options, budget - fixed)
    smallest = sum(min(o.nbytes for o in every) for every in options.values())
    if smallest > task.room:
        raise DoesNotFit(
            f"{show_bytes(budget)} is less than the smallest possible file, "
            f"{show_bytes(smallest + fixed)} ({smallest + fixed:,} bytes)",
            f"allow at least {smallest + fixed} bytes, or choose a smaller model",
        )
    return task


def _options(name: str, sensitivity: Sensitivity, target: Target | None) -> list[Option]:
    formats = sensitivity.formats(name)
    if target is not None:
        formats = tuple(f for f in formats if target.prefers(f) != "slow") or formats
    cpu = target is None or target.backend_named().name == "cpu"
    return [replace(o, nbytes=_padded(o.nbytes)) for o in sensitivity.options(name, formats, cpu=cpu)]


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _times(task: _Task, plan: Plan, target: Target) -> dict[tuple[str, str], float]:
    """(tensor, format) -> time of one decoded token, in units that only compare: on CPUs the weights, elsewhere the
    bytes, over the speed factor of the format. An embedding of which one row is looked up takes none."""
    kind = CLASSES[target.backend_named().speed_class]
    untied = any(t.made.role is Role.OUTPUT for t in plan.tensors)
    found = {}
    for tensor in (t for t in plan.tensors if t.name in task.options):
        looked_up = untied and tensor.made.role is Role.EMBED
        for option in task.options[tensor.name]:
            work = tensor.made.values if kind.rate is not None else option.nbytes
            found[tensor.name, option.name] = 0.0 if looked_up else work / kind.factor(option.name)
    return found


def _quicker(task: _Task, best: Allocation, times: Mapping[tuple[str, str], float]) -> Allocation:
    """The least time for at most GIVEN x the cost of `best`, by bisection of what time is worth."""

    def at(worth: float) -> Allocation:
        options = {
            name: [replace(o, cost=o.cost / best.cost + worth * times[name, o.name] / unit) for o in every]
            for name, every in task.options.items()
        }
        found = allocate(options, task.room)
        chosen = {n: next(o for o in task.options[n] if o.name == c.name) for n, c in found.chosen.items()}
        return replace(found, chosen=chosen, cost=sum(o.cost for o in chosen.values()))

    unit = sum(times[name, option.name] for name, option in best.chosen.items()) or 1.0
    low, high, kept = -10.0, 10.0, best
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = at(2.0**middle)
        if found.cost <= GIVEN * best.cost:
            low, kept = middle, found
        else:
            high = middle
    return kept


def _draw(task: _Task, dice: random.Random) -> dict[str, Option]:
    """One random choice within the room to which nothing can be added."""
    found = {name: dice.choice(every) for name, every in task.options.items()}
    while (over := _bytes(found) - task.room) > 0:
        name = dice.choice([n for n, o in found.items() if any(x.nbytes < o.nbytes for x in task.options[n])])
        found[name] = dice.choice([x for x in task.options[name] if x.nbytes < found[name].nbytes])
    left = -over
    while grown := [
        (name, x) for name, o in found.items() for x in task.options[name] if 0 < x.nbytes - o.nbytes <= left
    ]:
        name, option = dice.choice(grown)
        left -= option.nbytes - found[name].nbytes
        found[name] = option
    return found


def _bytes(chosen: Mapping[str, Option]) -> int:
    return sum(o.nbytes for o in chosen.values())
