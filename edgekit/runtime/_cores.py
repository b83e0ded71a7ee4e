"""How many threads to compute with. Knows affinity, hyper-threads and cgroup limits; knows no engine."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path


def usable_cores(sys_root: Path = Path("/sys"), proc_root: Path = Path("/proc")) -> int:
    """Physical cores this process may use: within its CPU affinity and its cgroup's CPU quota; at least 1.

    Matrix kernels saturate a core's vector units with one thread, so hyper-thread siblings count once
    (as common_cpu_get_num_physical_cores of llama.cpp does); on Apple silicon only performance cores count.
    """
    if sys.platform == "darwin":
        return _darwin_performance_cores() or os.cpu_count() or 1
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = len({_siblings(sys_root, cpu) for cpu in cpus})
    quota = _cgroup_quota(sys_root, proc_root)
    return max(1, min(cores, quota) if quota else cores)


def _siblings(sys_root: Path, cpu: int) -> str:
    """What the hyper-threads of one core have in common; a CPU without topology is its own core."""
    with suppress(OSError):
        return (sys_root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    return f"cpu{cpu}"


def _cgroup_quota(sys_root: Path, proc_root: Path) -> int:
    """Whole CPUs of time granted by cgroup v2 `cpu.max` (rounded up), the least up the tree; 0 = no limit.

    Kernel documentation, admin-guide/cgroup-v2: "$MAX $PERIOD" in microseconds, `max` means none.
    """
    top = sys_root / "fs/cgroup"
    try:
        lines = (proc_root / "self/cgroup").read_text().splitlines()
    except OSError:
        return 0
    group = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    folders = [top / group, *(p for p in (top / group).parents if p.is_relative_to(top))]
    limits = []
    for folder in folders:
        with suppress(OSError, ValueError):
            granted, period = (folder / "cpu.max").read_text().split()
            if granted != "max":
                limits.append(-(-int(granted) // int(period)))
    return max(1, min(limits)) if limits else 0


def _darwin_performance_cores() -> int:
    libc = ctypes.CDLL(None)
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):
        if libc.sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)) == 0:
            return value.value
    return 0
