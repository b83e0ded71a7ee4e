"""What an artefact folder says about itself, as plain checked values: a manifest is a file from outside.

Whatever is missing or of another kind than it should be is None or left out, never an error: old and damaged manifests
still give a page. Knows no HTML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.artifact import BENCH, EVALUATION, kept, open_artifact
from edgekit.errors import CorruptCheckpoint, EdgekitError
from edgekit.target import Target

MOST_TENSORS, MOST_ANSWERS, MOST_CANDIDATES, MOST_ROWS = 100_000, 500, 200, 200
"""Of a list that is longer only the beginning is shown."""

LONGEST_TEXT = 4_000
"""Characters of one text that are shown."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to spend the bytes that was measured. `kind`: `preset`, `random`, or a way of our own."""

    name: str
    kind: str
    nbytes: float
    kl: float
    stderr: float
    shipped: bool


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in the file. `layer` None: it belongs to none; `part` is its name without the layer."""

    part: str
    layer: int | None
    format: str
    bits: float
    nbytes: float
    dims: int


@dataclass(frozen=True, slots=True)
class Speed:
    """A measured test: tokens/s and their standard deviation. `decode`: one token at a time."""

    name: str
    decode: bool
    tok_s: float
    stddev: float
    machine: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Both answers to a prompt; `at` is the token where they part."""

    prompt: str
    at: int
    reference: str
    candidate: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its standard error, where there is one."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Facts:
    """Everything a page can show. Bytes, tokens, tokens/s; None where nobody said."""

    folder: str
    name: str
    device: str
    target: str
    preset: str
    why: str
    architecture: str
    source: str
    digest: str
    parameters: float | None
    file_bytes: float | None
    bits_per_weight: float | None
    context: float | None
    memory: tuple[tuple[str, float], ...]
    usable: float | None
    decode: float | None
    prefill: float | None
    band: float | None
    basis: str
    level: str
    checks: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    speeds: tuple[Speed, ...]
    candidates: tuple[Candidate, ...]
    ladder: tuple[Candidate, ...]
    doubt: float | None
    learned: str
    figures: Mapping[str, Figure]
    figures_from: str
    floor: Figure | None
    floor_method: str
    jitter: Figure | None
    jitter_method: str
    tasks: tuple[tuple[str, str, Figure, Figure | None], ...]
    prompts: int | None
    answers: tuple[Answer, ...]
    tensors: tuple[Tensor, ...]
    versions: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, float, str], ...]

    @property
    def memory_total(self) -> float:
        return sum(n for _, n in self.memory)

    @property
    def measured(self) -> tuple[Candidate, ...]:
        """All that was measured on one text: the candidates, and the stock presets at other sizes."""
        names = {c.name for c in self.candidates}
        return (*self.candidates, *(c for c in self.ladder if c.name not in names))

    @property
    def kl(self) -> Figure | None:
        """Mean KL divergence of what was shipped: as evaluated, else as the candidates were compared, else of the few
        places, without a standard error, that an ONNX artefact is verified by."""
        seen = self.figures.get("kl_mean")
        compared = next((Figure(c.kl, c.stderr) for c in self.candidates if c.shipped), None)
        return seen if seen and (seen.stderr is not None or compared is None) else compared


def read_facts(folder: Path) -> Facts:
    """The facts of one artefact folder. Raises EdgekitError, CorruptCheckpoint when it is none."""
    m = open_artifact(folder).manifest
    try:
        bench, evaluation = kept(folder, BENCH), kept(folder, EVALUATION)
    except CorruptCheckpoint as e:
        raise CorruptCheckpoint(str(e), "remove that file, or measure again with --keep") from None
    flips = at(evaluation, "flips") if at(evaluation, "flips") else at(m, "flips")
    figures, origin = _figures(m, evaluation)
    target = text(at(m, "target"))
    return Facts(
        folder=folder.resolve().name,
        name=text(at(m, "source", "name")) or folder.resolve().name,
        device=_device(target),
        target=target,
        preset=text(at(m, "plan", "preset")),
        why=text(at(m, "plan", "why")),
        architecture=text(at(m, "plan", "architecture")),
        source=text(at(m, "source", "ref")),
        digest=text(at(m, "source", "digest")),
        parameters=positive(at(m, "plan", "parameters")),
        file_bytes=positive(at(m, "plan", "file_bytes")),
        bits_per_weight=positive(at(m, "plan", "bits_per_weight")),
        context=positive(at(m, "plan", "context")),
        memory=tuple(_memory(at(m, "plan", "memory"))),
        usable=positive(at(m, "plan", "memory", "usable")),
        decode=positive(at(m, "plan", "forecast", "decode_tok_s")) if _writes(m) else None,
        prefill=positive(at(m, "plan", "forecast", "prefill_tok_s")),
        band=positive(at(m, "plan", "forecast", "band_pct")),
        basis=text(at(m, "plan", "forecast", "basis")),
        level=text(at(m, "certificate", "level")),
        checks=tuple(
            (text(at(c, "name")), text(at(c, "detail"))) for c in rows(at(m, "certificate", "checks"), MOST_ROWS)
        ),
        warnings=tuple(text(w) for w in rows(at(m, "warnings"), MOST_ROWS) if text(w)),
        speeds=tuple(_speeds(bench)),
        candidates=tuple(_candidates(at(m, "candidates"))),
        ladder=tuple(_candidates(at(m, "ladder"))),
        doubt=number(at(m, "doubt")),
        learned=_learned(at(m, "calibration")),
        figures=figures,
        figures_from=origin,
        floor=_figure(at(evaluation, "floor"), "kl_mean", "kl_stderr"),
        floor_method=text(at(evaluation, "floor", "method")),
        jitter=_figure(at(evaluation, "jitter"), "kl_mean", "kl_stderr"),
        jitter_method=text(at(evaluation, "jitter", "method")),
        tasks=tuple(_tasks(evaluation)),
        prompts=_count(at(flips, "prompts")),
        answers=tuple(_answers(at(flips, "answers"))),
        tensors=tuple(_tensors(at(m, "plan", "tensors"))),
        versions=_versions(m),
        files=tuple(_files(m["files"])),
    )


