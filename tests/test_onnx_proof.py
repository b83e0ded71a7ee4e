"""Graphs that are right pass the proof; graphs broken on purpose do not, whatever the weights are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import onnx_planning, onnx_verification, pipeline
from edgekit.errors import CorruptCheckpoint, EdgekitError, RuntimeFailed, VerificationFailed
from edgekit.onnx_file import open_onnx
from edgekit.quant.nbits import NBits
from edgekit.target import Target
from tests import pico
from tests.onnx_models import DEMO

for package in ("onnx", "onnxruntime", "onnxruntime_genai", "torch", "transformers"):
    pytest.importorskip(package)

from edgekit.export.onnx import _bits, _decoder, _encoder, _predictions, _proof, _quantize, _shipping, _weights  # noqa: E402

EIGHT, FOUR = NBits(8, 32, symmetric=True), NBits(4, 32, symmetric=False)
SCHEME = _quantize.Scheme(FOUR, EIGHT, EIGHT)
ROUNDING = {"linear": (4, 32, 32), "head": (8, 32, 32), "embedding": (8, 32, -1)}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trained decoder's float32 graph, all positions."""
    folder = tmp_path_factory.mktemp("demo")
    yield _decoder.build(DEMO, folder / "float32")


@pytest.fixture(scope="module")
def known() -> _predictions.Predictions:
    return _predictions.predict_decoder(DEMO, context=512, parameters=5_000_000, rounding=ROUNDING)


@pytest.fixture(scope="module")
def report(demo: Path) -> _quantize.Report:
    out = demo.parent.with_name("int4") / "model.onnx"
    shutil.copytree(demo.parent, out.parent, ignore=shutil.ignore_patterns("*.onnx", "*.data"))
    return _quantize.quantize(demo, out, SCHEME)


@pytest.fixture(scope="module")
def quantised(report: _quantize.Report) -> Path:
    return report.graph


def copied(graph: Path, to: Path) -> Path:
    shutil.copytree(graph.parent, to)
    return to / graph.name


