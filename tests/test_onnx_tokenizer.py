"""A model that comes with a SentencePiece file alone keeps its own treatment of spaces; sentencepiece is the judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgekit.export.onnx._tokenizer import restore

TEXTS = ["the", " the", "  two spaces", "a b", "end ", "\n line", "Größe 東京 🙂", "x = 1\n    return x", ""]


@pytest.mark.slow
def test_spaces_are_those_of_sentencepiece(test_data: Path, tmp_path: Path) -> None:
    import sentencepiece
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    root = tmp_path / "model"
    root.mkdir()
    shutil.copy(test_data / "tokenizers/llama-2/tokenizer.model", root)
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (root / "tokenizer_config.json").write_text(json.dumps(said))
    (root / "config.json").write_text(json.dumps({"model_type": "llama"}))
    AutoTokenizer.from_pretrained(root).save_pretrained(tmp_path / "converted")
    path = tmp_path / "converted/tokenizer.json"
    judge = sentencepiece.SentencePieceProcessor(model_file=str(root / "tokenizer.model"))

    def differing() -> list[str]:
        ours = Tokenizer.from_file(str(path))
        return [t for t in TEXTS if ours.encode(t, add_special_tokens=False).ids != judge.encode(t)]

    assert differing(), "transformers converts it as sentencepiece reads it: the repair can go"
    assert restore(root, path)
    assert differing() == []
    assert not restore(root, path), "once is enough"


def test_a_tokenizer_of_the_models_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    other = tmp_path / "other.json"
    other.write_text('{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Metaspace"}}')
    before = other.read_text()
    assert not restore(tmp_path, other)
    assert other.read_text() == before
