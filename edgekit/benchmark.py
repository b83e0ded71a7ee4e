"""How fast a model is on this machine: prefill and decode apart, as llama-bench does. Knows no target.

The method (tools/llama-bench/llama-bench.cpp): a context just large enough for each test; one warm-up (the whole
prompt, or one token); then `repetitions` times: memory cleared, and the wall clock over `n_prompt` random tokens in
batches, or over `n_gen` random tokens one at a time with the device synchronised after each. BOS goes first where the
vocabulary wants it. Tokens per second are averaged over the repetitions, with the sample standard deviation.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import edgekit.errors
from edgekit import artifact
from edgekit.errors import EdgekitError, RuntimeFailed
from edgekit.gguf_file import GgufFile, open_gguf
from edgekit.health import Health, examine
from edgekit.host import detect
from edgekit.runtime.llama_cpp import FLASH, Context, ContextSettings, Flash, Model, build_facts, open_model
from edgekit.units import Progress, silent


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row: `n_prompt` tokens of prefill or `n_gen` of decode, behind `n_depth` tokens already in memory.

    `samples_ns`: wall time of each repetition. `ttft_ms`: prefill only, median time from the prompt's start to its
    first sampled token, loading not counted.
    """

    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    samples_ns: tuple[int, ...]
    ttft_ms: float | None = None

    @property
    def name(self) -> str:
        """`pp512`, `tg128`, `tg128 @ d1024`."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return name + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def samples_ts(self) -> tuple[float, ...]:
        """Tokens per second of each repetition."""
        return tuple(1e9 * (self.n_prompt + self.n_gen) / ns for ns in self.samples_ns)

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


@dataclass(frozen=True, slots=True)
class Settings:
    """How the model was run; the defaults are llama-bench's. `threads` None: the cores worth using."""

    threads: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    kv: str = "f16"
    kv_values: str | None = None
    flash: Flash = "auto"
    n_gpu_layers: int = -1
    mmap: bool = True


_USUAL = Settings()


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Everything a number needs to be compared: the tests, the model, the machine, the build.

    `peak_rss_bytes` is of a process that does nothing else; `baseline_rss_bytes` of the same before it loaded the
    model. `bytes_per_token`: weights that decoding one token reads (no input embeddings, only the active experts).
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

    @property
    def prefill(self) -> Measurement | None:
        """The first prefill test."""
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


def bench(
    path: str | Path, *, prompt: int | Sequence[int] = 512, generate: int | Sequence[int] = 128, depth: int = 0,
    repetitions: int = 5, threads: int | None = None, n_batch: int = 2048, n_ubatch: int = 512, kv: str = "f16",
    kv_values: str | None = None, flash: Flash = "auto", n_gpu_layers: int = -1, mmap: bool = True,
    isolate: bool = True, progress: Progress = silent,
) -> BenchResult:  # fmt: skip
    """Measure the GGUF at `path`: one test for each prompt length and each number of tokens to generate (0: none).

    `isolate`: in a fresh process, so that its memory is the model's own. Raises RuntimeFailed, CorruptCheckpoint, and
    EdgekitError for senseless numbers.
    """
    prompts, counts = _positive(prompt, "prompt"), _positive(generate, "generate")
    if not prompts and not counts:
        raise EdgekitError("nothing to measure: no prompt and nothing to generate", "for example -p 512 -n 128")
    if repetitions < 1 or depth < 0:
        raise EdgekitError(f"{repetitions} repetitions at a depth of {depth}", "at least 1, and at least 0")
    settings = Settings(threads, n_batch, n_ubatch, kv, kv_values, flash, n_gpu_layers, mmap)
    plan = [(p, 0, depth) for p in prompts] + [(0, n, depth) for n in counts]
    if isolate:
        return _measure_apart(Path(path), plan, repetitions, settings, progress)
    return _measure(Path(path), plan, repetitions, settings, progress)


def as_json(result: BenchResult) -> list[dict[str, Any]]:
    """One row a test: llama-bench's keys in its order and types, then ours."""
    return [_row(result, test) for test in result.tests]


def keep(result: BenchResult, ref: str | Path) -> Path:
    """Leave `result` as `bench.json` in the artefact folder, where the report looks for it."""
    rows = [row | {"model_filename": Path(row["model_filename"]).name} for row in as_json(result)]
    return artifact.keep(ref, artifact.BENCH, rows)


