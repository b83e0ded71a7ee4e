"""What a machine is, read from file trees and command outputs of machines that are not at hand, and from this one."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from edgekit.host import Host, detect, measure_bandwidth
from edgekit.target import Target, cpu_class, match_target
from edgekit.units import GIB, KIB, MIB


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def arm_cpuinfo(parts: Sequence[int], features: str) -> str:
    block = "processor\t: {}\nBogoMIPS\t: 108.00\nFeatures\t: {}\nCPU implementer\t: 0x41\nCPU part\t: {:#05x}\n"
    return "\n".join(block.format(i, features, part) for i, part in enumerate(parts))


def x86_cpuinfo(name: str, cores: int, threads: int, flags: str) -> str:
    block = "processor : {}\nmodel name : {}\ncpu MHz : 800.1\nphysical id : 0\ncore id : {}\nflags : {}\n"
    return "\n".join(block.format(i, name, i % cores, flags) for i in range(threads))


def meminfo(gib: float, free: float = 0.5) -> str:
    return f"MemTotal:  {int(gib * GIB / KIB)} kB\nMemFree: 1 kB\nMemAvailable: {int(gib * free * GIB / KIB)} kB\n"


PI5 = {
    "proc/cpuinfo": arm_cpuinfo([0xD0B] * 4, "fp asimd evtstrm aes fphp asimdhp asimddp"),
    "proc/meminfo": meminfo(7.87),
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
} | {f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": "2400000\n" for i in range(4)}

RK3588 = {
    "proc/cpuinfo": arm_cpuinfo([0xD05] * 4 + [0xD0B] * 4, "fp asimd asimdhp asimddp"),
    "proc/meminfo": meminfo(15.6),
    "proc/device-tree/model": "Orange Pi 5 Plus\0",
} | {f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": "1800000" if i < 4 else "2400000" for i in range(8)}

N100 = {
    "proc/cpuinfo": x86_cpuinfo("Intel(R) N100", 4, 4, "fpu avx avx2 fma f16c avx_vnni"),
    "proc/meminfo": meminfo(15.4),
    "sys/class/dmi/id/product_name": "To be filled by O.E.M.\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "3400000",
}

HYBRID = {
    "proc/cpuinfo": x86_cpuinfo("12th Gen Intel(R) Core(TM) i7-1270P", 12, 16, "avx avx2 fma avx_vnni"),
    "proc/meminfo": meminfo(31),
    "sys/devices/cpu_core/cpus": "0-7\n",
    "sys/devices/cpu_atom/cpus": "8-15\n",
} | {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i // 2 * 2}-{i // 2 * 2 + 1}" for i in range(8)}


def test_raspberry_pi_5(tmp_path: Path) -> None:
    host = detect(system="Linux", machine="aarch64", root=tree(tmp_path, PI5))
    assert host.board == "Raspberry Pi 5 Model B Rev 1.0"
    assert host.cpu == "Cortex-A76"
    assert (host.logical_cores, host.physical_cores, host.big_cores, host.threads) == (4, 4, 4, 4)
    assert host.isa == ("neon", "dotprod", "fp16")
    assert host.max_ghz == 2.4
    assert host.ram_bytes == pytest.approx(7.87 * GIB, rel=1e-6)
    assert host.available_bytes == pytest.approx(7.87 / 2 * GIB, rel=1e-6)
    assert match_target(host) == "rpi5-8gb"
    assert cpu_class(host) == "cpu-arm-dotprod"


def test_big_and_little_cores(tmp_path: Path) -> None:
    host = detect(system="Linux", machine="aarch64", root=tree(tmp_path, RK3588))
    assert host.cpu == "Cortex-A76 + Cortex-A55"
    assert (host.logical_cores, host.big_cores, host.threads) == (8, 4, 4)
    assert match_target(host) == "orange-pi-5-16gb"


@pytest.mark.parametrize(
    ("file", "values", "big"),
    [
        ("cpu_capacity", [280] * 3 + [800] * 4 + [1024], 5),
        ("cpu_capacity", [1024] * 4, None),
        ("cpufreq/cpuinfo_max_freq", [2016000] * 3 + [2803200] * 4 + [3187200], 5),
        ("cpufreq/cpuinfo_max_freq", [3532800] * 6 + [4320000] * 2, None),
    ],
)
def test_cores_of_unknown_make(tmp_path: Path, file: str, values: list[int], big: int | None) -> None:
    """Little cores by capacity, else by clock; two kinds of fast cores (4.3 and 3.5 GHz) are all worth using."""
    files = {"proc/cpuinfo": "".join(f"processor : {i}\nFeatures : asimd i8mm\n\n" for i in range(len(values)))}
    files |= {f"sys/devices/system/cpu/cpu{i}/{file}": f"{v}\n" for i, v in enumerate(values)}
    host = detect(system="Linux", machine="aarch64", root=tree(tmp_path, files))
    assert host.big_cores == big
    assert host.threads == (big or len(values))
    assert cpu_class(host) == "cpu-arm-i8mm"


def test_features_are_those_of_every_core(tmp_path: Path) -> None:
    text = "processor : 0\nFeatures : asimd i8mm\n\nprocessor : 1\nFeatures : asimd\n"
    assert detect(system="Linux", machine="aarch64", root=tree(tmp_path, {"proc/cpuinfo": text})).isa == ("neon",)


def test_mini_pc(tmp_path: Path) -> None:
    host = detect(system="Linux", machine="x86_64", root=tree(tmp_path, N100))
    assert host.board is None, "a placeholder is no product name"
    assert (host.cpu, host.physical_cores, host.max_ghz) == ("Intel(R) N100", 4, 3.4)
    assert host.isa == ("avx", "avx2", "fma", "f16c", "avx_vnni")
    assert match_target(host) == "n100-16gb"


def test_performance_cores_of_a_hybrid(tmp_path: Path) -> None:
    host = detect(system="Linux", machine="x86_64", root=tree(tmp_path, HYBRID))
    assert (host.logical_cores, host.physical_cores, host.big_cores) == (16, 12, 4)
    assert match_target(host) is None
    assert cpu_class(host) == "cpu-x86-avx2"


def test_clock_where_there_is_no_cpufreq(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": "processor : 0\nmodel name : AMD EPYC\ncpu MHz : 2596.152\nflags : avx2\n"}
    assert detect(system="Linux", machine="x86_64", root=tree(tmp_path, files)).max_ghz == 2.596


@pytest.mark.parametrize(
    "limits",
    [
        {"proc/self/cgroup": "0::/app/worker\n", "sys/fs/cgroup/app/memory.max": str(2 * GIB)},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": str(2 * GIB)},
        {
            "proc/self/cgroup": "5:cpu,memory:/docker/x\n0::/\n",
            "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": str(2 * GIB),
        },
        {"sys/fs/cgroup/memory.max": str(2 * GIB)},
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": str(2 * GIB),
            "sys/fs/cgroup/a/b/memory.max": str(3 * GIB),
        },
    ],
)
def test_containers_count(tmp_path: Path, limits: dict[str, str]) -> None:
    host = detect(system="Linux", machine="x86_64", root=tree(tmp_path, N100 | limits))
    assert host.ram_bytes == 2 * GIB
    assert host.installed_bytes == pytest.approx(15.4 * GIB, rel=1e-6)


def test_memory_used_in_the_container_is_not_available(tmp_path: Path) -> None:
    limits = {"sys/fs/cgroup/memory.max": str(2 * GIB), "sys/fs/cgroup/memory.current": str(500 * MIB)}
    host = detect(system="Linux", machine="x86_64", root=tree(tmp_path, N100 | limits))
    assert host.available_bytes == 2 * GIB - 500 * MIB


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "3:pids:/small\n", "sys/fs/cgroup/memory/small/memory.limit_in_bytes": "1000"},
        {"proc/self/cgroup": "0::/../../../etc\n", "etc/memory.max": "1000", "sys/fs/cgroup/x": ""},
        {"proc/self/cgroup": "0::/mine\n", "sys/fs/cgroup/theirs/memory.max": "1000"},
    ],
)
def test_limits_of_others_do_not_count(tmp_path: Path, files: dict[str, str]) -> None:
    host = detect(system="Linux", machine="x86_64", root=tree(tmp_path, N100 | files))
    assert host.ram_bytes == host.installed_bytes


@pytest.mark.parametrize("limit", ["max\n", str(1 << 63), "9223372036854771712", "", "junk"])
def test_no_limit(tmp_path: Path, limit: str) -> None:
    host = detect(system="Linux", machine="x86_64", root=tree(tmp_path, N100 | {"sys/fs/cgroup/memory.max": limit}))
    assert host.ram_bytes == host.installed_bytes


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpu:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            3,
        ),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert detect(system="Linux", machine="x86_64", root=tree(tmp_path, N100 | files)).threads == cores


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/cpuinfo": "", "proc/meminfo": ""},
        {"proc/cpuinfo": "processor\nprocessor :\n: :\n\x00\n\n\n", "proc/meminfo": "MemTotal: lots\n"},
        {"proc/cpuinfo": "processor : 0\nCPU implementer : zz\nCPU part : -\n", "proc/self/cgroup": "nonsense\n::::\n"},
        {"sys/devices/cpu_core/cpus": "0-x,9\n", "sys/devices/system/cpu/cpu0/cache/index3/size": "many"},
        {"proc/self/cgroup": "0::/../../../etc\n"},
    ],
)
def test_nonsense_is_unknown(tmp_path: Path, files: dict[str, str]) -> None:
    host = detect(system="Linux", machine="riscv64", root=tree(tmp_path, files))
    assert (host.os, host.machine, host.ram_bytes, host.isa) == ("linux", "riscv64", None, ())
    assert host.threads == 1
    assert match_target(host) is None


def test_folders_and_binary_where_files_should_be(tmp_path: Path) -> None:
    (tmp_path / "proc" / "meminfo").mkdir(parents=True)
    (tmp_path / "proc" / "cpuinfo").write_bytes(bytes(range(256)) * 10)
    assert detect(system="Linux", machine="aarch64", root=tmp_path).ram_bytes is None


SYSCTL = """hw.memsize: 38654705664
hw.logicalcpu: 14
hw.physicalcpu: 14
hw.perflevel0.physicalcpu: 10
hw.perflevel0.l2cachesize: 16777216
hw.model: Mac16,6
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
machdep.cpu.brand_string: Apple M4 Max
"""
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               1000.
Pages active:                             5000.
Pages inactive:                            500.
Pages speculative:                          24.
"""


