"""How fast a device will be, reckoned from what one token reads and computes. Pure; knows targets, no file, no model.

Decoding is bound by memory traffic, on CPUs also by arithmetic; prefill by arithmetic alone (docs/forecast.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import exp, log
from statistics import median
from typing import Literal

from edgekit.shelf import unknown
from edgekit.target import Backend, Calibration, Prefill, Target, middle

Bound = Literal["memory", "compute"]

SHARPNESS = 4.0
"""Exponent that joins the two CPU bounds: (memory^4 + compute^4)^(1/4), a rounded maximum."""
OF_MEASURED, OF_THEORETICAL = 0.92, 0.62
"""What CPU decoding reaches of measured streaming traffic, and of theoretical bandwidth where nothing was measured."""
KV_READS, KV_READS_GROUPED, KV_READS_PLAIN = 1.0, 2.0, 5.5
"""How often the KV cache is read a token: once with flash attention, twice where query heads share KV heads, 5 to 6
times without flash attention (published depth sweeps on Strix Halo)."""
LLAMA_7B_LAYERS = 6_476_005_376
"""Weights of the 32 layers of Llama 2 7B, which `prefill.tok_s_7b_per_gpu_core` was measured on."""
CALIBRATED_BAND, UNSURE_BAND = 12.0, 50.0
"""Percent: error left after one run on the device itself (59 device and backend pairs: 9-11 %); and where cores or
clock of a CPU are not known, so that only one of its two bounds can be reckoned."""


@dataclass(frozen=True, slots=True)
class SpeedClass:
    """Devices alike enough to share constants; all of them against Q4_0, in which a factor is 1.

    CPUs have `rate`, weights a cycle and core; their `factors` slow the arithmetic. Others have `eta`, the share of
    theoretical bandwidth reached, and `overhead_us` a layer; their `factors` slow the traffic. `band_pct` is the
    error to expect. A factor's key is a format or the start of its name (`IQ2`); `other` stands for the rest.
    """

    band_pct: float
    rate: float | None = None
    eta: float = 1.0
    overhead_us: float = 0.0
    factors: Mapping[str, float] = field(default_factory=dict)
    prefill: Mapping[str, float] = field(default_factory=dict)

    def factor(self, name: str, *, prefill: bool = False) -> float:
        table = self.prefill if prefill else self.factors
        return table.get(name) or table.get(name.partition("_")[0]) or table.get("other", 1.0)


# Fitted to published rows (llama.cpp and ollama, 2026-11-23; docs/forecast.md says which devices and how well).
_CPU = {"Q4_0": 1.0, "IQ4_NL": 1.0, "Q4_K": 1.0, "IQ4_XS": 0.9, "Q6_K": 0.8, "Q2_K": 0.77, "Q5_K": 0.74, "Q8_0": 0.73}
_CPU |= {"Q5_0": 0.69, "Q3_K": 0.61, "F16": 0.46, "BF16": 0.46, "F32": 0.46, "IQ2": 0.4, "IQ1": 0.4, "IQ3": 0.3}
_CPU |= {"other": 0.7}
_ARM_PREFILL = {"Q4_0": 1.0, "Q8_0": 1.0, "IQ4_NL": 0.8, "Q4_K": 0.69, "Q5_K": 0.5, "Q6_K": 0.5, "IQ4_XS": 0.33}
_ARM_PREFILL |= {
    "F16": 0.25,
    "BF16": 0.25,
    "Q2_K": 0.23,
    "Q3_K": 0.18,
    "IQ1": 0.1,
    "IQ2": 0.1,
    "IQ3": 0.1,
    "other": 0.25,
}
_X86_PREFILL = {"Q4_0": 1.0, "Q8_0": 0.95, "IQ4_NL": 0.8, "Q2_K": 0.8, "Q4_K": 0.75, "Q5_0": 0.7, "Q3_K": 0.55}
_X86_PREFILL |= {"Q6_K": 0.55, "Q5_K": 0.5, "IQ4_XS": 0.5, "F16": 0.5, "BF16": 0.5, "IQ1": 0.3, "IQ2": 0.3, "IQ3": 0.2}
_METAL = {"Q4_0": 0.95, "Q4_K": 0.95}
_ADRENO = {"Q8_0": 0.97, "Q4_0": 0.66, "Q6_K": 0.66, "Q5_K": 0.56, "Q4_K": 0.54, "Q2_K": 0.16, "Q3_K": 0.14}
_ADRENO |= {"IQ1": 0.08, "IQ2": 0.1, "IQ3": 0.08, "other": 0.5}
_ADRENO_PREFILL = {"Q8_0": 0.86, "Q4_K": 0.65, "F16": 0.66, "Q6_K": 0.63, "Q5_K": 0.53, "Q3_K": 0.07, "Q2_K": 0.08}
_ADRENO_PREFILL |= {"IQ1": 0.04, "IQ2": 0.04, "IQ3": 0.04}
_HEXAGON = {"Q4_0": 0.93, "Q6_K": 0.68, "Q4_K": 0.65, "Q5_K": 0.56, "Q3_K": 0.39, "Q2_K": 0.33, "IQ3": 0.27}
_HEXAGON |= {"IQ1": 0.15, "IQ2": 0.15, "other": 0.6}
_HEXAGON_PREFILL = {"Q4_K": 0.48, "Q5_K": 0.35, "Q6_K": 0.32, "Q3_K": 0.12, "Q2_K": 0.16, "IQ1": 0.07, "IQ2": 0.07}
_HEXAGON_PREFILL |= {"IQ3": 0.07}


def _cpu(rate: float, prefill: Mapping[str, float] = _ARM_PREFILL) -> SpeedClass:
    return SpeedClass(band_pct=30, rate=rate, factors=_CPU, prefill=prefill)


CLASSES: Mapping[str, SpeedClass] = {
    "cpu-arm-plain": _cpu(0.8),
    "cpu-arm-dotprod": _cpu(2.1),
    "cpu-arm-i8mm": _cpu(2.2),
    "cpu-oryon-phone": _cpu(3.0),
    "cpu-oryon": _cpu(8.7),
    "cpu-apple": _cpu(8.7),
    "cpu-x86-plain": _cpu(1.0, _X86_PREFILL),
    "cpu-x86-small": _cpu(2.5, _X86_PREFILL),
    "cpu-x86-avx2": _cpu(8.7, _X86_PREFILL),
    "metal-mac": SpeedClass(20, eta=0.9, overhead_us=115, factors=_METAL),
    "metal-ultra": SpeedClass(20, eta=0.86, overhead_us=230, factors=_METAL),
    "metal-iphone": SpeedClass(30, eta=0.7, overhead_us=60),
    "cuda-pc": SpeedClass(20, eta=0.8, overhead_us=30),
    "cuda-jetson": SpeedClass(30, eta=0.76, overhead_us=120),
    "vulkan-igpu": SpeedClass(30, eta=0.75, overhead_us=75),
    "opencl-adreno": SpeedClass(50, eta=0.54, overhead_us=5, factors=_ADRENO, prefill=_ADRENO_PREFILL),
    "hexagon": SpeedClass(50, eta=0.46, overhead_us=130, factors=_HEXAGON, prefill=_HEXAGON_PREFILL),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """What a token costs. `weights_by_format`: weights read a decoded token (no untied input embedding, no idle
    experts); `bytes_per_token`: their bytes; `kv_bytes`: KV cache held while decoding; `body_params`: weights in
    the layers' matrices, which every prompt token passes (the head is computed for the last one alone).
    """

    weights_by_format: Mapping[str, int]
    bytes_per_token: int
    kv_bytes: int
    layers: int
    body_params: int
    context: int
    grouped: bool = True
    flash: bool = True

    @property
    def traffic(self) -> float:
        """Bytes that cross the memory bus for one decoded token."""
        reads = KV_READS_PLAIN if not self.flash else KV_READS_GROUPED if self.grouped else KV_READS
        return self.bytes_per_token + reads * self.kv_bytes

    def slowed(self, of: SpeedClass, *, prefill: bool = False) -> float:
        """Mean factor of the formats, each by its share of the weights: times add up, so the mean is harmonic."""
        total = sum(self.weights_by_format.values())
        cost = sum(n / of.factor(name, prefill=prefill) for name, n in self.weights_by_format.items())
        return total / cost if cost else 1.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Reckoned, not measured. None where a fact is missing, and then `basis` says which; ranges are +-`band_pct`."""

    backend: str
    decode_tok_s: float | None
    prefill_tok_s: float | None
    band_pct: float
    bound: Bound | None
    basis: str
    calibrated: bool = False
    storage_mb_s: float | None = None

    @property
    def decode_range(self) -> tuple[float, float] | None:
        return self._range(self.decode_tok_s)

    @property
    def prefill_range(self) -> tuple[float, float] | None:
        return self._range(self.prefill_tok_s)

    def load_s(self, file_bytes: int) -> float | None:
        """Seconds to read the file from the device's storage."""
        return file_bytes / (self.storage_mb_s * 1e6) if self.storage_mb_s else None

    def first_token_s(self, prompt: int) -> float | None:
        """Seconds from a prompt of `prompt` tokens to the first token of the answer, the model being loaded."""
        return prompt / self.prefill_tok_s if self.prefill_tok_s else None

    def _range(self, value: float | None) -> tuple[float, float] | None:
        if value is None:
            return None
        return value * (1 - self.band_pct / 100), value * (1 + self.band_pct / 100)


