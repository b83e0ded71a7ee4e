"""Decide, before a weight is read, what every tensor becomes, how big the file is, what it needs and how fast it
will be. Pure: takes opened headers, gives frozen values; reads no weight and writes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from edgekit.arch import Blueprint, Geometry, Made, Role
from edgekit.errors import DoesNotFit, EdgekitError
from edgekit.forecast import Forecast, Workload, forecast
from edgekit.gguf_file import Header, MetaValue, encode_header
from edgekit.quant import Format, ggml, presets
from edgekit.quant.presets import Preset
from edgekit.target import Target
from edgekit.units import show_bytes

UBATCH = 512
"""Tokens that llama.cpp evaluates at once (its default n_ubatch); compute buffers grow with it."""

KV_TYPES: Mapping[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
}
"""KV cache types that llama.cpp takes: values per block and bytes per block."""

REPACKED = frozenset({"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL"})
"""Formats that llama.cpp's CPU backend lays out anew at load on Arm (and some on AVX2), in a buffer of its own."""

RUNTIME_OVERHEAD = 90 << 20
"""Resident bytes allowed for the runner beside weights, KV cache and compute buffers (docs/planning.md)."""

COMFORTABLE = 10.0
"""Decode tokens/s below which `auto` gives quality away for speed: about twice as fast as people read."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the file: how it is made and in which format. `wanted` differs where the rows did not fit."""

    made: Made
    format: Format
    wanted: str
    reason: str

    @property
    def name(self) -> str:
        return self.made.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.made.shape

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.made.shape)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in RAM while the model answers, against what the target can spare. `usable` None = not known."""

    weights: int
    twice: int
    kv: int
    compute: int
    overhead: int
    usable: int | None

    @property
    def total(self) -> int:
        return self.weights + self.twice + self.kv + self.compute + self.overhead

    @property
    def headroom(self) -> int | None:
        return None if self.usable is None else self.usable - self.total

    @property
    def fits(self) -> bool:
        return self.usable is None or self.total <= self.usable


@dataclass(frozen=True)
class Plan:
    """Everything that is decided about one GGUF file for one target."""

    blueprint: Blueprint
    preset: Preset
    target: str
    tensors: tuple[Planned, ...]
    metadata: Mapping[str, MetaValue]
    header: Header
    context: int
    kv_type: str
    memory: Memory
    kv_bytes: Mapping[str, int]
    forecast: Forecast
    why: str

    @property
    def label(self) -> str:
        return self.preset.name

    @property
    def arch(self) -> str:
        return self.blueprint.arch

    @property
    def geometry(self) -> Geometry:
        return self.blueprint.geometry

    @property
    def file_bytes(self) -> int:
        return self.header.file_size

    @property
    def parameters(self) -> int:
        """Weights in matrices and vectors; constants that the exporter adds (rope factors) do not count."""
        return sum(t.made.values for t in self.tensors if t.made.role is not Role.ROPE)

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / self.parameters

    @property
    def fallbacks(self) -> tuple[Planned, ...]:
        """Tensors whose rows the wanted format cannot hold."""
        return tuple(t for t in self.tensors if t.wanted != t.format.name)

    @property
    def bytes_by_format(self) -> dict[str, int]:
        """Largest first."""
        count: Counter[str] = Counter()
        for t in self.tensors:
            count[t.format.name] += t.nbytes
        return dict(count.most_common())

    @property
    def rule_of_thumb(self) -> int:
        """The usual estimate of memory, M = (P * 4 B) / (32 / Q) * 1.2, Q = bits per weight of this plan, in bytes."""
        return round(self.parameters * 4 / (32 / self.bits_per_weight) * 1.2)


@dataclass(frozen=True, slots=True)
class Draft:
    """What a preset makes of a model, whatever the target."""

    preset: Preset
    tensors: tuple[Planned, ...]
    metadata: Mapping[str, MetaValue]
    header: Header


def draft(
    blueprint: Blueprint, metadata: Mapping[str, MetaValue], preset: Preset, importance: Collection[str] | None
) -> Draft:
    """The formats of `preset`, the file's metadata and its exact header."""
    chosen = presets.choose(preset, blueprint, importance=importance)
    tensors = tuple(Planned(c.tensor, ggml.FORMATS[c.format], c.wanted, c.reason) for c in chosen)
    full = {**metadata, "general.quantization_version": 2, "general.file_type": preset.file_type}
    return Draft(preset, tensors, full, _header(full, tensors))


