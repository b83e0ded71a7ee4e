"""Decoders through the repaired genai builder, judged by transformers; the shipping form by onnxruntime-genai itself.

Prompts are longer than every sliding window and than the original context of scaled rotations.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.errors import CorruptCheckpoint, EdgekitError, MissingExtra, RuntimeFailed, UnsupportedModel
from edgekit.export.onnx import _decoder, _shipping
from tests import pico
from tests.pico import GRANITE, LLAMA3, LONGROPE, YARN, Pico

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
pytest.importorskip("onnxruntime_genai")

PROMPT = [int(i) for i in np.random.default_rng(1).integers(3, pico.VOCAB, 96)]
LONG_PROMPT = [int(i) for i in np.random.default_rng(2).integers(3, pico.VOCAB, 4110)]
SWITCH = 4096  # tokens from which on a longrope takes its long factors; the engine knows this number alone
CONTEXT = 144


def _prompt(name: str) -> list[int]:
    return LONG_PROMPT if name in ("phi3, longrope", "phi4-mini") else PROMPT


def _llama(**settings: Any) -> Pico:
    return Pico("LlamaForCausalLM", "LlamaConfig", settings)


def _longrope(dimensions: int, **rope: Any) -> dict[str, Any]:
    half = dimensions // 2
    factors = {"short_factor": [1 + 0.05 * i for i in range(half)], "long_factor": [1.5 + 0.2 * i for i in range(half)]}
    plain = {k: v for k, v in LONGROPE.items() if k != "partial_rotary_factor"}
    return {
        "rope_parameters": plain | factors | {"original_max_position_embeddings": 4096, "factor": 2.0} | rope,
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 8192,
    }


DENSE_HYBRID = {k: v for k, v in GRANITE.items() if k != "attention_bias"} | {
    "layer_types": ["attention"] * 3,
    "num_local_experts": 0,
    "position_embedding_type": "rope",
    "shared_intermediate_size": 160,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 32}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
ALPHA = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}
TIED = {"tie_word_embeddings": True}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}

QUICK: dict[str, Pico | Callable[[Path], Path]] = {
    "gemma3_text": pico.FAMILIES["gemma3_text"],
    "llama, tied": _llama(tie_word_embeddings=True),
    "phi3, window": Pico("Phi3ForCausalLM", "Phi3Config", {"sliding_window": 32}),
}
SLOW: dict[str, Pico | Callable[[Path], Path]] = {
    "ernie4_5": Pico("Ernie4_5ForCausalLM", "Ernie4_5Config", {}),
    "ernie4_5, biases": Pico("Ernie4_5ForCausalLM", "Ernie4_5Config", {"use_bias": True, "head_dim": 32}),
    "gemma": pico.FAMILIES["gemma"],
    "gemma2": pico.FAMILIES["gemma2"],
    "granite": pico.FAMILIES["granite"],
    "granitemoehybrid, dense": Pico("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", DENSE_HYBRID),
    "hunyuan": Pico("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", {"head_dim": 32, "rope_parameters": ALPHA}),
    "lfm2": Pico("Lfm2ForCausalLM", "Lfm2Config", CONV),
    "llama": _llama(),
    "llama, dynamic rope": _llama(rope_parameters=DYNAMIC),
    "llama, linear rope": _llama(rope_parameters=LINEAR),
    "llama, llama3 rope and biases": _llama(rope_parameters=LLAMA3, head_dim=64, attention_bias=True, mlp_bias=True),
    "llama, yarn": _llama(rope_parameters=YARN),
    "mistral": Pico("MistralForCausalLM", "MistralConfig", {"sliding_window": None}),
    "mistral, window": Pico("MistralForCausalLM", "MistralConfig", {"head_dim": 64, "sliding_window": 32}),
    "nemotron": Pico("NemotronForCausalLM", "NemotronConfig", {"head_dim": 64, "attention_bias": True}),
    "olmo": Pico("OlmoForCausalLM", "OlmoConfig", {}),
    "phi": Pico("PhiForCausalLM", "PhiConfig", {"num_key_value_heads": 4}),
    "phi3": Pico("Phi3ForCausalLM", "Phi3Config", {}),
    "phi3, longrope": Pico("Phi3ForCausalLM", "Phi3Config", _longrope(32)),
    "phi4-mini": Pico(
        "Phi3ForCausalLM", "Phi3Config", TIED | {"hidden_size": 256} | _longrope(48, partial_rotary_factor=0.75)
    ),
    "qwen2": Pico("Qwen2ForCausalLM", "Qwen2Config", TIED),
    "qwen2, windows": Pico("Qwen2ForCausalLM", "Qwen2Config", WINDOWS | {"max_window_layers": 1}),
    "qwen2, yarn": pico.FAMILIES["qwen2"],
    "qwen3": pico.FAMILIES["qwen3"],
    "qwen3, windows": Pico("Qwen3ForCausalLM", "Qwen3Config", WINDOWS | {"max_window_layers": 2, "head_dim": 64}),
    "qwen3, yarn": Pico("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 64, "rope_parameters": YARN}),
    "smollm3": pico.FAMILIES["smollm3"],
    "smollm3, windows": Pico("SmolLM3ForCausalLM", "SmolLM3Config", WINDOWS | TIED | {"num_hidden_layers": 5}),
}
ALL = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(checkpoint, folder with its float32 graph) of a case by name, built once."""
    done: dict[str, tuple[Path, Path]] = {}

    def build(name: str) -> tuple[Path, Path]:
        if name not in done:
            root = (QUICK | SLOW)[name](tmp_path_factory.mktemp("source"))
            folder = tmp_path_factory.mktemp("graph")
            assert _decoder.build(root, folder) == folder / "model.onnx"
            done[name] = root, folder
        return done[name]

    return build


