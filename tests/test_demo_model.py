"""The shipped demo model is what its card says: small, whole, k-quantizable, and better than counting words."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "edgekit" / "demo"
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
TEXTS = [
    "def f(x):\n    return x\n",
    "naïve café, 東京 🍓!",
    "a  b\t\tc\r\n\r\n  d",
    "1234567.89e-10",
    "",
    " ",
    "don't I'LL",
]


def header() -> dict[str, Any]:
    """The safetensors header: 8 bytes of length, then JSON (huggingface.co/docs/safetensors)."""
    with (DEMO / "model.safetensors").open("rb") as file:
        content: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    content.pop("__metadata__", None)
    return content


@pytest.fixture(scope="module")
def trainer(monkeypatch_module: pytest.MonkeyPatch) -> Any:
    """scripts/train-demo as a module: it knows which files were held out."""
    monkeypatch_module.setattr(sys, "dont_write_bytecode", True)
    loader = SourceFileLoader("train_demo", str(ROOT / "scripts" / "train-demo"))
    spec = spec_from_loader("train_demo", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch_module.setitem(sys.modules, "train_demo", module)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return loaded.eval()


def held_out_docstrings(trainer: Any) -> list[str]:
    """Docstrings of files that were not trained on, as the trainer writes them."""
    return [
        f"Help on {module}.{name}:\n\n{text}\n"
        for module, source in trainer.sources()
        if trainer.is_held_out(module)
        for _, name, text in trainer.python_docstrings(module, source)
        if name and len(text) > 200
    ]


def test_the_folder_holds_these_files_and_is_small() -> None:
    assert {path.name for path in DEMO.iterdir() if path.name != "__pycache__"} == FILES
    assert sum((DEMO / name).stat().st_size for name in FILES) <= 12_000_000


def test_every_row_is_a_multiple_of_256_and_stored_as_bf16() -> None:
    tensors = header()
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    assert all(entry["shape"][-1] % 256 == 0 for entry in tensors.values())
    assert 3_000_000 <= sum(math.prod(entry["shape"]) for entry in tensors.values()) <= 6_000_000


def test_config_agrees_with_the_tensors_and_the_vocabulary() -> None:
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    tensors = header()
    assert tensors["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], config["hidden_size"]]
    assert "lm_head.weight" not in tensors and config["tie_word_embeddings"]
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    assert layers == set(range(config["num_hidden_layers"]))
    vocabulary = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(vocabulary["model"]["vocab"]) == config["vocab_size"]
    assert vocabulary["added_tokens"][config["eos_token_id"]]["content"] == "<|im_end|>"


def test_the_tokenizer_loses_nothing_and_keeps_special_tokens_whole(tokenizer: Any) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    for index, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        assert tokenizer.encode(text, add_special_tokens=False) == [index]
    assert tokenizer.eos_token_id == 2 and tokenizer.bos_token_id == 0


def test_the_chat_template_writes_what_the_model_was_trained_on(trainer: Any, tokenizer: Any) -> None:
    turns = [("user", " What is os? "), ("assistant", "A module."), ("user", "Thank you.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == trainer.chat(turns)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == trainer.chat(turns) + "<|im_start|>assistant\n"


def test_perplexity_on_unseen_docstrings_is_far_below_word_counting(trainer: Any, tokenizer: Any, model: Any) -> None:
    import torch

    text = "".join("<|endoftext|>" + text for text in held_out_docstrings(trainer)[:40])
    ids = tokenizer.encode(text, add_special_tokens=False)[:4096]
    assert len(ids) >= 2048
    # Counted on this very text: no model that looks at single tokens can do better on it.
    counts = Counter(ids)
    unigram = math.exp(-sum(n * math.log(n / len(ids)) for n in counts.values()) / len(ids))
    rows = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)
    with torch.inference_mode():
        perplexity = math.exp(float(model(input_ids=rows, labels=rows).loss))
    assert perplexity < 0.25 * unigram, (perplexity, unigram)


def test_it_answers_a_greeting_and_stops(tokenizer: Any, model: Any) -> None:
    import torch

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello!"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    answer = out[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer, skip_special_tokens=True).startswith("Hello! Ask me")
