"""A device as its TOML tells it: each number with who says so and when. Knows no model and no formula.

What nobody has published stays absent (None); `Target.load("host")` describes this machine instead of a file.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from edgekit.errors import InvalidSpec, UnknownName
from edgekit.host import Host, detect, measure_bandwidth
from edgekit.shelf import unknown
from edgekit.spec import Spec, Strict
from edgekit.units import GIB

Number = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=80)]
Family = Literal["raspberry-pi", "orange-pi", "jetson", "apple-silicon", "phone", "x86", "arm-laptop", "gpu", "other"]
Pace = Literal["fast", "ok", "slow", "unknown"]

FROM_MEMORY = "vendor specification, from memory, not verified"
"""The source text of a number that everybody quotes and nobody on this project has looked up."""

_OPTION = re.compile(r"(?P<base>.+?)[@-](?P<gib>[0-9]+(?:\.[0-9]+)?)(?:gb|gib)", re.IGNORECASE)


Span = Number | tuple[Number, Number]
"""A published number, or a published range from low to high."""


def middle(value: Span) -> float:
    """The number, or the middle of the range."""
    return sum(value) / 2 if isinstance(value, tuple) else value


class Fact(Strict):
    """A claim about a device. `source` says who makes it, `date` when that was read."""

    source: str = Field(min_length=2)
    date: datetime.date | None = None
    note: str = ""


class Ram(Fact):
    """Sizes the device is sold with, GiB, ascending; `default_gib` is the one in force (the smallest, if absent)."""

    gib: Annotated[tuple[Number, ...], Field(min_length=1)]
    default_gib: Number | None = None

    @model_validator(mode="after")
    def _default_is_sold(self) -> Self:
        if list(self.gib) != sorted(set(self.gib)):
            raise ValueError("gib must be ascending, without repeats")
        if self.default_gib is not None and self.default_gib not in self.gib:
            raise ValueError(f"default_gib {self.default_gib:g} is not one of gib")
        return self

    @property
    def value(self) -> float:
        return self.default_gib or self.gib[0]


class Usable(Fact):
    """What a model may take (file, KV cache, buffers): GiB for each size in `ram.gib`, or RAM less some, or a share."""

    gib: tuple[Number, ...] = ()
    less_gib: Number | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum((bool(self.gib), self.less_gib is not None, self.share is not None)) != 1:
            raise ValueError("give exactly one of gib, less_gib, share")
        return self


class Rate(Fact):
    """Memory traffic, GB/s (1e9 bytes). `method` says how it was measured, `rows` how many runs stand behind it."""

    gb_s: Span
    method: str = ""
    rows: Count | None = None

    @property
    def value(self) -> float:
        return middle(self.gb_s)

    @property
    def high(self) -> float:
        return max(self.gb_s) if isinstance(self.gb_s, tuple) else self.gb_s


class Cpu(Fact):
    """Cores that should run a model: `big` of them at `ghz`; the little ones are counted apart."""

    model: str = ""
    big: Count | None = None
    little: Annotated[int, Field(ge=0)] | None = None
    ghz: Span | None = None

    @property
    def clock_ghz(self) -> float | None:
        """Clock to reckon with: the lower one where parts differ."""
        return min(self.ghz) if isinstance(self.ghz, tuple) else self.ghz


class Isa(Fact):
    """Instruction-set features by their /proc/cpuinfo-like names, those known to be there and known to be missing."""

    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()


class Gpu(Fact):
    """The GPU by name; `cores` as the vendor counts them, two numbers where parts differ."""

    model: str
    cores: Count | tuple[Count, Count] | None = None

    @property
    def fewest_cores(self) -> int | None:
        return min(self.cores) if isinstance(self.cores, tuple) else self.cores


class Prefill(Fact):
    """Arithmetic really reached on prompts: `tops` (1e12 multiplications and additions/s) with weights in `format`, or
    tok/s of a 7B Q4_0 model for each GPU core."""

    tops: Span | None = None
    format: str = "Q4_0"
    tok_s_7b_per_gpu_core: Number | None = None


class Eta(Fact):
    """Share of the theoretical bandwidth that decoding reaches."""

    ratio: Annotated[float, Field(gt=0, le=1)]


class Overhead(Fact):
    """Time a token costs for each layer whatever its size, microseconds."""

    us_per_layer: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RelativeSpeed(Fact):
    """Measured decode tok/s of the same model in other presets, Q4_0 = 1."""

    of_q4_0: dict[str, Number]


class Backend(Strict):
    """One way to run on the device. `speed_class` is a row of edgekit.forecast's table; facts here override it."""

    name: str
    speed_class: str
    measured: Rate | None = None
    observed: Rate | None = None
    eta: Eta | None = None
    overhead: Overhead | None = None
    prefill: Prefill | None = None
    relative_speed: RelativeSpeed | None = None
    note: str = ""