def forecast(target: Target, workload: Workload, *, backend: str | None = None, threads: int | None = None) -> Forecast:
    """Speeds of `workload` on `target`: decoding at `workload.context` (whose KV cache is `kv_bytes`), and prompts of
    a few hundred tokens. `backend` None is the target's first. Raises UnknownName for a backend or speed class.
    """
    chosen = target.backend_named(backend)
    runs = [c for c in target.calibration if c.backend == chosen.name]
    plain = _uncalibrated(target, chosen, workload, threads, runs)
    if not runs or plain.decode_tok_s is None:
        return plain
    scale, prefill_scale = _scales(target, chosen, runs)
    return replace(
        plain,
        decode_tok_s=plain.decode_tok_s * scale,
        prefill_tok_s=plain.prefill_tok_s * prefill_scale if plain.prefill_tok_s else None,
        band_pct=CALIBRATED_BAND,
        basis=f"{scale:.2f} x the plain forecast, by {len(runs)} run(s) measured on the device",
        calibrated=True,
    )


def _uncalibrated(
    target: Target, backend: Backend, workload: Workload, threads: int | None, runs: list[Calibration]
) -> Forecast:
    group = CLASSES.get(backend.speed_class)
    if group is None:
        raise unknown("speed class", backend.speed_class, CLASSES)
    rate, basis = _bandwidth(target, backend, group, runs)
    storage = target.storage.read_mb_s if target.storage else None
    prefill = _prefill(target, backend, group, workload, threads)
    plain = Forecast(backend.name, None, prefill, group.band_pct, None, basis, storage_mb_s=storage)
    if rate is None:
        return plain
    if group.rate is None:
        return replace(plain, decode_tok_s=1 / _gpu_seconds(backend, group, workload, rate), bound="memory")
    cores, clock = _cores(target, threads), target.cpu.clock_ghz if target.cpu else None
    memory = workload.traffic / rate
    if not cores or not clock:
        basis = f"{basis}; cores or clock not known, so arithmetic is left out"
        return replace(plain, decode_tok_s=1 / memory, bound="memory", basis=basis, band_pct=UNSURE_BAND)
    weights = sum(workload.weights_by_format.values())
    compute = weights / (group.rate * workload.slowed(group) * cores * clock * 1e9)
    return replace(
        plain,
        decode_tok_s=(memory**SHARPNESS + compute**SHARPNESS) ** (-1 / SHARPNESS),
        bound="compute" if compute > memory else "memory",
        basis=f"{basis}, {cores} cores at {clock:g} GHz",
    )


