"""The knapsack against every possible choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgekit.errors import DoesNotFit
from edgekit.quant.allocation import Option, allocate


def problem(seed: int, groups: int, options: int, step: int = 1) -> dict[str, list[Option]]:
    rng = np.random.default_rng(seed)
    return {
        f"g{g}": [
            Option(f"f{i}", int(rng.integers(1, 60)) * step, float(rng.exponential(1.0)))
            for i in range(int(rng.integers(1, options + 1)))
        ]
        for g in range(groups)
    }


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_is_better(seed: int) -> None:
    groups = problem(seed, groups=5, options=5)
    sums = [
        (sum(o.nbytes for o in choice), sum(o.cost for o in choice)) for choice in itertools.product(*groups.values())
    ]
    smallest, largest = min(s for s, _ in sums), max(s for s, _ in sums)
    for budget in {smallest, (smallest + largest) // 3, (smallest + largest) // 2, largest}:
        if budget < smallest:
            continue
        found = allocate(groups, budget)
        assert found.nbytes <= budget
        assert found.gap == 0
        assert found.cost == pytest.approx(min(c for s, c in sums if s <= budget))
        assert set(found.chosen) == set(groups)


def test_a_real_size_hits_the_budget_from_below() -> None:
    """224 groups of 9 formats, as of a 32-layer model: costs halve a bit, sizes as the formats have them."""
    rng = np.random.default_rng(1)
    bits = {"Q2_K": 2.6, "Q3_K": 3.4, "IQ4_XS": 4.25, "Q4_0": 4.5, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.6, "Q8_0": 8.5}
    groups = {}
    for g in range(224):
        weights, weight = int(rng.choice([4096 * 4096, 4096 * 1024, 4096 * 14336])), float(rng.lognormal(0, 1))
        groups[f"g{g}"] = [
            Option(name, int(weights * b / 8), weight * 4.0**-b * float(rng.uniform(0.8, 1.2)))
            for name, b in bits.items()
        ]
    budget = int(sum(o[0].nbytes for o in groups.values()) * 4.5 / 2.6)
    found = allocate(groups, budget)
    assert 0.995 * budget <= found.nbytes <= budget
    assert found.gap < 0.001 * found.cost


def test_below_the_smallest_says_the_smallest() -> None:
    with pytest.raises(DoesNotFit, match="15 bytes"):
        allocate({"a": [Option("x", 10, 1), Option("y", 20, 0.5)], "b": [Option("x", 5, 1)]}, 14)
