"""What is tried: matrices, groups of them, and how many in how many formats fit a budget of forward passes.

Decides from names and shapes; measures nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.arch import Blueprint, Role
from edgekit.quant import Format, ggml, presets
from edgekit.shelf import unknown

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
    limit, _ = find_effort(effort)
    layers = 1 + max((_layer(p.name) for p in parts), default=0)
    for bands in range(layers, 0, -1):
        groups = group(parts, bands)
        for formats in PROBES if bands == layers else PROBES[-1:]:
            if passes(groups, formats, effort, combined=_COMBINED) <= limit:
                return groups, formats
    return group(parts, 1), PROBES[-1]


def passes(groups: Sequence[Group], formats: Sequence[str], effort: str = "normal", *, combined: int = 0) -> int:
    """Forward passes of 4,096 tokens that `measure` takes at most: probes, combinations, and the reference itself."""
    _, each = find_effort(effort)
    return each * (1 + combined + sum(len(probed(g, formats)) for g in groups))


def find_effort(name: str) -> tuple[int, int]:
    if name not in _BUDGET:
        raise unknown("effort", name, _BUDGET)
    return _BUDGET[name]


def _layer(name: str) -> int:
    match = re.match(r"blk\.([0-9]+)\.", name)
    return int(match[1]) if match else -1


def probed(members: Group, formats: Sequence[str]) -> tuple[str, ...]:
    """Formats that all matrices of a group take; if it takes none of those asked for, as many narrow ones."""
    for names in (formats, NARROW_PROBES[: len(formats)]):
        if found := tuple(n for n in names if all(ggml.get(n).fits(p.shape) for p in members.parts)):
            return found
    return ()