def _header(metadata: Mapping[str, MetaValue], tensors: Sequence[Planned]) -> Header:
    return encode_header(metadata, [(t.name, t.shape, t.format.code, t.nbytes) for t in tensors])


def plan(
    blueprint: Blueprint,
    metadata: Mapping[str, MetaValue],
    target: Target,
    *,
    quant: str = "auto",
    candidates: Sequence[str] = presets.LADDER,
    context: int | None = None,
    kv_type: str = "f16",
    prefer: str = "quality",
    importance: Collection[str] | None = None,
    budget: int | None = None,
    drafts: dict[str, Draft] | None = None,
) -> Plan:
    """The plan for one target. `metadata` is everything the file will say except what the format decides.

    `quant` names a preset, or `auto` takes the best of `candidates` (best quality first) that fits with `context`
    tokens of KV cache, and in a file of `budget` bytes. `drafts`, if given, keeps what does not depend on the target,
    for further plans of the same model. A named preset is planned whether it fits the memory or not:
    see `require_fit`. Raises UnknownName (preset), DoesNotFit (a budget too small; auto, nothing fits), EdgekitError.
    """
    if kv_type not in KV_TYPES:
        raise EdgekitError(f"no KV cache type called {kv_type!r}", f"known: {', '.join(KV_TYPES)}")
    context = context_for(blueprint.geometry, target, context)

    known = {} if drafts is None else drafts

    def one(name: str) -> Plan:
        preset = presets.get(name)
        if preset.name not in known:
            known[preset.name] = draft(blueprint, metadata, preset, importance)
        return _on_target(blueprint, known[preset.name], target, context, kv_type)

    if quant.lower() != "auto":
        return _within(budget, [one(quant)])[0]
    usable = [c for c in candidates if importance or not presets.get(c).needs_importance]
    if budget is None:
        return _best([one(c) for c in usable], target, prefer)
    largest_first = sorted(_within(budget, [one(c) for c in usable]), key=lambda p: -p.weight_bytes)
    return _because(largest_first[0], f"the largest preset of at most {show_bytes(budget)}")


def _within(budget: int | None, plans: Sequence[Plan]) -> Sequence[Plan]:
    """Those of at most `budget` bytes. Raises DoesNotFit with the smallest possible."""
    fitting = [p for p in plans if budget is None or p.file_bytes <= budget]
    if not fitting:
        smallest = min(plans, key=lambda p: p.file_bytes)
        raise DoesNotFit(
            f"{show_bytes(budget or 0)} is less than the smallest file, {smallest.preset.name} with "
            f"{show_bytes(smallest.file_bytes)} ({smallest.file_bytes:,} bytes)",
            f"allow at least {smallest.file_bytes} bytes, --calibration self for smaller presets, or a smaller model",
        )
    return fitting


def context_for(geometry: Geometry, target: Target, asked: int | None) -> int:
    """Context in tokens: what was asked, else the target's default, never more than the model was trained for."""
    if asked is not None and asked < 1:
        raise EdgekitError(f"a context of {asked} tokens makes no sense", "write for example --ctx-size 4096")
    if asked is not None:
        return asked
    return min(target.context, geometry.context) if geometry.context else target.context


def require_fit(decided: Plan, alternatives: Iterable[Plan] = ()) -> None:
    """Raise DoesNotFit with needs, has, and what would fit."""
    if decided.memory.fits:
        return
    has = decided.memory.usable or 0
    raise DoesNotFit(
        f"{decided.preset.name} with {decided.context} tokens of context needs {show_bytes(decided.memory.total)}; "
        f"{decided.target} has {show_bytes(has)} for a model",
        "; ".join(_what_would_fit(decided, alternatives)),
    )


