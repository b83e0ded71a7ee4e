"""Decide, before a weight is read, what an ONNX artefact holds, how big it is, and what building and running it take.

Pure: takes an opened checkpoint's headers and config, gives frozen values; knows no exporter and no runtime.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from edgekit.checkpoint import Checkpoint
from edgekit.errors import DoesNotFit, EdgekitError, UnknownName
from edgekit.forecast import Forecast, Workload, forecast
from edgekit.planning import COMFORTABLE, Memory
from edgekit.quant import channels
from edgekit.quant.nbits import INLINE, NBits, data_bytes, tensor_sizes, worthwhile
from edgekit.target import Target
from edgekit.units import show_bytes

GENERATION, TEXT2TEXT = "text-generation", "text2text-generation"
Kind = Literal["nbits", "dynamic", "static"]
Place = Literal["linear", "head", "embedding", "table", "rope", "plain"]

RUNTIME_OVERHEAD = 150 << 20
"""Resident bytes of Python, the engines and their first buffers beside weights, KV cache and activations. Fitted on
x86-64 to models of 7 M and 1.1 B parameters (docs/onnx.md)."""
LAID_OUT_ANEW = 0.15
"""Share of the bytes of block-quantized weights that onnxruntime holds a second time: scales and sums as its kernels
want them. From the same fit."""

_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output|decoder)\.weight$")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|tok_embeddings|embed_in|embeddings)\.weight$")
_TABLES = re.compile(r"(^|\.)\w*(position|token_type)\w*_embeddings?\.weight$|(^|\.)(wpe|embed_positions)\.weight$")
_QKV = re.compile(r"(\.)[qkv]_proj(\.weight|\.bias)$")
_SENSITIVE = re.compile(
    r"(qkv_proj|v_proj|down_proj|c_attn|query_key_value|dense_4h_to_h|fc2|fc_out|mlp[./]c_proj|Attention[./]v"
    r"|DenseReluDense[./]wo)\b"
)
_UNUSED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|causal_mask|(attn|attention)\.bias)$")
_PRETRAINING = re.compile(r"(^|\.)(pooler|cls|lm_head|mlm|vocab_\w+|discriminator_predictions|decoder|head)\.")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to store the weights. `mixed`: of 4-bit matrices the sensitive ones are stored as the head is; `largest`:
    of the integers that dynamic and static forms multiply."""

    name: str
    kind: Kind
    title: str
    linear: NBits
    head: NBits
    embedding: NBits | None
    mixed: bool = False
    largest: int = channels.LARGEST


def _decoder(name: str, title: str, linear: NBits, *, mixed: bool = False) -> Variant:
    eight = NBits(8, linear.block, symmetric=True)
    return Variant(name, "nbits", title, linear, eight, eight, mixed)


_INT8, _INT8_WIDE = NBits(8, 32, symmetric=True), NBits(8, 128, symmetric=True)

DECODERS: dict[str, Variant] = {
    v.name: v
    for v in (
        _decoder("int8", "8 bits, a scale for every 32 weights", _INT8),
        _decoder("int8-b128", "8 bits, a scale for every 128 weights", _INT8_WIDE),
        _decoder("int4", "4 bits, the sensitive matrices 8, blocks of 32", NBits(4, 32, symmetric=False), mixed=True),
        _decoder("int4-b32", "4 bits, blocks of 32", NBits(4, 32, symmetric=False)),
        _decoder("int4-b128", "4 bits, blocks of 128", NBits(4, 128, symmetric=False)),
    )
}
"""Best quality first."""

ENCODERS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant("int8", "nbits", "8-bit weights in blocks of 32, arithmetic in 8 bits", _INT8, _INT8, _INT8),
        Variant(
            "int8-dynamic", "dynamic", "8-bit weights a channel, activations scaled as they come", _INT8, _INT8, _INT8
        ),
        Variant("int8-static", "static", "8-bit weights and activations with fixed scales", _INT8, _INT8, _INT8),
    )
}