class Storage(Fact):
    """What models are loaded from; MB/s are 1e6 bytes."""

    medium: str
    read_mb_s: Number | None = None


class Threads(Fact):
    count: Count


class Peak(Fact):
    """A peak figure of the vendor or of a synthetic loop. For the record: no forecast uses it."""

    what: str
    tops: Number


class Power(Fact):
    """Watts at the wall, or as the source says in its note."""

    idle_w: Number | None = None
    load_w: Span | None = None
    modes: str = ""


class Commands(Strict):
    """Commands for a person to type on the device. They are shown, never run."""

    temperature: str = ""
    throttle: str = ""


class Detect(Strict):
    """How the device is recognised: text found in its board or CPU model, and its core count where parts differ."""

    model: str = Field(min_length=3)
    cores: Count | None = None
    exact: bool = False


class Calibration(Fact):
    """One measured run on the device, with what the model reads a token, so that a forecast can be scaled by it."""

    backend: str
    model: str
    preset: str
    weights_by_format: dict[str, Count]
    bytes_per_token: Count
    kv_bytes: Annotated[int, Field(ge=0)] = 0
    layers: Count
    body_params: Count
    decode_tok_s: Number
    prefill_tok_s: Number | None = None
    threads: Count | None = None
    build: str = ""


_RULES: Mapping[str, Usable] = {
    "apple-silicon": Usable(share=0.6666, source="rule: the GPU may wire 66.7 % of RAM up to 36 GiB and 75 % above"),
    "raspberry-pi": Usable(less_gib=2.0, source="rule: RAM less 2 GiB for the system"),
    "orange-pi": Usable(less_gib=1.5, source="rule: RAM less 1.5 GiB for the system"),
    "jetson": Usable(less_gib=2.8, source="rule: RAM less 2.8 GiB, shared between system, desktop and GPU"),
    "phone": Usable(share=0.5, source="rule: half of RAM; the system ends an app that takes more"),
    "arm-laptop": Usable(less_gib=4.0, source="rule: RAM less 4 GiB for the system"),
    "x86": Usable(less_gib=3.0, source="rule: RAM less 3 GiB for the system"),
    "gpu": Usable(less_gib=0.8, source="rule: graphics memory less 0.8 GiB for context and display"),
    "other": Usable(less_gib=2.0, source="rule: RAM less 2 GiB for the system"),
}
_APPLE_LARGE = _RULES["apple-silicon"].model_copy(update={"share": 0.75})
_SEEN = {"source": "read from this machine"}
_LEAST_SHARE = 0.4
"""A rule never leaves a model less than this share: a 2 GiB board runs small models although 2 - 2 is none."""


