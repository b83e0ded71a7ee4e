"""optimum-onnx in an environment of its own: what it is told, and its graphs against transformers where it is there."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import evaluation, onnx_planning
from edgekit.checkpoint import open_checkpoint
from edgekit.errors import CorruptCheckpoint, EdgekitError, MissingExtra, RuntimeFailed, UnsupportedModel
from edgekit.export import onnx
from edgekit.export.onnx import _optimum as optimum
from edgekit.target import Target
from tests import pico

GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4}
NEOX = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
OLMO = {"model_type": "olmo2"}


# --- what can be told without it -------------------------------------------------------------------------------------


def older(config: dict[str, Any]) -> dict[str, Any]:
    return optimum.older(config, optimum.FAMILIES[config["model_type"]])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GPT2, None),
        (NEOX | {"rotary_pct": 0.25}, None),
        (NEOX | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, None),
        (OLMO | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, None),
        ({}, "names no model_type"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder, which is another task"),
        ({"model_type": "mamba"}, "was not tried for mamba"),
        (NEOX | {"architectures": ["GPTNeoXForQuestionAnswering"]}, "not a causal language model"),
        (GPT2 | {"quantization_config": {"bits": 4}}, "quantized already"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        (OLMO | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        (OLMO | {"rope_scaling": ["dynamic"]}, "rope type ['dynamic']"),
    ],
)
def test_what_is_supported_is_known_from_the_config(config: dict[str, Any], said: str | None) -> None:
    found = optimum.supported(config)
    assert found is None if said is None else said in (found or "")


def test_the_config_is_spelled_as_transformers_4_reads_it() -> None:
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    found = older(NEOX | {"rope_parameters": rope, "dtype": "float32", "transformers_version": "5.23.0"})
    assert found == NEOX | {
        "rotary_emb_base": 5000.0, "rotary_pct": 0.5, "rope_scaling": None, "torch_dtype": "float32",
    }  # fmt: skip
    scaled = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 3e4, "original_max_position_embeddings": 64}
    found = older(OLMO | {"rope_parameters": scaled})
    assert found["rope_theta"] == 3e4
    assert found["rope_scaling"] == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    before = NEOX | {"rotary_pct": 0.25, "rotary_emb_base": 10000}
    assert older(before) == before, "what version 4 wrote stays"


def test_a_gpt2_is_taken_for_a_writer_of_text(tmp_path: Path) -> None:
    """Its class is called GPT2LMHeadModel, which ends like that of an encoder."""
    from edgekit.checkpoint import open_checkpoint
    from edgekit.export.onnx import engine_for

    root = pico.make("gpt2", tmp_path)
    engine = engine_for(open_checkpoint(root))
    assert (engine.name, engine.task, engine.graph_name) == ("optimum-onnx", "text-generation", "model.onnx")


def test_no_custom_code_reaches_the_child() -> None:
    found = older(GPT2 | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "architectures": ["Evil"]})
    assert "auto_map" not in found
    assert found["architectures"] == ["GPT2LMHeadModel"]


def test_without_an_environment_the_commands_that_make_one_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(optimum.VARIABLE, raising=False)
    if optimum.available() is not None:
        pytest.skip("optimum-onnx is installed in this very environment")
    with pytest.raises(MissingExtra, match="needs a transformers older than this environment's") as failed:
        optimum.require()
    hint = failed.value.hint
    assert f"pip install -c {optimum.CONSTRAINTS} torch optimum-onnx onnxruntime" in hint
    assert f"export {optimum.VARIABLE}=" in hint
    assert optimum.CONSTRAINTS.is_file()
    subprocess.run(["sh", "-n", "-c", hint], check=True)


def test_the_variable_must_name_a_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(optimum.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(EdgekitError, match="nowhere"):
        optimum.available()
    odd = tmp_path / "odd"
    odd.write_text("#!/bin/sh\necho hello\n")
    odd.chmod(odd.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(optimum.VARIABLE, str(odd))
    assert optimum.available() == odd
    with pytest.raises(EdgekitError, match="does not run as a Python"):
        optimum.require()


def test_an_environment_without_the_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(optimum.VARIABLE, sys.executable)
    if optimum.versions(Path(sys.executable))["optimum-onnx"]:
        pytest.skip("optimum-onnx is installed in this very environment")
    with pytest.raises(MissingExtra, match=f"optimum-onnx.* not installed for {sys.executable}"):
        optimum.require()


def test_every_release_that_matters_is_pinned() -> None:
    pins = optimum._pins()
    assert set(optimum.PINNED) <= set(pins)
    assert pins["transformers"].startswith("4.57.")


def test_a_model_is_refused_before_any_environment_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(optimum.VARIABLE, raising=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(UnsupportedModel, match="another task: text2text-generation"):
        optimum.build(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


HEADS = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 256}
WIDE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
OTHERS = {
    "bloom": pico.Pico("BloomForCausalLM", "BloomConfig", {"hidden_size": 128, "n_layer": 3, "n_head": 4}),
    "codegen": pico.Pico("CodeGenForCausalLM", "CodeGenConfig", HEADS | {"rotary_dim": 16}),
    "falcon": pico.Pico("FalconForCausalLM", "FalconConfig", WIDE),
    "gpt_bigcode": pico.Pico("GPTBigCodeForCausalLM", "GPTBigCodeConfig", HEADS | {"n_inner": 192}),
    "gptj": pico.Pico("GPTJForCausalLM", "GPTJConfig", HEADS | {"rotary_dim": 16}),
    "opt": pico.Pico("OPTForCausalLM", "OPTConfig", WIDE | {"ffn_dim": 192, "word_embed_proj_dim": 128}),
}
"""Families that no GGUF table knows."""

MAIN = ("gpt2", "gpt_neox", "olmo2")
REST = sorted(set(optimum.FAMILIES) - set(MAIN))

# --- with it ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Family -> (folder of its pico, folder of its graph), made once."""
    named = os.environ.get(optimum.VARIABLE)
    if not named or not Path(named).is_file():
        pytest.skip(f"{optimum.VARIABLE} names no Python of an environment with optimum-onnx")
    root = tmp_path_factory.mktemp("optimum")

    @cache
    def make(family: str) -> tuple[Path, Path]:
        model = OTHERS[family](root / family) if family in OTHERS else pico.make(family, root)
        optimum.build(model, root / "graph" / family)
        return model, root / "graph" / family

    return make


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return [int(t) for t in np.random.default_rng(0).integers(3, pico.VOCAB, 96)]