def test_mac() -> None:
    answers = {"sysctl": SYSCTL, "vm_stat": VM_STAT}
    host = detect(system="Darwin", machine="arm64", ask=lambda command: answers[command[0]])
    assert (host.os, host.cpu, host.board) == ("macos", "Apple M4 Max", "Mac16,6")
    assert (host.physical_cores, host.big_cores, host.threads) == (14, 10, 10)
    assert host.isa == ("neon", "dotprod", "i8mm")
    assert host.ram_bytes == 36 * GIB
    assert host.available_bytes == 1524 * 16384
    assert match_target(host) == "m4-max-32", "14 cores: the part with the smaller GPU"
    assert cpu_class(host) == "cpu-apple"


def test_mac_that_does_not_answer() -> None:
    host = detect(system="Darwin", machine="arm64", ask=lambda command: "")
    assert (host.cpu, host.ram_bytes, host.threads) == (None, None, 1)


def test_other_systems() -> None:
    assert detect(system="Plan9", machine="mips").os == "plan9"


@pytest.mark.parametrize(
    ("board", "cpu", "gib", "name"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit", None, 7.4, "jetson-orin-nano"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", None, 7.4, "jetson-orin-nano-super"),
        ("NVIDIA Jetson AGX Orin Developer Kit", None, 61, "jetson-agx-orin-64gb"),
        ("NVIDIA Jetson Xavier NX Developer Kit", None, 7.6, "jetson-xavier-nx-8gb"),
        ("Raspberry Pi 4 Model B Rev 1.4", "Cortex-A72", 3.7, "rpi4-4gb"),
        ("Raspberry Pi 500 Rev 1.0", "Cortex-A76", 7.8, "rpi5-8gb"),
        ("Raspberry Pi Zero 2 W Rev 1.0", "Cortex-A53", 0.42, "pi-zero-2w"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "Cortex-A53", 0.9, None),
        (None, "AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", 124, "strix-halo-128gb"),
        ("Jupiter", "AMD Custom APU 0405", 14.5, "steam-deck"),
        (None, "Apple M1", 8, "m1-8gb"),
        (None, "Apple M1 Pro", 16, "m1-pro-16gb"),
        (None, "Apple M5 Pro", 24, "m5-pro"),
        (None, "Apple M1 Extreme", 64, None),
        (None, None, 1, None),
    ],
)
def test_matching(board: str | None, cpu: str | None, gib: float, name: str | None) -> None:
    host = Host(os="linux", machine="aarch64", board=board, cpu=cpu, installed_bytes=int(gib * GIB))
    assert match_target(host) == name


