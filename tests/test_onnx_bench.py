"""`bench` and `eval` of ONNX: a decoder that onnxruntime-genai's own builder made, encoders made by hand."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edgekit import benchmark, corpus, evaluation, flips, pipeline, report
from edgekit.benchmark import BenchResult, bench
from edgekit.benchmark._graph import weights_of
from edgekit.errors import CorruptCheckpoint, EdgekitError, RuntimeFailed
from edgekit.evaluation import Options, evaluate
from edgekit.onnx_file import open_onnx
from edgekit.runtime.onnxruntime import open_session
from edgekit.similarity import spearman
from tests import pico
from tests.test_benchmark import LLAMA_BENCH_KEYS

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxruntime_genai", "torch")),
    reason="onnx, onnxruntime-genai or torch is not installed",
)

BUILD = """
import sys
import onnxruntime_genai.models
from onnxruntime_genai.models.builder import create_model, parse_extra_options
source, folder, precision, cache = sys.argv[1:]
options = parse_extra_options(None, source, folder, precision, "cpu", cache, [])
create_model(None, source, folder, precision, "cpu", cache, **options)
"""
"""genai's own builder: adds a folder to sys.path, talks, and loads torch, so it runs in a child."""

HIDDEN, LAYERS, VOCAB, FFN, KV = 256, 2, 512, 512, 128
MATRICES = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * FFN)
NORMS = (2 * LAYERS + 1) * HIDDEN


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8 by genai's own defaults: the embedding stays in float32."""
    root = tmp_path_factory.mktemp("genai")
    model = pico.llama(root / "pico", hidden=HIDDEN, layers=LAYERS, vocab=VOCAB, ffn=FFN, context=256)
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BUILD, str(model), str(root / "int8"), "int8", str(root / "cache")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return root / "int8"


@pytest.fixture(scope="module")
def result(built: Path) -> BenchResult:
    return bench(built / "model.onnx", prompt=(32, 8), generate=4, repetitions=3, threads=1)


def encoder(folder: Path, *, vocab: int = 100, hidden: int = 32, extra: str = "") -> Path:
    """ids -> rows of a table -> a matrix product, with the inputs of a BERT."""
    from onnx import TensorProto, helper, numpy_helper, save_model

    rng = np.random.default_rng(0)
    names = ["input_ids", "attention_mask", *([extra] if extra else [])]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"]) for n in names]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", hidden])
    weights = [
        numpy_helper.from_array(rng.standard_normal((vocab, hidden)).astype(np.float32), "table"),
        numpy_helper.from_array(rng.standard_normal((hidden, hidden)).astype(np.float32), "matrix"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "matrix"], ["last_hidden_state"]),
    ]
    graph = helper.make_graph(nodes, "encoder", inputs, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "onnx").mkdir(parents=True)
    save_model(model, folder / "onnx" / "model_quantized.onnx")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": vocab}))
    return folder / "onnx" / "model_quantized.onnx"


# --- decoders --------------------------------------------------------------------------------------------------------


def test_rows_are_comparable_with_those_of_a_gguf(result: BenchResult, built: Path) -> None:
    rows = benchmark.as_json(result)
    assert [list(row)[: len(LLAMA_BENCH_KEYS)] for row in rows] == [LLAMA_BENCH_KEYS] * 3
    assert [t.name for t in result.tests] == ["pp32", "pp8", "tg4"]
    assert all(len(r["samples_ns"]) == 3 and min(r["samples_ns"]) > 0 for r in rows)
    first = rows[0]
    assert (first["engine"], first["backends"], first["n_threads"]) == ("onnxruntime", "onnxruntime", 1)
    assert first["model_filename"] == str(built / "model.onnx")
    assert "onnxruntime-genai" in first["runtime"] and first["build_commit"] in first["runtime"]
    assert first["type_k"] == "f32", "the builder's cache on a CPU"
    assert first["n_ubatch"] is None and first["n_batch"] is None and first["flash_attn"] is None
    assert "f16" not in benchmark.markdown(result) and "onnxruntime" in benchmark.markdown(result)
    table = list(csv.DictReader(io.StringIO(benchmark.as_csv(result))))
    assert float(table[2]["avg_ts"]) == rows[2]["avg_ts"] and table[2]["n_batch"] == ""


def test_time_memory_and_first_token(result: BenchResult) -> None:
    prefill, decode = result.prefill, result.decode
    assert prefill is not None and decode is not None
    assert prefill.ttft_ms is not None and prefill.ttft_ms >= min(prefill.samples_ns) / 1e6
    assert decode.ttft_ms is None
    assert result.load_ms > 0
    assert result.peak_rss_bytes > result.baseline_rss_bytes > 10 << 20
    assert result.achieved_gbs(decode) == pytest.approx(result.bytes_per_token * decode.avg_ts / 1e9)


