"""The frame that family tables fit into: from a checkpoint and a table to a blueprint, or to an error with a name.

Knows how tables are read; knows no family. Nothing is silently dropped: each tensor of the checkpoint is consumed,
ignored by name, or the reason for a refusal.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from edgekit.arch._config import Settings
from edgekit.arch._make import Maker, as_is
from edgekit.arch._names import file_order, stays_float32
from edgekit.arch._types import Blueprint, Geometry, LayerGeometry, Made, Role
from edgekit.checkpoint import Checkpoint, TensorRef
from edgekit.errors import CorruptCheckpoint, UnsupportedModel
from edgekit.gguf_file import MetaValue

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS

Axis = str | int
EMBED, HEAD = "token_embd.weight", "lm_head.weight"


@dataclass(frozen=True)
class Dims:
    """Sizes of a model. `head` is the width of one attention head, `shared` of the shared expert's middle, `labels` of
    a classifier's logits; `skipped` rows of a position table come before the first position."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    ffn: int
    vocab: int
    context: int
    experts: int = 0
    experts_used: int = 0
    expert_ffn: int = 0
    shared: int = 0
    types: int = 0
    skipped: int = 0
    labels: int = 0

    def size(self, axis: Axis) -> int:
        """A size by the name tables use; `q`, `kv` and `qkv` are widths of projections, `2x` is twice `x`,
        `positions` the rows of a position table."""
        if isinstance(axis, int):
            return axis
        if axis.startswith("2"):
            return 2 * self.size(axis[1:])
        q, kv = self.heads * self.head, self.kv_heads * self.head
        made = {"q": q, "kv": kv, "qkv": q + 2 * kv, "positions": self.context + self.skipped}
        return made.get(axis) or int(getattr(self, axis))


@dataclass(frozen=True)
class Source:
    """Checkpoint tensors that one output is made from: a name with {l} for the layer, where {e} (experts), {h} (heads)
    and {k} (KV heads) stand for all of them, and the shape that each has in terms of Dims."""

    name: str
    shape: tuple[Axis, ...]
    make: Maker = as_is


@dataclass(frozen=True)
class Output:
    """One tensor of the GGUF, {l} for the layer. Several sources are alternatives: checkpoints spell them differently.

    `when` names a switch of the Reading without which the tensor does not exist; layers before `first` have none.
    """

    name: str
    role: Role
    sources: tuple[Source, ...]
    when: str = ""
    first: int = 0


def output(
    name: str, role: Role, source: str, *shape: Axis, make: Maker = as_is, when: str = "", first: int = 0
) -> Output:
    """An Output with one source."""
    return Output(name, role, (Source(source, shape, make),), when, first)


@dataclass(frozen=True)
class Reading:
    """What a family understood of a config. `metadata` is without the architecture's prefix.

    `switches`: which optional outputs exist. `windows`: tokens each layer's KV cache keeps. `tied`: the output matrix
    is the embedding. `extra`: tensors that come from the config alone.
    """

    dims: Dims
    metadata: Mapping[str, MetaValue]
    switches: frozenset[str] = frozenset()
    windows: tuple[int | None, ...] = ()
    extra: tuple[Made, ...] = ()
    notes: tuple[str, ...] = ()
    tied: bool = False
    causal: bool = True
    parallel_residual: bool = False


@dataclass(frozen=True)
class Family:
    """A table. `arch` is general.architecture, `architectures` what config.json calls the classes it covers.

    `head`: what llama.cpp does with the output matrix of a model whose embeddings are tied: `optional` (left out),
    `required` (must be written twice), `never` (it has none but the embedding), `none` (no output at all).
    """

    arch: str
    architectures: tuple[str, ...]
    read: Callable[[Settings, Path], Reading]
    outputs: tuple[Output, ...]
    defaults: Mapping[str, object] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    head: str = "optional"
    section: str = ""
    canonical: Callable[[str], str] = str


def build(family: Family, checkpoint: Checkpoint) -> Blueprint:
    """The blueprint of a safetensors checkpoint. Raises UnsupportedModel, CorruptCheckpoint."""
    settings = Settings(_section(family, checkpoint.config), family.defaults)
    reading = family.read(settings, checkpoint.root)
    settings.check_rest()
    tensors = _Tensors(family, checkpoint)
    reading = _settle_head(family, reading, tensors)
    made = [_made(o, reading, tensors, layer) for o in family.outputs for layer in _layers(o, reading)]
    ignored = tensors.leftovers()
    made += reading.extra
    metadata = {f"{family.arch}.{k}": v for k, v in reading.metadata.items()}
    return Blueprint(
        family.arch,
        tuple(sorted(made, key=lambda m: file_order(m.name))),
        metadata,
        geometry(reading),
        ignored,
        reading.notes,
    )


def geometry(reading: Reading) -> Geometry:
    """Sizes for planning."""
    d = reading.dims
    windows: Sequence[int | None] = reading.windows or [None] * d.layers
    return Geometry(
        hidden=d.hidden,
        heads=d.heads,
        kv_heads=d.kv_heads,
        ffn=d.ffn,
        vocab=d.vocab,
        context=d.context,
        layers=tuple(LayerGeometry(d.kv_heads, d.head, d.head, window) for window in windows),
        experts=d.experts,
        experts_used=d.experts_used,
        causal=reading.causal,
        parallel_residual=reading.parallel_residual,
    )


