"""The benchmark: its rows, its statistics, its own process; and what a machine says of its state."""

from __future__ import annotations

import csv
import io
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgekit import benchmark, pipeline
from edgekit.benchmark import BenchResult, Measurement, Settings, bench, bytes_per_token
from edgekit.errors import CorruptCheckpoint, EdgekitError, RuntimeFailed
from edgekit.gguf_file import open_gguf
from edgekit.health import Health, examine
from tests import pico
from tests.gguf_models import noise_gguf

KEYS = """
build_commit build_number cpu_info gpu_info backends model_filename model_type model_size model_n_params n_batch
n_ubatch n_threads cpu_mask cpu_strict poll type_k type_v n_gpu_layers n_cpu_moe split_mode main_gpu no_kv_offload
flash_attn devices tensor_split tensor_buft_overrides load_mode lazy_mode embeddings no_op_offload no_host repack
fit_target
fit_min_ctx n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts stddev_ts samples_ns samples_ts
"""
LLAMA_BENCH_KEYS = KEYS.split()


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_gguf(tmp_path_factory.mktemp("bench") / "noise.gguf", context=128)


@pytest.fixture(scope="module")
def result(noise: Path) -> BenchResult:
    return bench(noise, prompt=(32, 8), generate=4, repetitions=3, threads=1)


def test_one_row_a_test(result: BenchResult, noise: Path) -> None:
    rows = benchmark.as_json(result)
    assert [list(row)[: len(LLAMA_BENCH_KEYS)] for row in rows] == [LLAMA_BENCH_KEYS] * 3
    assert [t.name for t in result.tests] == ["pp32", "pp8", "tg4"]
    assert [(r["n_prompt"], r["n_gen"]) for r in rows] == [(32, 0), (8, 0), (0, 4)]
    assert all(len(r["samples_ns"]) == len(r["samples_ts"]) == 3 and min(r["samples_ns"]) > 0 for r in rows)
    assert rows[0]["model_filename"] == str(noise) and rows[0]["n_threads"] == 1
    assert rows[0]["model_n_params"] == sum(int(np.prod(t.shape)) for t in open_gguf(noise).tensors.values())
    assert rows[0]["model_size"] == sum(t.nbytes for t in open_gguf(noise).tensors.values())
    assert rows[0]["backends"] and rows[0]["cpu_info"] and "llama-cpp-python" in rows[0]["runtime"]


def test_what_llama_bench_does_not_tell(result: BenchResult) -> None:
    prefill, decode = result.prefill, result.decode
    assert prefill is not None and decode is not None
    assert result.ttft_ms == prefill.ttft_ms
    assert prefill.ttft_ms is not None and prefill.ttft_ms >= min(prefill.samples_ns) / 1e6
    assert decode.ttft_ms is None and result.achieved_gbs(prefill) is None
    assert result.achieved_gbs(decode) == pytest.approx(result.bytes_per_token * decode.avg_ts / 1e9)
    assert result.load_ms > 0
    assert result.peak_rss_bytes > result.baseline_rss_bytes > 10 << 20
    assert result.machine["ram_bytes"] > 0


def test_statistics_are_llama_bench_s() -> None:
    ns = (1_000_000, 1_250_000, 2_000_000)
    test = Measurement(0, 10, 0, "", ns)
    assert test.samples_ts == (10_000, 8_000, 5_000)
    assert test.avg_ts == pytest.approx(23_000 / 3)  # the mean of speeds, not the speed of the mean
    assert test.stddev_ts == pytest.approx(statistics.stdev((10_000, 8_000, 5_000)))
    assert (test.avg_ns, test.stddev_ns) == (1_416_666, int(statistics.stdev(ns)))
    assert (replace(test, samples_ns=ns[:1]).stddev_ts, replace(test, samples_ns=ns[:1]).stddev_ns) == (0, 0)
    assert replace(test, n_depth=7).name == "tg10 @ d7"


