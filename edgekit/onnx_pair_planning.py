"""Decide, before a weight is read, what an encoder-decoder becomes: two graphs, what each stores, what running takes.

Pure, as edgekit.onnx_planning, whose values it gives. Knows how T5's and BART's kin name their tensors and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgekit import onnx_planning as planning
from edgekit.checkpoint import Checkpoint
from edgekit.errors import EdgekitError
from edgekit.forecast import Forecast
from edgekit.onnx_planning import PAIRS, TEXT2TEXT, Exporter, OnnxPlan, Shape, Stored, Variant, Wish
from edgekit.planning import Memory
from edgekit.quant import channels
from edgekit.quant.nbits import INLINE, data_bytes
from edgekit.target import Target

TRAINED = 512
"""Tokens of context where config.json names none: what T5 and mT5 were trained with. Their positions are relative, so
that longer ones run."""

_TABLE = re.compile(r"(^|\.)(shared|embed_tokens|lm_head)\.weight$")
_POSITIONS = "embed_positions"
_SINES = ("marian", "pegasus")
"""Families whose tables of positions are reckoned where the checkpoint has none."""
_BIAS = "relative_attention_bias"
_CROSS = re.compile(r"(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj)\.weight$")


@dataclass(frozen=True, slots=True)
class Pair:
    """Widths and depths of both graphs. `relative`: positions have no end."""

    encoder: Shape
    decoder: Shape
    relative: bool


def is_t5(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in ("t5", "mt5")


def scales(config: Mapping[str, Any]) -> bool:
    """Whether a T5 scales what goes into its head. In transformers 4 `tie_word_embeddings` says so; version 5 always
    writes that as true, has a key of its own for T5, and never scales mT5."""
    if config.get("model_type") == "mt5":
        return False
    return config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)) is not False


def tied(config: Mapping[str, Any], tensors: Collection[str]) -> bool:
    """Whether the head is the token table; `tensors`: the names in the checkpoint."""
    if is_t5(config):
        return scales(config)
    return "lm_head.weight" not in tensors or config.get("tie_word_embeddings") is not False


def shape_of(config: Mapping[str, Any]) -> Pair:
    """Widths and depths out of a Hugging Face config. Raises EdgekitError for one that leaves them out."""

    def number(*names: str, default: int | None = None) -> int:
        found = (config.get(name) for name in names)
        value = next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0), default)
        if value is None:
            raise EdgekitError(f"config.json has no {names[0]}", "is this the model's own config.json?")
        return value

    width, vocab = number("d_model"), number("vocab_size")
    context = number("n_positions", "max_position_embeddings", default=TRAINED)

    def side(layers: int, name: str) -> Shape:
        heads = number("num_heads", f"{name}_attention_heads")
        return Shape(
            layers=layers,
            hidden=width,
            ffn=number("d_ff", f"{name}_ffn_dim"),
            heads=heads,
            kv_heads=heads,
            head_dim=number("d_kv", default=width // heads),
            vocab=vocab,
            context=context,
        )

    depth = number("num_layers", "encoder_layers")
    return Pair(
        encoder=replace(side(depth, "encoder"), causal=False),
        decoder=side(number("num_decoder_layers", "decoder_layers", default=depth), "decoder"),
        relative=is_t5(config),
    )


def plan(checkpoint: Checkpoint, target: Target, wish: Wish, exporter: Exporter) -> OnnxPlan:
    """The plan for one target; `OnnxPlan.shape` is the decoder's, `context` the most tokens of either side.

    `auto` does arithmetic on 8-bit activations (int8-dynamic) only where blocks of weights have no fast path.
    Raises as `onnx_planning.plan`.
    """
    pair = shape_of(checkpoint.config)
    if wish.context is not None and pair.relative:
        context = planning.context_of(wish.context, replace(pair.decoder, context=max(wish.context, 1)), target)
    else:
        context = planning.context_of(wish.context, pair.decoder, target)
    slow = planning.no_fast_path(PAIRS["int8"], target)
    if not wish.candidates:
        wish = replace(wish, candidates=("int8-dynamic",) if slow else tuple(n for n in PAIRS if n != "int8-dynamic"))
    decided = planning.decide(PAIRS, target, wish, lambda v: _one(checkpoint, v, pair, context, target, exporter))
    return replace(decided, why=slow) if slow and wish.quant == "auto" else decided


def _one(
    checkpoint: Checkpoint, variant: Variant, pair: Pair, context: int, target: Target, exporter: Exporter
) -> OnnxPlan:
    if variant.kind != "nbits" and planning.lacks_vnni(target):
        variant = replace(variant, largest=channels.NARROW)
    encoder = tuple(_encoder_weights(checkpoint, variant, pair.encoder))
    decoder = tuple(_decoder_weights(checkpoint, variant, pair.decoder))
    data = sum(data_bytes(size for s in side for size in s.sizes) for side in (encoder, decoder))
    memory = Memory(
        weights=data,
        twice=int(planning.LAID_OUT_ANEW * data) if variant.kind == "nbits" else 0,
        kv=cache_bytes(pair.decoder, context),
        compute=compute_bytes(pair, context),
        overhead=planning.RUNTIME_OVERHEAD,
        usable=target.usable_bytes,
    )
    return OnnxPlan(
        family=str(checkpoint.config.get("model_type", "")),
        task=TEXT2TEXT,
        variant=variant,
        target=target.name,
        stored=encoder + decoder,
        shape=pair.decoder,
        data_bytes=data,
        graph_bytes=graph_bytes(pair, encoder + decoder),
        build_bytes=exporter.build_bytes,
        context=context,
        memory=memory,
        forecast=_forecast(encoder, decoder, pair, context, variant, target),
        why="as asked",
        notes=planning.notes(variant, target, task=planning.TEXT2TEXT),
    )


def _encoder_weights(checkpoint: Checkpoint, variant: Variant, shape: Shape) -> Iterator[Stored]:
    yield planning.stored("encoder: token table", _table(checkpoint), "embedding", variant, shape)
    yield from _weights(checkpoint, variant, shape, "encoder")


def _decoder_weights(checkpoint: Checkpoint, variant: Variant, shape: Shape) -> Iterator[Stored]:
    """Blocks of integers serve as table and as head; dynamic integers are laid out by column for the one and by row for
    the other."""
    table = _table(checkpoint)
    if not tied(checkpoint.config, checkpoint.tensors) or variant.kind != "nbits":
        yield planning.stored("decoder: token table", table, "embedding", variant, shape)
    yield planning.stored("decoder: head", table, "head", variant, shape)
    yield from _weights(checkpoint, variant, shape, "decoder")


def _table(checkpoint: Checkpoint) -> tuple[int, ...]:
    found = next((tuple(ref.shape) for name, ref in checkpoint.tensors.items() if _TABLE.search(name)), None)
    if found is None:
        raise EdgekitError(f"{checkpoint.name} has no token table", "is this the whole checkpoint?")
    return found


def _weights(checkpoint: Checkpoint, variant: Variant, shape: Shape, side: str) -> Iterator[Stored]:
    """What belongs to one side alone. T5's first files have a bias of cross attention, which nothing reads."""
    for name, ref in checkpoint.tensors.items():
        own = "decoder" if re.match(r"(model\.)?decoder\.|final_logits_bias", name) else "encoder"
        if own != side or _TABLE.search(name) or f"EncDecAttention.{_BIAS}" in name:
            continue
        place = planning.place_of(name, ref.shape, tied=False)
        if _BIAS in name or _POSITIONS in name or (len(ref.shape) == 2 and ref.shape[0] == 1):
            place = "table"
        yield planning.stored(name, tuple(ref.shape), place, variant, shape)
    if checkpoint.config.get("model_type") in _SINES and not any(_POSITIONS in name for name in checkpoint.tensors):
        table = (shape.context, shape.hidden)
        yield planning.stored(f"{side}: {_POSITIONS}", table, "table", variant, shape)