def _what_would_fit(decided: Plan, alternatives: Iterable[Plan]) -> list[str]:
    has, ways = decided.memory.usable or 0, []
    smaller = next((p for p in alternatives if p.memory.fits), None)
    if smaller:
        ways.append(f"-q {smaller.preset.name} fits ({show_bytes(smaller.memory.total)})")
    for kind in ("q8_0", "q4_0"):
        total = _total_at(decided, decided.context, kind)
        if total <= has and decided.kv_bytes[kind] < decided.memory.kv:
            ways.append(f"--kv {kind} fits ({show_bytes(total)})")
            break
    context = 1 << (max(1, decided.context - 1).bit_length() - 1)
    while context >= 512 and _total_at(decided, context, decided.kv_type) > has:
        context //= 2
    if context >= 512:
        ways.append(f"--ctx-size {context} fits")
    if not ways:
        per_weight = decided.weight_bytes / decided.parameters
        room = max(0, has - (_total_at(decided, 512, "q8_0") - decided.memory.weights))
        ways.append(f"a model of at most about {room / per_weight / 1e9:.2g} B parameters would fit")
    return ways


def _total_at(decided: Plan, context: int, kv_type: str) -> int:
    """Bytes in memory of the same tensors with another context and KV cache type."""
    memory, geometry = decided.memory, decided.geometry
    buffers = kv_cache_bytes(geometry, context, kv_type) + compute_bytes(geometry, context)
    return memory.weights + memory.twice + memory.overhead + buffers


def _best(plans: Sequence[Plan], target: Target, prefer: str) -> Plan:
    """Best quality first; of those that fit and are not slow on the device, the first that is comfortably fast."""
    fitting = [p for p in plans if p.memory.fits]
    if not fitting:
        smallest = min(plans, key=lambda p: p.memory.total)
        require_fit(smallest)
    if prefer == "size":
        return _because(min(fitting, key=lambda p: p.file_bytes), "the smallest of the candidates")
    quick = [p for p in fitting if target.prefers(p.preset.name) != "slow"] or fitting
    # tensors that fall back cost bytes and gain nothing over the preset that they fall back to
    whole = [p for p in quick if not _mostly_fallback(p)] or quick
    speeds = {p.preset.name: p.forecast.decode_tok_s or 0.0 for p in whole}
    if prefer == "speed":
        best = max(whole, key=lambda p: speeds[p.preset.name])
        return _because(best, "the fastest forecast of those that fit")
    if not any(speeds.values()):
        return _because(whole[0], f"the best quality that fits {target.name}")
    comfortable = [p for p in whole if speeds[p.preset.name] >= COMFORTABLE]
    if comfortable:
        return _because(comfortable[0], f"the best quality that fits and decodes at {COMFORTABLE:.0f} tok/s or more")
    # nothing is comfortable: about 4.5 bits is where quality starts to fall faster than speed rises
    decent = [p for p in whole if p.bits_per_weight >= 4.4] or whole[:1]
    fastest = max(speeds[p.preset.name] for p in decent)
    best = next(p for p in decent if speeds[p.preset.name] >= 0.85 * fastest)
    return _because(best, f"nothing decodes at {COMFORTABLE:.0f} tok/s; the best within 15 % of the fastest")


def _mostly_fallback(decided: Plan) -> bool:
    return sum(t.nbytes for t in decided.fallbacks) > decided.weight_bytes / 4


def _because(decided: Plan, why: str) -> Plan:
    return replace(decided, why=why)


def with_formats(decided: Plan, formats: Mapping[str, str], target: Target, why: str) -> Plan:
    """`decided` with other formats for the tensors named, and everything that follows from them reckoned anew."""
    tensors = tuple(
        replace(t, format=ggml.FORMATS[formats[t.name]], wanted=formats[t.name], reason=why) if t.name in formats else t
        for t in decided.tensors
    )
    redone = Draft(decided.preset, tensors, decided.metadata, _header(decided.metadata, tensors))
    return replace(_on_target(decided.blueprint, redone, target, decided.context, decided.kv_type), why=why)


def _on_target(blueprint: Blueprint, made: Draft, target: Target, context: int, kv_type: str) -> Plan:
    """A draft with what it needs and how fast it is on `target`."""
    kv = {kind: kv_cache_bytes(blueprint.geometry, context, kind) for kind in KV_TYPES}
    memory = Memory(
        weights=sum(t.nbytes for t in made.tensors),
        twice=_resident_twice(made.tensors, target) if blueprint.geometry.causal else 0,
        kv=kv[kv_type],
        compute=compute_bytes(blueprint.geometry, context),
        overhead=RUNTIME_OVERHEAD,
        usable=target.usable_bytes,
    )
    return Plan(
        blueprint=blueprint,
        preset=made.preset,
        target=target.name,
        tensors=made.tensors,
        metadata=made.metadata,
        header=made.header,
        context=context,
        kv_type=kv_type,
        memory=memory,
        kv_bytes=kv,
        forecast=forecast(target, workload(made.tensors, blueprint.geometry, context, kv_type)),
        why="as asked",
    )


