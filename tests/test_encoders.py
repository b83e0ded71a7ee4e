"""GGUF encoders and rerankers through the front door; sentence-transformers and transformers judge the same folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.arch import blueprint
from edgekit.benchmark import bytes_per_token
from edgekit.checkpoint import open_checkpoint
from edgekit.embedding import shortened_pair
from edgekit.errors import (
    CorruptCheckpoint,
    EdgekitError,
    RuntimeFailed,
    UnsupportedModel,
    UnsupportedVocabulary,
    VerificationFailed,
)
from edgekit.gguf_file import encode_header, open_gguf
from edgekit.planning import workload
from edgekit.vocab import read_vocabulary
from tests import pico, pico_tokenizers
from tests.gguf_models import quantize
from tests.test_arch import renamed, rewritten, same_blueprint
from tests.test_vocab import check_parity

pytest.importorskip("sentence_transformers")

TEXTS = ["def dumps(obj):", "return cls(skipkeys=skipkeys, indent=indent)", "json  é ü 東京 🙂", "json encoder " * 200]
PAIRS = [
    ("def dumps(obj):", "return cls(skipkeys=skipkeys, indent=indent).encode(obj)"),
    ("json  é 東京", "a"),
    ("json encoder " * 200, "skip keys"),
    ("skip keys", "json encoder " * 200),
    ("json encoder " * 150, "skip keys " * 200),
]
LONGEST = 256  # positions of a pico, and what its tokenizer says


def made(root: Path, out: Path, **options: Any) -> Path:
    """A float32 GGUF of the folder: what differs from the source is not rounding."""
    given = {"quant": "F32", "calibration": "none"} | options
    edgekit.convert(str(root), "host", edgekit.Options(out=out, **given))
    return out


# --- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["modernbert", "nomic_bert", "roberta", "xlm_roberta"])
def test_vectors_are_those_of_sentence_transformers(family: str, tmp_path: Path) -> None:
    """Tokens, pooling, length and the cut, from the files that the artefact carries."""
    from sentence_transformers import SentenceTransformer

    root = pico.make(family, tmp_path)
    with edgekit.load(made(root, tmp_path / "out"), threads=1) as session:
        found = session.embed(TEXTS)
        assert f"texts of more than {LONGEST} tokens are cut to that" in session.notes
        with pytest.raises(RuntimeFailed, match="no classifier"):
            session.scores(TEXTS)
    with pytest.raises(RuntimeFailed, match="no head that scores"):
        edgekit.load(tmp_path / "out", pooling="rank")
    wanted = SentenceTransformer(str(root), device="cpu", model_kwargs={"dtype": "float32"}).encode(TEXTS)
    assert ((found * wanted).sum(axis=1) > 0.99999).all()


def test_bert_with_the_vocabulary_of_xlm_roberta(tmp_path: Path) -> None:
    """As the small multilingual E5 is made."""
    from sentence_transformers import SentenceTransformer

    root = rewritten(pico.make("bert", tmp_path), tmp_path / "m", lambda config: config.update(pad_token_id=1))
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    pico_tokenizers.write(root, pico_tokenizers.unigram(pico.VOCAB), names, tokenizer_class="XLMRobertaTokenizer")
    with edgekit.load(made(root, tmp_path / "out"), threads=1) as session:
        found = session.embed(TEXTS)
    wanted = SentenceTransformer(str(root), device="cpu", model_kwargs={"dtype": "float32"}).encode(TEXTS)
    assert ((found * wanted).sum(axis=1) > 0.99999).all()


def test_nomic_in_the_spelling_of_its_own_code(tmp_path: Path) -> None:
    """Trained on 2,048 tokens: beyond them its code turns by other angles, which llama.cpp does not."""
    root = pico.make("nomic_bert", tmp_path)
    spelled = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "layer_norm_epsilon": "layer_norm_eps",
    }

    def own(config: dict[str, Any]) -> None:
        theta = config.pop("rope_parameters")["rope_theta"]
        config |= {new: config.pop(old) for new, old in spelled.items()}
        config |= {"activation_function": "swiglu", "rotary_emb_base": theta, "rotary_emb_fraction": 1.0}
        config |= {"n_positions": 8192, "max_trained_positions": config.pop("max_position_embeddings"), "causal": False}
        for key in ("hidden_act", "head_dim"):
            config.pop(key)

    other = rewritten(root, tmp_path / "own", own)
    same_blueprint(blueprint(open_checkpoint(str(other))), blueprint(open_checkpoint(str(root))))


# --- scores ----------------------------------------------------------------------------------------------------------

NAMES = {0: "no", 1: "perhaps", 2: "yes"}
CLASSIFIERS: dict[str, Callable[[Path], Path]] = {
    "roberta, three labels": lambda root: pico.roberta(root, "RobertaForSequenceClassification", id2label=NAMES),
    "xlm-roberta, a reranker": lambda root: pico.xlm_roberta(root, "XLMRobertaForSequenceClassification", num_labels=1),
    "modernbert, three labels": lambda root: pico.modernbert(
        root, "ModernBertForSequenceClassification", id2label=NAMES, problem_type="multi_label_classification"
    ),
    "modernbert, a reranker of the mean": lambda root: pico.modernbert(
        root, "ModernBertForSequenceClassification", num_labels=1, classifier_pooling="mean"
    ),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_scores_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Texts as the pipeline scores them, pairs as the CrossEncoder of sentence-transformers does, both where cut."""
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import pipeline

    root = CLASSIFIERS[kind](tmp_path / "m")
    out = made(root, tmp_path / "out")
    assert "pairs" in (out / "README.md").read_text()  # the card lists what was checked
    with edgekit.load(out, threads=1) as session:
        texts, pairs = session.scores(TEXTS), session.scores(PAIRS)
        names, function = session.labels.names, session.labels.function
        assert f"texts of more than {LONGEST} tokens are cut to that" in session.notes
        with pytest.raises(RuntimeFailed, match="is a classifier"):
            session.embed(TEXTS)
    pipe = pipeline("text-classification", model=str(root), device="cpu", dtype=torch.float32, top_k=None)
    rows = pipe(TEXTS, truncation=True, max_length=LONGEST)
    wanted = np.array([[one["score"] for one in sorted(row, key=lambda one: one["label"])] for row in rows])
    assert names == (("no", "perhaps", "yes") if wanted.shape[1] == 3 else ("LABEL_0",))
    np.testing.assert_allclose(texts, wanted, atol=0.003)
    assert wanted.std() > 0.01
    activation = torch.nn.Softmax(dim=-1) if function == "softmax" else torch.nn.Sigmoid()
    judge = CrossEncoder(str(root), device="cpu", max_length=LONGEST, model_kwargs={"dtype": torch.float32})
    wanted = judge.predict(PAIRS, activation_fn=activation, show_progress_bar=False).reshape(len(PAIRS), -1)
    np.testing.assert_allclose(pairs, wanted, atol=0.003)