def test_weights_are_counted_as_the_checkpoint_has_them(result: BenchResult, built: Path) -> None:
    assert result.model_n_params == MATRICES + NORMS + 2 * VOCAB * HIDDEN
    assert result.model_type.startswith("llama ") and result.model_type.endswith("int8 b32")
    # 8 bits and a float32 scale for every 32 weights; the table of embeddings is looked up, not read
    packed = (MATRICES + VOCAB * HIDDEN) * 9 // 8
    file = open_onnx(built / "model.onnx")
    small = sum(t.nbytes for t in file.initializers.values() if t.dtype not in ("uint8", "float32"))
    assert packed + 4 * NORMS <= result.bytes_per_token <= packed + 4 * NORMS + small + 64
    assert result.model_size == sum(t.nbytes for t in file.initializers.values())


def test_behind_a_depth_in_this_process(built: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    found = bench(
        built / "model.onnx", prompt=0, generate=3, depth=40, repetitions=2, threads=1, isolate=False,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert [(t.name, len(t.samples_ns)) for t in found.tests] == [("tg3 @ d40", 2)]
    assert steps == [("bench", i + 1, 3) for i in range(3)]


def test_more_threads_are_what_was_asked_for(built: Path) -> None:
    found = bench(built / "model.onnx", prompt=4, generate=0, repetitions=1, threads=2, isolate=False)
    assert benchmark.as_json(found)[0]["n_threads"] == 2


# --- encoders --------------------------------------------------------------------------------------------------------


def test_an_encoder_is_measured_in_texts(tmp_path: Path) -> None:
    path = encoder(tmp_path)
    found = bench(path, repetitions=2, threads=1)
    assert [t.name for t in found.tests] == ["1x16", "1x128", "8x128"]
    row = benchmark.as_json(found)[2]
    assert (row["n_texts"], row["n_prompt"], row["n_gen"], row["embeddings"]) == (8, 128, 0, True)
    assert row["texts_per_s"] * 128 == pytest.approx(row["avg_ts"], rel=1e-6)
    assert found.model_type.startswith("bert ")
    assert (found.model_n_params, found.bytes_per_token) == (100 * 32 + 32 * 32, 4 * 32 * 32)
    chosen = bench(path, prompt=(8, 16), texts=3, repetitions=1, threads=1, isolate=False)
    assert [t.name for t in chosen.tests] == ["3x8", "3x16"]


def test_a_graph_with_int8_and_scales_is_counted_right(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = encoder(tmp_path)
    quantize_dynamic(path, tmp_path / "q.onnx", weight_type=QuantType.QInt8, per_channel=True)
    found = weights_of(open_onnx(tmp_path / "q.onnx"))
    assert found.parameters == pytest.approx(100 * 32 + 32 * 32, abs=2 * 132)  # scales a row at the most
    assert found.format == "int8"


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_transformers(built: Path) -> None:
    """Judged by torch: the same text, both models' logits, KL by its definition."""
    import torch
    from transformers import AutoModelForCausalLM

    source = built.parent / "pico"
    found = evaluate(built / "model.onnx", source, Options(threads=1, floor=False, n_ctx=64, chunks=3)).comparison
    assert found is not None
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with open_session(built / "model.onnx", n_ctx=64, threads=1) as session:
        ids = session.tokenize(corpus.TEXT, add_special=True, parse_special=False)[: 3 * 64]
        kl, same = [], []
        for start in range(0, len(ids), 64):
            chunk = ids[start : start + 64]
            if session.add_bos and session.bos is not None:
                chunk[0] = session.bos
            ours = torch.log_softmax(torch.tensor(session.logits(chunk)[32:63]).double(), -1)
            with torch.no_grad():
                wanted = torch.log_softmax(model(torch.tensor([chunk])).logits[0, 32:63].double(), -1)
            kl.append((wanted.exp() * (wanted - ours)).sum(-1))
            same.append(wanted.argmax(-1) == ours.argmax(-1))
    assert found.tokens == 3 * 31
    assert found.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=0.02)
    assert found.top1 == pytest.approx(float(torch.cat(same).double().mean()), abs=0.02)


def test_every_kind_of_reference_is_taken(built: Path, tmp_path: Path) -> None:
    source, graph = built.parent / "pico", built / "model.onnx"
    options = Options(threads=1, n_ctx=64, chunks=2, floor=False)
    usual = evaluate(graph, source, options)
    assert usual.comparison is not None and usual.comparison.kl_mean > 1e-6
    assert (usual.artifact, usual.engine) == ("int8", "onnx")
    assert usual.nbytes == graph.stat().st_size + (built / "model.onnx.data").stat().st_size
    whole = pipeline.convert(
        str(source), "rpi5", pipeline.Options(out=tmp_path / "f32", quant="F32", verify="none")
    ).out
    as_gguf = evaluate(graph, whole, options).comparison
    assert as_gguf is not None and as_gguf.kl_mean == pytest.approx(usual.comparison.kl_mean, rel=1e-3)
    evaluate(graph, whole, replace(options, save=tmp_path / "kept.npz"))
    kept = evaluate(graph, tmp_path / "kept.npz", Options(threads=1)).comparison
    assert kept is not None and kept.kl_mean == pytest.approx(usual.comparison.kl_mean, rel=0.05)
    itself = evaluate(whole, graph, replace(options, floor=True, prompts=flips.builtin_prompts()[:2], answer_tokens=4))
    assert itself.comparison is not None and itself.comparison.kl_mean == pytest.approx(as_gguf.kl_mean, rel=0.2)
    assert itself.flips is not None and len(itself.flips.answers) == 2
    assert itself.floor is None and any("no noise floor" in note for note in itself.notes)
    nothing = evaluate(graph, graph, replace(options, floor=True)).comparison
    assert nothing is not None and nothing.kl_mean == pytest.approx(0, abs=1e-9)


def test_encoders_are_compared_by_their_vectors(tmp_path: Path) -> None:
    model = pico.make("bert", tmp_path)
    made = {
        quant: pipeline.convert(
            str(model), "rpi5", pipeline.Options(out=tmp_path / quant, quant=quant, verify="none")
        ).out
        for quant in ("F32", "Q8_0", "Q4_0")
    }
    found = {quant: evaluate(out, model, Options(threads=1)) for quant, out in made.items()}
    exact, fine, coarse = (found[q].embeddings for q in ("F32", "Q8_0", "Q4_0"))
    assert exact is not None and fine is not None and coarse is not None
    assert exact.cosine_min > 1 - 1e-6 and exact.spearman > 1 - 1e-6
    assert coarse.cosine_mean < fine.cosine_mean < exact.cosine_mean and coarse.spearman < exact.spearman
    assert fine.pairs == fine.texts * (fine.texts - 1) // 2
    assert found["Q8_0"].comparison is None and found["Q8_0"].as_json()["embeddings"]["width"] == fine.width
    evaluation.keep(found["Q8_0"], made["Q8_0"])
    benchmark.keep(bench(made["Q8_0"], prompt=16, texts=2, repetitions=1, threads=1, isolate=False), made["Q8_0"])
    page = report.write([made["Q8_0"]], tmp_path / "page.html").read_text(encoding="utf-8")
    shown = re.search(r"cosine of the vectors, lowest</td>\s*<td[^>]*>([0-9.]+)", page)
    assert shown is not None and float(shown[1]) == pytest.approx(fine.cosine_min, abs=1e-5)
    assert "Spearman" in page and "2 × 16" in page
    with pytest.raises(EdgekitError, match="predicts no tokens"):
        evaluate(made["F32"], pico.llama(tmp_path / "llama"), Options(threads=1))
    with pytest.raises(EdgekitError, match="predicts no tokens") as caught:
        evaluate(made["F32"], model, Options(threads=1, save=tmp_path / "x.npz"))
    assert "--save" in caught.value.hint
    short = tmp_path / "short.txt"
    short.write_text("Too short to rank anything by.")
    with pytest.raises(EdgekitError, match="at least 8"):
        evaluate(made["F32"], model, Options(threads=1, text=short))


def test_spearman_is_scipy_s(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 9, 200).astype(float)  # ties
    b = a + rng.normal(0, 3, 200)
    stats = pytest.importorskip("scipy.stats")
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman(np.ones(5), np.arange(5.0)) == 0


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_tests_that_nobody_asked_for_fit_the_context(built: Path) -> None:
    found = bench(built / "model.onnx", depth=200, repetitions=1, threads=1, isolate=False)
    assert [(t.n_prompt, t.n_gen) for t in found.tests] == [(55, 0), (0, 55)]


def test_what_a_graph_cannot_be_asked_is_refused(built: Path, tmp_path: Path) -> None:
    graph = built / "model.onnx"
    with pytest.raises(RuntimeFailed, match="do not fit in the 256"):
        bench(graph, prompt=300, generate=0, isolate=False)
    with pytest.raises(EdgekitError, match="one text at a time"):
        bench(graph, texts=2, isolate=False)
    path = encoder(tmp_path / "a")
    with pytest.raises(EdgekitError, match="it generates nothing"):
        bench(path, generate=4, isolate=False)
    with pytest.raises(EdgekitError, match="pixel_values"):
        bench(encoder(tmp_path / "b", extra="pixel_values"), isolate=False)
    with pytest.raises(EdgekitError, match="0 threads"):
        bench(path, threads=0)


def test_damage_is_named_across_processes(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("model.onnx", "genai_config.json"):
        (folder / name).write_bytes((built / name).read_bytes())
    with pytest.raises(CorruptCheckpoint, match=r"model\.onnx\.data"):
        bench(folder / "model.onnx", repetitions=1)
    (folder / "model.onnx.data").write_bytes((built / "model.onnx.data").read_bytes()[:-4096])
    with pytest.raises(CorruptCheckpoint, match=r"model\.onnx\.data"):
        bench(folder / "model.onnx", repetitions=1)
    (folder / "model.onnx.data").write_bytes((built / "model.onnx.data").read_bytes())
    (folder / "genai_config.json").write_text("[]")
    with pytest.raises(CorruptCheckpoint, match=r"genai_config\.json"):
        bench(folder / "model.onnx", repetitions=1)
    with pytest.raises(CorruptCheckpoint, match=r"none\.onnx"):
        bench(tmp_path / "none.onnx")
