"""Forecasts: what moves them and which way, what they refuse to say, and how they do on published measurements."""

from __future__ import annotations

import csv
import runpy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from edgekit.errors import UnknownName
from edgekit.forecast import CALIBRATED_BAND, CLASSES, UNSURE_BAND, Workload, forecast
from edgekit.target import Calibration, Storage, Target

ROOT = Path(__file__).parents[1]
BITS = {"Q4_0": 4.5, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.4375, "F16": 16.0, "IQ2_S": 2.5625}


def model(billions: float, fmt: str = "Q4_0", *, layers: int = 28, kv_bytes: int = 0, **more: Any) -> Workload:
    """A dense model of one format without a head of its own."""
    weights = int(billions * 1e9)
    return Workload({fmt: weights}, int(weights * BITS[fmt] / 8), kv_bytes, layers, weights, 128, **more)


def speed(ref: str, work: Workload, **how: Any) -> float:
    made = forecast(Target.load(ref), work, **how)
    assert made.decode_tok_s is not None
    return made.decode_tok_s


def test_raspberry_pi_5_by_hand() -> None:
    """2.1 B of Q4_0 weights: 92 % of the middle of 9.6-11.7 GB/s, and 2.1 weights a cycle on 4 x 2.4 GHz."""
    work = model(2.1)
    memory, compute = 2.1e9 * 4.5 / 8 / (0.92 * 10.65e9), 2.1 / (2.1 * 4 * 2.4)
    made = forecast(Target.load("rpi5"), work)
    assert made.decode_tok_s == pytest.approx((memory**4 + compute**4) ** -0.25)
    assert made.bound == ("memory" if memory > compute else "compute")
    assert made.decode_range == pytest.approx((0.7 * made.decode_tok_s, 1.3 * made.decode_tok_s))
    assert made.basis == "92% of 10.65 GB/s measured memory traffic, 4 cores at 2.4 GHz"


def test_mac_by_hand() -> None:
    """1 B of Q8_0 on M4: 90 % of 120 GB/s and 115 us for each of 20 layers."""
    seconds = 1.0625 / (0.9 * 120) + 20 * 115e-6
    assert speed("m4", model(1, "Q8_0", layers=20)) == pytest.approx(1 / seconds)


def test_facts_of_a_device_come_before_those_of_its_class() -> None:
    """Strix Halo: 88 % of 256 GB/s and 103 us a layer, against 75 % and 75 us."""
    seconds = 1.0625 / (0.88 * 256) + 20 * 103e-6
    assert speed("strix-halo", model(1, "Q8_0", layers=20)) == pytest.approx(1 / seconds)


def test_mac_prefill_by_hand() -> None:
    """22.2 tok/s of a 7B model for each of (at least) 8 cores."""
    made = forecast(Target.load("m4"), model(6.476005376))
    assert made.prefill_tok_s == pytest.approx(22.2 * 8)
    assert made.first_token_s(512) == pytest.approx(512 / 22.2 / 8)
    assert made.prefill_range and made.prefill_range[0] < 22.2 * 8 < made.prefill_range[1]


def test_fewer_bits_are_no_faster_without_dotprod() -> None:
    pi4 = forecast(Target.load("rpi4"), model(1))
    assert pi4.bound == "compute"
    assert speed("rpi4", model(1, "Q2_K")) < speed("rpi4", model(1, "Q4_0"))
    assert speed("rpi4", model(0.5)) == pytest.approx(2 * speed("rpi4", model(1)), rel=0.01)


@pytest.mark.parametrize(
    ("ref", "backend"),
    [
        ("snapdragon-8-gen-2", "cpu"),
        ("snapdragon-8-elite-gen-5", "opencl"),
        ("snapdragon-8-elite-gen-5", "hexagon"),
    ],
)
def test_low_bit_formats_are_slow_on_phones(ref: str, backend: str) -> None:
    fast = speed(ref, model(1.5, "Q4_0"), backend=backend)
    for name in ("Q2_K", "Q3_K", "IQ2_S"):
        assert speed(ref, model(1.5, name), backend=backend) < fast


