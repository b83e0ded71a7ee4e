"""Bytes and rates, to and from text; and the shape of a progress callback."""

from __future__ import annotations

import re
from collections.abc import Callable

from edgekit.errors import EdgekitError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

Progress = Callable[[str, int, int], None]
"""Called with (task, done, total): `done` counts up to `total` for each task name. Units are the task's own. A total of
0 makes `task` a line to show: see `announce`."""

_FACTOR = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 1_000,
    "m": MIB,
    "mib": MIB,
    "mb": 1_000_000,
    "g": GIB,
    "gib": GIB,
    "gb": 1_000_000_000,
    "t": 1 << 40,
    "tib": 1 << 40,
    "tb": 10**12,
}


def silent(task: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


def announce(progress: Progress, text: str) -> None:
    """Show a line of text where progress is shown, such as how much work is to come."""
    progress(text, 0, 0)


def parse_bytes(text: str) -> int:
    """`3.2GiB` -> bytes. KiB/MiB/GiB are powers of 1024, kB/MB/GB of 1000, a bare K/M/G means KiB/MiB/GiB."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in _FACTOR:
        raise EdgekitError(f"{text!r} is not a size", "write it like 700MiB, 3.2GiB or 4GB")
    return int(float(match[1]) * _FACTOR[match[2].lower()])


def show_bytes(n: float) -> str:
    """1503238553 -> `1.40 GiB`; three significant digits, powers of 1024."""
    sign, n = ("-", -n) if n < 0 else ("", n)
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if n >= factor:
            value = n / factor
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{sign}{value:.{digits}f} {unit}"
    return f"{sign}{int(n)} B"


def show_count(n: float) -> str:
    """1100048384 -> `1.10 B`: parameters and the like, powers of 1000."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= factor:
            value = n / factor
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{digits}f} {unit}"
    return str(int(n))