def test_the_table_is_llama_bench_s(result: BenchResult) -> None:
    shown = replace(
        result,
        tests=(Measurement(64, 0, 0, "", (2_000_000, 2_000_000)), Measurement(0, 60, 5, "", (10_000_000, 20_000_000))),
        model_type="llama ?B (guessed) all F32", model_size=1040128, model_n_params=260032,
        build=dict(result.build) | {"backends": "CPU", "build_commit": "0c1e570", "build_number": 1},
    )  # fmt: skip
    assert benchmark.markdown(shown).splitlines() == [
        "| model                          |       size |     params | backend    | threads |            test "
        "|                  t/s |",
        "| ------------------------------ | ---------: | ---------: | ---------- | ------: | --------------: "
        "| -------------------: |",
        "| llama ?B (guessed) all F32     |   0.99 MiB |     0.26 M | CPU        |       1 |            pp64 "
        "|      32000.00 ± 0.00 |",
        "| llama ?B (guessed) all F32     |   0.99 MiB |     0.26 M | CPU        |       1 |       tg60 @ d5 "
        "|    4500.00 ± 2121.32 |",
        "",
        "build: 0c1e570 (1)",
    ]
    odd = replace(shown, settings=replace(shown.settings, kv="q8_0", flash="on", n_batch=64, mmap=False))
    heading = benchmark.markdown(odd).splitlines()[0]
    assert [cell.strip() for cell in heading.strip("|").split("|")] == [
        "model", "size", "params", "backend", "threads", "n_batch", "type_k", "type_v", "fa", "lm", "test", "t/s",
    ]  # fmt: skip


def test_csv(result: BenchResult) -> None:
    rows = list(csv.DictReader(io.StringIO(benchmark.as_csv(result))))
    json_rows = benchmark.as_json(result)
    assert len(rows) == 3
    assert list(rows[0])[:42] == LLAMA_BENCH_KEYS[:-2]
    for ours, theirs in zip(rows, json_rows, strict=True):
        assert float(ours["avg_ts"]) == theirs["avg_ts"] and ours["repack"] == "1" and ours["cpu_strict"] == "0"
        assert None not in ours.values()