PAIRS: Mapping[str, Variant] = DECODERS | {"int8-dynamic": ENCODERS["int8-dynamic"]}
"""Of an encoder and a decoder, each stored alike."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One weight as the artefact holds it. `format`: `int8 b32`, `int4 b32 asym`, `fp32` ...; `sizes`: bytes of each
    tensor that it becomes."""

    name: str
    shape: tuple[int, ...]
    place: Place
    format: str
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Shape:
    """What running needs to know of a model beside its weights. Widths in values; `window` None = full attention."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    window: int | None = None
    causal: bool = True


@dataclass(frozen=True)
class OnnxPlan:
    """Everything that is decided about one ONNX artefact for one target.

    `data_bytes` is exact; `file_bytes` adds the graphs, reckoned from what they are for models of this depth.
    `build_bytes`: RAM that exporting and quantizing take on this machine.
    """

    family: str
    task: str
    variant: Variant
    target: str
    stored: tuple[Stored, ...]
    shape: Shape
    data_bytes: int
    graph_bytes: int
    build_bytes: int
    context: int
    memory: Memory
    forecast: Forecast
    why: str
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.variant.name

    @property
    def file_bytes(self) -> int:
        return self.data_bytes + self.graph_bytes

    @property
    def parameters(self) -> int:
        return sum(prod(s.shape) for s in self.stored if s.place != "rope")

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.data_bytes / max(1, self.parameters)

    @property
    def bytes_by_format(self) -> dict[str, int]:
        """Largest first."""
        count: Counter[str] = Counter()
        for s in self.stored:
            count[s.format] += s.nbytes
        return dict(count.most_common())


# --- what the checkpoint says ----------------------------------------------------------------------------------------


def shape_of(config: Mapping[str, Any], *, causal: bool) -> Shape:
    """Widths and depths out of a Hugging Face config. Raises EdgekitError for one that leaves them out."""

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        if default is None:
            raise EdgekitError(f"config.json has no {names[0]}", "is this the model's own config.json?")
        return default

    hidden = number("hidden_size", "n_embd", "d_model", "dim")
    heads = number("num_attention_heads", "n_head", "n_heads", "num_heads", default=1)
    kept = config.get("layer_types")
    slides = isinstance(kept, list) and "full_attention" not in kept and config.get("sliding_window")
    return Shape(
        layers=number("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        hidden=hidden,
        ffn=number("intermediate_size", "n_inner", "hidden_dim", "d_ff", default=4 * hidden),
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden // heads),
        vocab=number("vocab_size"),
        context=number("max_position_embeddings", "n_positions", "n_ctx", default=512),
        window=int(slides) if slides else None,
        causal=causal,
    )


def place_of(name: str, shape: Sequence[int], *, tied: bool) -> Place:
    """What a tensor of the checkpoint becomes, by its name and shape."""
    if len(shape) < 2:
        return "plain"
    if _TABLES.search(name):
        return "table"
    if _EMBEDDINGS.search(name):
        return "head" if tied else "embedding"
    return "head" if _HEADS.search(name) else "linear"


def stored_weights(checkpoint: Checkpoint, variant: Variant, shape: Shape, *, fused: bool) -> tuple[Stored, ...]:
    """Every weight that reaches the artefact, in the format that `variant` gives it."""
    tied = shape.causal and _is_tied(checkpoint)
    found = []
    for name, dims in _joined(checkpoint, pack=fused).items():
        if _UNUSED.search(name) or (not shape.causal and _PRETRAINING.search(name)):
            continue
        place = place_of(name, dims, tied=tied)
        if tied and place == "head" and _HEADS.search(name):
            continue  # the same matrix a second time
        found.append(stored(name, dims, place, variant, shape))
    return tuple(found)


def _joined(checkpoint: Checkpoint, *, pack: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape; what a decoder's exporter lays side by side (queries, keys, values) as one."""
    found: dict[str, tuple[int, ...]] = {}
    for name, ref in checkpoint.tensors.items():
        packed = _QKV.sub(r"\1qkv_proj\2", name) if pack else name
        before = found.get(packed)
        found[packed] = (before[0] + ref.shape[0], *ref.shape[1:]) if before else tuple(ref.shape)
    return found