class Judge:
    """transformers in float32."""

    def __init__(self, root: Path) -> None:
        import torch
        import transformers

        self._torch = torch
        torch.set_num_threads(1)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        with self._torch.no_grad():
            return np.asarray(self._model(self._torch.tensor([list(tokens)]), use_cache=False).logits[0])

    def greedy(self, tokens: Sequence[int], new: int) -> list[int]:
        """Without a cache: it would keep what a longrope computed with its short factors."""
        made = list(tokens)
        for _ in range(new):
            made.append(int(self.logits(made)[-1].argmax()))
        return made[len(tokens) :]


def _plain(graph: Path, tokens: Sequence[int]) -> np.ndarray:
    """Logits by plain onnxruntime, caches of length 0 -> float32 (rows, vocabulary)."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    head = json.loads((graph.parent / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    sizes = {"batch_size": 1, "past_sequence_length": 0, "kv_cache_dim": head}
    feeds = {
        value.name: np.zeros([sizes.get(n, n) for n in value.shape], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    feeds |= {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), np.int64)}
    if "position_ids" in {value.name for value in session.get_inputs()}:
        feeds["position_ids"] = np.arange(len(tokens))[None]
    (logits,) = session.run(["logits"], feeds)
    return np.asarray(logits[0])


def _genai_greedy(folder: Path, tokens: Sequence[int], length: int) -> list[int]:
    """Tokens that onnxruntime-genai adds until `length` is reached."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(list(tokens))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(tokens) :]


@pytest.mark.parametrize("name", ALL)
def test_float32_graph_is_the_model(name: str, built: Callable[[str], tuple[Path, Path]]) -> None:
    root, folder = built(name)
    judge, prompt = Judge(root), _prompt(name)
    wanted, found = judge.logits(prompt), _plain(folder / "model.onnx", prompt)
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 4e-6
    assert (found.argmax(-1) == wanted.argmax(-1)).all()
    new = 12 if prompt is PROMPT else 4
    assert _genai_greedy(folder, prompt, len(prompt) + new) == judge.greedy(prompt, new)