def test_in_this_process_and_behind_a_depth(noise: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    found = bench(
        noise, prompt=0, generate=3, depth=40, repetitions=2, threads=1, n_batch=16, isolate=False,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert [(t.name, len(t.samples_ns)) for t in found.tests] == [("tg3 @ d40", 2)]
    assert found.prefill is None and found.ttft_ms is None
    assert steps == [("bench", i + 1, 3) for i in range(3)]


def test_every_repetition_begins_with_nothing_in_memory(noise: Path) -> None:
    found = bench(noise, prompt=200, generate=0, repetitions=3, threads=1, isolate=False)  # two would not fit
    assert len(found.tests[0].samples_ns) == 3


def test_progress_from_the_other_process(noise: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    found = bench(noise, prompt=4, generate=2, repetitions=1, progress=lambda *step: steps.append(step))
    assert steps == [("bench", i + 1, 4) for i in range(4)]
    assert found.settings.threads is not None and found.settings.threads >= 1


def test_memory_is_the_model_s_own(noise: Path) -> None:
    ballast = np.ones(400 << 17)  # 400 MiB of this process
    found = bench(noise, prompt=4, generate=0, repetitions=1, threads=1)
    assert found.peak_rss_bytes < ballast.nbytes / 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": 0, "generate": 0}, "nothing to measure"),
        ({"prompt": -1}, "prompt = -1"),
        ({"generate": 1 << 30}, "generate = 1073741824"),
        ({"repetitions": 0}, "0 repetitions"),
        ({"kv": "q9"}, "no KV cache type called 'q9'"),
        ({"threads": 0}, "0 threads"),
    ],
)
def test_senseless_numbers(noise: Path, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(EdgekitError, match=message):
        bench(noise, **wrong)  # type: ignore[arg-type]


def test_errors_come_back_whole(tmp_path: Path, noise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeFailed, match=r"none\.gguf: No such file") as e:
        bench(tmp_path / "none.gguf")
    assert e.value.hint == "give the path of a .gguf file"
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(noise.read_bytes()[:3000])
    with pytest.raises(CorruptCheckpoint, match=r"cut\.gguf"):
        bench(cut)
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\necho last words >&2\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(RuntimeFailed, match=r"noise\.gguf ended with signal 9: last words") as e:
        bench(noise)
    assert "memory" in e.value.hint


def tensors_gguf(path: Path, shapes: dict[str, tuple[int, ...]], **numbers: int) -> Path:
    w = gguf.GGUFWriter(path, "qwen2moe")
    for key, value in numbers.items():
        w.add_uint32(f"qwen2moe.{key}", value)
    for name, shape in shapes.items():
        w.add_tensor(name, np.zeros(shape, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_bytes_read_for_a_token(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    embed = {"token_embd.weight": (100, 32)}
    blocks = {
        "blk.0.ffn_up_exps.weight": (8, 16, 32),
        "blk.0.attn_q.weight": (32, 32),
        "position_embd.weight": (64, 32),
    }
    rest = 4 * (8 * 16 * 32 // 4 + 32 * 32)
    moe = {"expert_count": 8, "expert_used_count": 2}
    assert bytes_per_token(tensors_gguf(path, embed | blocks, **moe)) == 4 * 100 * 32 + rest
    assert bytes_per_token(tensors_gguf(path, embed | blocks | {"output.weight": (100, 32)}, **moe)) == 12_800 + rest
    first = tensors_gguf(tmp_path / "m-00001-of-00002.gguf", embed | blocks, **moe)
    tensors_gguf(tmp_path / "m-00002-of-00002.gguf", {"output.weight": (100, 32), "output_norm.weight": (32,)})
    assert bytes_per_token(first) == 12_800 + 128 + rest


def test_health_of_a_board(tmp_path: Path) -> None:
    for cpu, governor in enumerate(("ondemand", "performance", "ondemand")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{governor}\n")
    for zone, temperature in enumerate(("48312\n", "61200\n", "broken")):
        folder = tmp_path / f"sys/class/thermal/thermal_zone{zone}"
        folder.mkdir(parents=True)
        (folder / "temp").write_text(temperature)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/loadavg").write_text("3.25 1.0 0.5 1/100 999\n")
    answers = {"vcgencmd": "throttled=0x50004\n", "nvpmodel": "NV Power Mode: MAXN_SUPER\n2\n"}
    found = examine(root=tmp_path, ask=lambda command: answers[command[0]])
    assert found == Health(
        "ondemand,performance", "MAXN_SUPER", 61.2,
        ("throttled", "under-voltage has occurred", "throttling has occurred"), 3.25,
    )  # fmt: skip
    silent = examine(root=tmp_path / "nothing", ask=lambda command: "")
    assert silent == Health()
    assert examine(root=tmp_path, ask=lambda command: "throttled=0x0").throttling == ()


def test_notes_say_what_may_have_distorted(result: BenchResult) -> None:
    calm = replace(result, before=Health(load=0.1), after=Health(governor="performance"), machine={"logical_cores": 4})
    assert calm.notes == ()
    hot = replace(
        calm, before=Health(load=2.0), after=Health(governor="powersave", throttling=("throttled",))
    )  # fmt: skip
    assert hot.notes == (
        "the board reports: throttled",
        "the machine was busy before the test began (load 2.0)",
        "the clock governor is powersave",
    )
    assert Settings().n_batch == 2048


def test_an_encoder_is_measured_in_texts(tmp_path: Path) -> None:
    model = pico.make("bert", tmp_path / "bert")
    path = pipeline.convert(str(model), "rpi5", pipeline.Options(out=tmp_path / "out", quant="Q8_0", verify="none")).out
    found = bench(path, repetitions=2, threads=1, prompt=(8, 16), texts=3)
    assert [t.name for t in found.tests] == ["3x8", "3x16"]
    rows = benchmark.as_json(found)
    assert [(r["n_texts"], r["n_prompt"], r["n_gen"]) for r in rows] == [(3, 8, 0), (3, 16, 0)]
    assert rows[1]["texts_per_s"] * 16 == pytest.approx(found.tests[1].avg_ts)
    assert rows[1]["latency_ms"] == pytest.approx(statistics.median(found.tests[1].samples_ns) / 1e6)
    usual = bench(path, repetitions=1, threads=1, isolate=False)
    assert [t.name for t in usual.tests] == ["1x16", "1x128", "8x128"]
    with pytest.raises(EdgekitError, match="is an encoder: it generates nothing"):
        bench(path, generate=4, isolate=False)


def test_a_decoder_writes_one_text_at_a_time(noise: Path) -> None:
    with pytest.raises(EdgekitError, match="one text at a time"):
        bench(noise, texts=2)
