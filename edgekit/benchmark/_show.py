"""A benchmark as rows: JSON, CSV and a table with llama-bench's keys in its order. Computes no figure."""

from __future__ import annotations

from typing import Any

from edgekit.benchmark._result import BenchResult, Measurement, Settings
from edgekit.runtime.llama_cpp import FLASH

_USUAL = Settings()

_LLAMA_ONLY = (
    "n_batch", "n_ubatch", "cpu_mask", "cpu_strict", "poll", "n_gpu_layers", "n_cpu_moe", "split_mode", "main_gpu",
    "no_kv_offload", "flash_attn", "devices", "tensor_split", "tensor_buft_overrides", "load_mode", "lazy_mode",
    "no_op_offload", "no_host", "repack", "fit_target", "fit_min_ctx",
)  # fmt: skip
"""Settings that mean nothing to another engine: null in its rows."""


def as_json(result: BenchResult) -> list[dict[str, Any]]:
    """One row a test: llama-bench's keys in its order and types, then ours."""
    return [_row(result, test) for test in result.tests]


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
    said = f"{build['build_commit']} ({build['build_number']})"
    return "\n".join([*lines, "", f"build: {said if result.engine == 'llama.cpp' else build['runtime']}"])


def _row(result: BenchResult, test: Measurement) -> dict[str, Any]:
    theirs = _their_columns(result, test)
    if result.engine != "llama.cpp":
        theirs |= dict.fromkeys(_LLAMA_ONLY)
    ours = {
        "runtime": result.build["runtime"], "ttft_ms": test.ttft_ms, "load_ms": result.load_ms,
        "peak_rss_bytes": result.peak_rss_bytes, "baseline_rss_bytes": result.baseline_rss_bytes,
        "bytes_per_token": result.bytes_per_token, "achieved_gbs": result.achieved_gbs(test),
        "board": result.machine.get("board"), "os": result.machine.get("os"), "isa": result.machine.get("isa"),
        "ram_bytes": result.machine.get("ram_bytes"), "governor": result.after.governor,
        "power_mode": result.after.power_mode, "temperature_before_c": result.before.temperature_c,
        "temperature_after_c": result.after.temperature_c, "throttling": result.after.throttling,
        "load_before": result.before.load, "notes": list(result.notes), "engine": result.engine,
        "n_texts": test.texts or None, "latency_ms": test.latency_ms, "texts_per_s": test.texts_per_s,
    }  # fmt: skip
    return theirs | ours


def _their_columns(result: BenchResult, test: Measurement) -> dict[str, Any]:
    s = result.settings
    return {
        **{k: result.build[k] for k in ("build_commit", "build_number", "cpu_info", "gpu_info", "backends")},
        "model_filename": result.model_filename, "model_type": result.model_type, "model_size": result.model_size,
        "model_n_params": result.model_n_params, "n_batch": s.n_batch, "n_ubatch": s.n_ubatch, "n_threads": s.threads,
        "cpu_mask": "0x0", "cpu_strict": False, "poll": 50, "type_k": s.kv, "type_v": s.kv_values or s.kv,
        "n_gpu_layers": s.n_gpu_layers, "n_cpu_moe": 0, "split_mode": "layer", "main_gpu": 0, "no_kv_offload": False,
        "flash_attn": FLASH[s.flash], "devices": "auto", "tensor_split": "0.00", "tensor_buft_overrides": "none",
        "load_mode": "auto" if s.mmap else "none", "lazy_mode": "auto", "embeddings": bool(test.texts),
        "no_op_offload": 0, "no_host": False, "repack": True, "fit_target": 0, "fit_min_ctx": 0,
        "n_prompt": test.n_prompt, "n_gen": test.n_gen, "n_depth": test.n_depth, "test_time": test.test_time,
        "avg_ns": test.avg_ns, "stddev_ns": test.stddev_ns, "avg_ts": round(test.avg_ts, 6),
        "stddev_ts": round(test.stddev_ts, 6), "samples_ns": list(test.samples_ns),
        "samples_ts": [round(ts, 6) for ts in test.samples_ts],
    }  # fmt: skip


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
    llama = result.engine == "llama.cpp"
    on_cpu = any(name in build["backends"] for name in ("CPU", "BLAS", "ZenDNN"))
    chosen = [
        ("model", "<30", result.model_type, True),
        ("size", ">10", size_text, True),
        ("params", ">10", params_text, True),
        ("backend", "<10", build["backends"], True),
        ("ngl", ">3", s.n_gpu_layers, llama and not on_cpu),
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