def _bandwidth(
    target: Target, backend: Backend, group: SpeedClass, runs: list[Calibration]
) -> tuple[float | None, str]:
    """Bytes/s that decoding can draw, and where the figure is from."""
    if target.bandwidth and (group.rate is None or not backend.measured):
        share = OF_THEORETICAL if group.rate is not None else backend.eta.ratio if backend.eta else group.eta
        gb_s = target.bandwidth.value
        return share * gb_s * 1e9, f"{share:.0%} of {gb_s:.4g} GB/s theoretical bandwidth"
    if backend.measured:
        gb_s = backend.measured.value
        return OF_MEASURED * gb_s * 1e9, f"{OF_MEASURED:.0%} of {gb_s:.4g} GB/s measured memory traffic"
    if runs:
        return median(c.bytes_per_token * c.decode_tok_s for c in runs), "bytes read a second in calibration runs"
    return None, "the memory bandwidth of this device is not known: measure it with `edgekit targets detect`"


def _gpu_seconds(backend: Backend, group: SpeedClass, workload: Workload, rate: float) -> float:
    """(weights / format factor + KV) / bandwidth + overhead of each layer."""
    overhead = backend.overhead.us_per_layer if backend.overhead else group.overhead_us
    weights = workload.bytes_per_token / workload.slowed(group)
    kv = workload.traffic - workload.bytes_per_token
    return (weights + kv) / rate + overhead * 1e-6 * workload.layers