def reference(root: Path, tokens: list[int]) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    with torch.no_grad():
        return np.asarray(model(torch.tensor(tokens)[None]).logits[0])


def relative(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


Built = Callable[[str], tuple[Path, Path]]
FAMILIES = [*MAIN, *(pytest.param(family, marks=pytest.mark.slow) for family in REST)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(built: Built, tokens: list[int], family: str) -> None:
    """However the text is cut, in both engines; the transformers of this environment is not the exporter's."""
    from edgekit.runtime.onnxruntime import DecoderSession, open_session

    model, folder = built(family)
    expected = reference(model, tokens)
    with open_session(folder, threads=1) as genai, alone(folder) as cached:
        assert isinstance(genai, DecoderSession)
        assert relative(genai.logits(tokens), expected) < 1e-5
        assert relative(cached.forward(tokens), expected) < 1e-5
        cached.clear()
        parts = [tokens[:17], tokens[17:60], *([t] for t in tokens[60:])]
        assert relative(np.concatenate([cached.forward(part) for part in parts]), expected) < 1e-5
        assert cached.keep(np.array([*tokens[:40], 5], np.int32)) == 40
        assert cached.fed == tokens[:40]
        assert relative(cached.forward(tokens[40:]), expected[40:]) < 1e-5


def alone(folder: Path) -> Any:
    from contextlib import closing

    from edgekit.runtime._common import Spent
    from edgekit.runtime._ort_cache import Cached
    from edgekit.runtime._ort_genai import Settings

    return closing(Cached(folder / "model.onnx", pico.VOCAB, Settings(256, 1, ()), Spent()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_is_quantised_and_ships(built: Built, tokens: list[int], family: str, tmp_path: Path) -> None:
    from edgekit.export.onnx import _quantize, _shipping
    from edgekit.quant.nbits import NBits
    from edgekit.runtime.onnxruntime import open_session

    graph, folder = built(family)[1], tmp_path / family
    shutil.copytree(graph, folder, ignore=shutil.ignore_patterns("model.onnx*"))
    fmt = NBits(8, 32, True)
    report = _quantize.quantize(graph / "model.onnx", folder / "model.onnx", _quantize.Scheme(fmt, fmt, fmt))
    assert report.left == (), "no large matrix stays float32"
    assert sum(node.op == "GatherBlockQuantized" for node in report.nodes) == 1, "the token table"
    assert any(node.shares for node in report.nodes) is tied(graph), "and it is the head where they are tied"
    _shipping.ship(folder, context=200, threads=1)
    with open_session(graph, threads=1) as whole, open_session(folder, threads=1) as shipped:
        assert shipped.n_ctx == 200
        exact, rows = whole.logits(tokens), shipped.logits(tokens)
        assert 0 < relative(rows, exact) < 0.06
        answer = list(shipped.generate(tokens[:30], 12))
    assert answer == greedy(folder, tokens[:30], 12)
    assert not evaluation.candidate_of(folder / "model_all.onnx").encoder, "without a genai_config.json too"


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_bytes_are_written_bytes(built: Built, family: str, tmp_path: Path) -> None:
    model, folder = built(family)
    checkpoint = open_checkpoint(model)
    engine = onnx.engine_for(checkpoint)
    for quant in ("int8", "int4"):
        plan = onnx_planning.plan(
            checkpoint, engine.task, Target.load("rpi5"), onnx_planning.Wish(quant), engine.exporter
        )
        report = onnx.store(folder / onnx.GRAPH, tmp_path / quant, plan.variant, plan.shape.layers)
        assert report.data_bytes == plan.data_bytes
        assert 0.6 < 2 * report.graph_bytes / plan.graph_bytes < 1.7


def tied(folder: Path) -> bool:
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(folder).tie_word_embeddings)


def greedy(folder: Path, tokens: list[int], n: int) -> list[int]:
    """The same from the graph of all positions, by onnxruntime alone, all of the text anew for every token."""
    (folder / "genai_config.json").unlink()
    from edgekit.runtime.onnxruntime import open_session

    found: list[int] = []
    with open_session(folder / "model_all.onnx", threads=1) as session:
        for _ in range(n):
            token = int(session.logits(tokens + found)[-1].argmax())
            if session.vocabulary.is_end(token):
                break
            found.append(token)
        assert list(session.generate(tokens, n)) == found
    return found


def test_text_goes_in_and_comes_out(built: Built) -> None:
    from edgekit.runtime.onnxruntime import open_session

    with open_session(built("gpt2")[1], n_ctx=64, threads=1) as session:
        ids = session.tokenize("the river", add_special=False)
        assert session.detokenize(ids) == "the river"
        told = "".join(session.stream(ids, 5))
        assert told == session.detokenize(list(session.generate(ids, 5)))
        with pytest.raises(RuntimeFailed, match="do not fit in a context of 64"):
            list(session.generate(ids * 40, 5))


def test_what_the_exporter_says_is_passed_on(built: Built, tmp_path: Path) -> None:
    broken = shutil.copytree(built("gpt2")[0], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(RuntimeFailed, match=r"optimum-onnx could not export broken: .*\S") as failed:
        optimum.build(broken, tmp_path / "out")
    assert "Traceback" in failed.value.hint or "Error" in failed.value.hint
    weights.unlink()
    with pytest.raises(UnsupportedModel, match=r"holds no \*\.safetensors"):
        optimum.build(broken, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()), "nothing of a failed export stays"


# --- a graph with a cache, run by onnxruntime alone ------------------------------------------------------------------

VOCAB, WIDTH = 50, 8


def cumulative(path: Path, *, heads: int | str = 1, logits: int = VOCAB, extra: str = "") -> dict[str, np.ndarray]:
    """A decoder of one layer whose logits are U · (sum of all embeddings so far) + number of tokens -> its weights."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(1)
    weights = {
        "table": rng.normal(size=(VOCAB, WIDTH)).astype(np.float32),
        "places": rng.normal(size=(64, WIDTH)).astype(np.float32),
        "head": rng.normal(size=(WIDTH, logits)).astype(np.float32),
    }
    whole = {"one": np.array([1]), "two": np.array(2), "minus": np.array([-1]), "end": np.array([2**31 - 1]),
             "axis": np.array([2])}  # fmt: skip
    make = helper.make_node
    nodes = [
        make("Gather", ["table", "input_ids"], ["tokens"]),
        make("Gather", ["places", "position_ids"], ["positions"]),
        make("Add", ["tokens", "positions"], ["embedded"]),
        make("Unsqueeze", ["embedded", "one"], ["key"]),
        make("Concat", ["past_key_values.0.key", "key"], ["present.0.key"], axis=2),
        make("Identity", ["past_key_values.0.value"], ["held"]),
        make("Concat", ["held", "key"], ["present.0.value"], axis=2),
        make("CumSum", ["present.0.key", "two"], ["sums"]),
        make("Shape", ["input_ids"], ["length"], start=1, end=2),
        make("Mul", ["length", "minus"], ["from"]),
        make("Slice", ["sums", "from", "end", "axis"], ["last"]),
        make("Squeeze", ["last", "one"], ["hidden"]),
        make("MatMul", ["hidden", "head"], ["unscaled"]),
        make("ReduceSum", ["attention_mask"], ["count"], keepdims=0),
        make("Cast", ["count"], ["seen"], to=TensorProto.FLOAT),
        make("Add", ["unscaled", "seen"], ["logits"]),
    ]
    values = helper.make_tensor_value_info
    names = ["input_ids", "attention_mask", "position_ids", *([extra] if extra else [])]
    inputs = [values(name, TensorProto.INT64, ["b", None]) for name in names]
    caches = [f"0.{kind}" for kind in ("key", "value")]
    inputs += [values(f"past_key_values.{c}", TensorProto.FLOAT, ["b", heads, "past", WIDTH]) for c in caches]
    outputs = [values("logits", TensorProto.FLOAT, ["b", "s", logits])]
    outputs += [values(f"present.{c}", TensorProto.FLOAT, ["b", heads, "all", WIDTH]) for c in caches]
    stored = [numpy_helper.from_array(v, k) for k, v in (weights | whole).items()]
    graph = helper.make_graph(nodes, "cumulative", inputs, outputs, stored)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    (path.parent / "config.json").write_text(json.dumps({"model_type": "x", "n_positions": 64, "vocab_size": VOCAB}))
    return weights


def expected(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    embedded = weights["table"][tokens] + weights["places"][: len(tokens)]
    return embedded.cumsum(axis=0) @ weights["head"] + len(tokens)


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    from edgekit.runtime.onnxruntime import open_session

    weights = cumulative(tmp_path / "model.onnx")
    pico.tokenizer_files(tmp_path)
    with open_session(tmp_path, threads=1) as session:
        yield session, weights


def test_a_cache_is_taken_given_cut_and_forgotten(plain: tuple[Any, dict[str, np.ndarray]]) -> None:
    session, weights = plain
    tokens = [int(t) for t in np.random.default_rng(2).integers(3, VOCAB, 30)]
    decoder = session._decoder
    decoder.feed(np.array(tokens[:20], np.int32))
    for n in range(20, 30):
        np.testing.assert_allclose(decoder.last(), expected(weights, tokens[:n])[-1], rtol=1e-4, atol=1e-4)
        decoder.append(np.array(tokens[n : n + 1], np.int32))
    other = [*tokens[:11], 7, 8]
    assert decoder.keep(np.array(other, np.int32)) == 11
    decoder.feed(np.array(other[11:], np.int32))
    np.testing.assert_allclose(decoder.last(), expected(weights, other)[-1], rtol=1e-4, atol=1e-4)
    assert decoder.keep(np.array(other, np.int32)) == 12, "the last token is always computed"
    session.reset()
    assert decoder.fed == []
    np.testing.assert_allclose(session.logits(tokens)[-1], expected(weights, tokens)[-1], rtol=1e-4, atol=1e-4)


def test_a_session_without_genai_config_generates(plain: tuple[Any, dict[str, np.ndarray]]) -> None:
    session, weights = plain
    assert (session.n_ctx, session.n_vocab, session.encoder) == (64, VOCAB, False)
    tokens, found = [5, 6, 7], []
    for _ in range(8):
        found.append(int(expected(weights, tokens + found)[-1].argmax()))
    ends = [i for i, t in enumerate(found) if session.vocabulary.is_end(t)]
    assert list(session.generate(tokens, 8)) == found[: ends[0] if ends else 8]
    assert session.timings().decode_tokens > 0 or ends
    with pytest.raises(RuntimeFailed, match="do not fit in a context of 64"):
        session.generate([5] * 65, 1)


def test_graphs_that_cannot_go_on_are_refused(tmp_path: Path) -> None:
    from edgekit.runtime.onnxruntime import open_session

    cumulative(tmp_path / "model.onnx", heads="heads")
    with pytest.raises(UnsupportedModel, match=r"past_key_values\.0\.key has the shape"):
        open_session(tmp_path, threads=1)
    cumulative(tmp_path / "model.onnx", extra="speaker")
    with pytest.raises(UnsupportedModel, match="wants 'speaker'"):
        open_session(tmp_path, threads=1)
    cumulative(tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match="max_position_embeddings"):
        open_session(tmp_path, threads=1)
    with pytest.raises(RuntimeFailed, match="gives no vectors"):
        open_session(tmp_path, threads=1, embeddings=True)
