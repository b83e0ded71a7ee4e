"""Small tokenizers of the kinds that encoders have, trained on text that comes with Python: RoBERTa's byte-level BPE,
XLM-RoBERTa's Unigram, ModernBERT's BPE."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3 of RoBERTa's kin; `<mask>` comes last."""


def prose() -> list[str]:
    """Lines of Python's own json package."""
    return [line for path in sorted(Path(json.__file__).parent.glob("*.py")) for line in path.read_text().splitlines()]


@cache
def roberta(vocab: int) -> str:
    """tokenizer.json of a byte-level BPE framed by <s> and </s>, a pair by two </s> in the middle."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 1, special_tokens=list(FAIRSEQ), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(prose(), trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return str(tokenizer.to_str())


@cache
def unigram(vocab: int) -> str:
    """tokenizer.json of a SentencePiece Unigram in the numbering of fairseq, as XLM-RoBERTa's files have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab - 1, special_tokens=list(FAIRSEQ), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(prose(), trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return str(tokenizer.to_str())


@cache
def modernbert(vocab: int) -> str:
    """tokenizer.json of a byte-level BPE framed by [CLS] and [SEP], NFC before it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(prose(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return str(tokenizer.to_str())


def write(root: Path, tokenizer: str, names: Sequence[str], **config: Any) -> None:
    """tokenizer.json and tokenizer_config.json into `root`; `names` of bos, pad, eos, unk, mask."""
    roles = dict(zip(("bos", "pad", "eos", "unk", "mask"), names, strict=True)) | {"cls": names[0], "sep": names[2]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
    settings |= {f"{role}_token": name for role, name in roles.items()} | config
    (root / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    (root / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