def test_on_a_mac_bits_are_what_counts() -> None:
    assert speed("m4", model(8, "Q2_K")) > speed("m4", model(8, "Q4_0")) > speed("m4", model(8, "Q8_0"))


def test_context_costs_time_and_attention_says_how_much() -> None:
    short, long = model(3), model(3, kv_bytes=500 << 20)
    assert speed("strix-halo", long) < speed("strix-halo", short)
    plain = speed("strix-halo", replace(long, flash=False))
    assert plain < speed("strix-halo", long) < speed("strix-halo", replace(long, grouped=False))


def test_layers_cost_time_on_a_gpu() -> None:
    assert speed("m4", model(0.1, layers=60)) < speed("m4", model(0.1, layers=10))


def test_threads() -> None:
    one, four = (speed("rpi5", model(1), threads=n) for n in (1, 4))
    assert one < 0.5 * four
    assert speed("orange-pi-5", model(1), threads=8) == speed("orange-pi-5", model(1)), "little cores do not help"
    target, work = Target.load("rpi5"), model(1)
    whole, half = forecast(target, work).prefill_tok_s, forecast(target, work, threads=2).prefill_tok_s
    assert whole and half == pytest.approx(whole / 2)


def test_mixtures_lie_between() -> None:
    mixed = Workload({"Q4_0": 500_000_000, "F16": 500_000_000}, int(1e9 * 10.25 / 8), 0, 28, 10**9, 128)
    assert speed("rpi4", model(1, "F16")) < speed("rpi4", mixed) < speed("rpi4", model(1))


def test_unknown_stays_unknown() -> None:
    made = forecast(Target.load("pixel-9-pro"), model(1))
    assert (made.decode_tok_s, made.prefill_tok_s, made.decode_range, made.bound) == (None, None, None, None)
    assert "bandwidth" in made.basis
    assert made.first_token_s(100) is None
    assert forecast(Target.load("m5-pro"), model(1)).prefill_tok_s is None, "its GPU cores are not known"
    assert forecast(Target.load("rpi5"), model(1)).load_s(10**9) is None, "no read speed was published"


def test_load_time_where_storage_is_known() -> None:
    target = Target.load("rpi5")
    storage = Storage(medium="NVMe", read_mb_s=500, source="a test of mine")
    made = forecast(target.model_copy(update={"storage": storage}), model(1))
    assert made.load_s(10**9) == pytest.approx(2.0)


def test_half_known_cpus_have_a_wide_band() -> None:
    made = forecast(Target.load("cix-p1"), model(3))
    assert made.band_pct == UNSURE_BAND
    assert "arithmetic is left out" in made.basis


def run(work: Workload, tok_s: float, prefill: float | None = None) -> Calibration:
    return Calibration(
        backend="cpu",
        model="one",
        preset="Q4_0",
        weights_by_format=dict(work.weights_by_format),
        bytes_per_token=work.bytes_per_token,
        layers=work.layers,
        body_params=work.body_params,
        decode_tok_s=tok_s,
        prefill_tok_s=prefill,
        source="measured by a test",
    )


@pytest.mark.parametrize("ref", ["rpi5", "pixel-9-pro"])
def test_calibration_is_reproduced_and_carried_over(ref: str) -> None:
    work = model(1.5)
    target = Target.load(ref)
    target = target.model_copy(update={"calibration": (run(work, 4.0, 30.0),)})
    made = forecast(target, work)
    assert made.decode_tok_s == pytest.approx(4.0)
    assert made.calibrated
    assert made.band_pct == CALIBRATED_BAND
    plain = forecast(Target.load("rpi5"), work)
    if ref == "rpi5":
        assert made.prefill_tok_s == pytest.approx(30.0)
        assert plain.decode_tok_s
        assert f"{4.0 / plain.decode_tok_s:.2f} x" in made.basis
    assert forecast(target, model(3)).decode_tok_s == pytest.approx(2.0, rel=0.05)


