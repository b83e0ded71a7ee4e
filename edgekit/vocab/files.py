"""The tokenizer files of a model folder, read once and bounded. Knows which files there are, not what they mean."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.errors import CorruptCheckpoint, UnsupportedVocabulary

MAX_JSON_BYTES = 192 << 20  # six times the largest tokenizer.json seen (Gemma 3, 33 MB)
MAX_TEXT_BYTES = 4 << 20
MAX_MODEL_BYTES = 64 << 20
FAIRSEQ = "sentencepiece.bpe.model"  # XLM-RoBERTa's name for it, and that of its kin
SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", FAIRSEQ)

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Added:
    """One added token: matched in the text before anything else sees it."""

    id: int
    content: str
    special: bool
    normalized: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


@dataclass(frozen=True)
class Files:
    """What was found in `root`. `tokenizer` is tokenizer.json or None; `spm` the path of a SentencePiece model."""

    root: Path
    tokenizer: Json | None
    config: Json
    special_map: Json
    generation: Json
    model_config: Json
    spm: Path | None
    templates: Mapping[str, str] = field(default_factory=dict)

    def special_text(self, role: str) -> str | None:
        """What tokenizer_config.json, then special_tokens_map.json, call the `role` token (`bos`, `eos`, ...)."""
        for source in (self.config, self.special_map):
            entry = source.get(f"{role}_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str) and text:
                return text
        return None

    def config_ids(self, role: str) -> list[int]:
        """Ids that generation_config.json, then config.json, give for `role`; lists are flattened, in order."""
        found: list[int] = []
        text_config = self.model_config.get("text_config")
        for source in (self.generation, self.model_config, text_config if isinstance(text_config, dict) else {}):
            value = source.get(f"{role}_token_id")
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, int) and not isinstance(item, bool) and item >= 0 and item not in found:
                    found.append(item)
        return found


def read_files(root: Path, model_config: Json) -> Files:
    """What the Hugging Face folder holds. Raises CorruptCheckpoint, UnsupportedVocabulary if there is nothing."""
    config = _object(root / "tokenizer_config.json") or {}
    tokenizer = _object(root / "tokenizer.json") or _from_vocab_and_merges(root, config, model_config)
    spm = next((p for name in SENTENCEPIECE_NAMES if (p := root / name).is_file()), None)
    if tokenizer is None and spm is None:
        raise _nothing_usable(root)
    return Files(
        root=root,
        tokenizer=tokenizer,
        config=config,
        special_map=_object(root / "special_tokens_map.json") or {},
        generation=_object(root / "generation_config.json") or {},
        model_config=model_config,
        spm=spm,
        templates=_templates(root, config),
    )


def added_tokens(files: Files) -> dict[int, Added]:
    """Added tokens by id: tokenizer.json's, then those that only tokenizer_config.json or added_tokens.json list."""
    found: dict[int, Added] = {}
    for entry in _entries((files.tokenizer or {}).get("added_tokens"), "tokenizer.json"):
        token = _added(entry.get("id"), entry, "tokenizer.json")
        if token.id in found:
            raise CorruptCheckpoint(f"tokenizer.json: two added tokens share id {token.id}")
        found[token.id] = token
    decoder = files.config.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and str(key).isdecimal() and int(key) not in found:
            found[int(key)] = _added(int(key), entry, "tokenizer_config.json")
    for text, number in (_object(files.root / "added_tokens.json") or {}).items():
        if isinstance(number, int) and number not in found:
            special = text in _named_specials(files)
            found[number] = Added(number, text, special, False, False, False, False)
    return dict(sorted(found.items()))


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes. Raises CorruptCheckpoint."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise CorruptCheckpoint(f"{path}: {size} bytes, more than the {limit} a tokenizer file may have")
        return path.read_bytes()
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {path}: {e.strerror}") from None


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """A UTF-8 file, its line ends as they are. Raises CorruptCheckpoint."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as e:
        raise CorruptCheckpoint(f"{path}: not UTF-8 text at byte {e.start}") from None


def _object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    data = read_bytes(path, MAX_JSON_BYTES)
    collecting = gc.isenabled()
    gc.disable()  # half a million small lists would set it off again and again, for nothing
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise CorruptCheckpoint(f"{path}: not JSON ({e})") from None
    finally:
        if collecting:
            gc.enable()
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _entries(value: object, where: str) -> Iterator[dict[str, Any]]:
    for entry in value if isinstance(value, list) else ():
        if not isinstance(entry, dict):
            raise CorruptCheckpoint(f"{where}: added_tokens holds {entry!r}, not an object")
        yield entry


def _added(number: object, entry: Mapping[str, Any], where: str) -> Added:
    content = entry.get("content")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0 or not isinstance(content, str):
        raise CorruptCheckpoint(f"{where}: added token {content!r} has id {number!r}")
    flags = (bool(entry.get(k)) for k in ("special", "normalized", "lstrip", "rstrip", "single_word"))
    return Added(number, content, *flags)


def _named_specials(files: Files) -> set[str]:
    roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    return {text for role in roles if (text := files.special_text(role))}


def _from_vocab_and_merges(root: Path, config: Json, model_config: Json) -> dict[str, Any] | None:
    """The tokenizer.json that a GPT-2 style vocab.json + merges.txt stand for (byte-level BPE). RoBERTa's kind puts
    tokens around a text, which such files do not say."""
    vocab, merges_file = _object(root / "vocab.json"), root / "merges.txt"
    if vocab is None or not merges_file.is_file():
        return None
    lines = read_text(merges_file, MAX_MODEL_BYTES).split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
    for number, line in enumerate(merges):
        if line.count(" ") != 1:
            raise CorruptCheckpoint(f"{merges_file}: merge {number} is {line!r}, not two tokens with a space between")
    prefix = config.get("add_prefix_space") is True
    decoder = config.get("added_tokens_decoder")
    added = [
        {**_PLAIN, "id": int(k), **v}
        for k, v in (decoder.items() if isinstance(decoder, dict) else ())
        if str(k).isdecimal() and isinstance(v, dict)
    ]
    roberta = model_config.get("model_type") == "roberta"
    return {
        "version": "1.0",
        "added_tokens": added or (_roberta_specials(vocab) if roberta else _guessed_specials(vocab)),
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True},
        "post_processor": _roberta_frame(root, vocab) if roberta else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def _roberta_specials(vocab: Json) -> list[dict[str, Any]]:
    """What transformers' RobertaTokenizer takes for special by itself."""
    names = [name for name in ("<s>", "<pad>", "</s>", "<unk>", "<mask>") if name in vocab]
    return [{**_PLAIN, "id": vocab[n], "content": n, "special": True} for n in names]