def cache_bytes(shape: Shape, context: int) -> int:
    """Float32 keys and values of `context` tokens written and as many read. A step makes the longer cache of the one,
    and hands on that of the other, while the last ones are there."""
    return 2 * 2 * 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim * context


def compute_bytes(pair: Pair, context: int) -> int:
    """Bytes of activations while the encoder reads `context` tokens: among them scores of every pair of them, and their
    biases and probabilities."""
    e = pair.encoder
    block = 4 * context * (2 * e.ffn + 4 * e.hidden + 3 * e.heads * e.head_dim)
    return block + 3 * 4 * e.heads * context**2 + 4 * pair.decoder.vocab


def graph_bytes(pair: Pair, stored: tuple[Stored, ...]) -> int:
    """Bytes of both graphs: what is too small for the data files, and nodes and names, fitted to T5 and BART. M2M100's
    have tables of positions inside."""
    inside = sum(size for s in stored for size in s.sizes if size < INLINE)
    return 78_000 + 10_000 * pair.encoder.layers + 22_000 * pair.decoder.layers + inside


def _forecast(
    encoder: tuple[Stored, ...],
    decoder: tuple[Stored, ...],
    pair: Pair,
    context: int,
    variant: Variant,
    target: Target,
) -> Forecast:
    """Reading is the encoder's, writing the decoder's, which uses keys and values of the source once."""
    reads = planning.forecast_of(encoder, pair.encoder, context, variant, target)
    step = [s for s in decoder if not _CROSS.search(s.name)]
    writes = planning.forecast_of(step, pair.decoder, context, variant, target)
    return replace(writes, prefill_tok_s=reads.prefill_tok_s)