def _is_tied(checkpoint: Checkpoint) -> bool:
    if checkpoint.config.get("tie_word_embeddings") is True:
        return True
    return not any(_HEADS.search(name) for name in checkpoint.tensors)


def stored(name: str, dims: tuple[int, ...], place: Place, variant: Variant, shape: Shape) -> Stored:
    fmt = _format_of(name, place, variant, shape.layers)
    if fmt is None or len(dims) != 2 or not worthwhile(*dims):
        return Stored(name, dims, place, "fp32", (4 * prod(dims),))
    if variant.kind != "nbits":
        return Stored(name, dims, place, "int8", channels.sizes(*dims))
    return Stored(name, dims, place, label(fmt.fitted(dims[1])), tensor_sizes(*dims, fmt))


def label(fmt: NBits) -> str:
    """`int8 b32`; `int4 b32 asym` where every block has a zero point."""
    return f"int{fmt.bits} b{fmt.block}{'' if fmt.symmetric else ' asym'}"


def _format_of(name: str, place: Place, variant: Variant, layers: int) -> NBits | None:
    if place == "table" and variant.kind != "nbits":
        return variant.linear
    if place in ("plain", "table", "rope"):
        return None
    if place == "head":
        return variant.head
    if place == "embedding":
        return variant.embedding
    return variant.head if variant.mixed and is_sensitive(name, layers) else variant.linear