def kv_cache_bytes(geometry: Geometry, context: int, kind: str) -> int:
    """Bytes of the KV cache for `context` tokens of one sequence.

    llama.cpp rounds the cells of a cache up to 256; a sliding-window layer keeps window + one micro batch.
    An encoder keeps none.
    """
    if not geometry.causal:
        return 0
    block, size = KV_TYPES[kind]
    total = 0
    for layer in geometry.layers:
        cells = context if layer.window is None else min(context, layer.window + UBATCH)
        cells = -(-cells // 256) * 256
        for width in (layer.key, layer.value):
            total += cells * -(-layer.kv_heads * width // block) * size
    return total


def compute_bytes(geometry: Geometry, context: int) -> int:
    """Bytes of llama.cpp's compute buffer on CPU with flash attention, at its default micro batch; an encoder's holds
    the whole text, for which this is right with a gated feed-forward block and about twice what is needed without one.

    The larger of two moments of the graph, fitted to what llama.cpp prints (docs/planning.md): the logits of a whole
    micro batch, and one feed-forward block beside the attention mask.
    """
    tokens = min(UBATCH, context) if geometry.causal else context
    widest = max((layer.kv_heads * layer.key for layer in geometry.layers), default=0)
    queries = geometry.heads * max((layer.key for layer in geometry.layers), default=0)
    ffn = geometry.ffn * max(1, geometry.experts_used)
    logits = 4 * tokens * ((geometry.vocab if geometry.causal else 0) + 2 * geometry.hidden)
    block = 4 * tokens * (3 * ffn + 3 * geometry.hidden + queries + widest)
    masks = 2 if not geometry.causal and any(layer.window for layer in geometry.layers) else 1
    mask = masks * 2 * tokens * (-(-context // 256) * 256)
    return max(logits, block + mask)


def _resident_twice(tensors: Sequence[Planned], target: Target) -> int:
    """A tied embedding is loaded a second time where the output lives in another buffer (GPU, repacked on CPU)."""
    if any(t.made.role is Role.OUTPUT for t in tensors):
        return 0
    tied = next((t for t in tensors if t.made.role is Role.EMBED), None)
    if tied is None:
        return 0
    on_cpu = target.backend_named().name == "cpu"
    features = set(target.isa.has) if target.isa else set()
    repacks = tied.format.name in REPACKED and bool(features & {"dotprod", "i8mm"})
    return tied.nbytes if repacks or not on_cpu else 0


def workload(tensors: Sequence[Planned], geometry: Geometry, context: int, kv_type: str) -> Workload:
    """What one decoded token costs: weights read by format, their bytes, and a KV cache that is half full.

    Of an embedding that is not the output matrix too, and of an encoder's, one row is read.
    """
    untied = not geometry.causal or any(t.made.role is Role.OUTPUT for t in tensors)
    weights: Counter[str] = Counter()
    nbytes, body = 0, 0
    for t in tensors:
        looked_up = t.made.role in (Role.POSITION, Role.TOKEN_TYPE) or (untied and t.made.role is Role.EMBED)
        if looked_up:
            nbytes += t.format.row_bytes(t.shape[-1])
            continue
        used, all_experts = _share(t, geometry)
        weights[t.format.name] += t.made.values * used // all_experts
        nbytes += t.nbytes * used // all_experts
        if len(t.shape) > 1 and t.made.role not in (Role.EMBED, Role.OUTPUT):
            body += prod(t.shape) * used // all_experts
    return Workload(
        weights_by_format=dict(weights),
        bytes_per_token=nbytes,
        kv_bytes=kv_cache_bytes(geometry, max(1, context // 2), kv_type),
        layers=len(geometry.layers),
        body_params=body,
        context=context,
        grouped=geometry.kv_heads < geometry.heads,
    )


def _share(tensor: Planned, geometry: Geometry) -> tuple[int, int]:
    """Experts used and experts stored: (1, 1) for what every token passes through."""
    if geometry.experts and len(tensor.shape) == 3 and tensor.shape[0] == geometry.experts:
        return max(1, geometry.experts_used), geometry.experts
    return 1, 1
