"""The model card (README.md) that travels with an artefact. Knows text; figures come from plan and certificate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekit.checkpoint import Checkpoint
from edgekit.onnx_planning import TEXT2TEXT, OnnxPlan
from edgekit.planning import Plan
from edgekit.target import Target
from edgekit.units import show_bytes, show_count


def write(
    checkpoint: Checkpoint,
    decided: Plan,
    target: Target,
    file_name: str,
    checks: Mapping[str, str],
) -> str:
    """Markdown with hub front matter. `checks`: name of a verification check -> what it saw."""
    lines = [*_front_matter(checkpoint), "", f"# {checkpoint.name}, {decided.preset.name}, for {target.title}", ""]
    lines += [
        f"`{file_name}`: {show_bytes(decided.file_bytes)}, {show_count(decided.parameters)} parameters at "
        f"{decided.bits_per_weight:.2f} bits per weight ({decided.preset.name}: {decided.why}).",
        "",
        "| | |",
        "|---|---|",
        f"| memory at {decided.context} tokens of context | {show_bytes(decided.memory.total)} |",
        f"| speed on {target.title} | {_speed(decided)} |",
    ]
    lines += [f"| {name} | {detail} |" for name, detail in checks.items()]
    lines += ["", "## Use"]
    if decided.geometry.causal:
        lines += ["```", f"edgekit run .                         # or: llama-cli -m {file_name}"]
        lines.append(f"ollama create {checkpoint.name.lower()} -f Modelfile")
    elif decided.blueprint.classifies:
        lines += ["```python", "import edgekit", "scores = edgekit.load('.').scores([('A question?', 'A document.')])"]
    else:
        lines += ["```python", "import edgekit", "vectors = edgekit.load('.').embed(['A sentence.'])"]
    lines += ["```", "", "Everything that was decided and checked is in `edgekit.json`."]
    return "\n".join(lines) + "\n"


def write_onnx(checkpoint: Checkpoint, decided: OnnxPlan, target: Target, checks: Mapping[str, str]) -> str:
    """The same for an ONNX artefact."""
    name, variant = checkpoint.name, decided.variant
    lines = [*_front_matter(checkpoint, "onnx"), "", f"# {name}, ONNX {variant.name}, for {target.title}", ""]
    lines += [
        f"{show_bytes(decided.file_bytes)}, {show_count(decided.parameters)} parameters at "
        f"{decided.bits_per_weight:.2f} bits per weight ({variant.title}). Task: {decided.task}.",
        "",
        "| | |",
        "|---|---|",
        f"| memory at {decided.context} tokens | {show_bytes(decided.memory.total)} |",
    ]
    if decided.shape.causal:
        lines.append(f"| speed on {target.title} | {_speed(decided)} |")
    lines += [f"| {check} | {detail} |" for check, detail in checks.items()]
    lines += ["", "## Use", "```python"]
    if decided.task == TEXT2TEXT:
        lines += ["import edgekit", f"model = edgekit.load({name!r})"]
        lines.append("print(''.join(model.stream(model.tokenize('A text.', add_special=True), 128)))")
    elif decided.shape.causal:
        lines += ["import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'", "import onnxruntime_genai as og"]
        lines += [
            "model = og.Model('.')",
            "# tokenise with tokenizers.Tokenizer.from_file('tokenizer.json')",
        ]
    else:
        lines += ["import edgekit", f"vectors = edgekit.load({name!r}).embed(['A sentence.'])"]
    lines += ["```", "", "Everything that was decided and checked is in `edgekit.json`."]
    return "\n".join(lines) + "\n"


def _speed(decided: Plan | OnnxPlan) -> str:
    speed = decided.forecast.decode_tok_s
    return f"about {speed:.3g} tokens/s (forecast, ±{decided.forecast.band_pct:.0f} %)" if speed else "no forecast"


def _front_matter(checkpoint: Checkpoint, kind: str = "gguf") -> list[str]:
    fields: dict[str, Any] = {"library_name": kind, "tags": [kind, "edgekit"]}
    for key in ("license", "license_name", "language", "base_model"):
        if value := checkpoint.card.get(key):
            fields[key] = value
    lines = ["---"]
    for key, value in fields.items():
        if isinstance(value, list | tuple):
            lines += [f"{key}:", *(f"- {_quoted(v)}" for v in value)]
        else:
            lines.append(f"{key}: {_quoted(value)}")
    return [*lines, "---"]


def _quoted(value: Any) -> str:
    """A YAML scalar: quoted when it holds anything but plain name characters."""
    text = str(value)
    plain = text and all(c.isalnum() or c in "-_./" for c in text)
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
