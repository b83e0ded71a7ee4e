"""Vocabularies against the tokenizers they come from, in the runtime that will use them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgekit import corpus
from edgekit.errors import CorruptCheckpoint, UnsupportedVocabulary
from edgekit.vocab import Probe, Vocabulary, read_vocabulary
from edgekit.vocab.parity import differences, explain
from edgekit.vocab.pretokenizer import GPT2, LLAMA3, O200K, QWEN2, TABLE, canonical
from edgekit.vocab.protobuf import read_sentencepiece

SMALL = ["bert-minilm", "gpt-2", "gpt-neox", "llama-2", "phi-2", "phi-3-mini", "smollm", "t5-small"]
LARGE = [
    *("chatglm3", "deepseek-v3", "falcon", "gemma-3", "gpt-oss", "llama-3.2", "minicpm", "mistral-nemo", "mistral-v3"),
    *("olmo", "phi-4-mini", "qwen2.5", "qwen3", "roberta-base", "smollm3", "starcoder2"),
]
MODELS = ["babyllama-361", "lab-7m", "stories260K"]
EXPECTED = {
    "bert-minilm": ("bert", "default"),
    "chatglm3": ("llama", "default"),
    "deepseek-v3": ("gpt2", "deepseek-v3"),
    "falcon": ("gpt2", "falcon"),
    "gemma-3": ("llama", "default"),
    "gpt-2": ("gpt2", "gpt-2"),
    "gpt-neox": ("gpt2", "gpt-2"),
    "gpt-oss": ("gpt2", "granite-embed-multi-97m"),
    "llama-2": ("llama", "default"),
    "llama-3.2": ("gpt2", "llama-bpe"),
    "minicpm": ("llama", "default"),
    "mistral-nemo": ("gpt2", "tekken"),
    "mistral-v3": ("llama", "default"),
    "olmo": ("gpt2", "gpt-2"),
    "phi-2": ("gpt2", "gpt-2"),
    "phi-3-mini": ("llama", "default"),
    "phi-4-mini": ("gpt2", "granite-embed-multi-97m"),
    "qwen2.5": ("gpt2", "qwen2"),
    "qwen3": ("gpt2", "qwen2"),
    "roberta-base": ("gpt2", "gpt-2"),
    "smollm": ("gpt2", "smollm"),
    "smollm3": ("gpt2", "llama-bpe"),
    "starcoder2": ("gpt2", "smollm"),
    "t5-small": ("t5", "default"),
    "babyllama-361": ("llama", "default"),
    "lab-7m": ("gpt2", "qwen2"),
    "stories260K": ("llama", "default"),
}
DIFFERENT = {
    # strings of the corpus whose ids differ, with special tokens read and with them as text: all of them documented
    "bert-minilm": 12,
    "gemma-3": 2,
    "gpt-neox": 3,
    "mistral-nemo": 9,
    "olmo": 3,
    "qwen2.5": 3,
    "qwen3": 3,
    "t5-small": 2,
}


def open_family(data: Path, name: str) -> Vocabulary:
    folder = data / ("models" if name in MODELS else "tokenizers") / name
    config = folder / "config.json"
    # the config beside Mistral v3's tokenizer is Mistral v1's: 32,000 rows for 32,768 tokens
    use = config.is_file() and name != "mistral-v3"
    return read_vocabulary(folder, json.loads(config.read_text()) if use else {})


def check_parity(vocabulary: Vocabulary, texts: Sequence[str] | None = None, extra: Sequence[str] = ()) -> int:
    """The number of documented differences in the corpus (or `texts`); fails on any other, in `extra`, too."""
    strings = list(texts) if texts is not None else corpus.parity_strings(vocabulary)
    reference = vocabulary.reference()
    with Probe(vocabulary.metadata()) as probe:
        for parse in (True, False):
            found = differences(reference, probe, strings, vocabulary.limits, parse_special=parse)
            assert not found, f"parse_special={parse}:\n{explain(found)}"
        found = differences(reference, probe, extra, vocabulary.limits, add_special=False)
        assert not found, explain(found)
        return len(differences(reference, probe, corpus.STRINGS if texts is None else texts))


@pytest.mark.parametrize("name", [*SMALL, *MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_real_vocabularies_give_the_same_ids_in_llama_cpp(test_data: Path, name: str) -> None:
    vocabulary = open_family(test_data, name)
    assert (vocabulary.model, vocabulary.pre) == EXPECTED[name]
    documented = check_parity(vocabulary, extra=real_text(test_data, vocabulary.lead))
    if name not in ("chatglm3", "mistral-v3"):  # two tokens in front; no chat template to decide about spaces
        assert documented == DIFFERENT.get(name, 0)


def real_text(data: Path, lead: str) -> list[str]:
    """Passages of Wikipedia and of a calibration text in many languages and formats."""
    text = (data / "text/wikitext-2-raw/wiki.test.raw").read_text(encoding="utf-8")[:30_000]
    text += (data / "text/calibration/groups_merged.txt").read_text(encoding="utf-8")[-30_000:]
    return [lead + text[i : i + 2000].lstrip(" ") for i in range(0, len(text), 2000)]


def test_an_excuse_is_no_blank_cheque(test_data: Path) -> None:
    """Qwen's NFC excuses exactly the strings that NFC changes."""
    vocabulary = open_family(test_data, "lab-7m")
    assert not any(vocabulary.excuse(text) for text in corpus.STRINGS)
    path = test_data / "tokenizers" / "gpt-neox"
    neox = read_vocabulary(path, {})
    for text in corpus.STRINGS:
        assert bool(neox.excuse(text)) == (unicodedata.normalize("NFC", text) != text), text