# --- values that may be anything -------------------------------------------------------------------------------------


def at(value: Any, *path: str) -> Any:
    """What lies at `path` in nested mappings, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def text(value: Any) -> str:
    """A text as it may be shown: no control characters, no direction overrides, not endless."""
    if not isinstance(value, str):
        return ""
    cut = value if len(value) <= LONGEST_TEXT else value[:LONGEST_TEXT] + "…"
    cut = cut.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half a surrogate pair
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", "\ufffd", cut)


def number(value: Any) -> float | None:
    """A finite number, or None. JSON of Python's also knows NaN, Infinity and integers that no float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not math.isfinite(value):
        return None
    return float(value)


def positive(value: Any) -> float | None:
    found = number(value)
    return found if found is not None and found > 0 else None


def rows(value: Any, most: int) -> list[Any]:
    return value[:most] if isinstance(value, list) else []


def _count(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None and found >= 0 else None


def _figure(value: Any, key: str, stderr: str) -> Figure | None:
    found = number(at(value, key))
    return None if found is None else Figure(found, number(at(value, stderr)))


# --- parts of the manifest -------------------------------------------------------------------------------------------

_MEMORY = (
    ("weights", "weights"),
    ("twice", "output copy"),
    ("kv", "KV cache"),
    ("compute", "buffers"),
    ("overhead", "runtime"),
)


def _memory(value: Any) -> Iterator[tuple[str, float]]:
    for key, label in _MEMORY:
        found = positive(at(value, key))
        if found:
            yield label, found


def _device(target: str) -> str:
    """The title of a shipped target; the name where it is none (a board file of the user's)."""
    try:
        return Target.load(target).title if target.partition("@")[0] in Target.names() else target
    except EdgekitError:
        return target


_FIGURES = {
    "ppl_candidate": "ppl_candidate_stderr",
    "ppl_reference": "ppl_reference_stderr",
    "ln_ratio": "ln_ratio_stderr",
    "kl_mean": "kl_stderr",
    "kl_median": "",
    "kl_p99": "",
    "kl_max": "",
    "top1": "top1_stderr",
    "delta_p_mean": "delta_p_mean_stderr",
    "delta_p_rms": "delta_p_rms_stderr",
    "cosine_mean": "cosine_stderr",
    "cosine_min": "",
    "spearman": "",
}


def _figures(manifest: Any, evaluation: Any) -> tuple[dict[str, Figure], str]:
    """Figures against a reference and where they come from: a kept evaluation, else full verification, else the few
    that every ONNX artefact is verified by."""
    for origin, value in (
        (_evaluated(evaluation), at(evaluation, "comparison") or at(evaluation, "embeddings")),
        ("the built-in text, when it was verified", at(manifest, "certificate", "figures", "against_source")),
    ):
        found = {k: f for k, e in _FIGURES.items() if (f := _figure(value, k, e)) is not None}
        if found:
            return found, origin
    numbers = at(manifest, "certificate", "figures", "numbers")
    names = (("kl", "kl_mean"), ("top1", "top1"), ("cosine", "cosine"))
    found = {name: f for key, name in names if (f := _figure(numbers, key, "")) is not None}
    compared = _count(at(numbers, "compared")) or 0
    return found, f"against transformers in float32, {compared} places, when it was verified" if found else ""


def _writes(manifest: Any) -> bool:
    """False for an ONNX artefact that is no decoder: it decodes nothing."""
    return text(at(manifest, "task")) in ("", "text-generation", "text2text-generation")


def _evaluated(evaluation: Any) -> str:
    tokens = _count(at(evaluation, "comparison", "tokens"))
    texts = _count(at(evaluation, "embeddings", "texts"))
    scored = f", {tokens:,} tokens scored" if tokens else f", {texts:,} sentences" if texts else ""
    return f"{text(at(evaluation, 'text'))}, against {text(at(evaluation, 'reference'))}{scored}"


def _learned(value: Any) -> str:
    tokens, held = _count(at(value, "tokens")), _count(at(value, "held_out"))
    if not tokens:
        return ""
    return f"calibrated on {tokens:,} tokens ({text(at(value, 'text'))}), judged on {held or 0:,} held-out tokens"


def _candidates(value: Any) -> Iterator[Candidate]:
    for row in rows(value, MOST_CANDIDATES):
        nbytes, kl = positive(at(row, "nbytes")) or positive(at(row, "bytes")), number(at(row, "kl"))
        if nbytes and kl is not None:
            kind = text(at(row, "kind"))
            stderr = number(at(row, "kl_stderr")) or 0.0
            yield Candidate(text(at(row, "name")), kind, nbytes, kl, abs(stderr), at(row, "shipped") is True)


def _speeds(value: Any) -> Iterator[Speed]:
    for row in rows(value, MOST_ROWS):
        prompt, generated, tok_s = (number(at(row, k)) or 0 for k in ("n_prompt", "n_gen", "avg_ts"))
        if tok_s <= 0 or not (prompt or generated):
            continue
        texts = _count(at(row, "n_texts"))
        name = f"pp{prompt:.0f}" if prompt else f"tg{generated:.0f}"
        name = f"{texts} × {prompt:.0f}" if texts and prompt else name
        machine = text(at(row, "board")) or text(at(row, "cpu_info"))
        threads = _count(at(row, "n_threads"))
        where = f"{machine}, {threads} threads" if threads else machine
        yield Speed(name, not prompt, tok_s, number(at(row, "stddev_ts")) or 0.0, where)


def _tasks(evaluation: Any) -> Iterator[tuple[str, str, Figure, Figure | None]]:
    other = {
        (text(at(r, "task")), text(at(r, "metric"))): _figure(r, "value", "stderr")
        for r in rows(at(evaluation, "reference_tasks"), MOST_ROWS)
    }
    for row in rows(at(evaluation, "tasks"), MOST_ROWS):
        key, score = (text(at(row, "task")), text(at(row, "metric"))), _figure(row, "value", "stderr")
        if score:
            yield *key, score, other.get(key)


def _answers(value: Any) -> Iterator[Answer]:
    for row in rows(value, MOST_ANSWERS):
        parting = _count(at(row, "at"))
        if parting is not None:
            yield Answer(text(at(row, "prompt")), parting, text(at(row, "reference")), text(at(row, "candidate")))


_LAYER = re.compile(r"(?P<stack>.*?)\b(?:blk|layers?|h|blocks?)\.(?P<layer>\d{1,4})\.(?P<part>.+)")
_KIND = re.compile(r"(\.(weight|MatMul|Gemm|Gather|MatMulNBits))+(_\d+)?$")


def _place(name: str) -> tuple[str, int | None, str]:
    """(what the layers stand in, layer, part) of a tensor of a GGUF, of a weight, or of a node of an ONNX graph:
    `blk.0.attn_q.weight`, `model.layers.0.self_attn.q_proj.weight`, `/model/layers.0/attn/qkv_proj/MatMul`."""
    dotted = name.replace("/", ".").strip(".")
    found = _LAYER.fullmatch(dotted)
    if found is None:
        return "", None, _KIND.sub("", dotted)
    return found["stack"].strip("."), int(found["layer"]), _KIND.sub("", found["part"])


def _tensors(value: Any) -> Iterator[Tensor]:
    """Where layers stand in more than one place (an encoder and a decoder), the place is part of the name."""
    listed = rows(value, MOST_TENSORS)
    places = [_place(text(at(row, "name"))) for row in listed]
    several = len({stack for stack, layer, _ in places if layer is not None}) > 1
    for row, (stack, layer, part) in zip(listed, places, strict=True):
        shape = [number(n) or 0 for n in rows(at(row, "shape"), 8)]
        nbytes = positive(at(row, "bytes"))
        weights = math.prod(shape) if shape else 0
        if not nbytes or weights < 1:
            continue
        shown = f"{stack}.{part}" if several and stack and layer is not None else part
        yield Tensor(shown, layer, text(at(row, "format")), 8 * nbytes / weights, nbytes, len(shape))


def _versions(m: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    found = at(m, "versions")
    pairs = [(text(k), text(v)) for k, v in found.items()][:MOST_ROWS] if isinstance(found, Mapping) else []
    instructions = text(at(m, "instruction_set"))
    return (*pairs, ("instruction set", instructions)) if instructions else tuple(pairs)


def _files(files: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    for name, entry in list(files.items())[:MOST_ROWS]:
        yield text(name), number(entry["bytes"]) or 0.0, text(entry["sha256"])
