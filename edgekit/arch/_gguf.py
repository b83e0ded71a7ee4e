"""A GGUF as its own blueprint: names pass through, whatever architecture llama.cpp knows.

Knows which keys of a GGUF say how large a model is; knows no family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgekit.arch._family import MAX_LAYERS
from edgekit.arch._make import as_is
from edgekit.arch._names import file_order, left_alone, role_of
from edgekit.arch._types import Blueprint, Geometry, LayerGeometry, Made
from edgekit.checkpoint import Checkpoint, TensorRef
from edgekit.errors import CorruptCheckpoint, UnsupportedModel
from edgekit.gguf_file import GgufFile, plain

_OWN = {
    "general.alignment",
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
}
"""Keys that describe the old file, not the model."""

_WINDOWED: Mapping[str, tuple[int, bool]] = {
    "cohere2": (4, False),
    "exaone4": (4, False),
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "gpt-oss": (2, False),
    "modern-bert": (3, True),
    "olmo2": (4, False),
    "plamo3": (8, False),
    "smallthinker": (4, True),
}
"""Architectures with windowed layers: every how many layers one is full, and whether it is the first of them (else
the last), where the file has no pattern (llama.cpp `load_swa_pattern`)."""


def passed_through(checkpoint: Checkpoint) -> Blueprint:
    """The blueprint of a GGUF. tokenizer.* is left to the caller. Raises UnsupportedModel, CorruptCheckpoint."""
    file = checkpoint.gguf
    arch = file.get("general.architecture") if file else None
    if file is None or not isinstance(arch, str) or not arch:
        raise CorruptCheckpoint(f"{checkpoint.ref}: no general.architecture: not a model for llama.cpp")
    if (kind := file.get("general.type", "model")) != "model":
        raise UnsupportedModel(f"{checkpoint.ref}: general.type is {kind!r}, not a model")
    made = [_made(ref, arch) for ref in checkpoint.tensors.values()]
    metadata = {k: v for k, v in file.metadata.items() if k not in _OWN and not k.startswith(("tokenizer.", "split."))}
    tensors = tuple(sorted(made, key=lambda m: file_order(m.name)))
    return Blueprint(arch, tensors, metadata, _geometry(file, arch, checkpoint.tensors))


def _made(ref: TensorRef, arch: str) -> Made:
    shape, stream = as_is((ref,), lambda _: 0)
    return Made(ref.name, shape, role_of(ref.name), (ref,), stream, left_alone(ref.name, shape, arch))


class _Keys:
    """Numbers of one architecture, single or per layer."""

    def __init__(self, file: GgufFile, arch: str) -> None:
        self._file, self._arch = file, arch
        self.layers = self.one("block_count", 0)
        if self.layers > MAX_LAYERS:
            raise CorruptCheckpoint(f"{file.path}: {arch}.block_count is {self.layers}")

    def raw(self, key: str) -> Any:
        value = self._file.metadata.get(f"{self._arch}.{key}")
        return None if value is None else plain(value)

    def one(self, key: str, default: int) -> int:
        """A number; of a list its largest."""
        return max(self.each(key, default, 1))

    def each(self, key: str, default: int, count: int | None = None) -> list[int]:
        """A number for every layer. Raises CorruptCheckpoint."""
        value = self.raw(key)
        many = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None
        numbers = [default if value is None else value] if many is None else list(many)
        if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise CorruptCheckpoint(f"{self._file.path}: {self._arch}.{key} is {value!r}, expected whole numbers")
        if many is None:
            return numbers * (self.layers if count is None else count)
        if count is None and len(numbers) < self.layers:
            raise CorruptCheckpoint(f"{self._file.path}: {self._arch}.{key} has {len(numbers)} of {self.layers} values")
        return [int(n) for n in (numbers if count else numbers[: self.layers])]


def _geometry(file: GgufFile, arch: str, tensors: Mapping[str, TensorRef]) -> Geometry:
    keys = _Keys(file, arch)
    hidden, heads = keys.one("embedding_length", 0), keys.one("attention.head_count", 0)
    head = hidden // heads if heads else 0
    windows = _windows(keys, arch)
    kv_heads = keys.each("attention.head_count_kv", 0) if keys.raw("attention.head_count_kv") is not None else None
    embed = tensors.get("token_embd.weight")
    return Geometry(
        hidden=hidden,
        heads=heads,
        kv_heads=max(kv_heads, default=heads) if kv_heads else heads,
        ffn=keys.one("feed_forward_length", 0),
        vocab=embed.shape[0] if embed and len(embed.shape) == 2 else keys.one("vocab_size", 0),
        context=keys.one("context_length", 0),
        layers=_layers(keys, head, kv_heads or keys.each("attention.head_count", 0), windows),
        experts=keys.one("expert_count", 0),
        experts_used=keys.one("expert_used_count", 0),
        causal=keys.raw("attention.causal") is not False,
        parallel_residual=bool(keys.raw("use_parallel_residual")),
    )


def _layers(
    keys: _Keys, head: int, kv_heads: Sequence[int], windows: Sequence[int | None]
) -> tuple[LayerGeometry, ...]:
    """Cache of each layer; windowed layers may have heads of another width."""
    key, value = keys.one("attention.key_length", head), keys.one("attention.value_length", head)
    swa = keys.one("attention.key_length_swa", key), keys.one("attention.value_length_swa", value)
    return tuple(
        LayerGeometry(n, *(swa if window else (key, value)), window)
        for n, window in zip(kv_heads, windows, strict=True)
    )


def _windows(keys: _Keys, arch: str) -> list[int | None]:
    """Window of each layer; full where llama.cpp's graph ignores the key (phi3) or where we do not know."""
    window, pattern = keys.one("attention.sliding_window", 0), keys.raw("attention.sliding_window_pattern")
    every, first = _WINDOWED.get(arch, (0, False))
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        every = pattern
    if window and every == pattern == 0:
        return [window] * keys.layers
    if not window or arch == "phi3" or (every <= 0 and not isinstance(pattern, list | tuple)):
        return [None] * keys.layers
    if isinstance(pattern, list | tuple) and len(pattern) >= keys.layers:
        return [window if on else None for on in pattern[: keys.layers]]
    full = 0 if first else every - 1
    return [None if i % every == full else window for i in range(keys.layers)]