def is_sensitive(name: str, layers: int) -> bool:
    """Whether a mixed variant gives this matrix 8 bits: values and the way down, in the outer and every third layer.

    The rule that llama.cpp's Q4_K_M made usual. `name` is a checkpoint's (`model.layers.3.mlp.down_proj.weight`) or a
    graph node's (`/model/layers.3/mlp/down_proj/MatMul`).
    """
    found = re.search(r"\.(\d+)[./]", name)
    if found is None or not _SENSITIVE.search(name):
        return False
    layer, eighth = int(found[1]), max(1, layers // 8)
    return layer < eighth or layer >= layers - eighth or (layer - eighth) % 3 == 2


# --- what a target makes of it ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for. None = decided here."""

    quant: str = "auto"
    context: int | None = None
    prefer: str = "quality"
    budget: int | None = None
    candidates: tuple[str, ...] = ()


def variants(task: str) -> Mapping[str, Variant]:
    return {GENERATION: DECODERS, TEXT2TEXT: PAIRS}.get(task, ENCODERS)


@dataclass(frozen=True, slots=True)
class Exporter:
    """What of an exporter a plan depends on. `build_bytes`: RAM that it takes; `fused`: queries, keys and values are
    one matrix, and positions are tables of cosines and sines."""

    build_bytes: int
    fused: bool = False


def plan(checkpoint: Checkpoint, task: str, target: Target, wish: Wish, exporter: Exporter) -> OnnxPlan:
    """The plan for one target.

    A named variant is planned whether it fits or not; `auto` raises DoesNotFit when nothing does. Raises UnknownName.
    """
    shape = shape_of(checkpoint.config, causal=task == GENERATION)
    context = context_of(wish.context, shape, target)
    return decide(variants(task), target, wish, lambda v: _one(checkpoint, task, v, shape, context, target, exporter))


def decide(
    known: Mapping[str, Variant], target: Target, wish: Wish, planned: Callable[[Variant], OnnxPlan]
) -> OnnxPlan:
    """Of the variants that the wish leaves, the one to take, each `planned`. Raises UnknownName, DoesNotFit."""
    choice = [_named(c, known) for c in wish.candidates] or list(known)
    names = choice if wish.quant.lower() == "auto" else [_named(wish.quant, known)]
    plans = [planned(known[name]) for name in names]
    if wish.budget is not None:
        plans = _within(plans, wish.budget)
    return plans[0] if len(names) == 1 else _choose(plans, target, wish)


def _named(quant: str, known: Mapping[str, Variant]) -> str:
    name = quant.lower().replace("_", "-")
    if name not in known:
        hint = f"known: auto, {', '.join(known)}"
        if name.upper().startswith(("Q", "IQ")):
            hint = f"{quant} is a GGUF preset: leave out --format onnx; {hint}"
        raise UnknownName(f"no ONNX format called {quant!r}", hint)
    return name


def context_of(asked: int | None, shape: Shape, target: Target) -> int:
    if asked is not None and asked < 1:
        raise EdgekitError(f"a context of {asked} tokens makes no sense", "write for example --ctx-size 4096")
    if asked is not None and asked > shape.context:
        raise EdgekitError(
            f"a context of {asked} tokens is more than the {shape.context} that the model's positions are made for",
            f"--ctx-size {shape.context}, or a GGUF",
        )
    return asked or min(target.context, shape.context)


def _one(
    checkpoint: Checkpoint, task: str, variant: Variant, shape: Shape, context: int, target: Target, exporter: Exporter
) -> OnnxPlan:
    if variant.kind != "nbits" and lacks_vnni(target):
        variant = replace(variant, largest=channels.NARROW)
    stored = stored_weights(checkpoint, variant, shape, fused=exporter.fused)
    tables = 0
    if exporter.fused:
        rotary, tables = _rotary(checkpoint.config, shape, context)
        stored += rotary
    data = data_bytes(size for s in stored for size in s.sizes)
    memory = Memory(
        weights=data,
        twice=int(LAID_OUT_ANEW * data) if variant.kind == "nbits" else 0,
        kv=kv_bytes(shape, context),
        compute=compute_bytes(shape, context) + tables,
        overhead=RUNTIME_OVERHEAD,
        usable=target.usable_bytes,
    )
    return OnnxPlan(
        family=str(checkpoint.config.get("model_type", "")),
        task=task,
        variant=variant,
        target=target.name,
        stored=stored,
        shape=shape,
        data_bytes=data,
        graph_bytes=graph_bytes(shape, task, stored, fused=exporter.fused),
        build_bytes=exporter.build_bytes,
        context=context,
        memory=memory,
        forecast=forecast_of(stored, shape, context, variant, target),
        why="as asked",
        notes=notes(variant, target, task=task),
    )


def _rotary(config: Mapping[str, Any], shape: Shape, context: int) -> tuple[tuple[Stored, ...], int]:
    """What rotation stores, and the bytes of the tables that are computed when the graph is loaded.

    Tables hold cosines and sines of every position, float32, one pair more where sliding layers rotate at another
    speed. A row of frequencies is stored for each pair, or the tables themselves where they are not transformers' own.
    """
    if config.get("position_embedding_type", "rope") != "rope":
        return (), 0
    ropes = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = ropes if isinstance(ropes, Mapping) else {}
    local = {"full_attention", "sliding_attention"} <= rope.keys() or config.get("rope_local_base_freq")
    part = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor")
    rotated = int(shape.head_dim * part) if isinstance(part, float) and 0 < part <= 1 else shape.head_dim
    width, kinds = rotated // 2, ("", "_local") if local else ("",)
    if "alpha" in rope:
        names = [f"{table}_cache{kind}" for kind in kinds for table in ("cos", "sin")]
        return tuple(Stored(name, (context, width), "rope", "fp32", (4 * context * width,)) for name in names), 0
    rows = tuple(Stored(f"inv_freq{kind}", (1, width), "rope", "fp32", (4 * width,)) for kind in kinds)
    return rows, 2 * len(kinds) * 4 * context * width


def kv_bytes(shape: Shape, context: int) -> int:
    """Bytes of the KV cache for one sequence: float32 on CPUs; layers that slide over a window keep only that."""
    if not shape.causal:
        return 0
    cells = min(context, shape.window) if shape.window else context
    return 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim * cells


def compute_bytes(shape: Shape, context: int) -> int:
    """Bytes of activations while a prompt that fills the context is read; an encoder reads one of 512 tokens."""
    tokens = context if shape.causal else min(context, 512)
    block = 4 * tokens * (3 * shape.ffn + 4 * shape.hidden + 2 * shape.heads * shape.head_dim)
    return block + 4 * shape.vocab * (1 if shape.causal else 0)


def graph_bytes(shape: Shape, task: str, stored: Sequence[Stored], *, fused: bool) -> int:
    """Bytes of the graphs: what is too small for the data file, and nodes and names: about 6.6 KB for each layer, in a
    decoder without fused operators 31 KB (23 to 39 in three families).

    A decoder has two graphs.
    """
    inside = sum(size for s in stored for size in s.sizes if size < INLINE)
    if task == GENERATION:
        base, layer = (3_700, 6_600) if fused else (36_000, 31_000)
        return 2 * (base + layer * shape.layers + inside)
    return 3_700 + 6_600 * shape.layers + inside


def forecast_of(stored: Sequence[Stored], shape: Shape, context: int, variant: Variant, target: Target) -> Forecast:
    """As llama.cpp runs the format of the same bits on the CPU (measured level on x86-64, docs/benchmarks.md)."""
    cpu = next((b for b in target.backend if b.name == "cpu"), None)
    reason = no_fast_path(variant, target) or ("" if cpu else f"no figures for the CPU of {target.name}")
    if reason or cpu is None:
        return Forecast("cpu", None, None, 0.0, None, reason)
    like = {"int8": "Q8_0", "int4": "Q4_0"}
    weights: Counter[str] = Counter()
    nbytes = 0
    for s in stored:
        if s.place in ("linear", "head"):
            weights[like.get(s.format[:4], "F32")] += prod(s.shape)
            nbytes += s.nbytes
    body = sum(prod(s.shape) for s in stored if s.place == "linear")
    work = Workload(
        weights_by_format=dict(weights),
        bytes_per_token=nbytes,
        kv_bytes=kv_bytes(shape, max(1, context // 2)),
        layers=shape.layers,
        body_params=body,
        context=context,
        grouped=shape.kv_heads < shape.heads,
    )
    return forecast(target, work, backend=cpu.name)


def no_fast_path(variant: Variant, target: Target) -> str:
    """Why onnxruntime multiplies this variant slowly on the target's CPU, or an empty text.

    Its 4- and 8-bit block kernels need dot-product instructions; without them every matrix is first made float32.
    """
    lacks = set(target.isa.lacks) if target.isa else set()
    if variant.kind == "nbits" and "dotprod" in lacks:
        return f"{target.name} has no dot-product instructions, which onnxruntime's block kernels need"
    return ""


def lacks_vnni(target: Target) -> bool:
    """Whether onnxruntime adds products of 8-bit integers in 16 bits on the target's CPU: x86 without VNNI.

    Two large products overflow there, and what is computed is less than the sum. Blocks of integers, which do not
    overflow, are slow there: docs/benchmarks.md has what was measured.
    """
    has = target.isa.has if target.isa else ()
    return target.family == "x86" and not any("vnni" in name for name in has)


_SLOW_DECODER = (
    "without VNNI llama.cpp writes faster than this, by a quarter where it was measured (leave out --format onnx)"
)
_SLOW_ENCODER = (
    "without VNNI blocks of integers are slower than float32, by 1.1 to 1.5 times where it was measured: --prefer "
    "speed is faster than both"
)


def notes(variant: Variant, target: Target, *, task: str) -> tuple[str, ...]:
    """What this CPU makes of it, and where a GGUF would be faster: the user should know what a format costs."""
    found = []
    if variant.largest < channels.LARGEST:
        found.append(
            f"weights use 7 of their 8 bits: without VNNI the CPU of {target.name} cuts off sums of larger products"
        )
    if variant.kind == "nbits" and lacks_vnni(target) and task != TEXT2TEXT:
        found.append(_SLOW_DECODER if task == GENERATION else _SLOW_ENCODER)
    if reason := no_fast_path(variant, target):
        found.append(f"{reason}: it unpacks every weight to a float there, a GGUF does not (leave out --format onnx)")
    first = target.backend[0].name
    if first != "cpu":
        found.append(
            f"llama.cpp runs a GGUF on the {first} backend of {target.name}; this ONNX graph is planned for its CPU"
        )
    return tuple(found)


def _within(plans: Sequence[OnnxPlan], budget: int) -> list[OnnxPlan]:
    fitting = [p for p in plans if p.file_bytes <= budget]
    if not fitting:
        smallest = min(plans, key=lambda p: p.file_bytes)
        raise DoesNotFit(
            f"{show_bytes(budget)} is less than the smallest ONNX form, {smallest.variant.name} with "
            f"{show_bytes(smallest.file_bytes)} ({smallest.file_bytes:,} bytes)",
            f"allow at least {smallest.file_bytes} bytes, or make a GGUF: it goes down to 2 bits",
        )
    return fitting


def _choose(plans: Sequence[OnnxPlan], target: Target, wish: Wish) -> OnnxPlan:
    """Of an encoder, quality or speed as preferred; of a decoder the best that fits and reads comfortably fast."""
    fitting = [p for p in plans if p.memory.fits]
    if not fitting:
        require_fit(min(plans, key=lambda p: p.memory.total))
    if not plans[0].shape.causal:
        return _encoder_choice(fitting, target, wish)
    if wish.prefer == "size":
        return replace(min(fitting, key=lambda p: p.file_bytes), why="the smallest")
    speeds = {p.variant.name: p.forecast.decode_tok_s or 0.0 for p in fitting}
    if wish.prefer == "speed" and any(speeds.values()):
        best = max(fitting, key=lambda p: speeds[p.variant.name])
        return replace(best, why="the fastest forecast of those that fit")
    if wish.budget is not None or not any(speeds.values()):
        return replace(fitting[0], why=f"the best quality that fits {target.name}")
    comfortable = [p for p in fitting if speeds[p.variant.name] >= COMFORTABLE]
    if comfortable:
        why = f"the best quality that fits and decodes at {COMFORTABLE:.0f} tok/s or more"
        return replace(comfortable[0], why=why)
    best = max(fitting, key=lambda p: speeds[p.variant.name])
    return replace(best, why=f"nothing decodes at {COMFORTABLE:.0f} tok/s; the fastest")


def _encoder_choice(plans: Sequence[OnnxPlan], target: Target, wish: Wish) -> OnnxPlan:
    by_name = {p.variant.name: p for p in plans}
    slow = no_fast_path(plans[0].variant, target)
    if "int8-dynamic" in by_name and (wish.prefer in ("speed", "size") or slow):
        return replace(
            by_name["int8-dynamic"], why=slow or "about twice as fast as blocks of 8 bits, and a little less exact"
        )
    return replace(plans[0], why="the variant that is closest to the source")


_ACCELERATORS: Mapping[Kind, tuple[str, ...]] = {
    "nbits": ("CUDA", "DirectML"),
    "dynamic": (),
    "static": ("TensorRT", "QNN", "OpenVINO", "CUDA"),
}
"""Execution providers of onnxruntime that compute a variant's operators; all others would leave them to the CPU."""


def providers_for(variant: Variant, target: Target) -> tuple[str, ...]:
    """What the artefact is to run on, most wanted first: the target's providers that know its operators, then the
    CPU."""
    return (*(p for p in _ACCELERATORS[variant.kind] if p in target.ort_providers), "CPU")


def require_fit(decided: OnnxPlan) -> None:
    """Raise DoesNotFit (exit 3) when the target has less memory than running takes."""
    if decided.memory.fits:
        return
    smaller = [name for name in variants(decided.task) if name.startswith("int4")]
    hint = f"-q {smaller[0]}" if smaller and not decided.variant.name.startswith("int4") else "a smaller model"
    raise DoesNotFit(
        f"{decided.variant.name} with {decided.context} tokens of context needs {show_bytes(decided.memory.total)}; "
        f"{decided.target} has {show_bytes(decided.memory.usable or 0)} for a model",
        f"{hint}, a smaller --ctx-size, or a GGUF",
    )


def require_build_memory(decided: OnnxPlan, free: int) -> None:
    """Raise DoesNotFit (exit 3) when this machine has less free memory than the export takes."""
    if decided.build_bytes > free:
        raise DoesNotFit(
            f"exporting {decided.family} to ONNX takes about {show_bytes(decided.build_bytes)} of memory, and "
            f"{show_bytes(free)} is free here",
            "export on a larger machine, or make a GGUF: it needs hardly any memory",
        )
