"""The opened checkpoint itself, and the digest that names its content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edgekit.checkpoint._files import inside
from edgekit.checkpoint._tensor import TensorRef
from edgekit.errors import CorruptCheckpoint
from edgekit.gguf_file import GgufFile

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Files beside the weights that a conversion reads."""

_SAMPLE = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """What of a weight file goes into the digest."""

    path: Path
    size: int
    data_start: int
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Checkpoint:
    """A model opened by its headers. `tensors` are in file order; `dtype` is the one most weights are stored in.

    kind `safetensors`: `root` is the model's folder, `config` its config.json, `gguf` None. kind `gguf`: `root` is the
    folder of the file, `config` empty, the metadata in `gguf.metadata` (of a split file, the first part's, without its
    `split.` keys). `card` holds what the model card says in front (`license`, `base_model`, ...). `revision` is the
    commit of a hub download.
    """

    ref: str
    root: Path
    name: str
    kind: str
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorRef] = field(repr=False)
    dtype: str
    gguf: GgufFile | None = field(default=None, repr=False)
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)
    revision: str | None = None
    sources: tuple[Source, ...] = field(default=(), repr=False)

    @property
    def parameters(self) -> int:
        """Number of weights: values of every floating-point tensor, FP8 scales not counted."""
        return sum(t.values for t in self.tensors.values() if "F" in t.dtype)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) that names this content, not its place: for work folders and manifests.

        Over the small files that decide a conversion (config, tokenizer, templates) in full, and of each weight file
        name, size, header, and 4 KiB out of the middle of every tensor. Any training step changes it; a single weight
        edited by hand may not. Folder, times and the model card do not count.
        """
        return _digest(self.root if self.kind == "safetensors" else None, self.sources)


def _digest(root: Path | None, sources: tuple[Source, ...]) -> str:
    total = hashlib.sha256(b"edgekit checkpoint 1\n")
    try:
        _hash_content(total, root, sources)
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {e.filename}: {e.strerror}", "start again") from None
    return total.hexdigest()


def _hash_content(total: hashlib._Hash, root: Path | None, sources: tuple[Source, ...]) -> None:
    if root:
        templates = sorted(f"{p.parent.name}/{p.name}" for p in root.glob("additional_chat_templates/*.jinja"))
        for name in (*SMALL_FILES, *templates):
            if (root / name).is_file():
                total.update(f"{name}\n".encode() + hashlib.sha256(inside(root, name).read_bytes()).digest())
    for source in sources:
        total.update(f"{source.path.name}\n{source.size}\n".encode())
        with source.path.open("rb", buffering=0) as file:
            total.update(os.pread(file.fileno(), source.data_start, 0))
            for start, stop in source.spans:
                size = min(_SAMPLE, stop - start)
                total.update(os.pread(file.fileno(), size, (start + stop - size) // 2))
