"""Encoder-decoders: what is refused, both graphs through the whole pipeline, and text as transformers writes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import edgekit
from edgekit.errors import (
    CorruptCheckpoint,
    DoesNotFit,
    EdgekitError,
    RuntimeFailed,
    UnsupportedModel,
    VerificationFailed,
)
from edgekit.export.onnx import _optimum, _optimum_child, _pair, _pair_proof, _seq2seq
from edgekit.export.onnx._predictions import predict_pair
from edgekit.export.onnx._tensors import read_graph
from edgekit.runtime._rules import read_rules
from edgekit.runtime.onnxruntime import Seq2SeqSession, open_session
from tests import seq2seq_models as models

PROMPTS = ("translate English to German: Hello", "import json", "the class of a dict that returns a list")
RULES = {"no_repeat_ngram_size": 2, "suppress_tokens": [40, 41], "forced_bos_token_id": 9, "min_length": 6}
"""A pico left alone would say one word for ever."""
FORMATS = ("int8", "int8-dynamic", pytest.param("int4", marks=pytest.mark.slow))


# --- what is refused -------------------------------------------------------------------------------------------------

T5 = {"model_type": "t5", "is_encoder_decoder": True}
NAMES = ("shared.weight",)


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        (T5, NAMES, None),
        (T5 | {"tie_word_embeddings": False}, (*NAMES, "lm_head.weight"), None),
        (T5 | {"scale_decoder_outputs": False}, NAMES, "not scaled as T5's is"),
        (T5 | {"model_type": "mt5"}, NAMES, "not scaled as T5's is"),
        (T5 | {"model_type": "longt5"}, NAMES, "family longt5 were not proven, only those of bart,"),
        (T5 | {"architectures": ["T5EncoderModel"]}, NAMES, "is not what writes text of this family"),
        (T5 | {"quantization_config": {"bits": 4}}, NAMES, "quantized already"),
        ({"model_type": "llama"}, NAMES, "llama is no encoder-decoder"),
        ({}, NAMES, "names no model_type"),
    ],
)
def test_what_is_supported_is_known_from_headers(
    config: dict[str, Any], tensors: tuple[str, ...], said: str | None, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    found = _seq2seq.supported(config, tmp_path, tensors)
    assert found is None if said is None else said in (found or "")


def test_a_model_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source.spm").write_bytes(b"")
    found = _seq2seq.supported({"model_type": "marian", "is_encoder_decoder": True}, tmp_path, NAMES)
    assert found is not None and "marian has no tokenizer.json" in found


def test_the_config_is_spelled_as_transformers_4_reads_it() -> None:
    spelled = [
        _seq2seq.older(T5 | more)["tie_word_embeddings"]
        for more in (
            {"tie_word_embeddings": True, "scale_decoder_outputs": True},
            {"tie_word_embeddings": True, "scale_decoder_outputs": False},
            {"tie_word_embeddings": False},
            {},
            {"model_type": "mt5", "tie_word_embeddings": True},
        )
    ]
    assert spelled == [True, False, False, True, False]
    assert "scale_decoder_outputs" not in _seq2seq.older(T5 | {"scale_decoder_outputs": True})


# --- the pipeline, with graphs written by hand -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make("bart", tmp_path_factory.mktemp("source"), **RULES)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_seq2seq, "build", models.build)
    monkeypatch.setattr(_optimum, "require", lambda: Path(sys.executable))


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Format -> what `convert` did."""
    root = tmp_path_factory.mktemp("made")

    @cache
    def make(quant: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_seq2seq, "build", models.build)
            patch.setattr(_optimum, "require", lambda: Path(sys.executable))
            options = edgekit.Options(format="onnx", quant=quant, out=root / quant, threads=1)
            return edgekit.convert(str(source), "rpi5", options)

    return make