# --- what transformers makes of the same folder ----------------------------------------------------------------------

REBUILT = {"llama-2", "minicpm", "babyllama-361", "stories260K"}
"""Folders whose tokenizer_class is LlamaTokenizer: transformers 5 builds it anew from the vocabulary and puts no space
before a text that begins with one; tokenizer.json, SentencePiece and llama.cpp do."""
NOT_LOADED = {"chatglm3", "phi-4-mini"}
"""Custom code; a config.json that transformers 5.23 refuses."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers about its own configuration classes
@pytest.mark.parametrize("name", [n for n in EXPECTED if n not in NOT_LOADED])
def test_the_reference_is_what_transformers_loads(test_data: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = test_data / ("models" if name in MODELS else "tokenizers") / name
    auto = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    vocabulary = open_family(test_data, name)
    reference = vocabulary.reference()
    marks = tuple(t.content for t in vocabulary.added.values())
    for text in corpus.parity_strings(vocabulary):
        if name in REBUILT and (text.startswith((" ", "\u2581")) or any(m in text for m in marks)):
            continue
        for special in (True, False):
            own = reference.encode(text, add_special=special)
            assert own == auto.encode(text, add_special_tokens=special), (text, special)


# --- vocabularies trained here ---------------------------------------------------------------------------------------


def train(
    folder: Path, pre_tokenizer: Any, *, ignore_merges: bool = False, normalizer: Any = None, size: int = 900
) -> Path:
    """A byte-level BPE vocabulary trained on the built-in text, saved as tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([corpus.TEXT, *corpus.STRINGS], trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def split(*regexes: str) -> Any:
    steps = [pre_tokenizers.Split(Regex(r), "isolated") for r in regexes]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def digits_then_gpt2() -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


SHAPES: list[tuple[Callable[[], Any], bool, str]] = [
    (lambda: split(LLAMA3), True, "llama-bpe"),
    (lambda: split(LLAMA3), False, "smaug-bpe"),
    (lambda: split(QWEN2), False, "qwen2"),
    (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), False, "gpt-2"),
    (digits_then_gpt2, False, "smollm"),
    # written otherwise, meaning the same: no row of the table has these regexes, the runtime's ids decide
    (lambda: split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}\p{N}?\p{N}?")), True, "llama-bpe"),
    (lambda: split(QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")), False, "qwen2"),
]


@pytest.mark.parametrize(("shape", "ignore", "name"), SHAPES, ids=[f"{i}-{s[2]}" for i, s in enumerate(SHAPES)])
def test_a_fresh_vocabulary_is_recognised_by_its_splitting(
    tmp_path: Path, shape: Callable[[], Any], ignore: bool, name: str
) -> None:
    vocabulary = read_vocabulary(train(tmp_path, shape(), ignore_merges=ignore), {})
    assert vocabulary.pre == name
    assert check_parity(vocabulary) == 0


def test_ignored_merges_that_no_row_ignores_are_tried_out(tmp_path: Path) -> None:
    """GPT-2's splitting exists without ignore_merges only: fine here, where every token has its merges."""
    shape = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    vocabulary = read_vocabulary(train(tmp_path, shape, ignore_merges=True), {})
    assert vocabulary.pre == "gpt-2"


def test_ignored_merges_that_matter_are_refused(tmp_path: Path) -> None:
    """The same, but with words that no merge makes: the model has them, the runtime would not."""
    shape = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    folder = train(tmp_path, shape, ignore_merges=True)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["merges"] = data["model"]["merges"][:100]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedVocabulary, match="expected"):
        read_vocabulary(folder, {})


@pytest.mark.parametrize(
    ("shape", "normalizer"),
    [
        (lambda: split(r"[A-Z]?[a-z]+|\p{N}{2}|\s+|[^\s\p{L}\p{N}]"), None),
        (lambda: pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True), None),
        (lambda: split(LLAMA3), normalizers.Lowercase()),
    ],
    ids=["camel-case", "prefix-space", "lowercase"],
)
def test_splitting_that_no_runtime_has_is_refused_with_the_strings_that_differ(
    tmp_path: Path, shape: Callable[[], Any], normalizer: Any
) -> None:
    folder = train(tmp_path, shape(), normalizer=normalizer)
    with pytest.raises(UnsupportedVocabulary) as error:
        read_vocabulary(folder, {})
    lines = str(error.value).splitlines()[1:]
    assert len(lines) >= 5
    assert all("expected [" in line and "got [" in line for line in lines[:5])
    assert error.value.hint


