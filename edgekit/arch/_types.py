"""The nouns of `edgekit.arch`: roles, geometry, tensors to be made, blueprints. Knows no family and no config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum, auto
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.checkpoint import TensorRef
from edgekit.gguf_file import MetaValue

Array = npt.NDArray[np.float32]
Config = Mapping[str, Any]


class Role(StrEnum):
    """What a tensor is for. Presets, allocation and pruning speak of roles, never of names."""

    EMBED = auto()
    OUTPUT = auto()
    POSITION = auto()
    TOKEN_TYPE = auto()
    NORM = auto()
    BIAS = auto()
    ROUTER = auto()
    ROPE = auto()
    ATTN_Q = auto()
    ATTN_K = auto()
    ATTN_V = auto()
    ATTN_QKV = auto()
    ATTN_O = auto()
    FFN_UP = auto()
    FFN_GATE = auto()
    FFN_DOWN = auto()
    OTHER = auto()


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """KV cache of one layer: `kv_heads` heads of `key`/`value` widths; `window` tokens are kept, None = all."""

    kv_heads: int
    key: int
    value: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Geometry:
    """What planning needs to know of a model beside its tensors."""

    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int
    layers: tuple[LayerGeometry, ...]
    experts: int = 0
    experts_used: int = 0
    causal: bool = True
    parallel_residual: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """One tensor of the result, before a format has been chosen for it.

    `shape` is in numpy order (rows first; ggml's `ne` reversed). `stream(max_values)` yields float32 C-contiguous
    2-D slabs (rows, shape[-1]) in order, each of at most about `max_values` values where the way it is made allows;
    stacked they are the whole tensor. 1-D tensors come as one slab of one row. `keep_f32`: the converter convention
    stores it as float32 whatever preset is chosen (norms, biases, routers, position tables).
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    sources: tuple[TensorRef, ...]
    stream: Callable[[int], Iterator[Array]] = field(repr=False, compare=False)
    keep_f32: bool = False

    @property
    def values(self) -> int:
        return prod(self.shape)

    def load(self) -> Array:
        """The whole tensor, float32, `shape`."""
        return np.concatenate(list(self.stream(self.values))).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A checkpoint seen through its family: what the GGUF will hold, in file order.

    `ignored`: tensors of the checkpoint left out on purpose. `notes`: where the runtime's graph covers less than the
    model does, one sentence each, for the reader of a plan.
    """

    arch: str
    tensors: tuple[Made, ...]
    metadata: Mapping[str, MetaValue]
    geometry: Geometry
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def classifies(self) -> bool:
        """Whether it ends in a head that scores."""
        return f"{self.arch}.classifier.output_labels" in self.metadata
