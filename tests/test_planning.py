"""Plans against files, against what llama.cpp allocates, and against the tables of the other layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edgekit import pipeline, planning
from edgekit.arch import Geometry, LayerGeometry
from edgekit.errors import DoesNotFit
from edgekit.gguf_file import TYPES
from edgekit.pipeline import Options
from edgekit.quant.ggml import FORMATS
from edgekit.target import Target
from tests import pico
from tests.gguf_models import noise_gguf


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Source:
    return pipeline.open_source(pico.llama(tmp_path_factory.mktemp("plan") / "pico", hidden=256, layers=4))


def test_the_container_knows_every_format_that_can_be_written() -> None:
    for fmt in FORMATS.values():
        assert TYPES[fmt.code] == (fmt.name, fmt.block, fmt.size)


_KEPT: list[Any] = []  # the engine may still call it when this test is over


def printed(log: list[str], what: str) -> float:
    """MiB in llama.cpp's line `... <what> size = x MiB`, summed over its lines."""
    return sum(float(m) for m in re.findall(what + r" size =\s*([\d.]+) MiB", "".join(log)))


@pytest.mark.parametrize("context", [512, 4096, 16384])
def test_cache_and_buffers_are_what_llama_cpp_allocates(tmp_path: Path, context: int) -> None:
    """Judge: llama.cpp's own log, for a model of noise with 8 heads of 64, 4 layers and 3,000 tokens."""
    import llama_cpp.llama_cpp as api

    path = noise_gguf(tmp_path / "m.gguf", dim=512, layers=4, heads=8, ffn=1536, context=32768, extra_vocab=2735)
    log: list[str] = []
    callback = api.llama_log_callback(lambda _level, text, _user: log.append((text or b"").decode("utf-8", "replace")))
    _KEPT.append(callback)
    api.llama_log_set(callback, None)
    model: Any = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = context, 512, 512
    handle: Any = api.llama_init_from_model(model, params)
    api.llama_free(handle)
    api.llama_model_free(model)
    geometry = Geometry(512, 8, 8, 1536, 3000, 32768, tuple(LayerGeometry(8, 64, 64) for _ in range(4)))
    assert planning.kv_cache_bytes(geometry, context, "f16") == printed(log, "KV buffer") * 2**20
    planned, real = planning.compute_bytes(geometry, context), printed(log, "compute buffer") * 2**20
    assert real <= planned * 1.02, "a plan must not promise too much"
    assert planned <= real * 1.35


@pytest.mark.parametrize(("family", "above"), [("modernbert", 1.35), ("xlm_roberta", 2.5)])
def test_an_encoder_holds_the_whole_text(family: str, above: float, tmp_path: Path) -> None:
    """The same judge: every token of the longest text at once. Without a gate in its blocks it needs half of that."""
    import llama_cpp.llama_cpp as api

    wide = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "max_position_embeddings": 2050}
    made = {"modernbert": pico.modernbert, "xlm_roberta": pico.xlm_roberta}[family](tmp_path / "m", **wide)
    options = Options(out=tmp_path / "out", quant="Q8_0", verify="none", calibration="none")
    decided = pipeline.convert(made, "host", options).plan
    log: list[str] = []
    callback = api.llama_log_callback(lambda _level, text, _user: log.append((text or b"").decode("utf-8", "replace")))
    _KEPT.append(callback)
    api.llama_log_set(callback, None)
    path = next((tmp_path / "out").glob("*.gguf"))
    model: Any = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 2048
    params.embeddings, params.pooling_type = True, api.LLAMA_POOLING_TYPE_MEAN
    api.llama_free(api.llama_init_from_model(model, params))
    api.llama_model_free(model)
    planned, real = planning.compute_bytes(decided.geometry, 2048), printed(log, "compute buffer") * 2**20
    assert real <= planned * 1.02, "a plan must not promise too much"
    assert planned <= real * above


def test_a_sliding_window_keeps_the_window_and_a_micro_batch() -> None:
    layers = (LayerGeometry(1, 64, 64, 512), LayerGeometry(1, 64, 64))
    geometry = Geometry(64, 1, 1, 64, 64, 8192, layers)
    assert planning.kv_cache_bytes(geometry, 8192, "f16") == 2 * 2 * 64 * (1024 + 8192)
    assert planning.kv_cache_bytes(geometry, 512, "f16") == 2 * 2 * 64 * (512 + 512)
    assert planning.kv_cache_bytes(geometry, 8192, "q8_0") == 2 * 2 * (1024 + 8192) * 34


def test_auto_takes_quality_while_it_is_fast_enough(source: pipeline.Source) -> None:
    assert pipeline.plan_source(source, Target.load("rpi5")).preset.name == "Q8_0"
    assert pipeline.plan_source(source, Target.load("rpi5"), Options(recipe="smallest")).preset.name == "Q2_K"


def test_auto_never_takes_what_the_device_runs_slowly_when_there_is_a_choice(source: pipeline.Source) -> None:
    target = Target.load("rpi5").model_copy(update={"slow": ("Q8_0", "Q6_K", "Q5_K"), "fast": ()})
    assert pipeline.plan_source(source, target).preset.name == "Q4_K_M"


def test_a_budget_is_met_from_below_and_the_smallest_is_named(source: pipeline.Source) -> None:
    rpi5 = Target.load("rpi5")
    whole = pipeline.plan_source(source, rpi5, Options(quant="Q4_K_M"))
    found = pipeline.plan_source(source, rpi5, Options(target_size=whole.file_bytes))
    assert found.file_bytes <= whole.file_bytes
    assert found.weight_bytes >= pipeline.plan_source(source, rpi5, Options(quant="Q4_K_S")).weight_bytes
    with pytest.raises(DoesNotFit) as caught:
        pipeline.plan_source(source, rpi5, Options(target_size=1000))
    smallest = pipeline.plan_source(source, rpi5, Options(recipe="smallest"))
    assert f"{smallest.file_bytes:,} bytes" in str(caught.value)


def test_bits_per_weight_are_a_budget_too(source: pipeline.Source) -> None:
    found = pipeline.plan_source(source, Target.load("rpi5"), Options(target_bpw=4.6))
    assert 4.0 < found.bits_per_weight <= 4.6


def test_experts_count_by_what_is_active(tmp_path: Path) -> None:
    moe = pipeline.open_source(pico.make("mixtral", tmp_path / "moe"))
    decided = pipeline.plan_source(moe, Target.load("rpi5"), Options(quant="Q8_0"))
    load = planning.workload(decided.tensors, decided.geometry, 512, "f16")
    experts = [t for t in decided.tensors if len(t.shape) == 3]
    assert experts
    idle = sum(t.nbytes for t in experts) * (1 - decided.geometry.experts_used / decided.geometry.experts)
    read = sum(t.nbytes for t in decided.tensors) - idle
    assert load.bytes_per_token <= read * 1.001


def test_every_target_gets_a_plan(source: pipeline.Source) -> None:
    rows = list(pipeline.plan_all(source))
    assert {t.name for t, _ in rows} == set(Target.names())
    assert all(not isinstance(p, DoesNotFit) for _, p in rows)