def test_o200k_splits_are_excused_only_where_the_runtime_cuts_elsewhere(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(train(tmp_path, split(O200K)), {})
    assert vocabulary.pre == "gpt-4o"
    check_parity(vocabulary)
    assert vocabulary.excuse("écoleÉCOLE")
    assert not vocabulary.excuse("Don't stop 12345 \n\n élève, schoolSchool")


def test_regexes_of_the_table_are_their_own_canonical_form_twice() -> None:
    for row in TABLE:
        for step in row.steps:
            assert canonical(canonical(step)) == canonical(step)
    assert canonical(r"(?i:'s|'ll)|\p{N}{1}|a?+b++" + "[\r\n]") == canonical(r"(?:'[sS]|'[lL][lL])|\p{N}|a?b+[\r\n]")
    assert canonical(GPT2) != canonical(QWEN2)


def test_tokens_added_by_a_fine_tune(tmp_path: Path) -> None:
    folder = train(tmp_path, split(QWEN2))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|tool|>", special=True), AddedToken("[EXTRA 1]", special=True)])
    tokenizer.add_tokens([AddedToken("zxqv", normalized=False), AddedToken("  \n", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = read_vocabulary(folder, {})
    kinds = {t: vocabulary.types[vocabulary.tokens.index(t)] for t in ("<|tool|>", "[EXTRA 1]", "zxqv", "  \n", "a")}
    assert kinds == {"<|tool|>": 3, "[EXTRA 1]": 3, "zxqv": 4, "  \n": 4, "a": 1}
    assert vocabulary.pre == "qwen2"
    assert check_parity(vocabulary) == 0


def test_a_token_that_swallows_spaces_is_a_warning_and_an_excuse(tmp_path: Path) -> None:
    folder = train(tmp_path, split(QWEN2))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|x|>", rstrip=True), AddedToken("<|y|>", lstrip=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = read_vocabulary(folder, {})
    assert any("<|x|>" in w for w in vocabulary.warnings)
    assert vocabulary.excuse("<|x|> a") and vocabulary.excuse("a <|y|>")
    assert not vocabulary.excuse("a <|x|>a<|y|> ")
    check_parity(vocabulary)


def test_wordpiece_trained_here(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([corpus.TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({f"{k}_token": v for k, v in names.items()}))
    vocabulary = read_vocabulary(tmp_path, {})
    assert (vocabulary.ids["cls"], vocabulary.ids["sep"], vocabulary.ids["mask"]) == (2, 3, 4)
    assert vocabulary.add_bos and vocabulary.add_eos
    assert vocabulary.metadata()["tokenizer.ggml.token_type_count"] == 2  # BertConfig's own default
    check_parity(vocabulary)


def test_unigram_trained_here(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([corpus.TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path, {"vocab_size": 512})
    assert (vocabulary.model, vocabulary.size, vocabulary.add_bos, vocabulary.add_eos) == ("t5", 512, False, True)
    assert vocabulary.types[-1] == 5
    ascii_only = [s for s in corpus.STRINGS if s.isascii() and s.isprintable()]
    assert check_parity(vocabulary, ascii_only) == 0


# --- SentencePiece ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-2", "mistral-v3", "minicpm", "stories260K", "babyllama-361"])
def test_our_reader_sees_the_pieces_that_sentencepiece_sees(test_data: Path, name: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = test_data / ("models" if name in MODELS else "tokenizers") / name
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = read_sentencepiece(folder / "tokenizer.model")
    assert len(ours.pieces) == theirs.vocab_size()
    for i, (text, score, kind) in enumerate(ours.pieces):
        assert (text, score) == (theirs.id_to_piece(i), theirs.get_score(i))
        expected = [theirs.is_unknown(i), theirs.is_control(i), theirs.is_unused(i), theirs.is_byte(i)]
        assert expected == [kind == 2, kind == 3, kind == 5, kind == 6]
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (theirs.bos_id(), theirs.eos_id(), theirs.unk_id())


@pytest.mark.parametrize("name", ["stories260K", "babyllama-361", pytest.param("llama-2", marks=pytest.mark.slow)])
def test_a_sentencepiece_model_alone(test_data: Path, tmp_path: Path, name: str) -> None:
    """The reference built from it gives sentencepiece's ids, and the runtime gives the reference's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = test_data / ("models" if name in MODELS else "tokenizers") / name
    shutil.copy(folder / "tokenizer.model", tmp_path)
    vocabulary = read_vocabulary(tmp_path, {})
    reference = vocabulary.reference()
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in corpus.STRINGS:
        if "\u2581" not in text:  # the sign for a space, as itself
            assert reference.encode(text, add_special=False) == theirs.encode(text), text
    assert reference.encode("a", add_special=True)[0] == theirs.bos_id()
    assert reference.decode(theirs.encode("Hello, world")) == "Hello, world"
    # the model of stories260K makes one space of many, which llama.cpp does not: only strings with such runs differ
    documented = check_parity(vocabulary)
    assert (documented > 0) == (name == "stories260K")
    assert not vocabulary.excuse("One day, a bird sang.")


def test_scores_from_merges_order_tokens_as_the_model_file_does(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "models" / "stories260K"
    shutil.copy(folder / "tokenizer.json", tmp_path)
    alone, both = read_vocabulary(tmp_path, {}), read_vocabulary(folder, {})
    assert alone.tokens == both.tokens and alone.types == both.types
    assert alone.scores is not None and both.scores is not None
    assert alone.scores != both.scores
    made = [i for i, t in enumerate(both.tokens) if both.types[i] == 1 and len(t) > 1]
    assert sorted(made, key=lambda i: -alone.scores[i]) == sorted(made, key=lambda i: -both.scores[i])
    assert check_parity(alone) == 0


def test_merges_that_scores_cannot_say_go_by_merges_or_not_at_all(tmp_path: Path) -> None:
    """`the` is t + he here, and no merge joins them; llama.cpp's scores would, since there is a token `the`."""
    characters = sorted({c for c in corpus.TEXT if c.isprintable() and c != " "} | {"\u2581"})
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *characters, "he", "th", "the"]
    vocab = {text: i for i, text in enumerate(texts)}
    tokenizer = Tokenizer(
        models.BPE(vocab, [("h", "e"), ("t", "h"), ("th", "e")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = spaces
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path, {})
    assert (vocabulary.model, vocabulary.pre, vocabulary.scores) == ("gpt2", "sarvam-moe", None)
    assert check_parity(vocabulary) == 0
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedVocabulary, match=" the': expected"):
        read_vocabulary(tmp_path, {})


def test_tokens_added_to_a_sentencepiece_model(test_data: Path, tmp_path: Path) -> None:
    shutil.copy(test_data / "models" / "stories260K" / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 512, "<extra>": 513}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_start|>"}))
    vocabulary = read_vocabulary(tmp_path, {"vocab_size": 520})
    assert vocabulary.tokens[512:515] == ("<|im_start|>", "<extra>", "[PAD514]")
    assert vocabulary.types[512:515] == (3, 4, 5)
    assert vocabulary.ids["eos"] == 512 and vocabulary.ids["bos"] == 1
    check_parity(vocabulary)


def test_special_tokens_that_the_normaliser_hides(test_data: Path, tmp_path: Path) -> None:
    """Early Llama files mark `<s>` as normalized: behind a letter their tokenizer reads it as text."""
    data = json.loads((test_data / "models" / "stories260K" / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    vocabulary = read_vocabulary(tmp_path, {})
    assert 1 not in vocabulary.reference().encode("a<s>", add_special=False)
    assert vocabulary.excuse("a<s>") and not vocabulary.excuse("a <b>")
    check_parity(vocabulary)


def test_spaces_go_as_the_chat_template_needs_them(test_data: Path, tmp_path: Path) -> None:
    """Mistral's tokenizer puts a space before a text, not after [INST]: the prompt of a chat must come out the same."""
    shutil.copy(test_data / "tokenizers" / "mistral-v3" / "tokenizer.json", tmp_path)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = read_vocabulary(tmp_path, {})
    assert vocabulary.metadata()["tokenizer.ggml.add_space_prefix"] is False
    assert vocabulary.lead == " "
    rendered = vocabulary.template()
    assert rendered is not None
    turns = [("user", "Hello there"), ("assistant", "Hi!"), ("user", "Bye\n\nnow")]
    prompt = rendered.render([{"role": role, "content": text} for role, text in turns])
    with Probe(vocabulary.metadata()) as probe:
        assert probe.encode(prompt) == vocabulary.reference().encode(prompt, add_special=False)
        found = differences(vocabulary.reference(), probe, [f" {s}" for s in corpus.STRINGS])
    assert not found, explain(found)


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3.5"])
def test_phi3_swallows_line_ends_where_the_name_says_so(test_data: Path, name: str) -> None:
    vocabulary = open_family(test_data, "phi-3-mini")
    assert vocabulary.name_hint == "phi-3"
    text = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    with Probe(vocabulary.metadata(), name) as hinted, Probe(vocabulary.metadata(), "mine") as other:
        expected = vocabulary.reference().encode(text, add_special=False)
        assert hinted.encode(text) == expected
        assert other.encode(text) != expected


# --- special tokens --------------------------------------------------------------------------------------------------


def test_flags_follow_the_post_processor_not_the_config(tmp_path: Path) -> None:
    folder = train(tmp_path, split(LLAMA3), ignore_merges=True)
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = read_vocabulary(folder, {})
    assert (vocabulary.add_bos, vocabulary.add_eos) == (False, False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
            ),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = read_vocabulary(folder, {})
    assert (vocabulary.add_bos, vocabulary.add_eos) == (True, True)
    assert (vocabulary.ids["bos"], vocabulary.ids["eos"]) == (0, 2)
    assert check_parity(vocabulary) == 0


def test_several_ends_of_generation(tmp_path: Path) -> None:
    folder = train(tmp_path, split(QWEN2))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|done|>", "<|stop|>", "<|quit|>", "<|bye|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    done, stop, quit_, bye = range(900, 904)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|done|>"}}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [done, stop, 0]}))
    vocabulary = read_vocabulary(folder, {"eos_token_id": quit_, "bos_token_id": 1})
    assert vocabulary.stops == (done, stop, 0, quit_)
    assert (vocabulary.eos_text, vocabulary.bos_text) == ("<|done|>", "<|im_start|>")
    with Probe(vocabulary.metadata()) as probe:
        assert all(probe.stops(i) for i in vocabulary.stops)
        assert not probe.stops(bye)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [done, stop, quit_, bye]}))
    vocabulary = read_vocabulary(folder, {})
    assert any(f"token {bye}" in w for w in vocabulary.warnings)


def test_chat_templates_from_every_place(tmp_path: Path) -> None:
    folder = train(tmp_path, split(QWEN2), size=300)
    assert read_vocabulary(folder, {}).chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert read_vocabulary(folder, {}).chat_template == "json"
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_vocabulary(folder, {}).templates == {"default": "one", "tool_use": "two"}
    (folder / "chat_template.jinja").write_text("three")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("four")
    vocabulary = read_vocabulary(folder, {})
    assert vocabulary.templates == {"default": "three", "tool_use": "two", "rag": "four"}
    metadata = vocabulary.metadata()
    assert metadata["tokenizer.chat_template"] == "three"
    assert metadata["tokenizer.chat_template.rag"] == "four"
    with Probe(metadata) as probe:
        assert probe.encode("a")


# --- sizes and damage ------------------------------------------------------------------------------------------------


def test_rows_pad_and_cut(tmp_path: Path) -> None:
    folder = train(tmp_path, split(QWEN2), size=400)
    padded = read_vocabulary(folder, {"vocab_size": 416})
    assert padded.size == 416 and padded.tokens[415] == "[PAD415]" and padded.types[400:] == (5,) * 16
    assert read_vocabulary(folder, {"text_config": {"vocab_size": 408}}).size == 408
    assert read_vocabulary(folder, {"vocab_size": 416}, rows=402).size == 402
    check_parity(padded)
    with pytest.raises(CorruptCheckpoint, match="400 tokens but the model only 399"):
        read_vocabulary(folder, {"vocab_size": 399})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|image|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    cut = read_vocabulary(folder, {"vocab_size": 400})
    assert cut.size == 400 and any("<|image|>" in w for w in cut.warnings)
    check_parity(cut)


def test_added_tokens_keep_the_ids_of_the_file(tmp_path: Path) -> None:
    """A gap before the added tokens: the tokenizers library would number them anew, the embedding does not."""
    folder = train(tmp_path, split(QWEN2), size=400)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 410, "content": "<|far|>"})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    vocabulary = read_vocabulary(folder, {})
    assert vocabulary.tokens[405] == "[PAD405]" and vocabulary.tokens[410] == "<|far|>"
    assert vocabulary.reference().encode("<|far|>", add_special=False) == [410]
    assert check_parity(vocabulary) == 0


def _break_duplicate(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["zz-new"] = 300


def _break_merge(data: dict[str, Any]) -> None:
    data["model"]["merges"][5] = ["q", "nowhere"]


def _break_merge_kind(data: dict[str, Any]) -> None:
    data["model"]["merges"][5] = ["q", 7]


def _break_merge_count(data: dict[str, Any]) -> None:
    data["model"]["merges"][5] = "a b c"


def _break_id(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["zz-new"] = 1 << 40


def _break_id_kind(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["zz-new"] = "7"


def _break_added(data: dict[str, Any]) -> None:
    data["added_tokens"][1]["id"] = 0


def _break_clash(data: dict[str, Any]) -> None:
    data["added_tokens"][1]["id"] = 300


def _break_vocab(data: dict[str, Any]) -> None:
    data["model"]["vocab"] = ["a"]


def _break_model(data: dict[str, Any]) -> None:
    del data["model"]


def _break_pre(data: dict[str, Any]) -> None:
    data["pre_tokenizer"]["pretokenizers"][0] = 3


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_break_duplicate, "share id 300"),
        (_break_merge, "merge 5 .*nowhere"),
        (_break_merge_kind, "merge"),
        (_break_merge_count, "merge 5"),
        (_break_id, str(1 << 40)),
        (_break_id_kind, "'7'"),
        (_break_added, "share id 0"),
        (_break_clash, "id 300"),
        (_break_vocab, "vocab"),
        (_break_model, "model"),
        (_break_pre, "pre_tokenizer"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, damage: Callable[[dict[str, Any]], None], named: str) -> None:
    folder = train(tmp_path, split(QWEN2), size=400)
    data = json.loads((folder / "tokenizer.json").read_text())
    damage(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CorruptCheckpoint, match=named):
        read_vocabulary(folder, {})


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000, "null"])
def test_files_that_are_not_json_objects(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json"):
        read_vocabulary(tmp_path, {})


def test_a_damaged_sentencepiece_model(test_data: Path, tmp_path: Path) -> None:
    whole = (test_data / "models" / "stories260K" / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    chance = random.Random(7)
    for trial in range(300):
        data = bytearray(whole[: chance.randrange(len(whole))] if trial % 2 else whole)
        for _ in range(trial % 5):
            data[chance.randrange(len(data))] = chance.randrange(256) if data else 0
        path.write_bytes(bytes(data))
        try:
            read_vocabulary(tmp_path, {})
        except (CorruptCheckpoint, UnsupportedVocabulary) as e:
            assert str(e)


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x05\x0a\x7fabc",  # a piece whose text is longer than the piece
        b"\x0a\xff\x01abc",  # a piece longer than the file
        b"\x0a" + b"\x80" * 11 + b"\x01",  # a length of 77 bits
        b"\x0a\x02\x0a\x00\x0b",  # a group, which the format has given up
        b"\x0a\x04\x0a\x02\xff\xfe",  # text that is not UTF-8
        b"\x0a\x04\x0a\x00\x18\x09",  # a type of piece that does not exist
        b"\x12\x00",  # no pieces at all
    ],
)
def test_sentencepiece_fields_that_lie(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.model"):
        read_vocabulary(tmp_path, {})


def test_tiktoken_files_alone_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedVocabulary, match=r"no tokenizer\.json"):
        read_vocabulary(tmp_path, {})
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(UnsupportedVocabulary, match="tiktoken") as error:
        read_vocabulary(tmp_path, {})
    assert "save_pretrained" in error.value.hint
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(UnsupportedVocabulary, match="tiktoken"):
        read_vocabulary(tmp_path, {})


def test_vocab_json_with_merges_txt(tmp_path: Path) -> None:
    folder = train(tmp_path / "whole", pre_tokenizers.ByteLevel(add_prefix_space=False))
    whole = read_vocabulary(folder, {})
    (tmp_path / "parts").mkdir()
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(tmp_path / "parts"))
    vocabulary = read_vocabulary(tmp_path / "parts", {})
    assert vocabulary.tokens == whole.tokens and vocabulary.merges == whole.merges
    assert vocabulary.types[:3] == (3, 1, 1)  # nothing says that the other two are special
    assert check_parity(vocabulary) <= check_parity(whole)
    merges = tmp_path / "parts" / "merges.txt"
    merges.write_text(merges.read_text() + "one two three\n")
    with pytest.raises(CorruptCheckpoint, match="one two three"):
        read_vocabulary(tmp_path / "parts", {})


def test_kinds_that_llama_cpp_lacks(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedVocabulary, match="WordLevel"):
        read_vocabulary(tmp_path, {})
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedVocabulary, match="byte_fallback"):
        read_vocabulary(tmp_path, {})


def test_truncation_and_padding_in_the_file_do_not_reach_the_reference(tmp_path: Path) -> None:
    folder = train(tmp_path, split(QWEN2), size=400)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    reference = read_vocabulary(folder, {}).reference()
    assert len(reference.encode("x", add_special=True)) == 1
    assert len(reference.encode(corpus.TEXT, add_special=True)) > 1000


def test_importing_loads_nothing_heavy_and_planning_needs_no_tokenizer_library(tmp_path: Path) -> None:
    folder = train(tmp_path, split(QWEN2), size=400)
    code = (
        "import sys; from pathlib import Path; from edgekit.vocab import read_vocabulary\n"
        f"assert read_vocabulary(Path({str(folder)!r}), {{}}).pre == 'qwen2'\n"
        "heavy = {'tokenizers', 'llama_cpp', 'jinja2', 'transformers', 'torch', 'sentencepiece'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_the_corpus_is_what_it_says() -> None:
    assert 250 <= len(corpus.STRINGS) <= 450
    assert len(set(corpus.STRINGS)) == len(corpus.STRINGS)
    assert len(corpus.TEXT) >= 6000
    assert any(unicodedata.normalize("NFC", s) != s for s in corpus.STRINGS)
    categories = {unicodedata.category(c) for s in corpus.STRINGS for c in s}
    assert {"Lu", "Ll", "Lo", "Mn", "Mc", "Nd", "No", "Sc", "Sm", "So", "Zs", "Cc", "Cf", "Pi", "Pf"} <= categories
