"""Every shipped device, and what a user may do with a name or a file of their own."""

from __future__ import annotations

import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import InvalidSpec, UnknownName
from edgekit.forecast import CLASSES
from edgekit.quant.ggml import FORMATS
from edgekit.recipe import Recipe
from edgekit.target import FROM_MEMORY, Detect, Rate, Target, middle
from edgekit.units import GIB

NAMES = Target.names()
ROOT = Path(__file__).parents[1]

BOARD = """
title = "My board"
family = "other"
ram = { gib = [2], source = "printed on the box" }
bandwidth = { gb_s = 8.5, source = "my own measurement" }

[[backend]]
name = "cpu"
speed_class = "cpu-arm-plain"
"""


def write(tmp_path: Path, text: str, name: str = "board") -> Path:
    path = tmp_path / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def numbers(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Tables of a TOML that hold a number, with their paths."""
    if isinstance(node, dict):
        values = [x for v in node.values() for x in (v if isinstance(v, list) else [v])]
        if any(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            yield path, node
        for key, value in node.items():
            yield from numbers(value, f"{path}.{key}")
    if isinstance(node, list):
        for index, value in enumerate(node):
            yield from numbers(value, f"{path}.{index}")


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source_and_a_date(name: str) -> None:
    data = tomllib.loads((Target.folder() / f"{name}.toml").read_text(encoding="utf-8"))
    # `context` is edgekit's choice, `detect.cores` a pattern, `of_q4_0` lies inside a fact
    data.pop("context", None)
    data.pop("detect", None)
    bare = [path for path, table in numbers(data) if "source" not in table and not path.endswith(".of_q4_0")]
    assert not bare
    target = Target.load(name)
    facts = dict(target.facts())
    assert facts
    for where, fact in facts.items():
        assert " " in fact.source, f"{where}: {fact.source} is a key, not a text"
        assert fact.date is not None or fact.source.startswith("rule: "), where
    used = {fact.source for fact in facts.values()}
    assert set(target.sources.values()) <= used, "a source that nothing refers to"


@pytest.mark.parametrize("name", NAMES)
def test_shipped_values_are_sane(name: str) -> None:
    target = Target.load(name)
    for backend in target.backend:
        assert backend.speed_class in CLASSES
        for rate in (backend.measured, backend.observed):
            if rate and target.bandwidth:
                assert rate.value <= 1.05 * target.bandwidth.high
    if target.bandwidth:
        assert 1 <= target.bandwidth.value <= 1000
    if target.cpu and target.cpu.ghz:
        assert 0.5 <= middle(target.cpu.ghz) <= 6
    assert 1 <= (target.threads or 1) <= 32
    for gib in target.ram.gib if target.ram else ():
        sized = target.with_ram(gib)
        assert 0.2 * gib * GIB <= (sized.usable_bytes or 0) <= 0.97 * gib * GIB
    assert target.recipe in Recipe.names()
    for entry in (*target.fast, *target.slow):
        assert any(f == entry or f.startswith(f"{entry}_") for f in FORMATS), entry


@pytest.mark.parametrize(
    "ref",
    [
        "rpi4@4GB",
        "rpi4@8GB",
        "rpi5@4GB",
        "rpi5@8GB",
        "rpi5@16GB",
        "pi-zero-2w",
        "orange-pi-5",
        "jetson-nano",
        "jetson-xavier-nx",
        "jetson-orin-nano",
        "jetson-orin-nano-super",
        "jetson-orin-nx@16GB",
        "jetson-agx-orin@64GB",
        "jetson-thor",
        "m1",
        "m1-pro",
        "m1-max",
        "m1-ultra",
        "m2",
        "m2-pro",
        "m2-max",
        "m2-ultra",
        "m3",
        "m3-pro",
        "m3-max",
        "m3-ultra",
        "m4",
        "m4-pro",
        "m4-max",
        "m5",
        "m5-pro",
        "m5-max",
        "iphone-15-pro",
        "iphone-16-pro",
        "iphone-17-pro",
        "snapdragon-8-gen-2",
        "snapdragon-8-gen-3",
        "snapdragon-8-elite",
        "snapdragon-8-elite-gen-5",
        "snapdragon-x-elite",
        "n100",
        "n150",
        "strix-halo",
        "steam-deck",
        "x86-laptop",
    ],
)
def test_promised_devices_are_shipped(ref: str) -> None:
    assert Target.load(ref).backend


def test_aliases_are_nobody_elses_name() -> None:
    seen: dict[str, str] = {}
    for name in NAMES:
        for label in (name, *Target.load(name).aliases):
            assert seen.setdefault(label.lower(), name) == name
            assert label == label.lower()


def test_docs_hold_the_table() -> None:
    table = runpy.run_path(str(ROOT / "scripts" / "targets-table"))["table"]()
    docs = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    missing = [line for line in table.splitlines() if line not in docs]
    assert not missing, "docs/targets.md: paste the output of scripts/targets-table"


def test_size_is_chosen_by_name() -> None:
    assert Target.load("rpi5").ram_gib == 8
    assert Target.load("m2").ram_gib == 8, "the smallest where the file says nothing"
    for ref in ("rpi5@16GB", "rpi5-16gb", "rpi5@16GiB", "pi5@16gb"):
        target = Target.load(ref)
        assert (target.name, target.ram_gib) == ("rpi5-16gb", 16)
    assert Target.load("rpi5-16gb").usable_bytes == int(13.5 * GIB)


def test_size_that_is_not_sold() -> None:
    with pytest.raises(UnknownName, match="Raspberry Pi 5 with 3 GB") as e:
        Target.load("rpi5@3GB")
    assert "rpi5@16GB" in e.value.hint
    for ref in ("m5-pro@0GB", "m5-pro@99999999999GB"):
        with pytest.raises(UnknownName, match="is no size of memory"):
            Target.load(ref)


def test_size_of_an_own_file(tmp_path: Path) -> None:
    path = write(tmp_path, BOARD.replace("[2]", "[2, 4]"))
    assert (Target.load(path).ram_gib, Target.load(f"{path}@4GB").name) == (2, "board-4gb")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("rpi-5", "rpi5"), ("RPI6", "rpi"), ("jetson-orin-nano-supr", "jetson-orin-nano-super"), ("hst", "host")],
)
def test_unknown_name_suggests(typo: str, meant: str) -> None:
    with pytest.raises(UnknownName, match=f"no target called '{typo}'") as e:
        Target.load(typo)
    assert meant in e.value.hint
    assert "edgekit targets list" in e.value.hint


def test_own_file(tmp_path: Path) -> None:
    target = Target.load(write(tmp_path, BOARD))
    assert target.name == "board"
    assert target.bandwidth == Rate(gb_s=8.5, source="my own measurement")
    assert target.usable_bytes == int(0.8 * GIB), "a rule never leaves less than 40 %"
    assert Target.load(f"{tmp_path}/board.toml").name == "board"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("gb_s = 8.5", "gb_s = 8.5, mhz = 3"), "bandwidth.mhz"),
        ((', source = "my own measurement"', ""), "bandwidth.source"),
        (("my own measurement", "GG"), "source 'GG' is not in"),
        (("8.5", "-1"), "bandwidth.gb_s"),
        (("8.5", "nan"), "bandwidth.gb_s"),
        (("8.5", "inf"), "bandwidth.gb_s"),
        (("8.5", '"fast"'), "bandwidth.gb_s"),
        (('family = "other"', 'family = "toaster"'), "family"),
        (("[2]", "[4, 2]"), "ascending"),
        (("[2]", "[]"), "ram.gib"),
        (("gib = [2]", "gib = [2], default_gib = 3"), "not one of gib"),
        (('family = "other"', 'family = "other"\nfast = ["Q4_0"]\nslow = ["Q4_0"]'), "both fast and slow"),
        (('family = "other"', 'family = "other"\nname = "../evil"'), "name"),
        (('family = "other"', 'family = "other"\nusable = { gib = [1, 2], source = "a guess" }'), "usable.gib"),
        (
            ('family = "other"', 'family = "other"\nusable = { gib = [1], share = 0.5, source = "a guess" }'),
            "exactly one",
        ),
        (("[[backend]]", "[[backends]]"), "backend"),
        (("[[backend]]", '[[backend]]\nname = "cpu"\nspeed_class = "cuda-pc"\n[[backend]]'), "two backends"),
        (('family = "other"', 'family = "other"\nsources = 3'), "sources"),
        (('title = "My board"', "title ="), "board.toml"),
    ],
)
def test_own_file_with_a_mistake(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    assert change[0] in BOARD
    with pytest.raises(InvalidSpec) as e:
        Target.load(write(tmp_path, BOARD.replace(*change)))
    assert complaint in str(e.value)
    assert "board.toml" in str(e.value)


def test_own_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="cannot read target"):
        Target.load(tmp_path / "none.toml")


def test_keyed_sources_are_resolved(tmp_path: Path) -> None:
    text = (
        "read = 2026-01-31\n"
        + BOARD.replace("my own measurement", "BOX")
        + '\n[sources]\nBOX = "a data sheet, page 3"\n'
    )
    bandwidth = Target.load(write(tmp_path, text)).bandwidth
    assert bandwidth and bandwidth.source == "a data sheet, page 3"
    assert str(bandwidth.date) == "2026-01-31"


def test_apple_gpu_budget_grows_above_36_gib() -> None:
    assert (Target.load("m3-pro@36GB").usable_bytes or 0) / GIB == pytest.approx(24, abs=0.1)
    assert (Target.load("m4-max-40@64GB").usable_bytes or 0) / GIB == pytest.approx(48, abs=0.1)
    unknown = Target.load("m5-max")
    assert unknown.ram_gib is None
    assert unknown.usable_bytes is None
    assert (Target.load("m5-max@64GB").usable_bytes or 0) / GIB == pytest.approx(48, abs=0.1)
    assert (Target.load("m5-max@36GB").usable_bytes or 0) / GIB == pytest.approx(24, abs=0.1)


def test_what_a_device_runs_fast() -> None:
    pi = Target.load("rpi5")
    assert [pi.prefers(f) for f in ("Q4_0", "Q4_K", "Q4_K_M", "q4_k_s", "IQ2_XS", "IQ3_M")] == ["fast"] * 4 + [
        "slow"
    ] * 2
    assert pi.prefers("Q4_1") == "unknown"
    assert pi.prefers("IQ4_NL") == "fast"
    phone = Target.load("snapdragon-8-elite-gen-5")
    assert phone.prefers("Q3_K_M") == "slow"
    assert phone.prefers("Q5_K_M") == "ok", "0.72 of Q4_0 measured, and in neither list"
    assert phone.prefers("Q4_K_M") == "fast"


def test_facts_from_memory_say_so() -> None:
    ram = Target.load("m4").ram
    assert ram and ram.source == FROM_MEMORY


def test_backend_by_name() -> None:
    halo = Target.load("strix-halo")
    assert halo.backend_named().name == "vulkan"
    measured = halo.measured("cpu")
    assert measured and measured.value == 109
    with pytest.raises(UnknownName, match="no backend of strix-halo called 'cuda'"):
        halo.backend_named("cuda")


def test_detect_marks_are_not_loose() -> None:
    marks: list[tuple[str, Detect]] = [(n, d) for n in NAMES for d in Target.load(n).detect]
    for name, mark in marks:
        for other, its in marks:
            if other != name and mark.model.lower() == its.model.lower():
                assert mark.cores and its.cores and mark.cores != its.cores