def test_the_head_of_a_quantised_reranker(tmp_path: Path) -> None:
    """Its last matrix stays float32, the file says by itself what its scores mean, and `certify` reads it again."""
    root = CLASSIFIERS["xlm-roberta, a reranker"](tmp_path / "m")
    out = made(root, tmp_path / "out", quant="Q8_0")
    file = open_gguf(next(out.glob("*.gguf")))
    assert file.tensors["cls.output.weight"].shape == (1, 128)
    kinds = {name: file.tensors[name].code for name in ("cls.output.weight", "cls.weight", "blk.0.ffn_up.weight")}
    assert kinds == {"cls.output.weight": 0, "cls.weight": 8, "blk.0.ffn_up.weight": 8}  # F32, Q8_0
    assert file.get("bert.pooling_type") == 4  # LLAMA_POOLING_TYPE_RANK
    assert list(file.get("bert.classifier.output_labels")) == ["LABEL_0"]
    assert not (out / "modules.json").exists()
    assert edgekit.certify(out, root).certificate.checks
    shutil.copyfile(file.path, tmp_path / "alone.gguf")
    with edgekit.load(out, threads=1) as session, edgekit.load(tmp_path / "alone.gguf", threads=1) as alone:
        np.testing.assert_array_equal(alone.scores(PAIRS[:1]), session.scores(PAIRS[:1]))