@pytest.mark.slow
def test_longrope_changes_factors_where_transformers_does(
    built: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    root, folder = built("phi3, longrope")
    judge, short = Judge(root), LONG_PROMPT[: SWITCH - 6]
    wanted = judge.logits(short)
    assert np.linalg.norm(_plain(folder / "model.onnx", short) - wanted) / np.linalg.norm(wanted) < 4e-6
    shipped = _copy(folder, tmp_path / "shipped")
    assert _shipping.shorten_rope(shipped / "model.onnx", SWITCH + 64) > 0
    _shipping.ship(shipped, context=SWITCH + 64, threads=1)
    assert _genai_greedy(shipped, short, SWITCH + 6) == judge.greedy(short, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "rope"),
    [("phi3, longrope", {"type": "longrope"}), ("llama, linear rope", None)],
)
def test_old_spelling_of_rope_settings(
    family: str, rope: dict[str, str] | None, built: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """`rope_scaling` with `type`, the base beside it, no `architectures`: config.json files of years past."""
    root, folder = built(family)
    old = shutil.copytree(root, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    settings = config.pop("rope_parameters")
    config["rope_theta"] = settings.pop("rope_theta")
    kind = settings.pop("rope_type")
    kept = {k: v for k, v in settings.items() if k in ("factor", "short_factor", "long_factor")}
    config["rope_scaling"] = kept | (rope or {"type": kind})
    if rope:
        config["rope_scaling"].pop("factor")
    del config["architectures"]
    (old / "config.json").write_text(json.dumps(config))
    again, prompt = _decoder.build(old, tmp_path / "graph"), _prompt(family)
    assert np.array_equal(_plain(again, prompt), _plain(folder / "model.onnx", prompt))


def test_build_brings_the_models_own_files_and_tells_how_far_it_is(tmp_path: Path) -> None:
    root = pico.llama(tmp_path / "model", dtype="BF16")
    (root / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    told: list[tuple[str, int, int]] = []
    folder = _decoder.build(root, tmp_path / "graph", progress=lambda *step: told.append(step)).parent
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (root / name).read_bytes()
    assert not (folder / "cache").exists()
    assert ("building the float32 graph", 2, 2) in told
    assert told[-1][0] == "writing the float32 graph" and told[-1][1] == told[-1][2] > 10
    wanted = Judge(root).logits(PROMPT)
    assert np.linalg.norm(_plain(folder / "model.onnx", PROMPT) - wanted) / np.linalg.norm(wanted) < 4e-6


def test_what_the_builder_said_is_in_the_hint(tmp_path: Path) -> None:
    root = pico.llama(tmp_path / "model", num_attention_heads="many")
    with pytest.raises(RuntimeFailed, match=r"could not build model: .*num_attention_heads") as failed:
        _decoder.build(root, tmp_path / "graph")
    assert "Traceback" in failed.value.hint or "File" in failed.value.hint
    assert not (tmp_path / "graph" / "model.onnx").exists()


# --- refusals ------------------------------------------------------------------------------------------------------

GOOD = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 128,
    "num_attention_heads": 4,
}


def test_proven_families_are_supported() -> None:
    assert _decoder.supported(GOOD) is None
    assert _decoder.supported({"model_type": "llama"}) is None  # defaults of its class
    tested = {case.model for case in (QUICK | SLOW).values() if isinstance(case, Pico)}
    assert tested == set(_decoder.FAMILIES.values())
    for family, architecture in _decoder.FAMILIES.items():
        layers = {"layer_types": ["full_attention"], "position_embedding_type": "rope"}
        assert _decoder.supported(GOOD | layers | {"model_type": family, "architectures": [architecture]}) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "no exact builder for gpt2"),
        ({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}, "no exact builder for gpt_neox"),
        ({"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}, "no exact builder for olmo2"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "no exact builder for qwen3_moe"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "gemma3", "vision_config": {"hidden_size": 32}}, "vision_config"),
        ({"model_type": "qwen2_audio", "audio_config": {"d_model": 32}}, "audio_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
        ({"model_type": "olmo", "architectures": ["OlmoForCausalLM"], "clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ({"model_type": "phi", "architectures": ["PhiForCausalLM"], "qk_layernorm": True}, "qk_layernorm"),
        ({"model_type": "nemotron", "architectures": ["NemotronForCausalLM"], "mlp_bias": True}, "MLP biases"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope' in llama"),
        (
            {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 8192}
            | {"original_max_position_embeddings": 2048, "rope_scaling": {"type": "longrope"}},
            "factors at 4096 tokens, this phi3 at 2048",
        ),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "'ntk' in llama"),
        (
            {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "su"}},
            "'su' in phi3",  # transformers 5 no longer reads it
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        ({"layer_types": [{"a": 1}], "hidden_act": "silu"}, "layers of type \"{'a': 1}\""),
        ({"hidden_act": ["silu"]}, "activation"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope type"),
        ({"head_dim": 24}, "heads of 24 dimensions"),
        ({"partial_rotary_factor": 0.25}, "8 of them rotated"),
        ({"num_local_experts": 8}, "mixture of experts"),
        (
            {"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"]},
            "mamba",
        ),
        (
            {"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"]}
            | {"layer_types": ["attention"]},
            "position_embedding_type None",
        ),
    ],
)
def test_refused_with_a_sentence(change: dict[str, Any], why: str) -> None:
    assert why in (_decoder.supported(GOOD | change) or "")


def test_build_refuses_before_weights_are_read(tmp_path: Path) -> None:
    root = pico.llama(tmp_path / "model", model_type="olmo2", architectures=["Olmo2ForCausalLM"])
    with pytest.raises(UnsupportedModel, match="no exact builder for olmo2"):
        _decoder.build(root, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


def test_another_release_of_the_builder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "onnxruntime_genai-0.19.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-genai\nVersion: 0.19.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EdgekitError, match=r"0\.19\.1 is not the tested 0\.18") as refused:
        _decoder.require()
    assert "onnxruntime-genai==0.18.*" in refused.value.hint


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_decoder, "PACKAGES", (*_decoder.PACKAGES, "no-such-exporter"))
    with pytest.raises(MissingExtra, match="no-such-exporter") as missing:
        _decoder.require()
    assert missing.value.hint == 'pip install "edgekit[onnx]"'


def test_memory_estimate_covers_what_was_measured() -> None:
    """Peaks of the child, MiB: tied Llama of 134.5 M in BF16 and F32, untied one of 330.5 M in BF16."""
    for parameters, dtype, mib in ((134_500_000, "BF16", 941), (134_500_000, "F32", 1122), (330_500_000, "BF16", 1495)):
        assert 1.0 <= _decoder.build_bytes(parameters, dtype) / (mib << 20) < 1.25


# --- the shipping form ---------------------------------------------------------------------------------------------


def _copy(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)


SHIPPED = [
    "gemma3_text",
    "llama, tied",
    "phi3, window",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "gemma2",
            "granite",
            "lfm2",
            "mistral, window",
            "qwen2, windows",
            "smollm3, windows",
        )
    ),
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_form_says_the_same_up_to_its_context(
    name: str, built: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    root, folder = built(name)
    shipped = _copy(folder, tmp_path / "shipped")
    data = (shipped / "model.onnx.data").read_bytes()
    assert _shipping.shorten_rope(shipped / "model.onnx", CONTEXT) > 0
    _shipping.ship(shipped, context=CONTEXT, threads=1)
    assert (shipped / "model.onnx.data").read_bytes() == data
    assert np.array_equal(_plain(shipped / "model_all.onnx", PROMPT), _plain(folder / "model.onnx", PROMPT))
    wanted = Judge(root).greedy(PROMPT, CONTEXT - len(PROMPT))
    assert _genai_greedy(shipped, PROMPT, CONTEXT) == wanted


def test_last_position_alone_reaches_the_head(built: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, folder = built("llama, tied")
    shipped = _copy(folder, tmp_path / "shipped")
    _shipping.ship(shipped, context=256)
    last = _plain(shipped / "model.onnx", PROMPT)
    assert last.shape == (1, pico.VOCAB)
    assert np.array_equal(last[0], _plain(folder / "model.onnx", PROMPT)[-1])
    decoder = json.loads((shipped / "genai_config.json").read_text())["model"]["decoder"]
    assert "intra_op_num_threads" not in decoder["session_options"] and "sliding_window" not in decoder
    with pytest.raises(EdgekitError, match="shipping form already"):
        _shipping.ship(shipped, context=256)


def test_windows_no_shorter_than_the_context_keep_whole_caches(
    built: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, folder = built("gemma3_text")
    inside = _copy(folder, tmp_path / "inside")
    _shipping.ship(inside, context=32)
    assert "sliding_window" not in json.loads((inside / "genai_config.json").read_text())["model"]["decoder"]
    beyond = _copy(folder, tmp_path / "beyond")
    _shipping.ship(beyond, context=33)
    found = json.loads((beyond / "genai_config.json").read_text())["model"]["decoder"]["sliding_window"]
    assert found["window_size"] == 32 and found["layers"] == [0, 1, 2, 3, 4, 6]


def test_genai_config_says_what_the_model_and_the_device_want(
    built: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, folder = built("llama, tied")
    shipped = _copy(folder, tmp_path / "shipped")
    wanted = {"eos_token_id": [7, 2, True, -1], "do_sample": True, "temperature": 0.6, "top_p": "high", "top_k": 0}
    (shipped / "generation_config.json").write_text(json.dumps(wanted))
    _shipping.ship(shipped, context=100, threads=3)
    config = json.loads((shipped / "genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == 100
    assert config["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 3
    assert config["model"]["eos_token_id"] == [7, 2]
    search = config["search"]
    assert (search["do_sample"], search["temperature"], search["top_p"], search["top_k"]) == (True, 0.6, 1.0, 50)
    assert _genai_greedy(shipped, PROMPT, 100)


def test_ship_refuses_what_is_not_the_builders(built: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, folder = built("llama, tied")
    broken = _copy(folder, tmp_path / "broken")
    with pytest.raises(EdgekitError, match="a context of 257 tokens; the model has 256"):
        _shipping.ship(broken, context=257)
    (broken / "genai_config.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match="genai_config"):
        _shipping.ship(broken, context=16)
    (broken / "model.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(CorruptCheckpoint, match="ONNX graph"):
        _shipping.shorten_rope(broken / "model.onnx", 16)


def test_rope_tables_lose_rows_and_nothing_else(built: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, folder = built("gemma3_text")
    short = _copy(folder, tmp_path / "short")
    assert _shipping.shorten_rope(short / "model.onnx", 96) == 256 - 96
    assert np.array_equal(_plain(short / "model.onnx", PROMPT), _plain(folder / "model.onnx", PROMPT))
    assert _shipping.shorten_rope(short / "model.onnx", 96) == 0
