"""What a user may ask for, and a model opened and understood. Knows headers; decides nothing about formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit import arch
from edgekit.arch import Blueprint, Role
from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.errors import EdgekitError
from edgekit.export import gguf
from edgekit.gguf_file import MetaValue, encode_header
from edgekit.units import Progress, silent
from edgekit.vocab import Vocabulary, read_vocabulary


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may ask of `convert` and `plan` beside model and target. None = the recipe decides."""

    recipe: str = "default"
    format: str | None = None
    quant: str | None = None
    context: int | None = None
    kv: str | None = None
    prefer: str | None = None
    target_size: int | None = None
    target_bpw: float | None = None
    calibration: str | None = None
    verify: str | None = None
    name: str | None = None
    out: Path | None = None
    strict: bool = False
    force: bool = False
    threads: int | None = None
    effort: str = "normal"
    task: str | None = None


@dataclass(frozen=True)
class Source:
    """A model opened and understood: headers, family, tokenizer, and what metadata does not depend on the format."""

    checkpoint: Checkpoint
    blueprint: Blueprint
    vocabulary: Vocabulary | None
    metadata: Mapping[str, MetaValue]


def open_source(model: str | Path, *, name: str | None = None, progress: Progress = silent) -> Source:
    """Open what the user named, under another `name` if one is given.

    Raises CorruptCheckpoint, UnsupportedModel, UnsupportedVocabulary, DownloadFailed.
    """
    checkpoint = open_checkpoint(model, progress=progress)
    checkpoint = replace(checkpoint, name=safe_name(name or checkpoint.name))
    blueprint = arch.blueprint(checkpoint)
    rows = next((t.shape[0] for t in blueprint.tensors if t.role is Role.EMBED), None)
    vocabulary = None
    if checkpoint.kind != "gguf":
        vocabulary = read_vocabulary(checkpoint.root, checkpoint.config, rows=rows)
    return Source(checkpoint, blueprint, vocabulary, gguf.metadata(checkpoint, blueprint, vocabulary))


def safe_name(name: str) -> str:
    """A file name out of a model name: what is not a letter, digit, dot, dash or underscore becomes a dash."""
    clean = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip(".-")
    if not clean:
        raise EdgekitError(f"{name!r} cannot be a file name", "choose one with --name")
    return clean[:120]


def size_budget(source: Source, options: Options) -> int | None:
    """Bytes that the file may have: --target-size, or --target-bpw times the weights plus what metadata takes."""
    if options.target_size is not None and options.target_bpw is not None:
        raise EdgekitError("--target-size and --target-bpw say the same thing", "give one of them")
    if options.target_bpw is None:
        return options.target_size
    if not 0 < options.target_bpw <= 32:
        raise EdgekitError(f"{options.target_bpw} bits per weight make no sense", "write for example --target-bpw 4.5")
    weights = sum(t.values for t in source.blueprint.tensors if t.role is not Role.ROPE)
    names = [(t.name, t.shape, 0, 4 * t.values) for t in source.blueprint.tensors]
    return round(weights * options.target_bpw / 8) + len(encode_header(source.metadata, names).bytes)
