"""What this machine is: cores, instruction sets, memory it may use, board, bandwidth. Knows no target and no model.

Whatever cannot be read is None or empty: a strange kernel, a container or a locked-down phone is no error.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.units import MIB

Ask = Callable[[Sequence[str]], str]
"""Runs a command and returns its standard output, or "" where it does not exist or fails."""

_ISA = {
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
}
"""/proc/cpuinfo `Features` and `flags` -> the names used here (linux: arch/*/kernel/cpuinfo.c, cpufeatures.h)."""

_APPLE_ISA = {
    "hw.optional.neon": "neon",
    "hw.optional.AdvSIMD": "neon",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_FP16": "fp16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx1_0": "avx",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.fma": "fma",
    "hw.optional.f16c": "f16c",
    "hw.optional.avx512f": "avx512",
}
"""sysctl names (Apple developer documentation, "Determining instruction set characteristics")."""

_ARM_PARTS = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0D: "Cortex-A77",
    0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE",
    0xD44: "Cortex-X1",
    0xD46: "Cortex-A510",
    0xD47: "Cortex-A710",
    0xD48: "Cortex-X2",
    0xD4D: "Cortex-A715",
    0xD4E: "Cortex-X3",
    0xD80: "Cortex-A520",
    0xD81: "Cortex-A720",
    0xD82: "Cortex-X4",
}
"""`CPU part` of implementer 0x41 (Arm): the MIDR_EL1 part number in each core's technical reference manual."""

_LITTLE = {"Cortex-A53", "Cortex-A35", "Cortex-A55", "Cortex-A510", "Cortex-A520"}


@dataclass(frozen=True, slots=True)
class Host:
    """Facts of a machine; None and () mean unknown. `ram_bytes` is what this process may use: containers count."""

    os: str
    machine: str
    cpu: str | None = None
    board: str | None = None
    logical_cores: int | None = None
    physical_cores: int | None = None
    big_cores: int | None = None
    max_ghz: float | None = None
    isa: tuple[str, ...] = ()
    ram_bytes: int | None = None
    installed_bytes: int | None = None
    available_bytes: int | None = None
    cache_bytes: int | None = None
    allowed_cores: int | None = None

    @property
    def threads(self) -> int:
        """One for each core worth using: big, or physical, and no more than this process may have; at least 1."""
        known = [n for n in (self.big_cores or self.physical_cores or self.logical_cores, self.allowed_cores) if n]
        return min(known, default=1)


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Memory traffic reached: `gb_s` in 1e9 bytes/s, from `moved` bytes really read in `seconds` by `threads`."""

    gb_s: float
    moved: int
    seconds: float
    threads: int
    method: str


def detect(*, system: str = "", machine: str = "", root: Path = Path("/"), ask: Ask | None = None) -> Host:
    """This machine; or, for tests, the one whose files lie under `root` and whose commands `ask` answers."""
    system = system or platform.system()
    machine = machine or platform.machine()
    if system == "Darwin":
        return _darwin(machine, ask or _ask)
    if system == "Linux":
        return _linux(machine, root)
    return Host(os=system.lower(), machine=machine, logical_cores=os.cpu_count())


def usable_cores() -> int:
    """Cores that this process may use, little ones and quotas of containers counted: for work that is split evenly."""
    return detect().allowed_cores or os.cpu_count() or 1


def measure_bandwidth(threads: int = 0, seconds: float = 1.0, *, buffer_bytes: int = 0) -> Bandwidth:
    """Read buffers larger than the last-level cache over and over, `threads` at once, for about `seconds`.

    Only bytes that are read count (nothing is written), so the figure is bus traffic, not "copied bytes".
    `threads` 0: every core worth using. `buffer_bytes` is the total over all threads; 0: four times the cache, at
    least 256 MiB, at most an eighth of memory. Each thread ORs its buffer together: numpy lets go of the GIL.
    """
    import numpy as np

    host = detect()
    threads = threads or host.threads
    words = (buffer_bytes or _buffer_bytes(host)) // threads // 8
    buffers = [np.ones(max(words, 1), np.uint64) for _ in range(threads)]
    start = threading.Barrier(threads)
    results = [(0, 0.0, 0.0)] * threads

    def work(index: int) -> None:
        buffer, passes = buffers[index], 0
        np.bitwise_or.reduce(buffer)
        start.wait()
        begin = now = time.perf_counter()
        while passes == 0 or now < begin + seconds:
            np.bitwise_or.reduce(buffer)
            passes, now = passes + 1, time.perf_counter()
        results[index] = (passes * buffer.nbytes, begin, now)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    rate = sum(moved / (end - begin) for moved, begin, end in results)
    elapsed = max(end for _, _, end in results) - min(begin for _, begin, _ in results)
    size = sum(b.nbytes for b in buffers) // MIB
    method = f"{threads} threads reading {size} MiB over and over with numpy; bytes read, none written"
    return Bandwidth(rate / 1e9, sum(moved for moved, _, _ in results), elapsed, threads, method)


def _buffer_bytes(host: Host) -> int:
    wanted = max(256 * MIB, 4 * (host.cache_bytes or 0))
    return min(wanted, (host.ram_bytes or 8 * wanted) // 8)


def _ask(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _text(path: Path, limit: int = 1 << 20) -> str:
    """At most `limit` bytes of a file as text, "" where there is none to be had."""
    try:
        with path.open("rb") as file:
            return file.read(limit).decode("utf-8", "replace").replace("\0", "").strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """The first run of digits."""
    match = re.search(r"[0-9]{1,19}", text)
    return int(match[0]) if match else None


def _linux(machine: str, root: Path) -> Host:
    blocks = [_fields(b) for b in re.split(r"\n\s*\n", _text(root / "proc/cpuinfo"))]
    cpus = [b for b in blocks if "processor" in b]
    parts = [_arm_part(b) for b in cpus]
    memory = _fields(_text(root / "proc/meminfo"))
    installed = _kib(memory.get("MemTotal", ""))
    limit, used = _cgroup_memory(root)
    ram = min((n for n in (installed, limit) if n), default=None)
    free = [_kib(memory.get("MemAvailable", "")), None if limit is None or used is None else max(limit - used, 0)]
    core_dirs = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*"))
    clocks = [n / 1e6 for d in core_dirs if (n := _number(_text(d / "cpufreq/cpuinfo_max_freq")))]
    clocks = clocks or [n / 1e3 for c in cpus if (n := _number(c.get("cpu MHz", "")))]
    here = root == Path("/")
    return Host(
        os="linux",
        machine=machine,
        cpu=_cpu_name(cpus, parts),
        board=_board(root, blocks),
        logical_cores=len(cpus) or len(core_dirs) or None,
        physical_cores=_physical(cpus, root),
        big_cores=_big_cores(root, core_dirs, parts),
        max_ghz=max(clocks, default=None),
        isa=_features(cpus),
        ram_bytes=ram,
        installed_bytes=installed,
        available_bytes=min((n for n in free if n is not None), default=None),
        cache_bytes=_cache(root),
        allowed_cores=_allowed(root, len(os.sched_getaffinity(0)) if here else None),
    )


def _fields(block: str) -> dict[str, str]:
    """`key : value` lines of /proc files."""
    pairs = (line.partition(":") for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _kib(text: str) -> int | None:
    value = _number(text)
    return None if value is None else value * 1024


def _arm_part(cpu: Mapping[str, str]) -> str:
    """`Cortex-A76` from implementer and part number; "" for other vendors and unknown parts."""
    try:
        if int(cpu.get("CPU implementer", "0"), 16) != 0x41:
            return ""
        return _ARM_PARTS.get(int(cpu.get("CPU part", "0"), 16), "")
    except ValueError:
        return ""


def _cpu_name(cpus: Sequence[Mapping[str, str]], parts: Sequence[str]) -> str | None:
    for cpu in cpus:
        if name := cpu.get("model name", "").strip():
            return re.sub(r"\s+", " ", name)
    names = sorted({p for p in parts if p}, key=lambda name: (name in _LITTLE, name))
    return " + ".join(names) or None


def _board(root: Path, blocks: Sequence[Mapping[str, str]]) -> str | None:
    """Board by device tree, or by firmware tables (product name) where those say something."""
    for path in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        if name := _text(root / path, 4096):
            return name
    for block in blocks:
        if name := block.get("Model", ""):
            return name
    name = _text(root / "sys/class/dmi/id/product_name", 4096)
    return name if name and "to be filled" not in name.lower() else None


def _physical(cpus: Sequence[Mapping[str, str]], root: Path) -> int | None:
    """Cores counted once whatever number of threads they run."""
    pairs = {(c["physical id"], c["core id"]) for c in cpus if "physical id" in c and "core id" in c}
    if pairs:
        return len(pairs)
    siblings = {
        text
        for d in (root / "sys/devices/system/cpu").glob("cpu[0-9]*")
        if (text := _text(d / "topology/thread_siblings_list"))
    }
    return len(siblings) or len(cpus) or None


def _big_cores(root: Path, dirs: Sequence[Path], parts: Sequence[str]) -> int | None:
    """Cores of the fast kind: by Arm part number, else the kernel's capacity, else clock; Intel by its P-core list."""
    if performance := _cpu_list(_text(root / "sys/devices/cpu_core/cpus")):
        firsts = {
            _text(root / f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") or str(n) for n in performance
        }
        return len(firsts)
    if any(parts):
        big = sum(p not in _LITTLE for p in parts)
        return big or len(parts)
    for file, share in (("cpu_capacity", 0.6), ("cpufreq/cpuinfo_max_freq", 0.8)):
        values = [n for d in dirs if (n := _number(_text(d / file)))]
        if values and min(values) < share * max(values):
            return sum(v >= share * max(values) for v in values)
    return None


def _cpu_list(text: str) -> list[int]:
    """`0-3,8` -> [0, 1, 2, 3, 8]; anything odd -> []."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        if not match:
            return []
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _features(cpus: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Features that *every* core has, in the order of _ISA."""
    sets = [set((c.get("flags") or c.get("Features") or "").split()) for c in cpus]
    common = set.intersection(*sets) if sets else set()
    return tuple(dict.fromkeys(name for flag, name in _ISA.items() if flag in common))


def _cache(root: Path) -> int | None:
    """Last-level caches of all cores together, each shared one counted once."""
    found: dict[tuple[str, str], int] = {}
    for index in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        size = re.fullmatch(r"([0-9]{1,9})([KM])", _text(index / "size"))
        if size:
            level, shared = _text(index / "level"), _text(index / "shared_cpu_list")
            found[level, shared] = int(size[1]) * (1024 if size[2] == "K" else MIB)
    last = max((level for level, _ in found), default="")
    return sum(n for (level, _), n in found.items() if level == last) or None


def _cgroup_memory(root: Path) -> tuple[int | None, int | None]:
    """(tightest memory limit of this process's control groups and their parents, bytes used there), v2 and v1."""
    tightest: tuple[int | None, int | None] = (None, None)
    for folder in _cgroup_folders(root, "memory"):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _number(_text(folder / limit_file))
            if limit and (tightest[0] is None or limit < tightest[0]):
                tightest = limit, _number(_text(folder / used_file))
    return tightest


def _cgroup_folders(root: Path, controller: str) -> Iterable[Path]:
    """Folders of the control groups this process is in, up to the mount point (cgroups(7): /proc/self/cgroup)."""
    for line in _text(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        inside = [p for p in path.split("/") if p not in ("", ".", "..")]
        for depth in range(len(inside), -1, -1):
            yield mount.joinpath(*inside[:depth])


def _allowed(root: Path, affinity: int | None) -> int | None:
    """Cores this process may use: its affinity mask, and the CPU quota of its control groups, rounded up."""
    known = [affinity] if affinity else []
    for folder in _cgroup_folders(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            known.append(max(1, math.ceil(int(quota) / int(period))))
    return min(known, default=None)


def _darwin(machine: str, ask: Ask) -> Host:
    facts = _fields(ask(("sysctl", "hw", "machdep.cpu")))
    brand = facts.get("machdep.cpu.brand_string") or None
    total = _number(facts.get("hw.memsize", ""))
    isa = dict.fromkeys(name for key, name in _APPLE_ISA.items() if facts.get(key) == "1")
    hertz = _number(facts.get("hw.cpufrequency_max", ""))
    return Host(
        os="macos",
        machine=machine,
        cpu=brand,
        board=facts.get("hw.model") or None,
        logical_cores=_number(facts.get("hw.logicalcpu", "")),
        physical_cores=_number(facts.get("hw.physicalcpu", "")),
        big_cores=_number(facts.get("hw.perflevel0.physicalcpu", "")),
        max_ghz=hertz / 1e9 if hertz else None,
        isa=tuple(isa),
        ram_bytes=total,
        installed_bytes=total,
        available_bytes=_vm_stat(ask(("vm_stat",))),
        cache_bytes=_number(facts.get("hw.l3cachesize", "")) or _number(facts.get("hw.perflevel0.l2cachesize", "")),
    )


def _vm_stat(text: str) -> int | None:
    """Free, inactive and speculative pages of vm_stat, in bytes."""
    page = re.search(r"page size of ([0-9]+) bytes", text)
    counts = [re.search(rf"Pages {kind}:\s*([0-9]+)", text) for kind in ("free", "inactive", "speculative")]
    if not page or not counts[0]:
        return None
    return int(page[1]) * sum(int(c[1]) for c in counts if c)
