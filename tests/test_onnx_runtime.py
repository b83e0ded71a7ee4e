"""ONNX sessions: decoders against transformers and llama.cpp, encoders against sentence-transformers, and errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit import generation
from edgekit import ort_library as library
from edgekit.artifact import model_file
from edgekit.errors import CorruptCheckpoint, EdgekitError, MissingExtra, RuntimeFailed, UnknownName, UnsupportedModel
from edgekit.export.onnx import _decoder, _encoder, _shipping
from edgekit.export.onnx._quantize import Scheme, quantize
from edgekit.host import Host
from edgekit.onnx_file import open_onnx
from edgekit.pipeline import Options, convert
from edgekit.quant.nbits import NBits
from edgekit.runtime import Session, llama_cpp, onnxruntime
from edgekit.runtime import _ort_genai as engine
from edgekit.runtime._ort_vocabulary import Vocabulary
from edgekit.runtime._sampling import Sampler, Sampling
from edgekit.runtime.onnxruntime import DecoderSession, EncoderSession, open_session
from edgekit.runtime.opening import open_session as open_any
from tests import pico

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxruntime_genai", "torch")),
    reason="onnx, onnxruntime-genai or torch is not installed",
)

PROMPT = "def read(path):\n    with open(path) as file:"
DRAWS: tuple[dict[str, Any], ...] = (
    {},
    {"repeat_penalty": 1.2},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.3, "seed": 5, "top_k": 0, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "seed": 2**32 + 9, "repeat_penalty": 1.3},
    {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 11},
    {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.1, "seed": 12},
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of noise. `whole`: one graph, logits of every position, as genai's builder lays it out; `int8`: the same,
    quantized; `shipped`, `windowed`: the form that ships, the latter with a cache as long as its sliding window."""
    root = tmp_path_factory.mktemp("onnx")
    llama = pico.llama(root / "llama", dtype="F32")
    window = pico.make("mistral", root)
    config = json.loads((window / "config.json").read_text())
    (window / "config.json").write_text(json.dumps(config | {"sliding_window": 32}))
    _decoder.build(llama, root / "whole")
    shutil.copytree(root / "whole", root / "shipped")
    _shipping.ship(root / "shipped", context=256)
    _decoder.build(window, root / "windowed")
    _shipping.ship(root / "windowed", context=256)
    shutil.copytree(root / "whole", root / "int8", ignore=shutil.ignore_patterns("model.onnx*"))
    eight = NBits(8, 32, symmetric=True)
    quantize(root / "whole" / "model.onnx", root / "int8" / "model.onnx", Scheme(eight, eight, eight))
    shutil.copytree(root / "shipped", root / "pruned")
    (root / "pruned" / "model_all.onnx").unlink()
    return root


@pytest.fixture(scope="module")
def gguf(made: Path) -> Path:
    done = convert(str(made / "llama"), "rpi5", Options(quant="F32", out=made / "gguf", verify="none"))
    return done.artifact.model


@pytest.fixture
def session(made: Path) -> Iterator[DecoderSession]:
    with open_decoder(made / "shipped") as opened:
        yield opened


def open_decoder(folder: Path, **settings: Any) -> DecoderSession:
    opened = open_session(folder, **{"n_ctx": 200, "threads": 1} | settings)
    assert isinstance(opened, DecoderSession)
    return opened


