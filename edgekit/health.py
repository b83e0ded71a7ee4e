"""In what state a machine is while something is measured: clock policy, heat, throttling, load. Knows no benchmark.

Whatever cannot be read is None: most machines tell only some of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

Ask = Callable[[Sequence[str]], str]
"""Runs a command and returns its standard output, or "" where it does not exist or fails."""

_PI_FLAGS = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
    16: "under-voltage has occurred",
    17: "frequency capping has occurred",
    18: "throttling has occurred",
    19: "soft temperature limit has occurred",
}
"""Bits of `vcgencmd get_throttled` (Raspberry Pi documentation, "vcgencmd")."""


@dataclass(frozen=True, slots=True)
class Health:
    """`governor`: cpufreq policies in use, joined by commas; `power_mode`: a Jetson's; `temperature_c`: the hottest
    zone; `throttling`: a Pi's flags in words (empty: none, None: it does not tell); `load`: runnable tasks (1 min)."""

    governor: str | None = None
    power_mode: str | None = None
    temperature_c: float | None = None
    throttling: tuple[str, ...] | None = None
    load: float | None = None


def examine(*, root: Path = Path("/"), ask: Ask | None = None) -> Health:
    """This machine now; or, for tests, the one whose files lie under `root` and whose commands `ask` answers."""
    ask = ask or _ask
    mode = re.search(r"NV Power Mode:\s*(\S+)", ask(("nvpmodel", "-q")))
    flags = re.search(r"throttled=0x([0-9a-fA-F]+)", ask(("vcgencmd", "get_throttled")))
    return Health(
        governor=_governors(root),
        power_mode=mode[1] if mode else None,
        temperature_c=_hottest(root),
        throttling=tuple(text for bit, text in _PI_FLAGS.items() if int(flags[1], 16) >> bit & 1) if flags else None,
        load=_load(root),
    )


def _governors(root: Path) -> str | None:
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return ",".join(sorted({text for f in files if (text := _read(f))})) or None


def _hottest(root: Path) -> float | None:
    """Thermal zones are in thousandths of a degree (kernel: driver-api/thermal/sysfs-api)."""
    found = []
    for file in (root / "sys/class/thermal").glob("thermal_zone*/temp"):
        with suppress(ValueError):
            found.append(int(_read(file)) / 1000)
    return max(found, default=None)


def _load(root: Path) -> float | None:
    with suppress(ValueError, IndexError):
        return float(_read(root / "proc/loadavg").split()[0])
    with suppress(OSError):
        return os.getloadavg()[0] if root == Path("/") else None
    return None


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="ascii", errors="replace").strip()
    return ""


def _ask(command: Sequence[str]) -> str:
    if not shutil.which(command[0]):
        return ""
    with suppress(OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    return ""