class Target(Spec):
    """A device. Facts carry sources; `context`, `recipe`, `runtimes`, `flags`, `fast`, `slow` are edgekit's choices."""

    kind: ClassVar[str] = "target"
    name: Name = ""
    title: str
    family: Family
    aliases: tuple[Name, ...] = ()
    os: tuple[str, ...] = ()
    soc: str = ""
    runtimes: tuple[Literal["gguf", "onnx"], ...] = ("gguf",)
    ort_providers: tuple[str, ...] = ()
    recipe: str = "default"
    context: Count = 4096
    flags: tuple[str, ...] = ()
    fast: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    npu: str = ""
    ram: Ram | None = None
    usable: Usable | None = None
    bandwidth: Rate | None = None
    cpu: Cpu | None = None
    isa: Isa | None = None
    gpu: Gpu | None = None
    storage: Storage | None = None
    thread_count: Threads | None = None
    power: Power | None = None
    peak: tuple[Peak, ...] = ()
    commands: Commands = Commands()
    detect: tuple[Detect, ...] = ()
    backend: Annotated[tuple[Backend, ...], Field(min_length=1)]
    calibration: tuple[Calibration, ...] = ()
    sources: dict[str, str] = Field(default_factory=dict)
    read: datetime.date | None = None

    @model_validator(mode="before")
    @classmethod
    def _resolve_sources(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("sources", {}), dict):
            return data
        return _with_sources(data, data.get("sources", {}), data.get("read"))

    @field_validator("backend")
    @classmethod
    def _one_name_each(cls, value: tuple[Backend, ...]) -> tuple[Backend, ...]:
        if len({b.name for b in value}) != len(value):
            raise ValueError("two backends of one name")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.usable and self.usable.gib and (not self.ram or len(self.usable.gib) != len(self.ram.gib)):
            raise ValueError("usable.gib needs one number for each size in ram.gib")
        if both := set(self.fast) & set(self.slow):
            raise ValueError(f"both fast and slow: {', '.join(sorted(both))}")
        return self

    @classmethod
    def load(cls, ref: str | Path) -> Self:
        """By `rpi5`, `rpi5@16GB`, `rpi5-16gb`, alias, `./board.toml`, or `host`. Raises UnknownName, InvalidSpec."""
        text = str(ref)
        if text == "host":
            return cls.of_host(detect())
        if text.endswith(".toml") or text in cls.names():
            return super().load(ref)
        if name := cls._aliases().get(text.lower()):
            return super().load(name)
        if match := _OPTION.fullmatch(text):
            base = match["base"]
            if base.endswith(".toml") or base.lower() in {*cls.names(), *cls._aliases()}:
                return cls.load(base if base.endswith(".toml") else base.lower()).with_ram(float(match["gib"]))
        raise unknown(cls.kind, text, {*cls.names(), *cls._aliases(), "host"}, show=f"edgekit {cls.kind}s list")

    @classmethod
    def _aliases(cls) -> dict[str, str]:
        """Alias (lower case) -> file name, read from the shipped files without checking the rest of them."""
        found: dict[str, str] = {name.lower(): name for name in cls.names()}
        for name in cls.names():
            text = (cls.folder() / f"{name}.toml").read_text(encoding="utf-8")
            found |= {alias.lower(): name for alias in tomllib.loads(text).get("aliases", ())}
        return found

    @classmethod
    def of_host(cls, host: Host) -> Self:
        """This machine: the shipped profile it matches, at its real memory size, or one made from what it shows."""
        try:
            return cls.model_validate(_host_data(host, match_target(host)))
        except ValueError as e:
            raise InvalidSpec(f"this machine cannot be described: {e}", "edgekit targets detect") from None

    def with_ram(self, gib: float) -> Self:
        """The same device with `gib` GiB, named `<name>-<gib>gb`. Raises UnknownName for a size it is not sold with."""
        if self.ram is None and 0.1 <= gib <= 4096:
            ram = Ram(gib=(gib,), source="given by the user")
        elif self.ram is None:
            raise UnknownName(f"{gib:g} GB is no size of memory", f"write it like {self.name}@16GB")
        elif gib in self.ram.gib:
            ram = self.ram.model_copy(update={"default_gib": gib})
        else:
            sold = ", ".join(f"{self.name}@{size:g}GB" for size in self.ram.gib)
            raise UnknownName(f"no {self.title} with {gib:g} GB is described", f"known: {sold}; or write a TOML for it")
        return self.model_copy(update={"ram": ram, "name": f"{self.name}-{gib:g}gb"})

    @property
    def ram_gib(self) -> float | None:
        return self.ram.value if self.ram else None

    @property
    def usable_rule(self) -> Usable:
        """What `usable_bytes` rests on: the file's own fact, or the rule of the family."""
        if self.usable:
            return self.usable
        large = self.family == "apple-silicon" and (self.ram_gib or 0) > 36
        return _APPLE_LARGE if large else _RULES[self.family]

    @property
    def usable_bytes(self) -> int | None:
        """Bytes that file, KV cache and buffers may take together; None where the RAM is unknown."""
        if self.ram is None:
            return None
        ram, rule = self.ram.value, self.usable_rule
        if rule.gib:
            gib = rule.gib[self.ram.gib.index(ram)]
        elif rule.share is not None:
            gib = rule.share * ram
        else:
            gib = max(ram - (rule.less_gib or 0), _LEAST_SHARE * ram)
        return int(gib * GIB)

    @property
    def threads(self) -> int | None:
        """Threads to decode with: as the file says, or one for each big core; None where neither is known."""
        if self.thread_count:
            return self.thread_count.count
        return self.cpu.big if self.cpu else None

    def backend_named(self, name: str | None = None) -> Backend:
        """That backend, or the first one (what edgekit would use). Raises UnknownName."""
        for backend in self.backend:
            if name is None or backend.name == name:
                return backend
        raise unknown(f"backend of {self.name}", str(name), [b.name for b in self.backend])

    def measured(self, backend: str | None = None) -> Rate | None:
        """Streaming bandwidth measured on `backend` (the first one if None)."""
        return self.backend_named(backend).measured

    def prefers(self, format: str) -> Pace:
        """How the device runs a preset or number format: by the file's `fast` and `slow`, else by measured speeds.

        An entry `Q4_K` speaks for `Q4_K`, `Q4_K_S` and `Q4_K_M`; `IQ2` for every IQ2 format.
        """
        if any(_speaks_for(entry, format) for entry in self.fast):
            return "fast"
        if any(_speaks_for(entry, format) for entry in self.slow):
            return "slow"
        speeds = self.backend_named().relative_speed
        near = [v for k, v in speeds.of_q4_0.items() if k == format or k.startswith(f"{format}_")] if speeds else []
        if not near:
            return "unknown"
        return "fast" if max(near) >= 0.85 else "slow" if max(near) < 0.6 else "ok"

    def facts(self) -> Iterable[tuple[str, Fact]]:
        """Every fact with its path in the file (`backend.0.measured`), for showing and for checking."""
        return _facts(self, "")