@pytest.fixture(scope="module")
def shipped(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ships, its weights float32: what is written can be held against transformers token by token."""
    root = tmp_path_factory.mktemp("float32")
    _pair.ship(source, models.build(source, root / "exported"), root / "shipped")
    return root / "shipped"


@pytest.fixture(scope="module")
def reference(source: Path) -> Any:
    import transformers

    return transformers.AutoModelForSeq2SeqLM.from_pretrained(source).eval()


@pytest.mark.parametrize("quant", FORMATS)
def test_convert_proves_what_it_makes(made: Callable[[str], Any], source: Path, quant: str) -> None:
    done = made(quant)
    names = [check.name for check in done.certificate.checks]
    weights = [] if quant == "int8-dynamic" else ["weights"]
    assert names == ["export", "files", "bits", "tokens", *weights, "states", "numbers", "text"]
    folder = done.artifact.root / "onnx"
    graphs = ["decoder_model_merged_quantized.onnx", "encoder_model_quantized.onnx"]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*graphs, *(f"{g}_data" for g in graphs)])
    data = sum(p.stat().st_size for p in folder.glob("*_data"))
    assert data == done.plan.data_bytes
    assert sum(p.stat().st_size for p in folder.iterdir()) == pytest.approx(done.plan.file_bytes, rel=0.15)
    config = json.loads((done.artifact.root / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": dict.fromkeys(sorted(graphs)[::-1], 1)}
    assert done.artifact.model == folder / graphs[0]
    manifest = done.artifact.manifest
    assert manifest["task"] == "text2text-generation"
    if weights:
        assert len(manifest["encoder"]["nodes"]) == 3 * 6 + 1 and len(manifest["nodes"]) == 2 * 10 + 2
    figures = done.certificate.figures
    assert figures["export"]["relative"] < 2e-6
    if quant == "int8":
        assert figures["numbers"]["kl"] < 1e-3 and figures["states"]["figures"]["relative"] < 0.03


def test_every_weight_is_there_once(made: Callable[[str], Any]) -> None:
    graph = read_graph(made("int8").artifact.model).graph
    branches = [node for node in graph.node if node.op_type == "If"]
    assert len(branches) == 1 and not any(node.op_type == "If" for node in branches[0].attribute[0].g.node)
    inside = next(a.g for a in branches[0].attribute if a.name == "else_branch")
    assert [node.op_type for node in inside.node].count("MatMulNBits") == 4  # keys and values of 2 layers
    assert [node.op_type for node in graph.node].count("MatMulNBits") == 2 * 8 + 1
    assert not inside.initializer
    places = [tuple(e.value for e in t.external_data) for t in graph.initializer if t.external_data]
    assert len(places) == len(set(places)) + 1  # the table has the head's bytes


def test_certify_proves_it_again(made: Callable[[str], Any], source: Path) -> None:
    found = edgekit.certify(made("int8").artifact.root, str(source), threads=1)
    assert {"files", "source", "bits", "tokens", "states", "numbers"} <= {c.name for c in found.certificate.checks}


DAMAGE = ("swapped keys", "lost past", "shifted head")


def damaged(decoder: Path, damage: str) -> None:
    """Each of these writes nonsense without an error."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(decoder)
    for node in model.graph.node:
        if damage == "swapped keys" and node.name == "/decoder/layers.1.encoder_attn.k_proj/MatMul":
            node.input[1] = "decoder.layers.1.encoder_attn.v_proj.weight.T"
        if damage == "lost past" and node.output[0] == "present.0.decoder.value":
            node.input[0] = "past_key_values.0.decoder.key"
    for tensor in model.graph.initializer:
        if damage == "shifted head" and tensor.name == "shared.weight.T":
            tensor.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(tensor), 1, 1), tensor.name))
    decoder.with_name(f"{decoder.name}.data").unlink()
    models.save(model, decoder)


@pytest.fixture(scope="module")
def known(source: Path) -> Any:
    return predict_pair(source, context=256)


@pytest.mark.parametrize("damage", [None, *DAMAGE])
def test_a_wrong_graph_is_found(source: Path, known: Any, tmp_path: Path, damage: str | None) -> None:
    decoder = models.build(source, tmp_path)
    encoder = decoder.with_name(_seq2seq.ENCODER)
    if damage is None:
        assert _pair_proof.judge(encoder, decoder, known, exact=True, slack=1.0).logits.figures.relative < 2e-6
        return
    damaged(decoder, damage)
    with pytest.raises(VerificationFailed, match="does not compute what the model computes"):
        _pair_proof.judge(encoder, decoder, known, exact=True, slack=1.0)


