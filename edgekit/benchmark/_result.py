"""What a benchmark is asked for and what it answers: tests, samples, settings, machine, build. Knows no engine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.health import Health
from edgekit.runtime.llama_cpp import Flash

ENCODER_TESTS = ((1, 16), (1, 128), (8, 128))
"""(texts at once, tokens of each) that an encoder is measured on unless told otherwise: a query, a passage, a batch."""

PROMPT, GENERATE = 512, 128
"""Tokens of the two tests of a decoder unless told otherwise: llama-bench's defaults."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row: `n_prompt` tokens of prefill or `n_gen` of decode, behind `n_depth` tokens already in memory.

    `samples_ns`: wall time of each repetition. `ttft_ms`: prefill only, median time from the prompt's start to its
    first sampled token, loading not counted. `texts`: of an encoder, how many texts of `n_prompt` tokens are read at
    once; 0 for a decoder.
    """

    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    samples_ns: tuple[int, ...]
    ttft_ms: float | None = None
    texts: int = 0

    @property
    def name(self) -> str:
        """`pp512`, `tg128`, `tg128 @ d1024`; of an encoder `8x128`."""
        if self.texts:
            return f"{self.texts}x{self.n_prompt}"
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return name + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def samples_ts(self) -> tuple[float, ...]:
        """Tokens per second of each repetition."""
        tokens = (self.n_prompt + self.n_gen) * max(1, self.texts)
        return tuple(1e9 * tokens / ns for ns in self.samples_ns)

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return statistics.stdev(self.samples_ts) if len(self.samples_ts) > 1 else 0.0

    @property
    def avg_ns(self) -> int:
        return int(statistics.fmean(self.samples_ns))

    @property
    def stddev_ns(self) -> int:
        return int(statistics.stdev(self.samples_ns)) if len(self.samples_ns) > 1 else 0

    @property
    def latency_ms(self) -> float | None:
        """Of an encoder: median time until all texts have their vectors."""
        return statistics.median(self.samples_ns) / 1e6 if self.texts else None

    @property
    def texts_per_s(self) -> float | None:
        """Of an encoder: texts per second, the mean over the repetitions."""
        return self.avg_ts / self.n_prompt if self.texts else None


@dataclass(frozen=True, slots=True)
class Settings:
    """How the model was run; the defaults are llama-bench's. `threads` None: the cores worth using.

    All but `threads` are llama.cpp's: onnxruntime takes a prompt as one batch and its cache's type from the graph.
    """

    threads: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    kv: str = "f16"
    kv_values: str | None = None
    flash: Flash = "auto"
    n_gpu_layers: int = -1
    mmap: bool = True


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be measured. None: the defaults for what the model turns out to be; empty: leave that test out.

    `texts`: an encoder reads so many at once, for every length in `prompts`.
    """

    path: str
    prompts: tuple[int, ...] | None
    counts: tuple[int, ...] | None
    texts: int
    depth: int
    repetitions: int
    settings: Settings


@dataclass(frozen=True, slots=True)
class Ran:
    """What an engine found out about a model, beside what every engine's process can tell by itself."""

    engine: str
    tests: tuple[Measurement, ...]
    model_type: str
    model_size: int
    model_n_params: int
    bytes_per_token: int
    settings: Settings
    load_ms: float
    build: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Everything a number needs to be compared: the tests, the model, the machine, the build.

    `peak_rss_bytes` is of a process that does nothing else; `baseline_rss_bytes` of the same before it loaded the
    model. `bytes_per_token`: weights that decoding one token reads (no input embeddings, only the active experts).
    `engine`: `llama.cpp` or `onnxruntime`.
    """

    tests: tuple[Measurement, ...]
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    bytes_per_token: int
    settings: Settings
    load_ms: float
    peak_rss_bytes: int
    baseline_rss_bytes: int
    build: Mapping[str, Any]
    machine: Mapping[str, Any]
    before: Health
    after: Health
    engine: str = "llama.cpp"

    @property
    def prefill(self) -> Measurement | None:
        """The first prefill test; of an encoder its first test."""
        return next((t for t in self.tests if t.n_prompt), None)

    @property
    def decode(self) -> Measurement | None:
        """The first decode test."""
        return next((t for t in self.tests if t.n_gen), None)

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token after the first test's prompt."""
        return self.prefill.ttft_ms if self.prefill else None

    def achieved_gbs(self, test: Measurement) -> float | None:
        """Memory traffic of weights while decoding, 1e9 bytes/s; None for prefill, which reads them once a batch."""
        return self.bytes_per_token * test.avg_ts / 1e9 if test.n_gen else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What may have distorted the figures, one sentence each."""
        notes = [f"the board reports: {flag}" for flag in self.after.throttling or ()]
        cores = self.machine.get("allowed_cores") or self.machine.get("logical_cores") or 1
        if (self.before.load or 0) > 0.25 * cores:
            notes.append(f"the machine was busy before the test began (load {self.before.load:.1f})")
        if self.after.governor and "powersave" in self.after.governor:
            notes.append("the clock governor is powersave")
        return tuple(notes)