def as_csv(result: BenchResult) -> str:
    """As llama-bench's CSV, every value quoted, with our columns after its own."""
    rows = [{k: v for k, v in row.items() if not k.startswith("samples")} for row in as_json(result)]
    lines = [",".join(rows[0])]
    for row in rows:
        lines.append(",".join('"' + _csv_text(value).replace('"', '""') + '"' for value in row.values()))
    return "\n".join(lines)


def markdown(result: BenchResult) -> str:
    """llama-bench's table: the columns it shows for these settings, then its build line."""
    columns = _columns(result)
    lines = [
        "| " + " | ".join(f"{name:{width}}" for name, width, _ in columns) + " |",
        "| " + " | ".join(_rule(width) for _, width, _ in columns) + " |",
    ]
    for i in range(len(result.tests)):
        lines.append("| " + " | ".join(f"{cells[i]:{width}}" for _, width, cells in columns) + " |")
    build = result.build
    return "\n".join([*lines, "", f"build: {build['build_commit']} ({build['build_number']})"])


# --- measuring -------------------------------------------------------------------------------------------------------

_Plan = list[tuple[int, int, int]]


def _measure(path: Path, plan: _Plan, repetitions: int, settings: Settings, progress: Progress) -> BenchResult:
    before, baseline = examine(), _resident()
    build = build_facts()
    total = len(plan) * (repetitions + 1)
    with open_model(path, n_gpu_layers=settings.n_gpu_layers, mmap=settings.mmap) as model:
        tests: list[Measurement] = []
        for sizes in plan:
            done = len(tests) * (repetitions + 1)
            test, threads = _run(
                model, sizes, repetitions, settings, lambda n, at=done: progress("bench", at + n, total)
            )
            tests.append(test)
        return BenchResult(
            tests=tuple(tests),
            model_filename=str(path),
            model_type=model.description,
            model_size=model.nbytes,
            model_n_params=model.parameters,
            bytes_per_token=bytes_per_token(path),
            settings=replace(settings, threads=threads),
            load_ms=model.load_ms,
            peak_rss_bytes=_peak(),
            baseline_rss_bytes=baseline,
            build=build,
            machine=asdict(detect()),
            before=before,
            after=examine(),
        )


def _run(
    model: Model, sizes: tuple[int, int, int], repetitions: int, settings: Settings, step: Any
) -> tuple[Measurement, int]:
    """One test, and the threads it used."""
    n_prompt, n_gen, n_depth = sizes
    tokens = _Tokens(model)
    context = Context(
        model,
        ContextSettings(
            n_ctx=sum(sizes), threads=settings.threads, n_batch=settings.n_batch, n_ubatch=settings.n_ubatch,
            kv=settings.kv, kv_values=settings.kv_values, flash=settings.flash, outputs=settings.n_batch,
        ),
    )  # fmt: skip
    try:
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        context.append(tokens.draw(n_prompt or 1), context.n_batch if n_prompt else 1)
        step(1)
        samples, firsts = [], []
        for i in range(repetitions):
            context.forget()
            if n_depth:
                context.append(tokens.draw(n_depth), context.n_batch)
            ids = tokens.draw(n_prompt or n_gen)
            start = time.perf_counter_ns()
            context.append(ids, context.n_batch if n_prompt else 1)
            samples.append(time.perf_counter_ns() - start)
            if n_prompt:
                context.likeliest(model.n_vocab)
                firsts.append((time.perf_counter_ns() - start) / 1e6)
            step(i + 2)
        first = statistics.median(firsts) if firsts else None
        return Measurement(n_prompt, n_gen, n_depth, started, tuple(samples), first), context.threads
    finally:
        context.close()