def change(graph: Path, name: str, how: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite the values of one tensor in the data file."""
    file = open_onnx(graph)
    tensor = next(t for t in file.tensors if name in t.name)
    values = np.ascontiguousarray(how(file.values(tensor)))
    assert values.nbytes == tensor.nbytes
    assert tensor.file is not None
    with (graph.parent / tensor.file).open("r+b") as f:
        f.seek(tensor.offset)
        f.write(values.tobytes())


def edit(graph: Path, how: Callable[[Any], None]) -> None:
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    how(model.graph)
    graph.write_bytes(model.SerializeToString())


def judged(graph: Path, known: _predictions.Predictions, *, exact: bool) -> _proof.Proof:
    return _proof.judge_decoder(graph, known, exact=exact)


# --- a trained decoder -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_float32_graph_is_exact(demo: Path, known: _predictions.Predictions) -> None:
    found = judged(demo, known, exact=True).figures
    assert found.relative < 1e-5
    assert (found.top1, found.flips) == (1.0, 0)
    assert found.kl == pytest.approx(0, abs=1e-8)
    assert found.tokens == _predictions.USUAL


@pytest.mark.slow
def test_a_quantised_graph_is_as_far_off_as_rounding(quantised: Path, known: _predictions.Predictions) -> None:
    proof = judged(quantised, known, exact=False)
    assert proof.expected is not None
    assert 0.3 < proof.figures.relative / proof.expected.relative < 1.3
    assert proof.warnings == ()
    with pytest.raises(VerificationFailed, match="differs by"):
        judged(quantised, known, exact=True)


BREAKS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "rows of one matrix swapped": ("layers.2.mlp.down_proj", lambda w: w[::-1]),
    "columns of one matrix swapped": ("layers.1.attn.o_proj", lambda w: w[:, ::-1]),
    "another rope": ("/rotary/inv_freq", lambda f: f * 2),
    "a norm left out": ("layers.1.input_layernorm", np.ones_like),
    "not a number": (
        "layers.0.mlp.up_proj",
        lambda w: w * np.where(np.arange(w.size) == 5, np.nan, 1).reshape(w.shape),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_float32_graph_fails(
    demo: Path, known: _predictions.Predictions, tmp_path: Path, case: str
) -> None:  # fmt: skip
    graph = copied(demo, tmp_path / "m")
    name, how = BREAKS[case]
    change(graph, name, lambda values: how(values).astype(values.dtype))
    with pytest.raises(VerificationFailed, match="does not compute what the model computes") as e:
        judged(graph, known, exact=True)
    assert e.value.exit_code == 4


QUANTISED_BREAKS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "nibbles swapped": ("layers.1.mlp.gate_proj.MatMul.weight_Q4", lambda q: (q >> 4) | (q << 4)),
    "rows swapped": ("layers.2.attn.o_proj.MatMul.weight_Q4", lambda q: q[::-1]),
    "the head's rows shifted": ("weight_Q8", lambda q: np.roll(q, 1, 0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", QUANTISED_BREAKS)
def test_a_broken_quantised_graph_fails(
    quantised: Path, known: _predictions.Predictions, tmp_path: Path, case: str
) -> None:
    graph = copied(quantised, tmp_path / "m")
    name, how = QUANTISED_BREAKS[case]
    change(graph, name, how)
    with pytest.raises(VerificationFailed, match="further from the model than its number format explains"):
        judged(graph, known, exact=False)


SMALL_BREAKS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = QUANTISED_BREAKS | {
    "zero points off by one": ("layers.0.mlp.down_proj.MatMul.weight_zero_points", lambda z: z + 0x11),
    "scales of another row": ("layers.1.mlp.up_proj.MatMul.weight_scales", lambda s: np.roll(s, 1, 0)),
    "scales of the next block": ("layers.1.mlp.up_proj.MatMul.weight_scales", lambda s: np.roll(s, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL_BREAKS)
def test_weights_decode_to_the_source(demo: Path, report: _quantize.Report, tmp_path: Path, case: str) -> None:
    """What is too small to see in the outputs of a whole model is seen in the matrix."""
    out = copied(report.graph, tmp_path / "m")
    errors = {n.node: n.error for n in report.nodes}
    rows = _weights.sample(demo)
    assert set(errors) <= set(rows)
    found = _weights.check(open_onnx(out), rows, errors)
    assert found["int4 b32"] == pytest.approx(max(errors.values()), rel=0.2)
    assert found["int8 b32"] < 0.01
    change(out, SMALL_BREAKS[case][0], SMALL_BREAKS[case][1])
    with pytest.raises(VerificationFailed, match="differ from the source by"):
        _weights.check(open_onnx(out), rows, errors)
    with pytest.raises(VerificationFailed, match="no matrix of the source is quantised"):
        _weights.check(open_onnx(demo), rows, errors)


@pytest.mark.slow
def test_the_shipped_form_says_the_same(quantised: Path, known: _predictions.Predictions, tmp_path: Path) -> None:
    folder = copied(quantised, tmp_path / "m").parent
    _shipping.ship(folder, context=256)
    prompts = [known.texts[0][:12], known.texts[0]]
    found = _proof.same_greedy(folder, folder / "model_all.onnx", prompts, 12)
    assert found.prompts == 2
    assert found.tokens - found.same <= 2  # ties
    assert found.relative < 1e-4
    with pytest.raises(VerificationFailed, match="not one row a token"):
        _proof.judge_decoder(folder / "model.onnx", known, exact=False)

    def first(graph: Any) -> None:
        index = next(t for t in graph.initializer if t.name == "/lm_head/prune/index")
        index.raw_data = np.int64(0).tobytes()

    edit(folder / "model.onnx", first)
    with pytest.raises(VerificationFailed, match="does not continue prompts"):
        _proof.same_greedy(folder, folder / "model_all.onnx", prompts, 12)


@pytest.mark.slow
def test_bits_are_those_planned(quantised: Path, demo: Path) -> None:
    file = open_onnx(quantised)
    found = _bits.check_bits(file)
    assert sum(n for (bits, _), n in found.matrices.items() if bits == 4) > 10
    assert found.tables == {(8, 32): 1}
    assert found.plain == {}
    with pytest.raises(VerificationFailed, match="planned were 8 bits"):
        _bits.check_bits(file, 8)
    with pytest.raises(VerificationFailed, match="was planned to be quantised and is not"):
        _bits.check_bits(file, {"absent": FOUR})
    with pytest.raises(VerificationFailed, match="are not quantised"):
        _bits.check_bits(open_onnx(demo))
    assert any("stays float32" in w for w in _bits.read_bits(open_onnx(demo)).warnings)


@pytest.mark.slow
def test_scales_and_sizes_are_checked(quantised: Path, tmp_path: Path) -> None:
    graph = copied(quantised, tmp_path / "m")
    change(
        graph,
        "layers.1.mlp.up_proj.MatMul.weight_scales",
        lambda s: np.where(np.arange(s.size) == 3, np.inf, s.reshape(-1)).astype(s.dtype),
    )
    with pytest.raises(VerificationFailed, match=r"a scale of .*up_proj.* is not finite"):
        _bits.check_bits(open_onnx(graph))

    def narrower(model: Any) -> None:
        node = next(n for n in model.node if n.op_type == "MatMulNBits")
        next(a for a in node.attribute if a.name == "N").i -= 1

    graph = copied(quantised, tmp_path / "n")
    edit(graph, narrower)
    with pytest.raises(VerificationFailed, match="has sizes"):
        _bits.check_bits(open_onnx(graph))


# --- noise, and a sliding window -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, _predictions.Predictions]:
    """(checkpoint, graph, predictions) of noise with a window of 128 in every layer."""
    root = pico.make("mistral", tmp_path_factory.mktemp("mistral"))
    graph = _decoder.build(root, root / "onnx")
    return root, graph, _predictions.predict_decoder(root, context=256, parameters=1_000_000, rounding=ROUNDING)


@pytest.mark.slow
def test_a_window_is_proven(mistral: tuple[Path, Path, _predictions.Predictions], tmp_path: Path) -> None:
    _, right, known = mistral
    found = judged(right, known, exact=True).figures
    assert (found.window, found.passed, found.tokens) == (128, True, 192)
    graph = copied(right, tmp_path / "m")
    edit(graph, _without_windows)
    with pytest.raises(VerificationFailed, match="does not compute"):
        judged(graph, known, exact=True)


@pytest.mark.slow
def test_a_windowed_cache_says_the_same(mistral: tuple[Path, Path, _predictions.Predictions], tmp_path: Path) -> None:
    """The graph that ships keeps a window's length of cache; the prompt is longer."""
    _, right, known = mistral
    folder = copied(right, tmp_path / "m").parent
    _shipping.ship(folder, context=256)
    assert "sliding_window" in (folder / "genai_config.json").read_text()
    prompts = [known.texts[0][:12], known.texts[0]]
    found = _proof.same_greedy(folder, folder / "model_all.onnx", prompts, 16)
    assert found.same == found.tokens
    wrong = copied(right, tmp_path / "wrong")
    edit(wrong, _without_windows)
    with pytest.raises(VerificationFailed, match="does not continue prompts"):
        _proof.same_greedy(folder, wrong, prompts, 16, noise=1.0)  # which excuses tokens, not logits


def _without_windows(graph: Any) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = -1


@pytest.mark.slow
def test_noise_may_be_quantised(mistral: tuple[Path, Path, _predictions.Predictions], tmp_path: Path) -> None:
    """4 bits change most choices of a model of noise; that is what rounding does to it, and no fault."""
    _, right, known = mistral
    out = tmp_path / "m" / "model.onnx"
    shutil.copytree(right.parent, out.parent, ignore=shutil.ignore_patterns("*.onnx", "*.data"))
    _quantize.quantize(right, out, SCHEME)
    proof = judged(out, known, exact=False)
    assert proof.figures.relative > 0.05
    change(out, "layers.0.mlp.gate_proj.MatMul.weight_Q4", lambda q: q[::-1])
    with pytest.raises(VerificationFailed, match="further"):
        judged(out, known, exact=False)


def test_a_window_out_of_reach_is_said() -> None:
    config = {"sliding_window": 4096, "max_position_embeddings": 32768, "vocab_size": 32000}
    assert _predictions.prompt_length(config, 8192, 100_000_000) == 4160
    assert _predictions.prompt_length(config, 2048, 100_000_000) == 2048
    assert _predictions.prompt_length(config, 8192, 7_000_000_000) == 357
    assert _predictions.prompt_length(config, 8192, 70_000_000_000) == _predictions.SHORTEST
    assert _predictions.prompt_length(config, 64, 70_000_000_000) == 64
    assert _predictions.prompt_length(config | {"use_sliding_window": False}, 8192, 100_000_000) == _predictions.USUAL
    assert _predictions.sliding_window(config | {"layer_types": ["full_attention"]}) is None
    known = _predictions.Predictions(((1,) * 100,), (0,), (), window=4096)
    assert not known.passed
    positions = _predictions.spread(192, 128)
    assert sum(p >= 128 for p in positions) == 32
    assert (positions[0], positions[-1]) == (0, 191)


# --- encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_encoder_is_proven(tmp_path: Path) -> None:
    root = pico.make("bert", tmp_path)
    graph = _encoder.build(root, tmp_path / "float32", task="feature-extraction")
    pooling = onnx_verification.read_pooling(root)
    rounding = {"linear": (8, 32, 32), "head": (8, 32, 32), "embedding": (8, 32, -1)}
    known = _predictions.predict_encoder(root, "feature-extraction", max_length=128, rounding=rounding)
    exact = _proof.judge_encoder(graph, known, pooling, exact=True).figures
    assert exact.cosine == pytest.approx(1, abs=1e-5)
    assert max(map(len, known.texts)) == 128
    out = tmp_path / "int8" / "model.onnx"
    out.parent.mkdir()
    _quantize.quantize(graph, out, _quantize.Scheme(EIGHT, EIGHT, EIGHT))
    proof = _proof.judge_encoder(out, known, pooling, exact=False)
    assert proof.expected is not None
    assert 0.3 < proof.figures.relative / proof.expected.relative < 1.5
    change(out, "_Q8", lambda q: np.roll(q, 1, 0))
    with pytest.raises(VerificationFailed, match="further"):
        _proof.judge_encoder(out, known, pooling, exact=False)
    broken = copied(graph, tmp_path / "broken")
    change(broken, "word_embeddings", lambda w: w[::-1])
    with pytest.raises(VerificationFailed, match="does not compute"):
        _proof.judge_encoder(broken, known, pooling, exact=True)


# --- what cannot be proven -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_that_transformers_refuses_is_named(tmp_path: Path) -> None:
    root = tmp_path / "m"
    shutil.copytree(DEMO, root)
    (root / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(EdgekitError, match="transformers did not run") as e:
        _predictions.predict_decoder(root, context=128, parameters=1)
    assert "--verify none" in e.value.hint


def test_a_graph_that_onnxruntime_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x3a\x00")
    with pytest.raises(RuntimeFailed, match=r"onnxruntime refused .*model\.onnx"):
        _proof.judge_decoder(tmp_path / "model.onnx", _predictions.Predictions(((1,),), (0,), ()), exact=True)


# --- tokens and templates --------------------------------------------------------------------------------------------


def tokenizer_of(root: Path, to: Path) -> Path:
    to.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (root / name).is_file():
            shutil.copyfile(root / name, to / name)
    return to


def test_tokens_and_template_are_the_sources(tmp_path: Path) -> None:
    folder = tokenizer_of(DEMO, tmp_path / "same")
    assert "strings give the ids" in onnx_verification.check_tokens(folder, DEMO).detail
    assert "conversations render the same" in onnx_verification.check_template(folder, DEMO).detail


def test_a_model_with_a_sentencepiece_file_alone_can_be_asked(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "models" / "stories260K"
    for name in ("config.json", "tokenizer_config.json", "tokenizer.model"):
        shutil.copyfile(source / name, tmp_path / name)
    text = "Once upon a time there was a little girl."
    assert _predictions.encode(tmp_path, text) == _predictions.encode(source, text)
    assert len(_predictions.encode(tmp_path, text, 5)) == 5


def test_another_tokenizer_is_noticed(tmp_path: Path) -> None:
    folder = tokenizer_of(DEMO, tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(VerificationFailed, match="tokens differ for") as e:
        onnx_verification.check_tokens(folder, DEMO)
    assert e.value.exit_code == 4


def test_another_template_is_noticed(tmp_path: Path) -> None:
    folder = tokenizer_of(DEMO, tmp_path / "other")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template + " ")
    with pytest.raises(VerificationFailed, match="the chat template renders"):
        onnx_verification.check_template(folder, DEMO)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(VerificationFailed, match="did not reach"):
        onnx_verification.check_template(folder, DEMO)


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decided() -> onnx_planning.OnnxPlan:
    options = pipeline.Options(format="onnx", quant="int4-b32", context=256)
    return pipeline.plan_onnx(pipeline.open_onnx(DEMO, options), Target.load("rpi5"), options)


@pytest.fixture(scope="module")
def export(demo: Path, decided: onnx_planning.OnnxPlan) -> onnx_verification.Export:
    found = onnx_verification.prove_export(demo, DEMO, onnx_planning.GENERATION, decided)
    assert found is not None
    return found


@pytest.fixture
def shipped(report: _quantize.Report, tmp_path: Path) -> Path:
    folder = copied(report.graph, tmp_path / "artefact").parent
    _shipping.ship(folder, context=256)
    return folder


@pytest.mark.slow
def test_a_certificate_says_what_was_seen(
    shipped: Path, decided: onnx_planning.OnnxPlan, report: _quantize.Report, export: onnx_verification.Export
) -> None:
    task = onnx_planning.GENERATION
    found = onnx_verification.verify(shipped, DEMO, task, decided, report, export)
    names = [check.name for check in found.checks]
    assert names == ["export", "files", "bits", "tokens", "chat template", "weights", "numbers", "text"]
    assert found.figures["export"]["relative"] < 1e-5
    assert found.figures["greedy"]["gap"] < _proof.CLEAR
    assert found.figures["weight_error"].keys() == {"int4 b32", "int8 b32"}
    assert found.warnings == ()
    json.dumps(asdict(found))
    again = onnx_verification.verify(shipped, DEMO, task, decided)  # as for an artefact made long ago
    assert again.figures["numbers"]["kl"] == pytest.approx(found.figures["numbers"]["kl"], rel=1e-3)
    assert onnx_verification.verify(shipped, DEMO, task, decided, level="none").checks == ()


def _data_gone(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def _data_cut(folder: Path) -> None:
    path = folder / "model.onnx.data"
    os.truncate(path, path.stat().st_size // 2)


def _scale_off(folder: Path) -> None:
    change(folder / "model_all.onnx", "layers.1.mlp.up_proj.MatMul.weight_scales", lambda s: s * np.float32(1.3))


def _four_bits_too_many(folder: Path) -> None:
    def more(graph: Any) -> None:
        node = next(n for n in graph.node if n.op_type == "MatMulNBits" and n.name.startswith("/lm_head"))
        next(a for a in node.attribute if a.name == "bits").i = 4

    edit(folder / "model.onnx", more)


def _tokenizer_of_another(folder: Path) -> None:
    pico.tokenizer_files(folder)


TAMPERED: dict[str, tuple[Callable[[Path], None], type[EdgekitError], str]] = {
    "data gone": (_data_gone, CorruptCheckpoint, "which is missing"),
    "data cut": (_data_cut, CorruptCheckpoint, "ends at byte"),
    "a scale off": (_scale_off, VerificationFailed, "differ from the source by"),
    "other bits": (_four_bits_too_many, VerificationFailed, "planned were 8 bits"),
    "another tokenizer": (_tokenizer_of_another, VerificationFailed, "tokens differ"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TAMPERED)
def test_what_was_tampered_with_is_not_certified(
    shipped: Path,
    decided: onnx_planning.OnnxPlan,
    report: _quantize.Report,
    export: onnx_verification.Export,
    case: str,
) -> None:
    tamper, kind, says = TAMPERED[case]
    tamper(shipped)
    with pytest.raises(kind, match=says):
        onnx_verification.verify(shipped, DEMO, onnx_planning.GENERATION, decided, report, export)


# --- what a person sees of a graph -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_inspect_tells_bits_and_files(quantised: Path, demo: Path, tmp_path: Path) -> None:
    from edgekit import inspection

    found = inspection.inspect(quantised)
    assert isinstance(found, inspection.OnnxInspection)
    plain = inspection.inspect(demo)
    assert found.parameters == plain.parameters  # a table tied to the head counts once
    assert plain.bits_per_weight == pytest.approx(32, rel=1e-3)
    assert 5 < found.bits_per_weight < 9
    assert found.nbytes == sum(p.stat().st_size for p in quantised.parent.glob("model.onnx*"))
    told = json.loads(json.dumps(found.as_json(tensors=True)))
    assert told["matrices"].keys() == {"int4 b32", "int8 b32"}
    assert told["files"] == {"model.onnx.data": (quantised.parent / "model.onnx.data").stat().st_size}
    assert told["opsets"]["com.microsoft"] == 1
    shown = dict(found.rows())
    assert "MatMulNBits" in shown["operators"]
    assert "input_ids int64 (batch_size, sequence_length)" in shown["inputs"]
    graph = copied(quantised, tmp_path / "m")
    (graph.parent / "model.onnx.data").unlink()
    with pytest.raises(EdgekitError, match="which is missing"):
        inspection.inspect(graph)


@pytest.mark.slow
def test_inspect_of_a_graph_on_the_command_line(quantised: Path) -> None:
    from typer.testing import CliRunner

    from edgekit.cli import app

    done = CliRunner().invoke(app, ["inspect", str(quantised.parent), "--tensors"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "bits per weight" in done.output
    assert "int4 b32" in done.output