def test_a_segment_of_its_own_is_refused(tmp_path: Path) -> None:
    """llama.cpp puts every token into the first segment."""
    root = pico.roberta(tmp_path / "m", "RobertaForSequenceClassification", num_labels=1, type_vocab_size=2)
    tokenizer = json.loads((root / "tokenizer.json").read_text())
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("<s>", 0), ("</s>", 2))}
    one, two = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    start, end = ({"SpecialToken": {"id": name, "type_id": 0}} for name in special)
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, one, end],
        "pair": [start, one, end, end, two, end],
        "special_tokens": special,
    }
    (root / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(VerificationFailed, match="segment of its own"):
        made(root, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classifier_bias": True}, "classifier_bias is True"),
        ({"classifier_activation": "relu"}, "classifier_activation is 'relu'"),
        ({"classifier_pooling": "max"}, "classifier_pooling is 'max'"),
        ({"id2label": {"0": "a", "2": "b"}}, "does not number"),
        ({"id2label": {"0": "a", "1": "b"}}, "classifier"),  # one more than the matrix has rows
    ],
)
def test_heads_that_are_refused(change: dict[str, Any], words: str, heads: Path, tmp_path: Path) -> None:
    root = rewritten(heads, tmp_path / "changed", lambda config: config.update(change))
    with pytest.raises((UnsupportedModel, CorruptCheckpoint), match=words):
        blueprint(open_checkpoint(str(root)))


def test_a_head_without_a_class_for_it_is_unknown(tmp_path: Path) -> None:
    """The tensors of a classifier under the class of an embedding model: neither dropped nor guessed."""
    root = pico.roberta(tmp_path / "m", "RobertaForSequenceClassification", num_labels=1)
    other = rewritten(root, tmp_path / "n", lambda config: config.update(architectures=["RobertaModel"]))
    with pytest.raises(UnsupportedModel, match=r"classifier\.dense"):
        blueprint(open_checkpoint(str(other)))


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads") / "m"
    return pico.modernbert(root, "ModernBertForSequenceClassification", num_labels=1)