class _Tokens:
    """Random tokens, uniform over the vocabulary, behind BOS where it is wanted."""

    def __init__(self, model: Model) -> None:
        self._random = np.random.default_rng()
        self._n_vocab = model.n_vocab
        self._bos = model.bos if model.add_bos else None

    def draw(self, count: int) -> list[int]:
        ids: list[int] = self._random.integers(0, self._n_vocab, count).tolist()
        if self._bos is not None:
            ids[0] = self._bos
        return ids


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads, all shards together.

    Not counted: input embeddings that are not the output matrix too, and position and token type tables (one row
    each); of a mixture's experts only the share that is active.
    """
    files = [open_gguf(shard) for shard in _shards(path)]
    tied = not any("output.weight" in f.tensors for f in files)
    tables = {"position_embd.weight", "token_types.weight"} | (set() if tied else {"token_embd.weight"})
    share = _active_share(files[0])
    total = 0.0
    for tensor in (t for f in files for t in f.tensors.values()):
        if tensor.name not in tables:
            total += tensor.nbytes * (share if "_exps." in tensor.name else 1)
    return round(total)


def _active_share(file: GgufFile) -> float:
    arch = file.get("general.architecture")
    experts, used = file.get(f"{arch}.expert_count", 0), file.get(f"{arch}.expert_used_count", 0)
    return used / experts if experts and used else 1.0


def _shards(path: Path) -> list[Path]:
    """All files of a model split by llama.cpp's convention, `-00001-of-00003.gguf`; or the one."""
    split = re.fullmatch(r"(.+-)00001-of-([0-9]{5})\.gguf", path.name)
    if not split:
        return [path]
    return [path.with_name(f"{split[1]}{i:05d}-of-{split[2]}.gguf") for i in range(1, int(split[2]) + 1)]


# --- a process of its own --------------------------------------------------------------------------------------------


def _measure_apart(path: Path, plan: _Plan, repetitions: int, settings: Settings, progress: Progress) -> BenchResult:
    """`_measure` in a child: it answers with one line of JSON for each step, and a last one with the result."""
    request = {"path": str(path), "plan": plan, "repetitions": repetitions, "settings": asdict(settings)}
    root = str(Path(__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": root + (os.pathsep + inherited if inherited else "")}
    command = [sys.executable, "-m", "edgekit.benchmark", json.dumps(request)]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as talk,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=talk, text=True, encoding="utf-8", env=environment
        ) as child,
    ):  # fmt: skip
        try:
            result = _listen(child, progress)
            status = child.wait()
        finally:
            child.kill()
        talk.seek(0)
        said = talk.read()
    if result is None:
        why = f"signal {-status}" if status < 0 else f"status {status}"
        raise RuntimeFailed(
            f"the process that ran {path.name} ended with {why}: {said.strip()[-500:] or 'it said nothing'}",
            "signal 9 means that memory ran out: try a smaller model or context",
        )
    return result


def _listen(child: subprocess.Popen[str], progress: Progress) -> BenchResult | None:
    for line in child.stdout or ():
        answer = json.loads(line)
        if "progress" in answer:
            task, done, total = answer["progress"]
            progress(task, done, total)
        elif "error" in answer:
            kind = getattr(edgekit.errors, answer["error"], EdgekitError)
            raise kind(answer["message"], answer["hint"])
        else:
            return _from_plain(answer["result"])
    return None


def _from_plain(data: dict[str, Any]) -> BenchResult:
    """What `asdict` and JSON made of a BenchResult, back again."""
    tests = tuple(Measurement(**t | {"samples_ns": tuple(t["samples_ns"])}) for t in data["tests"])
    health = {}
    for name in ("before", "after"):
        flags = data[name]["throttling"]
        health[name] = Health(**data[name] | {"throttling": None if flags is None else tuple(flags)})
    return BenchResult(**data | {"tests": tests, "settings": Settings(**data["settings"])} | health)


def _worker(request: str) -> None:
    def say(**answer: Any) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    wanted = json.loads(request)
    try:
        result = _measure(
            Path(wanted["path"]),
            [tuple(sizes) for sizes in wanted["plan"]],
            wanted["repetitions"],
            Settings(**wanted["settings"]),
            lambda *step: say(progress=step),
        )
    except EdgekitError as e:
        say(error=type(e).__name__, message=str(e), hint=e.hint)
    else:
        say(result=asdict(result))


def _resident() -> int:
    """Bytes of memory this process has resident now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """Most bytes resident since the program started.

    Linux: VmHWM, since ru_maxrss begins with what the parent had at the fork (kernel: exec_mmap). Elsewhere:
    ru_maxrss, in bytes on macOS (getrusage(2)).
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _positive(value: int | Sequence[int], what: str) -> list[int]:
    """The counts asked for, zeros left out."""
    counts = [value] if isinstance(value, int) else list(value)
    for count in counts:
        if not 0 <= count <= 1 << 22:
            raise EdgekitError(f"{what} = {count} tokens", "0 leaves the test out")
    return [count for count in counts if count]


# --- showing ---------------------------------------------------------------------------------------------------------