def _section(family: Family, config: Mapping[str, object]) -> Mapping[str, object]:
    if not family.section:
        return config
    inner = config.get(family.section)
    if not isinstance(inner, Mapping):
        raise CorruptCheckpoint(f"config.json: {family.section} is missing", "take the model's original config.json")
    shared = {k: config[k] for k in ("tie_word_embeddings",) if k in config}
    return {**shared, **inner}


class _Tensors:
    """The checkpoint's tensors under their canonical names, with a record of which have been used."""

    def __init__(self, family: Family, checkpoint: Checkpoint) -> None:
        self._family = family
        self.all: dict[str, TensorRef] = {}
        for name, ref in checkpoint.tensors.items():
            known = family.canonical(name)
            if known in self.all:
                raise UnsupportedModel(f"tensors {self.all[known].name} and {name} are the same one by their names")
            self.all[known] = ref
        self._used: set[str] = set()
        self._expected: set[str] = set()
        self.dropped: list[str] = []

    def take(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        """The tensor `name`, its shape checked. Raises CorruptCheckpoint."""
        ref = self.all.get(name)
        if ref is None:
            raise CorruptCheckpoint(
                f"tensor {name} is missing", "the download may be incomplete, or config.json belongs to another model"
            )
        if ref.shape != shape:
            raise CorruptCheckpoint(f"tensor {ref.name} has shape {list(ref.shape)}, config.json says {list(shape)}")
        if "F" not in ref.dtype:
            raise UnsupportedModel(f"tensor {ref.name} holds {ref.dtype}, not floating-point weights")
        self._used.add(name)
        return ref

    def has(self, name: str) -> bool:
        """Whether `name` is there. Remembers it as one that could have been."""
        self._expected.add(name)
        return name in self.all

    def leftovers(self) -> tuple[str, ...]:
        """Names of tensors left out on purpose. Raises UnsupportedModel for one that nobody asked for."""
        ignored = list(self.dropped)
        for name, ref in self.all.items():
            if name in self._used or ref.name in ignored:
                continue
            if not any(fnmatchcase(name, pattern) for pattern in self._family.ignore):
                raise self._unknown(ref.name, name)
            ignored.append(ref.name)
        return tuple(ignored)

    def _unknown(self, name: str, known: str) -> UnsupportedModel:
        near = difflib.get_close_matches(_starred(known), {_starred(n) for n in self._expected}, n=1, cutoff=0.0)
        if re.search(r"\.(qweight|qzeros|g_idx|weight_packed|absmax|weight_scale\w*)\b", known):
            hint = "quantised already: convert the model it was made from"
        elif _starred(known) in near:
            hint = "config.json speaks of fewer layers or experts than there are"
        else:
            hint = f"nearest known: {near[0]}" if near else ""
        return UnsupportedModel(f"tensor {name} is unknown to family {self._family.arch}", hint)


def _starred(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _settle_head(family: Family, reading: Reading, tensors: _Tensors) -> Reading:
    """Decide whether the output matrix is written, and set the switch `head` or `copied_head`.

    A tied checkpoint may hold the matrix all the same: an equal one is left out, a different one counts (as
    transformers does when loading: `tie_weights` leaves unequal weights untied).
    """
    if family.head == "none":
        return reading
    switch = {"optional": "", "required": "copied_head", "never": ""}[family.head]
    there = tensors.has(HEAD)
    if there or not reading.tied:
        switch = "head"
    if there and reading.tied and _equals_embedding(family, reading, tensors):
        tensors.dropped.append(tensors.all[HEAD].name)
        switch = "copied_head" if family.head == "required" else ""
    if switch and family.head == "never":
        raise UnsupportedModel(f"{HEAD} is not the embedding: {family.arch} has no output matrix of its own")
    return replace(reading, switches=reading.switches | {switch})


def _equals_embedding(family: Family, reading: Reading, tensors: _Tensors) -> bool:
    """Compares values, slab by slab: the one case where a blueprint reads weights."""
    embed = next(o for o in family.outputs if o.name == EMBED).sources[0].name
    shape = (reading.dims.vocab, reading.dims.hidden)
    a, b = tensors.take(HEAD, shape), tensors.take(embed, shape)
    step = max(1, (1 << 22) // shape[1])
    return all(np.array_equal(a.rows(i, min(i + step, shape[0])), b.rows(i, min(i + step, shape[0])))
               for i in range(0, shape[0], step))  # fmt: skip


def _layers(o: Output, reading: Reading) -> Iterable[int]:
    if o.when and o.when not in reading.switches:
        return ()
    return range(o.first, reading.dims.layers) if "{l}" in o.name else (0,)


def _made(o: Output, reading: Reading, tensors: _Tensors, layer: int) -> Made:
    names = [(s, _expanded(s.name, reading.dims, layer)) for s in o.sources]
    found = [tensors.has(expanded[0]) for _, expanded in names]  # the first of each tells which spelling this is
    source, expanded = names[found.index(True) if True in found else 0]
    shape = tuple(reading.dims.size(axis) for axis in source.shape)
    refs = tuple(tensors.take(name, shape) for name in expanded)
    made_shape, stream = source.make(refs, reading.dims.size)
    name = o.name.format(l=layer)
    return Made(name, made_shape, o.role, refs, stream, stays_float32(name, made_shape))


def _expanded(name: str, dims: Dims, layer: int) -> list[str]:
    for letter, count in (("e", dims.experts), ("h", dims.heads), ("k", dims.kv_heads)):
        if f"{{{letter}}}" in name:
            return [name.format(l=layer, e=i, h=i, k=i) for i in range(count)]
    return [name.format(l=layer)]