def test_this_machine() -> None:
    host = detect()
    assert host.ram_bytes and host.ram_bytes > 100 * MIB
    assert 1 <= host.threads <= (os.cpu_count() or 1)
    if sys.platform == "linux":
        assert host.ram_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 1.01


def test_bandwidth_of_this_machine() -> None:
    result = measure_bandwidth(1, 0.2, buffer_bytes=8 * MIB)
    assert result.threads == 1
    assert result.moved % (8 * MIB) == 0
    assert result.moved > 8 * MIB, "more than one pass"
    assert 0.2 <= result.seconds < 5
    assert result.gb_s == pytest.approx(result.moved / result.seconds / 1e9, rel=0.05)
    assert 0.3 < result.gb_s < 2000
    assert "bytes read" in result.method


def test_bandwidth_counts_every_thread() -> None:
    result = measure_bandwidth(3, 0.1, buffer_bytes=48 * MIB)
    assert result.threads == 3
    assert result.moved >= 48 * MIB
    assert result.moved % (16 * MIB) == 0


def test_host_is_a_target() -> None:
    target = Target.load("host")
    assert target.name == "host"
    ram = detect().ram_bytes or 0
    assert 0 < (target.usable_bytes or 0) < ram
    assert target.threads and target.threads <= (os.cpu_count() or 1)


def test_host_that_is_a_known_board(tmp_path: Path) -> None:
    """Facts of the profile, at the memory that is really there, less what a container takes away."""
    pi = Target.of_host(detect(system="Linux", machine="aarch64", root=tree(tmp_path / "a", PI5)))
    assert (pi.name, pi.family) == ("host", "raspberry-pi")
    assert pi.ram_gib == pytest.approx(7.87)
    assert (pi.usable_bytes or 0) / GIB == pytest.approx(6.0)
    measured = pi.measured()
    assert measured and measured.gb_s == (9.6, 11.7)
    boxed = PI5 | {"sys/fs/cgroup/memory.max": str(GIB)}
    pi = Target.of_host(detect(system="Linux", machine="aarch64", root=tree(tmp_path / "b", boxed)))
    assert (pi.usable_bytes or 0) / GIB == pytest.approx(0.8)
