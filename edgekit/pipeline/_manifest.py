"""Plans and conversions as plain values: for the manifest in the artefact, and for `--json`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.checkpoint import Checkpoint
from edgekit.planning import Plan
from edgekit.recipe import Recipe

if TYPE_CHECKING:
    from edgekit.export.gguf import Written
    from edgekit.onnx_tuning import Outcome as OnnxOutcome
    from edgekit.pipeline._gguf import Conversion
    from edgekit.tuning import Outcome
    from edgekit.verification import Certificate


def manifest(conversion: Conversion, written: Written, certificate: Certificate, recipe: Recipe) -> Mapping[str, Any]:
    source = conversion.source
    return {
        "model_file": written.path.name,
        "format": "gguf",
        "source": {
            "ref": public_ref(source.checkpoint),
            "name": source.checkpoint.name,
            "digest": source.checkpoint.digest,
            "architecture": conversion.plan.arch,
            "parameters": source.checkpoint.parameters,
            "dtype": source.checkpoint.dtype,
        },
        "target": conversion.target.name,
        "recipe": recipe.model_dump(mode="json"),
        "plan": summary(conversion.plan, tensors=True),
        "certificate": asdict(certificate),
        **learned(conversion.outcome),
        "warnings": list(conversion.warnings),
        "versions": versions(),
        "instruction_set": platform.machine(),
    }


def learned(outcome: Outcome | OnnxOutcome | None) -> dict[str, Any]:
    """What was learned and compared, for the manifest: what the candidates were made from and judged by, how they did,
    what other sizes lose, and which answers changed."""
    if outcome is None:
        return {}
    return {
        "calibration": {"text": outcome.text, "tokens": outcome.tokens, "held_out": outcome.held_out},
        "candidates": [asdict(c) for c in outcome.candidates],
        "doubt": outcome.doubt,
        "ladder": [asdict(c) for c in outcome.ladder],
        "flips": outcome.flips.as_json() if outcome.flips else None,
    }


def public_ref(checkpoint: Checkpoint) -> str:
    """What the user typed; of a local path only the last part, so that a manifest does not tell who made it."""
    return Path(checkpoint.ref).name if Path(checkpoint.ref).exists() else checkpoint.ref


def versions(more: Sequence[str] = ("llama-cpp-python",)) -> dict[str, str]:
    """Versions of what took part: always edgekit, tokenizers and numpy, and `more`."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in ("edgekit", *more, "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def summary(decided: Plan, *, tensors: bool = False) -> dict[str, Any]:
    """A plan as plain values for JSON: bytes, tokens, tokens/s. `tensors` adds one row for each tensor."""
    memory = decided.memory
    found: dict[str, Any] = {
        "target": decided.target,
        "preset": decided.preset.name,
        "why": decided.why,
        "architecture": decided.arch,
        "parameters": decided.parameters,
        "file_bytes": decided.file_bytes,
        "weight_bytes": decided.weight_bytes,
        "bits_per_weight": round(decided.bits_per_weight, 4),
        "bytes_by_format": decided.bytes_by_format,
        "context": decided.context,
        "kv_type": decided.kv_type,
        "kv_bytes": dict(decided.kv_bytes),
        "memory": asdict(memory) | {"total": memory.total, "headroom": memory.headroom, "fits": memory.fits},
        "rule_of_thumb_bytes": decided.rule_of_thumb,
        "forecast": asdict(decided.forecast),
        "fallbacks": [
            {"tensor": t.name, "wanted": t.wanted, "format": t.format.name, "row": t.shape[-1]}
            for t in decided.fallbacks
        ],
        "ignored": list(decided.blueprint.ignored),
    }
    if tensors:
        found["tensors"] = [
            {"name": t.name, "shape": list(t.shape), "format": t.format.name, "bytes": t.nbytes}
            for t in decided.tensors
        ]
    return found


def conversion_summary(done: Conversion) -> dict[str, Any]:
    """What `convert --json` prints."""
    return {
        "out": str(done.out),
        "model": str(done.artifact.model) if done.artifact else None,
        "sha256": done.artifact.manifest["files"][done.artifact.model.name]["sha256"] if done.artifact else None,
        "plan": summary(done.plan),
        "certificate": asdict(done.certificate) if done.certificate else None,
        **learned(done.outcome),
        "warnings": list(done.warnings),
    }