def _cores(target: Target, threads: int | None) -> int | None:
    """Cores that decode: as many as threads, and no little ones."""
    big, wanted = (target.cpu.big if target.cpu else None), threads or target.threads
    return min(big, wanted) if big and wanted else wanted or big


def _prefill(
    target: Target, backend: Backend, group: SpeedClass, workload: Workload, threads: int | None
) -> float | None:
    """Prompt tok/s: 2 operations a weight of the layers, over the arithmetic that prompts really reach."""
    reached = _operations(target, backend.prefill, group)
    if reached is None or not workload.body_params:
        return None
    if group.rate is not None and threads and (usual := _cores(target, None)):
        reached *= min(threads / usual, 1.0)
    return reached * workload.slowed(group, prefill=True) / (2 * workload.body_params)


def _operations(target: Target, prefill: Prefill | None, group: SpeedClass) -> float | None:
    """Operations/s in Q4_0: as published, or from 7B tok/s a GPU core for the smallest GPU of that name."""
    if prefill and prefill.tops is not None:
        return middle(prefill.tops) * 1e12 / group.factor(prefill.format, prefill=True)
    cores = target.gpu.fewest_cores if target.gpu else None
    if prefill and prefill.tok_s_7b_per_gpu_core and cores:
        return prefill.tok_s_7b_per_gpu_core * cores * 2 * LLAMA_7B_LAYERS
    return None


def _scales(target: Target, backend: Backend, runs: list[Calibration]) -> tuple[float, float]:
    """How much faster the device decoded and prefilled than the plain forecast: geometric medians over its runs."""
    decode, prefill = [], []
    for run in runs:
        plain = _uncalibrated(target, backend, _of_run(run), run.threads, runs)
        if plain.decode_tok_s:
            decode.append(log(run.decode_tok_s / plain.decode_tok_s))
        if plain.prefill_tok_s and run.prefill_tok_s:
            prefill.append(log(run.prefill_tok_s / plain.prefill_tok_s))
    return exp(median(decode or [0.0])), exp(median(prefill or [0.0]))


def _of_run(run: Calibration) -> Workload:
    return Workload(
        weights_by_format=run.weights_by_format,
        bytes_per_token=run.bytes_per_token,
        kv_bytes=run.kv_bytes,
        layers=run.layers,
        body_params=run.body_params,
        context=0,
    )
