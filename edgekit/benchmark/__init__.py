"""How fast a model is on this machine: prefill and decode apart, as llama-bench does. Knows no target.

The method (tools/llama-bench/llama-bench.cpp): a context just large enough for each test; one warm-up (the whole
prompt, or one token); then `repetitions` times: memory cleared, and the wall clock over `n_prompt` random tokens in
batches, or over `n_gen` random tokens one at a time with the device synchronised after each. BOS goes first where the
vocabulary wants it. Tokens per second are averaged over the repetitions, with the sample standard deviation. Encoders
are timed over whole batches of texts instead. The engine is the file's: llama.cpp for GGUF, onnxruntime for ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgekit import artifact
from edgekit.benchmark._apart import measure_apart
from edgekit.benchmark._llama import bytes_per_token
from edgekit.benchmark._measure import measure
from edgekit.benchmark._result import BenchResult, Measurement, Request, Settings
from edgekit.benchmark._show import as_csv, as_json, markdown
from edgekit.errors import EdgekitError
from edgekit.runtime.llama_cpp import Flash
from edgekit.units import Progress, silent

__all__ = [
    "BenchResult", "Measurement", "Settings", "as_csv", "as_json", "bench", "bytes_per_token", "keep", "markdown",
]  # fmt: skip


def bench(
    path: str | Path, *, prompt: int | Sequence[int] | None = None, generate: int | Sequence[int] | None = None,
    texts: int = 0, depth: int = 0, repetitions: int = 5, threads: int | None = None, n_batch: int = 2048,
    n_ubatch: int = 512, kv: str = "f16", kv_values: str | None = None, flash: Flash = "auto", n_gpu_layers: int = -1,
    mmap: bool = True, isolate: bool = True, progress: Progress = silent,
) -> BenchResult:  # fmt: skip
    """Measure the `.gguf` or `.onnx` at `path`, or the model of an artefact folder.

    A decoder: one test for each prompt length (512) and each number of tokens to generate (128); 0 leaves it out. An
    encoder: 1 text of 16 tokens, 1 of 128 and 8 of 128 at once, or `texts` texts of each length in `prompt`.
    `isolate`: in a fresh process, so that its memory is the model's own. Raises RuntimeFailed, CorruptCheckpoint, and
    EdgekitError for senseless numbers.
    """
    prompts, counts = _positive(prompt, "prompt"), _positive(generate, "generate")
    if prompts == () and counts == ():
        raise EdgekitError("nothing to measure: no prompt and nothing to generate", "for example -p 512 -n 128")
    if repetitions < 1 or depth < 0:
        raise EdgekitError(f"{repetitions} repetitions at a depth of {depth}", "at least 1, and at least 0")
    if not 0 <= texts <= 1 << 12:
        raise EdgekitError(f"{texts} texts at once", "between 1 and 4096")
    settings = Settings(threads, n_batch, n_ubatch, kv, kv_values, flash, n_gpu_layers, mmap)
    file = artifact.model_file(path) if Path(path).is_dir() else path
    request = Request(str(file), prompts, counts, texts, depth, repetitions, settings)
    return measure_apart(request, progress) if isolate else measure(request, progress)


def keep(result: BenchResult, ref: str | Path) -> Path:
    """Leave `result` as `bench.json` in the artefact folder, where the report looks for it."""
    rows = [row | {"model_filename": Path(row["model_filename"]).name} for row in as_json(result)]
    return artifact.keep(ref, artifact.BENCH, rows)


def _positive(value: int | Sequence[int] | None, what: str) -> tuple[int, ...] | None:
    """The counts asked for, zeros left out; None for the defaults."""
    if value is None:
        return None
    counts = [value] if isinstance(value, int) else list(value)
    for count in counts:
        if not 0 <= count <= 1 << 22:
            raise EdgekitError(f"{what} = {count} tokens", "0 leaves the test out")
    return tuple(count for count in counts if count)