def reference(checkpoint: Path, ids: list[int], new: int = 0) -> tuple[np.ndarray, list[int]]:
    """What transformers makes of `ids`: logits float32 (n, vocab), and greedy tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
        out = list(ids)
        for _ in range(new):
            out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
    return logits, out[len(ids) :]


# --- decoders ---------------------------------------------------------------------------------------------------------


def test_what_it_says_of_a_model(session: DecoderSession, made: Path) -> None:
    kept: Session = session  # mypy: the protocol is implemented
    assert (kept.n_vocab, kept.n_ctx, kept.encoder, kept.add_bos) == (512, 200, False, False)
    assert session.threads == 1 and kept.notes == () and kept.finish_reason == ""
    assert kept.metadata()["config.model_type"] == "llama"
    assert kept.metadata()["genai.model.decoder.head_size"] == "32"
    with pytest.raises(RuntimeFailed, match="gives no vectors"):
        kept.embed(["x"])
    with pytest.raises(RuntimeFailed, match="gives no vectors"):
        open_session(made / "shipped", embeddings=True)


@pytest.mark.parametrize("name", ["shipped", "whole", "windowed"])
def test_logits_and_greedy_tokens_are_those_of_transformers(made: Path, name: str) -> None:
    ids = np.random.default_rng(1).integers(3, 512, 120).tolist()
    logits, greedy = reference(made / ("mistral" if name == "windowed" else "llama"), ids, 12)
    with open_decoder(made / name) as session:
        found = session.logits(ids)
        assert found.shape == (120, 512) and found.dtype == np.float32
        assert np.linalg.norm(found - logits) / np.linalg.norm(logits) < 1e-5
        assert list(session.generate(ids, 12)) == greedy
        assert (
            list(session.generate([*ids[:70], 5], 4))
            == reference(
                session.folder.root.parent / ("mistral" if name == "windowed" else "llama"), [*ids[:70], 5], 4
            )[1]
        )


def test_logits_do_not_depend_on_how_they_are_cut(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(40, 140))
    with open_decoder(made / "shipped") as whole:
        expected = whole.logits(ids)
    monkeypatch.setattr(engine, "_LOGITS_BUDGET", 7 * 4 * 512)
    with open_decoder(made / "shipped") as cut:
        slabs = list(cut.logits_chunks(ids, first=50))
        assert slabs[0][0] == 50 and max(len(rows) for _, rows in slabs) == 7
        np.testing.assert_allclose(np.concatenate([rows for _, rows in slabs]), expected[50:], atol=1e-4)
        assert list(cut.generate(ids, 5)) and cut.logits([]).shape == (0, 512)


def test_a_pruned_graph_alone_generates_and_says_why_it_gives_no_more(made: Path) -> None:
    ids = list(range(40, 70))
    with open_decoder(made / "pruned") as alone, open_decoder(made / "shipped") as shipped:
        assert list(alone.generate(ids, 8)) == list(shipped.generate(ids, 8))
        with pytest.raises(RuntimeFailed, match="the last position only") as error:
            alone.logits(ids)
        assert "model_all.onnx" in error.value.hint


def test_one_graph_is_loaded_at_a_time(session: DecoderSession) -> None:
    ids = list(range(30, 40))
    first = list(session.generate(ids, 6))
    loaded = session.timings().load_ms
    for i, token in enumerate(first):
        assert token == session.logits(ids + first[:i])[-1].argmax()
    assert session._decoder is not None and session._decoder.graph.name == "model_all.onnx"
    assert list(session.generate(ids, 6)) == first and session._decoder.graph.name == "model.onnx"
    assert session.timings().load_ms > loaded > 0


def test_only_what_is_new_is_computed(session: DecoderSession) -> None:
    ids = list(range(50, 100))
    out = list(session.generate(ids, 10))
    before = session.timings()
    assert (before.prefill_tokens, before.decode_tokens) == (50, 9) and before.prefill_ms > 0
    assert list(session.generate(ids + out[:5], 5)) == out[5:]
    after = session.timings()
    assert after.prefill_tokens + after.decode_tokens == 59 + 1 + 4  # the last token of the prompt, then one a token
    session.reset()
    assert session.timings().prefill_tokens == 0 and session.timings().load_ms == before.load_ms


@pytest.mark.parametrize("how", DRAWS)
def test_both_engines_draw_the_same_tokens(session: DecoderSession, gguf: Path, how: dict[str, Any]) -> None:
    with llama_cpp.open_session(gguf, n_ctx=200, threads=1, kv="f32", flash="off") as other:
        ids = session.tokenize(PROMPT, add_special=True)
        assert ids == other.tokenize(PROMPT, add_special=True)
        assert list(session.generate(ids, 60, **how)) == list(other.generate(ids, 60, **how))
        assert session.finish_reason == other.finish_reason


def test_chat_prompts_are_those_of_the_gguf(session: DecoderSession, gguf: Path) -> None:
    with open_any(gguf, n_ctx=200, threads=1) as other:
        assert session.template is not None and other.template is not None
        assert session.chat_template == other.chat_template == pico.CHAT_TEMPLATE
        for system in (None, "Be brief."):
            mine, theirs = (
                generation.prompt_tokens(s, "What is a byte?", raw=False, system=system) for s in (session, other)
            )
            assert mine == theirs and mine[0] == session.tokenize("<|im_start|>", add_special=False)[0]
        for i in range(512):
            assert session.piece(i) == other.piece(i) and session.piece(i, special=True) == other.piece(i, special=True)


def test_text_as_it_comes_is_the_text(session: DecoderSession) -> None:
    ids = session.tokenize("é日🙂 " + PROMPT, add_special=True)
    for how in ({}, {"temperature": 1.5, "seed": 4, "top_k": 0}):
        tokens = list(session.generate(ids, 60, **how))
        text = "".join(session.stream(ids, 60, **how))
        assert text == session.detokenize(tokens) == b"".join(map(session.piece, tokens)).decode("utf-8", "replace")
    stop = text[20:24]
    assert "".join(session.stream(ids, 60, stop=[stop], **how)) == text[: text.index(stop)]
    assert session.finish_reason == "stop"
    assert (
        list(session.generate(ids, 60, stop=[stop], **how))
        == tokens[: len(list(session.generate(ids, 60, stop=[stop], **how)))]
    )


def test_generation_ends_at_an_end_token(session: DecoderSession) -> None:
    ids = session.tokenize(PROMPT, add_special=True)
    tokens = list(session.generate(ids, 20))
    vocabulary = session.vocabulary
    assert vocabulary.is_end(2) and vocabulary.is_end(0) and not vocabulary.is_end(tokens[7])
    session.vocabulary = Vocabulary(session.folder.root, session.folder.config, [tokens[7]])
    assert list(session.generate(ids, 20)) == tokens[: tokens.index(tokens[7])] and session.finish_reason == "stop"


@pytest.mark.parametrize("text", ["", " ", "the cat", "é日\x00🙂\n\t", "<|im_end|> <s>"])
def test_tokens_are_the_text(session: DecoderSession, text: str) -> None:
    ids = session.tokenize(text, add_special=False, parse_special=False)
    assert b"".join(map(session.piece, ids)).decode() == session.detokenize(ids) == text


def test_special_tokens_only_on_request(session: DecoderSession) -> None:
    assert session.tokenize("<|im_end|>", add_special=False) == [2]
    assert session.piece(2) == b"" and session.piece(2, special=True) == b"<|im_end|>"
    assert session.detokenize([2, 300]) == session.detokenize([300])
    with pytest.raises(EdgekitError, match="surrogate pair at character 1"):
        session.tokenize("a\ud800", add_special=False)


def test_a_turn_belongs_to_one_caller(session: DecoderSession) -> None:
    first = session.generate(list(range(30, 40)), 5)
    next(first)
    list(session.generate(list(range(30, 38)), 2))
    with pytest.raises(RuntimeFailed, match="another call has used the session"):
        next(first)
    session.close()
    with pytest.raises(RuntimeFailed, match="closed"):
        list(session.generate([5], 2))


def test_the_context_is_the_planned_one(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "planned"
    shutil.copytree(made / "shipped", folder)
    config = json.loads((folder / "genai_config.json").read_text())
    with open_decoder(folder, n_ctx=None) as session:
        assert session.n_ctx == 256
    config["search"]["max_length"] = 64
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 3
    (folder / "genai_config.json").write_text(json.dumps(config))
    for cores, threads in ((2, 2), (8, 3)):
        monkeypatch.setattr(onnxruntime, "usable_cores", lambda cores=cores: cores)
        with open_decoder(folder, n_ctx=None, threads=None) as session:
            assert (session.n_ctx, session.threads) == (64, threads)
    assert len(list(session_tokens(folder, 60, 20))) == 4  # 60 and 4 fill it
    with pytest.raises(RuntimeFailed, match="65 tokens do not fit in a context of 64"):
        session_tokens(folder, 65, 1)
    with open_decoder(folder, n_ctx=4000) as session:
        assert session.n_ctx == 256 and "positions for no more" in session.notes[0]


def test_a_planned_context_is_told_from_the_builders(made: Path, tmp_path: Path) -> None:
    """genai's builder writes the model's own limit as the length to allocate; a plan may choose as much."""
    folder = tmp_path / "long"
    shutil.copytree(made / "shipped", folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["context_length"] = config["search"]["max_length"] = 5000
    (folder / "genai_config.json").write_text(json.dumps(config))
    with open_decoder(folder, n_ctx=None) as session:
        assert session.n_ctx == 5000
    (folder / "model_all.onnx").unlink()
    with open_decoder(folder, n_ctx=None) as session:
        assert session.n_ctx == 4096
    with open_decoder(folder, n_ctx=0) as session:
        assert session.n_ctx == 5000


def session_tokens(folder: Path, prompt: int, new: int) -> list[int]:
    with open_decoder(folder, n_ctx=None) as session:
        return list(session.generate([7] * prompt, new))


def test_cache_is_allocated_for_the_context_asked_for(made: Path) -> None:
    script = """