def test_keys_that_are_not_handed_back_are_found(shipped: Path, known: Any, tmp_path: Path) -> None:
    """An If that computes the keys anew with every token: the proof gives it nothing to compute them from."""
    import onnx

    copy = tmp_path / "copy"
    shutil.copytree(shipped, copy)
    judged = _pair_proof.judge(copy / _pair.SHIPPED_ENCODER, copy / _pair.SHIPPED, known, exact=True, slack=1.0)
    assert judged.logits.figures.relative < 2e-6
    model = onnx.load(copy / _pair.SHIPPED, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "If")
    computed = next(a for a in node.attribute if a.name == "else_branch")
    next(a for a in node.attribute if a.name == "then_branch").g.CopyFrom(computed.g)
    (copy / _pair.SHIPPED).write_bytes(model.SerializeToString())
    with pytest.raises(VerificationFailed, match="does not compute what the model computes"):
        _pair_proof.judge(copy / _pair.SHIPPED_ENCODER, copy / _pair.SHIPPED, known, exact=True, slack=1.0)


def test_a_failed_proof_leaves_nothing(
    by_hand: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(root: Path, folder: Path, **_: Any) -> Path:
        decoder = models.build(root, folder)
        damaged(decoder, "lost past")
        return decoder

    monkeypatch.setattr(_seq2seq, "build", wrong)
    with pytest.raises(VerificationFailed, match="does not compute what the model computes"):
        edgekit.convert(str(source), "rpi5", edgekit.Options(format="onnx", quant="int8", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_plans_are_made_for_both_graphs(by_hand: None, source: Path) -> None:
    def plan(target: str, **options: Any) -> Any:
        return edgekit.plan(str(source), target, edgekit.Options(format="onnx", **options))

    assert plan("rpi5").variant.name == "int8" and plan("rpi5").task == "text2text-generation"
    old = plan("rpi4")
    assert old.variant.name == "int8-dynamic" and "dot-product" in old.why
    assert plan("rpi5", context=64).memory.total < plan("rpi5").memory.total
    with pytest.raises(EdgekitError, match="more than the 256"):
        plan("rpi5", context=512)
    with pytest.raises(DoesNotFit, match="smallest ONNX form, int4"):
        plan("rpi5", target_size=1000)
    with pytest.raises(EdgekitError, match="nothing is calibrated"):
        options = edgekit.Options(format="onnx", quant="int8", calibration="self")
        edgekit.convert(str(source), "rpi5", options, dry_run=True)


def test_two_decoders_become_one(source: Path, tmp_path: Path) -> None:
    """As the exporter gives them: one for the first step, one for those behind it, each with weights of its own."""
    import onnxruntime

    joined = _optimum_child.join(models.bart_decoder(source, past=False), models.bart_decoder(source, states=False))
    assert sum(node.op_type == "MatMul" for node in joined.graph.node) == 2 * (8 + 2 + 4) + 1
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "input_ids": rng.integers(3, 500, (2, 5)),
        "encoder_attention_mask": np.array([[1] * 7, [1] * 4 + [0] * 3]),
        "encoder_hidden_states": rng.standard_normal((2, 7, 128)).astype(np.float32),
    }
    for value in joined.graph.input:
        if value.name.startswith("past"):
            feeds[value.name] = rng.standard_normal((2, 4, 3, 32)).astype(np.float32)
    whole = models.bart_decoder(source)
    names = sorted(value.name for value in whole.graph.output)
    assert names == sorted(value.name for value in joined.graph.output)
    one, other = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(names, feeds)
        for m in (whole, joined)
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# --- text ------------------------------------------------------------------------------------------------------------

STRANGER = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime
root, ids, n = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
run = {p.name.split("_")[0]: onnxruntime.InferenceSession(p, providers=["CPUExecutionProvider"])
       for p in (root / "onnx").glob("*.onnx")}
mask = np.ones((1, len(ids)), np.int64)
states = run["encoder"].run(["last_hidden_state"], {"input_ids": np.array([ids]), "attention_mask": mask})[0]
decoder = run["decoder"]
past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in decoder.get_inputs() if "past" in i.name}
names = [o.name for o in decoder.get_outputs()]
written = [json.loads((root / "config.json").read_text())["decoder_start_token_id"]]
for step in range(n):
    feeds = {"input_ids": np.array([written[-1:]]), "encoder_attention_mask": mask, "encoder_hidden_states": states,
             "use_cache_branch": np.array([step > 0]), **past}
    found = dict(zip(names, decoder.run(None, feeds)))
    past = {k.replace("present", "past_key_values"): v for k, v in found.items() if k != "logits"}
    written.append(int(found["logits"][0, -1].argmax()))
print(json.dumps(written), "edgekit" in sys.modules)
"""


def test_strangers_read_the_folder(shipped: Path, reference: Any) -> None:
    """onnxruntime alone, told nothing but the names that optimum and transformers.js use."""
    import torch

    ids = [5, 17, 300, 44, 1]
    command = [sys.executable, "-I", "-c", STRANGER, str(shipped), json.dumps(ids), "12"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(" ")
    written = json.loads(" ".join(said[:-1]))
    assert said[-1].strip() == "False"
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([written[:-1]])).logits[0]
    assert logits.argmax(-1).tolist() == written[1:]


JAVASCRIPT = """
import { AutoModelForSeq2SeqLM, Tensor, env } from '@huggingface/transformers';
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const model = await AutoModelForSeq2SeqLM.from_pretrained(process.argv[3], { dtype: 'q8' });
const ids = JSON.parse(process.argv[4]), shape = [1, ids.length];
const inputs = new Tensor('int64', BigInt64Array.from(ids.map(BigInt)), shape);
const attention_mask = new Tensor('int64', new BigInt64Array(ids.length).fill(1n), shape);
const found = await model.generate({ inputs, attention_mask, max_new_tokens: 12, do_sample: false });
console.log(JSON.stringify(found.tolist()[0].map(Number)));
"""


@pytest.mark.slow
def test_folder_reads_in_transformers_js(shipped: Path, tmp_path: Path) -> None:
    """EDGEKIT_TRANSFORMERS_JS names a folder with node_modules/@huggingface/transformers."""
    where = os.environ.get("EDGEKIT_TRANSFORMERS_JS", "")
    if not shutil.which("node") or not Path(where, "node_modules", "@huggingface", "transformers").is_dir():
        pytest.skip("no node, or EDGEKIT_TRANSFORMERS_JS names no folder with @huggingface/transformers")
    copy = tmp_path / "plain"
    shutil.copytree(shipped, copy)
    said = json.loads((copy / "generation_config.json").read_text())
    kept = {k: v for k, v in said.items() if k not in RULES or k == "no_repeat_ngram_size"}
    (copy / "generation_config.json").write_text(json.dumps(kept))
    ids = [5, 17, 300, 44, 1]
    with edgekit.load(copy, threads=1) as session:
        expected = list(session.generate(ids, 12))
    script = Path(where, f"edgekit-{os.getpid()}.mjs")
    script.write_text(JAVASCRIPT)
    try:
        command = ["node", str(script), str(tmp_path), "plain", json.dumps(ids)]
        written = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=where).stdout)
    finally:
        script.unlink()
    assert len(set(expected)) > 3 and written[1:] == expected


def test_texts_of_a_batch_do_not_touch(shipped: Path, reference: Any) -> None:
    import onnxruntime
    import torch

    ids = np.array([[5, 17, 300, 44, 1], [90, 80, 1, 0, 0]])
    mask, target = np.array([[1] * 5, [1, 1, 1, 0, 0]]), np.array([[2, 9, 33, 50], [2, 8, 7, 6]])
    encoder, decoder = (
        onnxruntime.InferenceSession(shipped / name, providers=["CPUExecutionProvider"])
        for name in (_pair.SHIPPED_ENCODER, _pair.SHIPPED)
    )
    states = encoder.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    feeds: dict[str, Any] = {"encoder_attention_mask": mask, "encoder_hidden_states": states}
    past = {
        i.name: np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32) for i in decoder.get_inputs() if "past" in i.name
    }
    names, rows = [o.name for o in decoder.get_outputs()], []
    for step in range(target.shape[1]):
        now = {"input_ids": target[:, step : step + 1], "use_cache_branch": np.array([step > 0])}
        found = dict(zip(names, decoder.run(None, feeds | past | now), strict=True))
        past = {k.replace("present", "past_key_values"): v for k, v in found.items() if k != "logits"}
        rows.append(found["logits"])
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}
        expected = reference(**{k: torch.tensor(v) for k, v in given.items()}).logits.numpy()
    np.testing.assert_allclose(np.concatenate(rows, 1), expected, atol=1e-4)


def test_answers_are_those_of_transformers(shipped: Path, reference: Any) -> None:
    """Token by token, under every rule that generation_config.json states."""
    import torch

    with edgekit.load(shipped, threads=1) as session:
        for text in PROMPTS:
            ids = session.tokenize(text, add_special=True)
            assert ids[-1] == models.END
            expected = reference.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, num_beams=1)[0]
            found = list(session.generate(ids, 40))
            assert len(set(found)) > 8 and found[0] == RULES["forced_bos_token_id"]
            assert found == [t for t in expected[1:].tolist() if t != models.END]
            assert session.finish_reason == ("stop" if models.END in expected else "length")


def test_streamed_text_is_what_the_tokenizer_decodes(shipped: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shipped / "tokenizer.json"))
    with edgekit.load(shipped, threads=1) as session:
        ids = session.tokenize(PROMPTS[0], add_special=True)
        assert ids == tokenizer.encode(PROMPTS[0]).ids
        written = list(session.generate(ids, 30))
        text = tokenizer.decode(written)
        assert "".join(session.stream(ids, 30)) == session.detokenize(written) == text and not text.startswith(" ")
        stop = text[8:12]
        assert "".join(session.stream(ids, 30, stop=[stop])) == text[: text.index(stop)]
        assert session.finish_reason == "stop"
        drawn = [list(session.generate(ids, 10, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]


def test_a_session_says_what_it_is_and_what_it_cannot(shipped: Path) -> None:
    session = edgekit.load(shipped, threads=1)
    assert isinstance(session, Seq2SeqSession)
    assert (session.n_ctx, session.n_vocab, session.encoder, session.template) == (256, models.VOCAB, False, None)
    with pytest.raises(RuntimeFailed, match="300 tokens do not fit in a context of 256"):
        session.generate([5] * 300, 4)
    with pytest.raises(RuntimeFailed, match="no token to answer"):
        session.generate([], 4)
    with pytest.raises(RuntimeFailed, match="not in the vocabulary"):
        session.generate([models.VOCAB], 4)
    for ask in (lambda: session.logits([5]), lambda: session.embed(["a"])):
        with pytest.raises(RuntimeFailed, match="reads one text and writes another"):
            ask()
    first = session.generate([5, 1], 4)
    next(first)
    list(session.generate([6, 1], 2))
    with pytest.raises(RuntimeFailed, match="another call"):
        next(first)
    session.reset()
    list(session.generate([5, 6, 7, 1], 5))
    times = session.timings()
    assert (times.prefill_tokens, times.decode_tokens) == (4, 4)
    session.close()
    with pytest.raises(RuntimeFailed, match="closed"):
        list(session.generate([5], 1))
    with edgekit.load(shipped, n_ctx=8, threads=1) as short:
        assert len(list(short.generate([5, 1], 100))) == 7 and short.finish_reason == "length"


def test_an_incomplete_folder_is_named(shipped: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shipped, copy)
    (copy / _pair.SHIPPED_ENCODER).unlink()
    with pytest.raises(CorruptCheckpoint, match=r"no encoder_model_quantized\.onnx"):
        edgekit.load(copy)
    shutil.copyfile(shipped / _pair.SHIPPED_ENCODER, copy / _pair.SHIPPED_ENCODER)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((copy / name).read_text())
        (copy / name).write_text(
            json.dumps({k: v for k, v in said.items() if k not in ("decoder_start_token_id", "bos_token_id")})
        )
    with pytest.raises(CorruptCheckpoint, match="names no decoder_start_token_id"):
        edgekit.load(copy)


def test_rules_that_are_not_followed_are_told() -> None:
    rules = read_rules({"decoder_start_token_id": 2}, {"num_beams": 4, "bad_words_ids": [[5], [6, 7], [999]]}, 100)
    assert rules is not None and rules.never == (5,)
    assert len(rules.notes) == 2 and "num_beams = 4" in rules.notes[0]
    assert read_rules({}, {}, 100) is None
    hostile = read_rules({}, {"decoder_start_token_id": 1, "suppress_tokens": "all", "min_length": True}, 100)
    assert hostile is not None and (hostile.never, hostile.least) == ((), 0)


def test_the_commands_work(made: Callable[[str], Any], source: Path) -> None:
    from edgekit.cli import app

    folder = str(made("int8").artifact.root)

    def run(*command: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, list(command))
        return done.exit_code, done.output

    code, said = run("run", folder, PROMPTS[0], "-n", "12", "--temperature", "0", "--json")
    answer = json.loads(said)
    assert code == 0 and answer["text"] and answer["tokens"] == 12 and answer["finish_reason"] == "length"
    code, said = run("bench", folder, "-p", "16", "-n", "8", "-r", "1", "-t", "1", "--json")
    assert code == 0 and [row["avg_ts"] > 0 for row in json.loads(said)] == [True, True]
    code, said = run("inspect", folder)
    assert code == 0 and "encoder_model_quantized.onnx" in said
    assert run("report", folder)[0] == 0
    with pytest.raises(EdgekitError, match="reads one text and writes another"):
        edgekit.evaluate(folder, str(source))


# --- with the exporter's environment ---------------------------------------------------------------------------------

MAIN = ("t5", "t5-untied")
REST = sorted(set(models.PICOS) - {"t5"})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Family -> (folder of its pico, folder as it ships, in float32), made once."""
    named = os.environ.get(_optimum.VARIABLE)
    if not named or not Path(named).is_file():
        pytest.skip(f"{_optimum.VARIABLE} names no Python of an environment with optimum-onnx")
    root = tmp_path_factory.mktemp("optimum")

    @cache
    def make(family: str) -> tuple[Path, Path]:
        rules = RULES if family != "m2m_100" else {"no_repeat_ngram_size": 2}
        model = models.make(family.removesuffix("-untied"), root, untied=family.endswith("-untied"), **rules)
        _pair.ship(model, _seq2seq.build(model, root / f"{family}-graph"), root / f"{family}-shipped")
        return model, root / f"{family}-shipped"

    return make


@pytest.mark.parametrize("family", [*MAIN, *(pytest.param(family, marks=pytest.mark.slow) for family in REST)])
def test_families_are_those_of_transformers(exported: Callable[[str], tuple[Path, Path]], family: str) -> None:
    """Logits along a text of 150 tokens behind sources of 5 and 200, all at once and one after another; greedy text."""
    import torch
    import transformers

    from edgekit.export.onnx._pair_running import Pair

    root, folder = exported(family)
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(root, dtype=torch.float32).eval()
    pair = Pair(folder / _pair.SHIPPED_ENCODER, folder / _pair.SHIPPED)
    rng = np.random.default_rng(0)
    for length in (5, 200):
        ids, target = rng.integers(3, 490, length).tolist(), [2, *rng.integers(3, 490, 149).tolist()]
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([target])).logits[0]
        states = pair.states(ids)
        for found in (pair.begin(states).append(target), pair.begin(states).each(target)):
            # T5 does not scale its scores: noise makes them so large that the last bit of one is seen
            bound = 2e-4 if "t5" in family else 2e-6
            assert np.linalg.norm(found - expected.numpy()) / np.linalg.norm(expected) < bound
    with open_session(folder, threads=1) as session:
        for text in PROMPTS:
            given = session.tokenize(text, add_special=True)
            wanted = reference.generate(torch.tensor([given]), max_new_tokens=24, do_sample=False, num_beams=1)[0]
            assert list(session.generate(given, 24)) == [t for t in wanted[1:].tolist() if t != models.END]