def _row(result: BenchResult, test: Measurement) -> dict[str, Any]:
    s = result.settings
    theirs = {
        **{k: result.build[k] for k in ("build_commit", "build_number", "cpu_info", "gpu_info", "backends")},
        "model_filename": result.model_filename, "model_type": result.model_type, "model_size": result.model_size,
        "model_n_params": result.model_n_params, "n_batch": s.n_batch, "n_ubatch": s.n_ubatch, "n_threads": s.threads,
        "cpu_mask": "0x0", "cpu_strict": False, "poll": 50, "type_k": s.kv, "type_v": s.kv_values or s.kv,
        "n_gpu_layers": s.n_gpu_layers, "n_cpu_moe": 0, "split_mode": "layer", "main_gpu": 0, "no_kv_offload": False,
        "flash_attn": FLASH[s.flash], "devices": "auto", "tensor_split": "0.00", "tensor_buft_overrides": "none",
        "load_mode": "auto" if s.mmap else "none", "lazy_mode": "auto", "embeddings": False, "no_op_offload": 0,
        "no_host": False, "repack": True, "fit_target": 0, "fit_min_ctx": 0, "n_prompt": test.n_prompt,
        "n_gen": test.n_gen, "n_depth": test.n_depth, "test_time": test.test_time, "avg_ns": test.avg_ns,
        "stddev_ns": test.stddev_ns, "avg_ts": round(test.avg_ts, 6), "stddev_ts": round(test.stddev_ts, 6),
        "samples_ns": list(test.samples_ns), "samples_ts": [round(ts, 6) for ts in test.samples_ts],
    }  # fmt: skip
    ours = {
        "runtime": result.build["runtime"], "ttft_ms": test.ttft_ms, "load_ms": result.load_ms,
        "peak_rss_bytes": result.peak_rss_bytes, "baseline_rss_bytes": result.baseline_rss_bytes,
        "bytes_per_token": result.bytes_per_token, "achieved_gbs": result.achieved_gbs(test),
        "board": result.machine.get("board"), "os": result.machine.get("os"), "isa": result.machine.get("isa"),
        "ram_bytes": result.machine.get("ram_bytes"), "governor": result.after.governor,
        "power_mode": result.after.power_mode, "temperature_before_c": result.before.temperature_c,
        "temperature_after_c": result.after.temperature_c, "throttling": result.after.throttling,
        "load_before": result.before.load, "notes": list(result.notes),
    }  # fmt: skip
    return theirs | ours


def _csv_text(value: Any) -> str:
    """As llama-bench writes it: booleans as 0 and 1, six decimals; lists with semicolons, nothing for unknown."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.6f}"
    return ";".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _columns(result: BenchResult) -> list[tuple[str, str, list[str]]]:
    """(heading, width with its alignment, a cell a test): llama-bench's choice of columns and widths."""
    s, build, same = result.settings, result.build, len(result.tests)
    size, params = result.model_size, result.model_n_params
    size_text = f"{size / 2**20:.2f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"
    params_text = f"{params / 1e6:.2f} M" if params < 10**9 else f"{params / 1e9:.2f} B"
    on_cpu = any(name in build["backends"] for name in ("CPU", "BLAS", "ZenDNN"))
    chosen = [
        ("model", "<30", result.model_type, True),
        ("size", ">10", size_text, True),
        ("params", ">10", params_text, True),
        ("backend", "<10", build["backends"], True),
        ("ngl", ">3", s.n_gpu_layers, not on_cpu),
        ("threads", ">7", s.threads, True),
        ("n_batch", ">7", s.n_batch, s.n_batch != _USUAL.n_batch),
        ("n_ubatch", ">8", s.n_ubatch, s.n_ubatch != _USUAL.n_ubatch),
        ("type_k", ">6", s.kv, s.kv != _USUAL.kv),
        ("type_v", ">6", s.kv_values or s.kv, (s.kv_values or s.kv) != _USUAL.kv),
        ("fa", ">3", FLASH[s.flash], s.flash != _USUAL.flash),
        ("lm", ">10", "none", not s.mmap),
    ]
    columns = [(name, width, [str(value)] * same) for name, width, value, shown in chosen if shown]
    speeds = [f"{t.avg_ts:.2f} ± {t.stddev_ts:.2f}" for t in result.tests]
    return [*columns, ("test", ">15", [t.name for t in result.tests]), ("t/s", ">20", speeds)]


def _rule(width: str) -> str:
    dashes = "-" * (int(width[1:]) - 1)
    return f"{dashes}:" if width[0] == ">" else f"{dashes}-"


if __name__ == "__main__":
    _worker(sys.argv[1])
