"""The model's vocabulary as llama.cpp needs it, and the model's own tokenizer to compare with.

Knows tokenizer files and llama.cpp's tokenizers; knows no tensor. Importing it loads no tokenizer library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.chat import Template
from edgekit.errors import CorruptCheckpoint, UnsupportedVocabulary
from edgekit.gguf_file import MetaValue, Typed
from edgekit.vocab import bpe, sentencepiece, special, unigram, wordpiece
from edgekit.vocab.built import NORMAL, PAD_SCORE, UNUSED, Built, Limit, check_unique
from edgekit.vocab.equivalent import tokenizer_json
from edgekit.vocab.files import FAIRSEQ, Added, Files, added_tokens, read_files
from edgekit.vocab.limits import added_limits, forced_limits, literal_limits, name_hint, normalized_limits
from edgekit.vocab.probe import Probe
from edgekit.vocab.protobuf import BPE, UNIGRAM, SentencePiece, read_sentencepiece
from edgekit.vocab.reference import Reference, TokenizerJson
from edgekit.vocab.special import KEYS

__all__ = ["Limit", "Probe", "Reference", "Vocabulary", "read_vocabulary"]


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id and everything else that goes into the `tokenizer.*` keys of a GGUF."""

    model: str
    """llama.cpp's kind: gpt2 (byte-level BPE), llama (SentencePiece BPE), bert (WordPiece), t5 (Unigram)."""
    pre: str
    """llama.cpp's name for the way words are split, `default` where there is no choice."""
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    ids: Mapping[str, int]
    """Special tokens by role: bos, eos, eot, eom, unk, sep, pad, cls, mask, fim_pre, ..."""
    add_bos: bool
    add_eos: bool
    stops: tuple[int, ...]
    """Ids that end generation according to the model's files."""
    templates: dict[str, str]
    """Chat templates by name (`default` is the one to use)."""
    warnings: tuple[str, ...]
    """What the runtime cannot do as the model's own tokenizer does, one sentence each."""
    limits: tuple[Limit, ...] = field(repr=False, compare=False)
    added: Mapping[int, Added] = field(repr=False, compare=False)
    extra: Mapping[str, MetaValue] = field(repr=False, compare=False)
    files: Files = field(repr=False, compare=False)
    spm: SentencePiece | None = field(repr=False, compare=False)
    lead: str = ""
    """What a text must begin with for the runtime to see it as the model's tokenizer sees every text."""
    name_hint: str = ""
    """A word that `general.name` must hold for the runtime to treat spaces after special tokens as the model does."""

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def chat_template(self) -> str | None:
        return self.templates.get("default")

    @property
    def bos_text(self) -> str:
        return self._text("bos")

    @property
    def eos_text(self) -> str:
        return self._text("eos")

    def special_texts(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, `pad_token`, ... as a chat template sees them: only those the files name."""
        roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
        named = {f"{role}_token": text for role in roles if (text := self.files.special_text(role))}
        for role in ("bos", "eos"):
            if f"{role}_token" not in named and not self.files.config and role in self.ids:
                named[f"{role}_token"] = self._text(role)
        return named

    @property
    def added_texts(self) -> tuple[str, ...]:
        """Texts of the added tokens: those with a role first, then those that are not special, then the rest."""
        named = [self.tokens[i] for i in dict.fromkeys((*self.ids.values(), *self.stops))]
        ordered = sorted((t for t in self.added.values() if t.id < self.size), key=lambda t: t.special)
        return tuple(dict.fromkeys([t for t in named if t.strip()] + [t.content for t in ordered]))

    def template(self) -> Template | None:
        """The default chat template with the texts of the special tokens that the model's files name, or None."""
        return None if self.chat_template is None else Template(self.chat_template, self.special_texts())

    def excuse(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> str:
        """Why the runtime's ids for `text` may differ from the model's own, or the empty string."""
        how = {"add_special": add_special, "parse_special": parse_special}
        return next((limit.reason for limit in self.limits if limit.covers(text, **how)), "")

    def reference(self) -> Reference:
        """The model's own tokenizer. Raises UnsupportedVocabulary if its library refuses it."""
        if self.files.tokenizer is not None:
            return TokenizerJson(self.files.tokenizer, self.added, self.files.root / "tokenizer.json")
        assert self.spm is not None and self.files.spm is not None
        before = (self.ids["bos"],) if self.add_bos else ()
        after = (self.ids["eos"],) if self.add_eos else ()
        return TokenizerJson(tokenizer_json(self.spm, self.added, before, after), self.added, self.files.spm)

    def metadata(self) -> dict[str, MetaValue]:
        """All `tokenizer.*` keys."""
        meta: dict[str, MetaValue] = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
        }
        if self.scores is not None:
            meta["tokenizer.ggml.scores"] = self.scores
        if self.merges is not None:
            meta["tokenizer.ggml.merges"] = self.merges or Typed("array:string", [])
        meta |= {f"tokenizer.ggml.{KEYS[role]}": number for role, number in self.ids.items()}
        meta["tokenizer.ggml.add_bos_token"] = self.add_bos
        meta["tokenizer.ggml.add_eos_token"] = self.add_eos
        meta |= self.extra
        if self.chat_template is not None:
            meta["tokenizer.chat_template"] = self.chat_template
            others = {n: t for n, t in self.templates.items() if n != "default"}
            if others:
                meta["tokenizer.chat_templates"] = tuple(others)
            meta |= {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
        return meta

    def _text(self, role: str) -> str:
        return self.tokens[self.ids[role]] if role in self.ids else ""


def read_vocabulary(root: Path, config: Mapping[str, Any], *, rows: int | None = None) -> Vocabulary:
    """The vocabulary in the folder `root` for a model with this config.json.

    It gets as many tokens as the embedding has rows: `rows`, else `vocab_size` of the config. Raises CorruptCheckpoint
    for files that contradict themselves, UnsupportedVocabulary for a tokenizer that llama.cpp cannot reproduce; that
    message shows strings whose ids would differ.
    """
    files = read_files(Path(root), config)
    added = added_tokens(files)
    rows = _rows(config) if rows is None else rows
    model = _sentencepiece(files)
    if files.tokenizer is None:
        assert model is not None and files.spm is not None
        if files.spm.name == FAIRSEQ:
            raise UnsupportedVocabulary(
                f"{files.spm}: such a model is numbered otherwise in the file than in the embedding (fairseq)",
                "put the model's tokenizer.json beside it: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
        built = _from_model(model, added, files)
    else:
        built = _from_json(files, added, model)
    return _finish(built, files, added, model, rows)


def _rows(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    for source in (config, text if isinstance(text, dict) else {}):
        size = source.get("vocab_size")
        if isinstance(size, int) and size > 0:
            return size
    return None


def _kind(tokenizer: Mapping[str, Any]) -> str:
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        raise CorruptCheckpoint("tokenizer.json: no model object", "download the file again")
    return str(model.get("type") or ("BPE" if "merges" in model else "Unigram" if "unk_id" in model else "WordPiece"))


def _sentencepiece(files: Files) -> SentencePiece | None:
    """The SentencePiece model, where it is all there is, or has the scores that tokenizer.json lacks."""
    if files.spm is None:
        return None
    if files.tokenizer is not None and (_kind(files.tokenizer) != "BPE" or bpe.is_byte_level(files.tokenizer)):
        return None
    return read_sentencepiece(files.spm)


def _from_model(model: SentencePiece, added: Mapping[int, Added], files: Files) -> Built:
    laid = sentencepiece.lay_over(model, added)
    if model.model_type == UNIGRAM:
        return unigram.from_model(model, laid)
    if model.model_type != BPE:
        raise UnsupportedVocabulary(f"{files.spm}: model type {model.model_type} is neither Unigram (1) nor BPE (2)")
    return sentencepiece.from_model(model, laid)


def _from_json(files: Files, added: Mapping[int, Added], model: SentencePiece | None) -> Built:
    tokenizer = files.tokenizer
    assert tokenizer is not None
    kind = _kind(tokenizer)
    if kind == "WordPiece":
        return wordpiece.build(tokenizer, added)
    if kind == "Unigram":
        return unigram.from_json(tokenizer, added)
    if kind != "BPE":
        raise UnsupportedVocabulary(f"tokenizer.json: llama.cpp has no {kind} tokenizer")
    if bpe.is_byte_level(tokenizer):
        return bpe.build(files, added)
    return sentencepiece.from_json(files, added, model)


def _finish(
    built: Built, files: Files, added: Mapping[int, Added], model: SentencePiece | None, rows: int | None
) -> Vocabulary:
    warnings = _fit(built, rows)
    tokenizer = files.tokenizer or {}
    frame = special.frame_of(tokenizer, built.tokens) if files.tokenizer else special.frame_of_config(files, model)
    found = special.find(files, built.tokens, frame, _roles(tokenizer, model, built))
    check_unique(built.tokens)
    kin = built.model == "bert" or files.model_config.get("model_type") in ("bert", "roberta", "xlm-roberta")
    segments = files.model_config.get("type_vocab_size", 2 if kin else None)
    if isinstance(segments, int) and segments > 0:  # BERT's: its runtime reads it with the vocabulary
        built.extra["tokenizer.ggml.token_type_count"] = segments
    limits = [*built.limits, *added_limits(added), *special.frame_limits(frame, built.tokens)]
    limits += normalized_limits(tokenizer, added)
    limits += [*literal_limits(built.model, added), *forced_limits(built)]
    if frame.pair_sep is not None and built.model in ("bert", "gpt2", "t5"):
        built.extra["tokenizer.ggml.add_sep_token"] = frame.pair_sep
    return Vocabulary(
        model=built.model,
        pre=built.pre,
        tokens=tuple(built.tokens),
        types=tuple(built.types),
        scores=None if built.scores is None else tuple(built.scores),
        merges=None if built.merges is None else tuple(built.merges),
        ids=found.ids,
        add_bos=found.add_bos,
        add_eos=found.add_eos,
        stops=found.stops,
        templates=dict(files.templates),
        warnings=tuple(dict.fromkeys([*warnings, *found.warnings, *(limit.reason for limit in limits)])),
        limits=tuple(limits),
        added=added,
        extra=built.extra,
        files=files,
        spm=model,
        name_hint=name_hint(built, added),
        lead=built.lead,
    )


def _fit(built: Built, rows: int | None) -> list[str]:
    """Cuts or pads the vocabulary to `rows` tokens, in place."""
    size = len(built.tokens)
    if rows is None or rows == size:
        return []
    if rows > size:
        built.tokens += [f"[PAD{i}]" for i in range(size, rows)]
        built.types += [UNUSED] * (rows - size)
        if built.scores is not None:
            built.scores += [PAD_SCORE] * (rows - size)
        return []
    cut = [t for t, kind in zip(built.tokens[rows:], built.types[rows:], strict=True) if kind == NORMAL]
    if cut:
        raise CorruptCheckpoint(
            f"the tokenizer has {size} tokens but the model only {rows} rows for them; {cut[0]!r} would have none",
            "tokenizer files and config.json come from two different models",
        )
    lost = built.tokens[rows:]
    del built.tokens[rows:], built.types[rows:]
    if built.scores is not None:
        del built.scores[rows:]
    return [f"{len(lost)} added tokens have no row in the model and are left out: {', '.join(lost[:4])}"]


def _roles(tokenizer: Mapping[str, Any], model: SentencePiece | None, built: Built) -> dict[str, int]:
    """Special ids that the vocabulary itself names."""
    roles: dict[str, int] = {}
    inner = tokenizer.get("model") or {}
    unk = inner.get("unk_token")
    if isinstance(inner.get("unk_id"), int):
        roles["unk"] = inner["unk_id"]
    elif unk in built.tokens:
        roles["unk"] = built.tokens.index(unk)
    if model is not None:
        named = {"bos": model.bos_id, "eos": model.eos_id, "unk": model.unk_id, "pad": model.pad_id}
        roles |= {role: number for role, number in named.items() if 0 <= number < len(built.tokens)}
    return roles