def test_the_exporter_writes_every_weight_once(exported: Callable[[str], tuple[Path, Path]]) -> None:
    """transformers counts texts in what the decoder writes, layer after layer: none of that is copied for the keys."""
    _, folder = exported("t5")
    graph = read_graph(folder / _pair.SHIPPED).graph
    inside = next(a.g for n in graph.node if n.op_type == "If" for a in n.attribute if a.name == "else_branch")
    weights = {t.name for t in graph.initializer if len(t.dims) == 2}
    read = [name for node in (*graph.node, *inside.node) for name in node.input if name in weights]
    assert len(read) == len(set(read)) == 2 * 10 + 3  # ten a layer, the table, the head, the bias of positions


def test_a_graph_that_cannot_be_joined_is_an_error(source: Path) -> None:
    first = models.bart_decoder(source, past=False)
    for node in first.graph.node:
        if node.op_type == "MatMul" and node.name.endswith("layers.1.encoder_attn.k_proj/MatMul"):
            node.input[0] = next(n.output[0] for n in first.graph.node if n.op_type == "LayerNormalization")
    with pytest.raises(ValueError, match="depend on what is written"):
        _optimum_child.join(first, models.bart_decoder(source, states=False))


def test_a_family_without_proof_is_refused_before_any_environment(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "led", "is_encoder_decoder": True}))
    with pytest.raises(UnsupportedModel, match="led were not proven"):
        _seq2seq.build(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