def test_a_language_model_makes_the_same_vectors(tmp_path: Path) -> None:
    """...ForMaskedLM: the head that predicts words is left out by name."""
    for kind, head in ((pico.roberta, "RobertaForMaskedLM"), (pico.modernbert, "ModernBertForMaskedLM")):
        root = kind(tmp_path / head, head)
        found = blueprint(open_checkpoint(str(root)))
        assert found.ignored and not found.classifies
        assert all(name.startswith(("lm_head.", "head.", "decoder.")) for name in found.ignored)


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_a_pair_is_cut_as_tokenizers_cuts_it(seed: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    rng = np.random.default_rng(seed)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(30)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    room = int(rng.integers(2, 24))
    words.enable_truncation(room, strategy="longest_first")
    first, second = (list(range(1, int(rng.integers(1, 30)))) for _ in range(2))
    encoded = words.encode(" ".join(map(str, first)), " ".join(map(str, second)))
    a, b = shortened_pair(first, second, room)
    assert a + b == encoded.ids
    assert [0] * len(a) + [1] * len(b) == encoded.type_ids


def test_unigram_with_the_rules_of_sentencepiece(test_data: Path, tmp_path: Path) -> None:
    """XLM-RoBERTa's files: fairseq's numbering and SentencePiece's compiled normalisation (here T5's)."""
    tokenizer = json.loads(pico_tokenizers.unigram(pico.VOCAB))
    rules = json.loads((test_data / "tokenizers/t5-small/tokenizer.json").read_text(encoding="utf-8"))["normalizer"]
    tokenizer["normalizer"] = rules
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    pico_tokenizers.write(tmp_path, json.dumps(tokenizer), names)
    vocabulary = read_vocabulary(tmp_path, {"model_type": "xlm-roberta", "vocab_size": pico.VOCAB})
    assert (vocabulary.model, vocabulary.add_bos, vocabulary.add_eos) == ("t5", True, True)
    assert {role: vocabulary.ids[role] for role in ("bos", "pad", "eos", "unk")} == dict(
        zip(("bos", "pad", "eos", "unk"), range(4), strict=True)
    )
    assert check_parity(vocabulary) <= 2
    assert vocabulary.metadata()["tokenizer.ggml.add_sep_token"] is True
    assert vocabulary.metadata()["tokenizer.ggml.token_type_count"] == 2  # XLMRobertaConfig's own default


def test_a_run_that_can_be_cut_in_two_ways_is_excused(tmp_path: Path) -> None:
    """zzz and z, or z and zzz: the same score but for rounding, and the two tokenizers take different ones."""
    tokenizer = json.loads(pico_tokenizers.unigram(pico.VOCAB))
    pieces = {"▁": -5.54, "a": -7.66, "b": -5.74, "00": -3.55, "0": -5.76, "zzz": -3.55, "z": -5.76}
    tokenizer["model"]["vocab"] = tokenizer["model"]["vocab"][:4] + [list(entry) for entry in pieces.items()]
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<mask>"]
    pico_tokenizers.write(tmp_path, json.dumps(tokenizer), ("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    vocabulary = read_vocabulary(tmp_path, {})
    excused = {text: bool(vocabulary.excuse(text)) for text in ("a zzzz", "aab 000", "a 00 b", "a zzz b", "aabb")}
    assert excused == {"a zzzz": True, "aab 000": True, "a 00 b": False, "a zzz b": False, "aabb": False}
    assert check_parity(vocabulary, list(excused)) == 2  # how many differ turns on rounding: these do


@pytest.mark.parametrize(
    ("family", "between"), [("bert", False), ("roberta", True), ("xlm_roberta", True), ("modernbert", False)]
)
def test_what_is_between_two_texts(family: str, between: bool, tmp_path: Path) -> None:
    """add_sep_token is one token more than the one that ends every text, as llama.cpp's server reads it."""
    root = pico.make(family, tmp_path)
    vocabulary = read_vocabulary(root, json.loads((root / "config.json").read_text()))
    assert vocabulary.metadata()["tokenizer.ggml.add_sep_token"] is between


def test_roberta_without_a_tokenizer_json(tmp_path: Path) -> None:
    """vocab.json and merges.txt do not say that a text stands between <s> and </s>; transformers knows it."""
    from transformers import AutoTokenizer

    root = pico.make("roberta", tmp_path)
    model = json.loads((root / "tokenizer.json").read_text())["model"]
    vocab = model["vocab"] | {"<mask>": len(model["vocab"])}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / name).unlink()
    (root / "vocab.json").write_text(json.dumps(vocab))
    (root / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    judge = AutoTokenizer.from_pretrained(root)
    vocabulary = read_vocabulary(root, json.loads((root / "config.json").read_text()))
    assert vocabulary.add_bos and vocabulary.add_eos
    reference = vocabulary.reference()
    for text in (*TEXTS, "a <mask> b", " x  "):
        assert reference.encode(text, add_special=True) == judge(text)["input_ids"]
    assert reference.pair(*PAIRS[0])[0] == judge(*PAIRS[0])["input_ids"]
    check_parity(vocabulary, TEXTS)


def test_a_fairseq_model_alone_is_refused(tmp_path: Path) -> None:
    """Its pieces are numbered otherwise than the rows of the embedding."""
    root = pico.make("xlm_roberta", tmp_path)
    (root / "tokenizer.json").unlink()
    (root / "sentencepiece.bpe.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(UnsupportedVocabulary, match="fairseq"):
        read_vocabulary(root, json.loads((root / "config.json").read_text()))


def test_a_model_with_its_weights_under_another_prefix(tmp_path: Path) -> None:
    """BGE's reranker keeps the encoder under `roberta.`, BGE-M3 has no prefix: one table for both."""
    root = pico.make("xlm_roberta", tmp_path)
    other = renamed(root, tmp_path / "n", lambda tensors: {"roberta." + name: t for name, t in tensors.items()})
    same_blueprint(blueprint(open_checkpoint(str(other))), blueprint(open_checkpoint(str(root))))


# --- everything around -----------------------------------------------------------------------------------------------


def test_what_a_reranker_cannot_be_asked(tmp_path: Path) -> None:
    root = CLASSIFIERS["xlm-roberta, a reranker"](tmp_path / "m")
    out = made(root, tmp_path / "out", verify="none")
    with pytest.raises(EdgekitError, match="is a classifier: eval compares"):
        edgekit.evaluate(out, root)
    with pytest.raises(EdgekitError, match="is an encoder") as refusal:
        edgekit.answer(out, "Hello")
    assert ".scores([...])" in refusal.value.hint


def test_a_reranker_of_another_tool_and_one_made_from_a_gguf(tmp_path: Path) -> None:
    """Without our keys it is asked for scores by name: a sigmoid. With them a GGUF is a source like a folder."""
    root = CLASSIFIERS["xlm-roberta, a reranker"](tmp_path / "m")
    out = made(root, tmp_path / "out")
    with edgekit.load(out, threads=1) as session:
        wanted = session.scores(PAIRS)
    source = next(out.glob("*.gguf"))
    file = open_gguf(source)
    ours = {"bert.pooling_type", "bert.classifier.function", "bert.classifier.output_labels"}
    metadata = {key: value for key, value in file.metadata.items() if key not in ours}
    other = copied(source, metadata, tmp_path / "other.gguf")
    with edgekit.load(other, threads=1, pooling="rank") as session:
        assert session.labels.names == ("LABEL_0",)
        np.testing.assert_array_equal(session.scores(PAIRS), wanted)
    with edgekit.load(made(source, tmp_path / "again", quant="Q8_0"), threads=1) as session:
        np.testing.assert_allclose(session.scores(PAIRS), wanted, atol=0.05)


def copied(source: Path, metadata: dict[str, Any], to: Path) -> Path:
    """The same tensors under other metadata."""
    file = open_gguf(source)
    tensors = [(t.name, t.shape, t.code, t.nbytes) for t in file.tensors.values()]
    header = encode_header(metadata, tensors)
    data, old = bytearray(header.file_size), source.read_bytes()
    data[: len(header.bytes)] = header.bytes
    for tensor, at in zip(file.tensors.values(), header.offsets, strict=True):
        data[at : at + tensor.nbytes] = old[tensor.offset : tensor.offset + tensor.nbytes]
    to.write_bytes(data)
    return to


def test_one_row_of_an_encoders_embedding_is_read(tmp_path: Path) -> None:
    """No output matrix is tied to it: it is neither read whole for a token nor loaded twice."""
    root = pico.make("xlm_roberta", tmp_path)
    done = edgekit.plan(str(root), "rpi5", edgekit.Options(quant="Q8_0"))
    embed = next(t for t in done.tensors if t.name == "token_embd.weight")
    load = workload(done.tensors, done.geometry, done.context, done.kv_type)
    others = sum(t.nbytes for t in done.tensors if t.name not in ("token_embd.weight", "position_embd.weight"))
    assert done.memory.twice == 0
    assert load.bytes_per_token < others + embed.nbytes / 100 + 1024
    assert bytes_per_token(next(made(root, tmp_path / "out", quant="Q8_0").glob("*.gguf"))) <= others


@pytest.mark.parametrize("family", ["modernbert", "xlm_roberta"])
def test_a_preset_has_the_bytes_of_llama_quantize(family: str, tmp_path: Path) -> None:
    """The same formats, order and bytes: the mixes follow what a tensor is for."""
    make = {"modernbert": pico.modernbert, "xlm_roberta": pico.xlm_roberta}[family]
    root = make(tmp_path / "m", hidden_size=256, intermediate_size=512)
    source = next(made(root, tmp_path / "f32", verify="none").glob("*.gguf"))
    ours = next(made(root, tmp_path / "out", verify="none", quant="Q4_K_M").glob("*.gguf"))
    theirs = quantize(source, tmp_path / "theirs.gguf", 15)  # LLAMA_FTYPE_MOSTLY_Q4_K_M
    assert stored(ours) == stored(theirs)
    assert len({code for _, code, _ in stored(ours)}) == 3  # F32, Q4_K, Q6_K


def stored(path: Path) -> list[tuple[str, int, bytes]]:
    """Name, format and bytes of every tensor, in file order."""
    data = path.read_bytes()
    return [(t.name, t.code, data[t.offset : t.offset + t.nbytes]) for t in open_gguf(path).tensors.values()]