def test_calibration_of_another_backend_is_not_used() -> None:
    target = Target.load("snapdragon-8-gen-2")
    target = target.model_copy(update={"calibration": (run(model(1), 1.0),)})
    assert not forecast(target, model(1), backend="opencl").calibrated
    assert forecast(target, model(1)).calibrated


def test_unknown_backend_and_class() -> None:
    target = Target.load("rpi5")
    with pytest.raises(UnknownName, match="cuda"):
        forecast(target, model(1), backend="cuda")
    odd = target.backend_named().model_copy(update={"speed_class": "cpu-arm-dotprd"})
    with pytest.raises(UnknownName) as e:
        forecast(target.model_copy(update={"backend": (odd,)}), model(1))
    assert "cpu-arm-dotprod" in e.value.hint


@pytest.mark.parametrize("name", Target.names())
def test_every_backend_forecasts_below_its_roof_or_says_why_not(name: str) -> None:
    target = Target.load(name)
    for backend in target.backend:
        for billions in (0.1, 1, 8):
            work = model(billions, "Q8_0")
            made = forecast(target, work, backend=backend.name)
            if made.decode_tok_s is None:
                assert "not known" in made.basis
            elif target.bandwidth:
                assert 0 < made.decode_tok_s < target.bandwidth.high * 1e9 / work.bytes_per_token


def test_every_class_is_used_by_a_target_or_by_host() -> None:
    used = {b.speed_class for n in Target.names() for b in Target.load(n).backend}
    of_host = {"cpu-apple", "cpu-x86-plain"}
    assert set(CLASSES) == used | of_host


@pytest.fixture(scope="module")
def script() -> Mapping[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "check-forecast"))


@pytest.fixture(scope="module")
def replays(script: Mapping[str, Any]) -> list[Any]:
    path: Path = script["default_csv"]()
    if not path.is_file():
        pytest.skip(f"no published rows at {path} (set EDGEKIT_PUBLISHED_TOKS)")
    with path.open(newline="", encoding="utf-8") as file:
        made: list[Any] = script["replay"](csv.DictReader(file))
    return made


def test_published_rows_are_forecast_well(script: Mapping[str, Any], replays: list[Any]) -> None:
    devices = script["by_device"](replays)
    assert len(replays) > 600
    assert len(devices) > 40
    assert median(devices.values()) < 0.16
    assert script["percentile"](devices.values(), 0.9) < 0.40
    assert median(script["unseen"](replays).values()) < 0.20


def test_bands_hold_what_they_promise(replays: list[Any]) -> None:
    inside = [r.error <= r.forecast.band_pct / 100 for r in replays]
    assert sum(inside) / len(inside) > 0.85


def test_prompts_are_forecast(script: Mapping[str, Any], replays: list[Any]) -> None:
    assert median(script["by_device"](replays, prefill=True).values()) < 0.30


def test_no_forecast_is_above_the_memory_roof(replays: list[Any]) -> None:
    assert all(r.forecast.decode_tok_s <= r.roof for r in replays if r.roof)


def test_docs_hold_the_constants() -> None:
    """A class's row of docs/forecast.md names its numbers."""
    docs = (ROOT / "docs" / "forecast.md").read_text(encoding="utf-8")
    for name, group in CLASSES.items():
        row = next(line for line in docs.splitlines() if line.startswith("|") and f"`{name}`" in line)
        numbers = [f"{group.band_pct:.0f} %"]
        numbers += [f"{group.rate:.1f}"] if group.rate else [f"{group.eta:.2f}", f"{group.overhead_us:.0f}"]
        assert not [n for n in numbers if n not in row], row