def _speaks_for(entry: str, format: str) -> bool:
    entry, format = entry.upper(), format.upper()
    return format == entry or format.startswith(f"{entry}_")


def _facts(part: Strict, path: str) -> Iterable[tuple[str, Fact]]:
    for key in type(part).model_fields:
        value = getattr(part, key)
        for index, item in enumerate(value if isinstance(value, tuple) else (value,)):
            where = f"{path}{key}.{index}" if isinstance(value, tuple) else f"{path}{key}"
            if isinstance(item, Fact):
                yield where, item
            if isinstance(item, Strict):
                yield from _facts(item, f"{where}.")


def _with_sources(node: Any, sources: dict[str, Any], read: Any) -> Any:
    """`source = "GG"` becomes the text under [sources] with the file's `read` date; text with a blank is itself."""
    if isinstance(node, list | tuple):
        return [_with_sources(item, sources, read) for item in node]
    if not isinstance(node, dict):
        return node
    made = {k: v if k == "sources" else _with_sources(v, sources, read) for k, v in node.items()}
    key = made.get("source")
    if isinstance(key, str) and key in sources:
        made["source"] = sources[key]
        if read is not None:
            made.setdefault("date", read)
    elif isinstance(key, str) and key and " " not in key:
        raise ValueError(f"source {key!r} is not in [sources] (a source of several words may stand by itself)")
    return made