def _roberta_frame(root: Path, vocab: Json) -> dict[str, Any]:
    if not {"<s>", "</s>"} <= vocab.keys():
        raise UnsupportedVocabulary(
            f"{root / 'vocab.json'}: no <s> and </s>", "put the model's tokenizer.json beside it"
        )
    return {"type": "RobertaProcessing", "cls": ["<s>", vocab["<s>"]], "sep": ["</s>", vocab["</s>"]],
            "trim_offsets": True, "add_prefix_space": False}  # fmt: skip


def _guessed_specials(vocab: Json) -> list[dict[str, Any]]:
    """GPT-2 folders from before added_tokens_decoder: the one special token is the end of text."""
    text = "<|endoftext|>"
    return [{**_PLAIN, "id": vocab[text], "content": text, "special": True}] if text in vocab else []


def _templates(root: Path, config: Json) -> dict[str, str]:
    """Chat templates by name; `default` first. Files beside tokenizer_config.json win, as in transformers."""
    templates: dict[str, str] = {}
    value = config.get("chat_template")
    if value is None and (root / "chat_template.json").is_file():
        value = (_object(root / "chat_template.json") or {}).get("chat_template")
    if isinstance(value, str):
        templates["default"] = value
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str):
            templates[entry["name"]] = entry["template"]
    if (root / "chat_template.jinja").is_file():
        templates["default"] = read_text(root / "chat_template.jinja")
    for path in sorted((root / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path)
    return templates


def _nothing_usable(root: Path) -> UnsupportedVocabulary:
    tiktoken = [p.name for p in sorted(root.glob("*.tiktoken"))] + [n for n in ("tekken.json",) if (root / n).is_file()]
    if tiktoken:
        return UnsupportedVocabulary(
            f"{root}: {tiktoken[0]} is a tiktoken vocabulary without the rules that go with it",
            "load it once with transformers (AutoTokenizer.from_pretrained) and save_pretrained() into this folder: "
            "that writes a tokenizer.json",
        )
    return UnsupportedVocabulary(
        f"{root}: no tokenizer.json, no tokenizer.model, no vocab.json with merges.txt",
        "download the tokenizer files of the model into the folder",
    )