import sys
from edgekit.runtime.onnxruntime import open_session
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize"))
with open_session(sys.argv[1], n_ctx=int(sys.argv[2]), threads=1) as s:
    list(s.generate([5, 6], 2))
    print(s.n_ctx)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, made / "shipped", "100"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "100" and done.stderr == ""


# --- the same on trained models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Path:
    """Graphs and GGUFs of a byte-level and a SentencePiece model."""
    root = tmp_path_factory.mktemp("trained")
    names = ("lab-7m", "babyllama-361")
    for name in names:
        _decoder.build(test_data / "models" / name, root / name)
    for name in (*names, "stories260K"):
        options = Options(quant="F32", out=root / f"{name}-gguf", verify="none")
        convert(str(test_data / "models" / name), "rpi5", options)
    return root


@pytest.mark.parametrize("name", ["lab-7m", "babyllama-361"])
def test_a_trained_model_is_the_same_on_both_engines(trained: Path, name: str) -> None:
    exact = {"threads": 1, "kv": "f32", "flash": "off"}
    text = PROMPT if name == "lab-7m" else "Once upon a time, there was a little girl"
    with (
        open_decoder(trained / name) as mine,
        llama_cpp.open_session(model_file(trained / f"{name}-gguf"), n_ctx=200, **exact) as other,  # type: ignore[arg-type]
    ):
        ids = mine.tokenize(text, add_special=True)
        assert ids == other.tokenize(text, add_special=True)
        assert (mine.bos, mine.add_bos) == (other.bos, other.add_bos) and mine.template == other.template
        np.testing.assert_allclose(mine.logits(ids), other.logits(ids), atol=2e-4)
        for how in DRAWS:
            assert list(mine.generate(ids, 40, **how)) == list(other.generate(ids, 40, **how)), how
        ends = [i for i in range(mine.n_vocab) if mine.vocabulary.is_end(i)]
        assert ends == [i for i in range(mine.n_vocab) if other.model.is_end(i)] and ends