def match_target(host: Host) -> str | None:
    """Name of the shipped target that `host` is, at its memory size (`rpi5-16gb`); None where no profile fits."""
    found = [(mark.cores is not None, len(mark.model), name) for name, mark in _marks() if _is_marked(host, mark)]
    if not found:
        return None
    target = Target.load(max(found)[2])
    if not target.ram or not host.installed_bytes or len(target.ram.gib) == 1:
        return target.name
    size = min(target.ram.gib, key=lambda gib: abs(gib * GIB - (host.installed_bytes or 0)))
    return target.with_ram(size).name


@cache
def _marks() -> tuple[tuple[str, Detect], ...]:
    return tuple((name, mark) for name in Target.names() for mark in Target.load(name).detect)


def _is_marked(host: Host, mark: Detect) -> bool:
    if mark.cores is not None and mark.cores != host.physical_cores:
        return False
    wanted = mark.model.lower()
    known = [text.lower() for text in (host.board, host.cpu) if text]
    return any(text == wanted if mark.exact else wanted in text for text in known)


def _host_data(host: Host, known: str | None) -> dict[str, Any]:
    """TOML-like data of this machine: the matching profile at its real memory, or what the machine itself shows."""
    data = Target.load(known).model_dump(exclude_none=True) if known else _plain_host(host)
    data |= {"name": "host", "title": f"This machine ({data['title']})", "aliases": (), "detect": (), "os": (host.os,)}
    usable = Target.load(known).usable_bytes if known else None
    data.pop("usable", None)
    data.pop("ram", None)
    if not host.ram_bytes:
        return data
    data["ram"] = {"gib": [host.ram_bytes / GIB]} | _SEEN
    if host.installed_bytes and host.ram_bytes < 0.9 * host.installed_bytes:
        data["usable"] = {"share": 0.8, "source": "rule: 80 % of what the control group lets this process have"}
    elif usable:
        data["usable"] = {"gib": [min(usable, host.ram_bytes) / GIB]} | {"source": f"as {known}"}
    return data


def _plain_host(host: Host) -> dict[str, Any]:
    """A machine that no profile describes: its CPU, with the bandwidth it shows in a short run."""
    rate = measure_bandwidth(seconds=0.4)
    cpu: dict[str, Any] = {"model": host.cpu or "", "big": host.threads, "ghz": host.max_ghz}
    measured = {"gb_s": rate.gb_s, "method": rate.method} | _SEEN | {"date": datetime.date.today()}
    return {
        "title": host.cpu or host.machine,
        "family": "x86" if host.machine.lower() in ("x86_64", "amd64", "i686") else "other",
        "cpu": {k: v for k, v in cpu.items() if v} | _SEEN,
        "isa": {"has": host.isa} | _SEEN,
        "backend": [{"name": "cpu", "speed_class": cpu_class(host), "measured": measured}],
        "runtimes": ("gguf", "onnx"),
        "ort_providers": ("CPU",),
    }


def cpu_class(host: Host) -> str:
    """The speed class (a row of edgekit.forecast's table) that the CPU of `host` belongs to by its features."""
    has = set(host.isa)
    if host.machine.lower() in ("x86_64", "amd64", "i686"):
        return "cpu-x86-avx2" if "avx2" in has else "cpu-x86-plain"
    if host.cpu and host.cpu.startswith("Apple"):
        return "cpu-apple"
    return "cpu-arm-i8mm" if "i8mm" in has else "cpu-arm-dotprod" if "dotprod" in has else "cpu-arm-plain"