@pytest.mark.parametrize("name", ["lab-7m", "babyllama-361", "stories260K"])
def test_every_token_has_the_bytes_that_llama_cpp_gives_it(trained: Path, test_data: Path, name: str) -> None:
    source = test_data / "models" / name
    mine = Vocabulary(source, json.loads((source / "config.json").read_text()))
    with llama_cpp.open_session(model_file(trained / f"{name}-gguf"), n_ctx=64, threads=1) as other:
        for i in range(other.n_vocab):
            assert mine.piece(i) == other.piece(i), i
            assert mine.piece(i, special=True) == other.piece(i, special=True), i
        for text in ("Once upon a time", " two  spaces", "é日🙂\n\tx", "", "</s> <s>"):
            ids = other.tokenize(text, add_special=False, parse_special=False)
            assert mine.tokenize(text, add_special=False, parse_special=False) == ids
            assert mine.detokenize(ids) == other.detokenize(ids) == text


def test_added_tokens_that_are_text_are_shown_as_they_are(tmp_path: Path) -> None:
    pico.tokenizer_files(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {"content": "Ġé tag", "special": False, "id": len(tokenizer["model"]["vocab"])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append(flags | added)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    mine = Vocabulary(tmp_path, {})
    ids = mine.tokenize("a Ġé tag b", add_special=False)
    assert added["id"] in ids and mine.piece(added["id"]) == "Ġé tag".encode()
    assert mine.detokenize(ids) == "a Ġé tag b" and mine.piece(len(mine) + 7) == b""


def test_word_pieces_are_bytes_too(test_data: Path) -> None:
    source = test_data / "tokenizers" / "bert-minilm"
    mine = Vocabulary(source, json.loads((source / "config.json").read_text()))
    ids = mine.tokenize("tokenization of a Word", add_special=True)
    assert mine.detokenize(ids) == "tokenization of a word"
    assert mine.detokenize(ids, special=True) == "[CLS] tokenization of a word[SEP]"
    assert not mine.is_special(ids[1]) and mine.is_special(ids[0])


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    how = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    sampler = Sampler(how)
    share = np.bincount([sampler.draw(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(share, [0.1, 0.2, 0.3, 0.4], atol=0.03)
    top = Sampler(replace(how, top_k=2))
    assert {top.draw(logits) for _ in range(200)} == {2, 3}
    nucleus = Sampler(replace(how, top_p=0.65))
    assert {nucleus.draw(logits) for _ in range(200)} == {2, 3}
    likely = Sampler(replace(how, min_p=0.45))
    assert {likely.draw(logits) for _ in range(200)} == {1, 2, 3}


def test_a_penalty_looks_back_a_window() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    assert Sampler(Sampling(repeat_penalty=1.5), [0]).draw(logits) == 1
    assert Sampler(Sampling(repeat_penalty=1.5), [0, *[2] * 64]).draw(logits) == 0
    again = Sampler(Sampling(repeat_penalty=1.5))
    assert [again.draw(logits) for _ in range(3)] == [0, 1, 0]
    assert logits.tolist() == [2.0, np.float32(1.9), -1.0]


# --- encoders ---------------------------------------------------------------------------------------------------------

TEXTS = ["import json", "a", "class JSONDecoder(object):", "def loads(s, *, cls=None):\n    return 1", "x y z " * 30]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of noise in transformers.js's layout, with sentence-transformers' files."""
    base = tmp_path_factory.mktemp("bert")
    root = pico.make("bert", base)
    modules = json.loads((root / "modules.json").read_text())
    (root / "modules.json").write_text(json.dumps([m | {"name": str(m["idx"])} for m in modules]))
    _encoder.ship(root, _encoder.build(root, base / "built", task="feature-extraction"), base / "shipped")
    shutil.copy(root / "model.safetensors", base / "shipped")  # for the judge
    return base / "shipped"


def head(folder: Path, *, rank: int, labels: int, **config: Any) -> Path:
    """ids -> rows of a table, their mean for `rank` 2: a classifier of texts, or of tokens for `rank` 3."""
    from onnx import TensorProto, helper, numpy_helper, save_model

    folder.mkdir(parents=True)
    pico.tokenizer_files(folder, bert=True)
    table = np.random.default_rng(0).standard_normal((512, labels)).astype(np.float32)
    np.save(folder / "table.npy", table)
    names = ["input_ids", "attention_mask"]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in names]
    steps = [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    if rank == 2:
        steps += [
            helper.make_node("Cast", ["attention_mask"], ["seen"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["seen", "last"], ["weights"]),
            helper.make_node("Mul", ["rows", "weights"], ["weighted"]),
            helper.make_node("ReduceSum", ["weighted", "one"], ["logits"], keepdims=0),
        ]
    else:
        steps.append(helper.make_node("Identity", ["rows"], ["logits"]))
    constants = {"table": table, "last": np.array([-1]), "one": np.array([1])}
    axes = ["b", labels] if rank == 2 else ["b", "s", labels]
    graph = helper.make_graph(
        steps, "head", inputs, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, axes)],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    save_model(model, folder / "model.onnx")
    named = {"id2label": {str(i): f"L{i}" for i in range(labels)}, "model_type": "bert", "vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(named | {"max_position_embeddings": 128} | config))
    return folder


def open_encoder(folder: Path, **settings: Any) -> EncoderSession:
    opened = open_session(folder, threads=1, **settings)
    assert isinstance(opened, EncoderSession)
    return opened


def test_vectors_are_those_of_sentence_transformers(bert: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(bert), device="cpu").encode(TEXTS, batch_size=2)
    with edgekit.load(bert, threads=1) as session:
        assert session.encoder and session.n_ctx == 256
        np.testing.assert_allclose(session.embed(TEXTS), theirs, atol=2e-5)
        np.testing.assert_allclose(session.embed(TEXTS[::-1])[::-1], theirs, atol=2e-5)
        free = session.embed(TEXTS, normalize=False)
        assert np.linalg.norm(free, axis=1).min() > 1.1
        np.testing.assert_allclose(free / np.linalg.norm(free, axis=1, keepdims=True), theirs, atol=2e-5)
        assert session.embed([]).shape[0] == 0 and session.notes == ()
        assert session.timings().prefill_tokens > 40 and session.timings().decode_tokens == 0


def test_long_texts_are_cut_and_it_is_said(bert: Path) -> None:
    with open_encoder(bert, n_ctx=16) as session:
        cut, same = session.embed(["word " * 100, "word " * 14])
        assert session.n_ctx == 16 and session.notes == ("texts of more than 16 tokens are cut to that",)
        np.testing.assert_allclose(cut, same, atol=1e-6)
    with pytest.raises(EdgekitError, match="context of 2 tokens"):
        open_session(bert, n_ctx=2)


def test_an_encoder_writes_no_text(bert: Path) -> None:
    with open_encoder(bert) as session:
        for call in (session.logits, session.stream, session.generate):
            with pytest.raises(RuntimeFailed, match="writes no text"):
                call([1], *([] if call == session.logits else [3]))  # type: ignore[operator]
        with pytest.raises(RuntimeFailed, match="made for embedding: it has no scores"):
            session.scores(["a"])
    with pytest.raises(EdgekitError, match="is an encoder"):
        generation.answer(model_file(bert), "hello", threads=1)
    with pytest.raises(RuntimeFailed, match="closed"):
        session.embed(["a"])


def test_scores_of_texts_and_of_pairs(tmp_path: Path) -> None:
    with open_encoder(head(tmp_path / "three", rank=2, labels=3)) as session:
        assert session.task == "classification" and session.labels.names == ("L0", "L1", "L2")
        found = session.scores(["import json", "x"])
        table = np.load(tmp_path / "three" / "table.npy")
        raw = table[session.tokenize("import json", add_special=True)].sum(axis=0)
        np.testing.assert_allclose(found[0], np.exp(raw) / np.exp(raw).sum(), rtol=1e-5)
    with open_encoder(head(tmp_path / "rank", rank=2, labels=1)) as session:
        pair = session.scores([("import json", "x"), ("x", "def loads")])
        table = np.load(tmp_path / "rank" / "table.npy")
        ids = [*session.tokenize("import json", add_special=True), *session.tokenize("x", add_special=True)[1:]]
        np.testing.assert_allclose(pair[0], 1 / (1 + np.exp(-table[ids].sum(axis=0))), rtol=1e-5)
        assert pair.shape == (2, 1)


def test_every_token_gets_a_label(tmp_path: Path) -> None:
    with open_encoder(head(tmp_path / "tags", rank=3, labels=4)) as session:
        texts = ["import json", "x"]
        made = session.tags(texts)
        table = np.load(tmp_path / "tags" / "table.npy")
        for text, tags in zip(texts, made, strict=True):
            ids = session.tokenize(text, add_special=True)[1:-1]
            assert [t.label for t in tags] == [f"L{i}" for i in table[ids].argmax(axis=1)]
            assert "".join(text[t.start : t.stop] for t in tags) == text.replace(" ", "")
        assert made[0][0].scores.sum() == pytest.approx(1.0)


def test_a_graph_of_something_else_is_refused(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save_model

    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["pixel_values"], ["y"])], "g", [pixels], [out])
    save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "model.onnx"
    )
    with pytest.raises(UnsupportedModel, match="wants 'pixel_values'"):
        open_session(tmp_path)


# --- providers --------------------------------------------------------------------------------------------------------


def test_what_was_asked_for_and_is_not_there_is_said(made: Path, tmp_path: Path) -> None:
    ids = list(range(40, 50))
    with open_decoder(made / "shipped") as plain, open_decoder(made / "shipped", providers=["CUDA", "CPU"]) as session:
        assert plain.notes == () and "without CUDA" in session.notes[0]
        assert list(session.generate(ids, 5)) == list(plain.generate(ids, 5))
    with open_encoder(head(tmp_path / "h", rank=2, labels=2), providers=["OpenVINO", "CPU"]) as encoder:
        assert len(encoder.notes) == 1 and "no OpenVINO (OpenVINOExecutionProvider)" in encoder.notes[0]
        assert encoder.scores(["x"]).shape == (1, 2)
    with pytest.raises(UnknownName, match="no execution provider called 'GPU'"):
        open_session(made / "shipped", providers=["GPU"])


def test_a_provider_of_the_file_itself_is_missed_aloud(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cuda"
    shutil.copytree(made / "shipped", folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    (folder / "genai_config.json").write_text(json.dumps(config))
    with open_decoder(folder) as session:
        assert "runs on the CPU" in session.notes[0] and len(list(session.generate([5, 6], 3))) == 3
    with open_decoder(folder, providers=["CPU"]) as session:
        assert session.notes == ()


def test_what_onnxruntime_drops_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = head(tmp_path / "h", rank=2, labels=2)
    ort = library.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["XnnpackExecutionProvider", "CPUExecutionProvider"])
    with pytest.warns(UserWarning, match="XnnpackExecutionProvider"):
        session, notes = library.open_graph(folder / "model.onnx", 1, ["XNNPACK"])
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert notes == ("onnxruntime did not start XNNPACK for this graph: it runs on CPU",)


def test_every_provider_of_a_target_is_known() -> None:
    from edgekit.target import Target

    named = {p for name in Target.names() for p in Target.load(name).ort_providers}
    assert named and library.wanted(sorted(named)) == tuple(sorted(named - {"CPU"}))


def test_slow_cpus_are_told(made: Path) -> None:
    packed, plain = open_onnx(made / "int8" / "model.onnx"), open_onnx(made / "whole" / "model.onnx")
    old = Host("linux", "aarch64", isa=("neon",))
    assert "no dotprod" in onnxruntime.slow_here(packed, old)[0] and onnxruntime.slow_here(plain, old) == ()
    assert onnxruntime.slow_here(packed, replace(old, isa=("neon", "dotprod"))) == ()
    assert "no avx2" in onnxruntime.slow_here(packed, Host("linux", "x86_64", isa=("avx",)))[0]
    assert onnxruntime.slow_here(packed, Host("linux", "x86_64", isa=("avx", "avx2"))) == ()
    with open_decoder(made / "int8") as session:
        assert len(list(session.generate([5, 6, 7], 4))) == 4


# --- opening and what goes wrong --------------------------------------------------------------------------------------


def test_the_engine_follows_the_file(made: Path, gguf: Path, tmp_path: Path) -> None:
    for ref in (made / "shipped", made / "shipped" / "model.onnx"):
        with edgekit.load(ref, n_ctx=64) as session:
            assert isinstance(session, DecoderSession)
    for ref in (gguf, gguf.parent):
        with edgekit.load(ref, n_ctx=64, threads=1) as session:
            assert isinstance(session, llama_cpp.LlamaSession) and session.n_ctx == 64
    with edgekit.load(gguf, threads=1) as session:
        assert session.n_ctx == 256  # what it was trained with is less than the default
    with pytest.raises(EdgekitError, match=r"no \.gguf and no \.onnx"):
        edgekit.load(tmp_path)
    with pytest.raises(EdgekitError, match="there is no"):
        edgekit.load(tmp_path / "x.onnx")
    with pytest.raises(EdgekitError, match="providers= is for ONNX"):
        edgekit.load(gguf, providers=["CUDA"])
    with pytest.raises(EdgekitError, match="pooling= is for GGUF"):
        edgekit.load(made / "shipped", pooling="mean")


@pytest.mark.parametrize("engine_name", ["onnx", "gguf"])
def test_answers_come_from_either_engine(made: Path, gguf: Path, engine_name: str) -> None:
    pieces: list[str] = []
    ref = made / "shipped" if engine_name == "onnx" else gguf
    answer = generation.answer(
        model_file(ref), "hi", max_tokens=12, temperature=0, context=128, threads=1, emit=pieces.append
    )
    assert answer.text == "".join(pieces) and answer.tokens == 12 and answer.finish_reason == "length"
    with pytest.raises(EdgekitError, match="and the context 16") as error:
        generation.answer(model_file(ref), "word " * 40, context=16, threads=1)
    assert error.value.hint.startswith("--ctx-size")


def test_answers_are_the_same(made: Path, gguf: Path) -> None:
    refs = (made / "shipped", gguf)
    texts = [generation.answer(model_file(r), "hi", max_tokens=30, seed=7, context=128, threads=1).text for r in refs]
    assert texts[0] == texts[1] != ""


def damaged(folder: Path, made: Path, spoil: Callable[[Path], object]) -> Path:
    shutil.copytree(made / "shipped", folder)
    spoil(folder)
    return folder


def _opset(folder: Path, *, ir: int | None = None) -> None:
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    if ir is not None:
        model.ir_version = ir
    else:
        next(o for o in model.opset_import if o.domain in ("", "ai.onnx")).version = 99
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    change(config)
    (folder / "genai_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (lambda f: (f / "model.onnx.data").unlink(), CorruptCheckpoint, "model.onnx.data"),
        (lambda f: os.truncate(f / "model.onnx.data", 5000), CorruptCheckpoint, "model.onnx.data"),
        (lambda f: (f / "model.onnx").write_bytes(b"\xff" * 500), CorruptCheckpoint, "model.onnx"),
        (lambda f: (f / "model.onnx").write_bytes(b""), CorruptCheckpoint, "empty"),
        (lambda f: os.truncate(f / "model.onnx", 9000), CorruptCheckpoint, "model.onnx"),
        (lambda f: (f / "model.onnx").unlink(), (CorruptCheckpoint, EdgekitError), "model"),
        (_opset, UnsupportedModel, "opset 99"),
        (lambda f: _opset(f, ir=99), UnsupportedModel, "IR version 99"),
        (lambda f: (f / "genai_config.json").write_text("{"), CorruptCheckpoint, "genai_config.json: not JSON"),
        (lambda f: (f / "genai_config.json").write_text("{}"), CorruptCheckpoint, "model.vocab_size is None"),
        (lambda f: _edit(f, lambda c: c["model"].update(typo=3)), CorruptCheckpoint, "genai_config.json is not one"),
        (lambda f: _edit(f, lambda c: c["model"].update(context_length=-3)), CorruptCheckpoint, "context_length is -3"),
        (
            lambda f: _edit(f, lambda c: c["model"]["decoder"].update(filename="../x.onnx")),
            CorruptCheckpoint,
            "no file",
        ),
        (lambda f: _edit(f, lambda c: c["model"].update(vision={})), EdgekitError, "more than one part"),
    ],
)
def test_what_is_wrong_is_named(
    made: Path,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    kind: Any,
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = damaged(tmp_path / "spoilt", made, spoil)
    with pytest.raises(kind, match=words) as error:
        open_session(folder, n_ctx=32, threads=1)
    assert error.value.hint
    assert capfd.readouterr().err == ""  # the engines' own words go into the error, not onto the screen


def test_a_missing_tokenizer_stops_text_and_not_ids(made: Path, tmp_path: Path) -> None:
    folder = damaged(tmp_path / "x", made, lambda f: (f / "tokenizer.json").unlink())
    with open_decoder(folder) as session:
        assert session.logits([5, 6]).shape == (2, 512)
        with pytest.raises(EdgekitError, match=r"no tokenizer\.json") as error:
            session.tokenize("a", add_special=False)
        assert error.value.hint


@pytest.mark.parametrize("ids", [[512], [3, -1]])
def test_ids_of_another_model_are_refused(session: DecoderSession, ids: list[int]) -> None:
    for call in (session.logits, lambda i: session.generate(i, 3), session.detokenize):
        with pytest.raises(RuntimeFailed, match="not in the vocabulary of 512"):
            call(ids)
    with pytest.raises(RuntimeFailed, match="no token to continue from"):
        session.generate([], 3)
    with pytest.raises(EdgekitError, match="0 threads"):
        open_session(session.folder.root, threads=0)


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("[ONNXRuntimeError] : 1 : FAIL : std::bad_alloc", RuntimeFailed, "not enough memory"),
        ("Fatal error: com.microsoft:MatMul2Bits(-1) is not a registered function/op", RuntimeFailed, "no kernel"),
        ("something new\nand more", RuntimeFailed, "something new"),
    ],
)
def test_engines_are_put_into_words(said: str, kind: type[EdgekitError], words: str) -> None:
    error = library.refused(Path("m/model.onnx"), said)
    assert type(error) is kind and words in str(error) and error.hint and "and more" not in str(error)


def test_missing_packages_are_named() -> None:
    script = """
import sys
sys.modules["onnxruntime_genai"] = None
from edgekit.errors import MissingExtra
from edgekit import ort_library as library
library.onnxruntime()
try:
    library.genai()
except MissingExtra as e:
    print(e, "|", e.hint)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'onnxruntime-genai is not installed | pip install "edgekit[onnx-runtime]"'
    assert issubclass(MissingExtra, EdgekitError)


# --- telemetry --------------------------------------------------------------------------------------------------------

RUN = """
import sys
import edgekit
with edgekit.load(sys.argv[1], n_ctx=64, threads=1) as session:
    assert list(session.generate([5, 6, 7], 3))
    session.logits([5, 6])
"""


def _left_in(home: Path, script: str, folder: Path) -> set[str]:
    """What a process that runs `script` leaves in its home and its temporary folder."""
    (home / "tmp").mkdir(parents=True)
    kept = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY" and not k.startswith("XDG_")}
    places = {"HOME": str(home), "TMPDIR": str(home / "tmp")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], env=kept | places, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {p.name for p in home.rglob("*") if p.is_file()}


def test_no_record_of_use_is_kept(made: Path, tmp_path: Path) -> None:
    assert _left_in(tmp_path / "ours", RUN, made / "shipped") == set()


def test_without_the_switch_there_is_one(made: Path, tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    theirs = """
import sys
import onnxruntime_genai as og
og.Model(sys.argv[1])
"""
    left = _left_in(tmp_path / "theirs", theirs, made / "shipped")
    if not left:
        pytest.skip("this build of onnxruntime keeps no records")
    assert left & {"deviceid", "onnxruntime.db", "onnxruntime-genai.db"}
