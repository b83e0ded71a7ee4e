"""The one pipeline: open, plan, run the stages, write, verify, seal. The only place that knows the order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekit import arch
from edgekit.checkpoint import open_checkpoint
from edgekit.errors import UnknownName, UnsupportedModel
from edgekit.onnx_planning import ENCODERS, PAIRS, OnnxPlan
from edgekit.pipeline import _gguf, _manifest, _onnx
from edgekit.pipeline._gguf import (
    Conversion,
    alternatives,
    file_name,
    importance_names,
    plan_all,
    plan_source,
    refuse_fallbacks,
)
from edgekit.pipeline._manifest import versions
from edgekit.pipeline._model import Options, Source, open_source, safe_name, size_budget
from edgekit.pipeline._onnx import OnnxConversion, OnnxSource
from edgekit.pipeline._onnx import learning as learning_onnx
from edgekit.pipeline._onnx import open_source as open_onnx
from edgekit.pipeline._onnx import plan_all as plan_all_onnx
from edgekit.pipeline._onnx import plan_source as plan_onnx
from edgekit.planning import Plan
from edgekit.recipe import Recipe
from edgekit.target import Target
from edgekit.units import Progress, silent

__all__ = [
    "Conversion",
    "OnnxConversion",
    "OnnxSource",
    "Options",
    "Source",
    "alternatives",
    "conversion_summary",
    "convert",
    "export_format",
    "file_name",
    "importance_names",
    "learning_onnx",
    "open_onnx",
    "open_source",
    "plan",
    "plan_all",
    "plan_all_onnx",
    "plan_onnx",
    "plan_source",
    "refuse_fallbacks",
    "safe_name",
    "size_budget",
    "summary",
    "versions",
]


def plan(
    model: str | Path, target: str = "host", options: Options = Options(), *, progress: Progress = silent
) -> Plan | OnnxPlan:
    """The plan that `convert` would follow, whether it fits or not (`auto` raises DoesNotFit when nothing does)."""
    device = Target.load(target)
    if export_format(model, device, options, progress=progress) == "onnx":
        return plan_onnx(open_onnx(model, options, progress=progress), device, options)
    return plan_source(open_source(model, progress=progress), device, options)


def convert(
    model: str | Path,
    target: str = "host",
    options: Options = Options(),
    *,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Conversion | OnnxConversion:
    """Make the artefact for `target`. Every decision is made, and every refusal given, before a weight is read.

    Raises DoesNotFit (exit 3), VerificationFailed (exit 4, nothing sealed) and the other EdgekitErrors (exit 1).
    """
    device, recipe = Target.load(target), Recipe.load(options.recipe)
    if export_format(model, device, options, progress=progress) == "onnx":
        return _onnx.convert(model, device, recipe, options, dry_run=dry_run, progress=progress)
    return _gguf.convert(model, device, recipe, options, dry_run=dry_run, progress=progress)


def export_format(model: str | Path, device: Target, options: Options, *, progress: Progress = silent) -> str:
    """`gguf` or `onnx`. `auto` takes GGUF where the device runs it and this model's family has one, else ONNX."""
    chosen = options.format or Recipe.load(options.recipe).export.format
    if chosen == "auto":
        chosen = _fitting_format(model, device, progress)
    quant = (options.quant or "").lower().replace("_", "-")
    if chosen == "gguf" and quant in {*PAIRS, *ENCODERS}:
        raise UnknownName(f"{options.quant} is an ONNX format, and this makes a GGUF", f"--format onnx -q {quant}")
    return chosen


def _fitting_format(model: str | Path, device: Target, progress: Progress) -> str:
    if "gguf" not in device.runtimes:
        return "onnx"
    try:
        arch.blueprint(open_checkpoint(model, progress=progress))
    except UnsupportedModel:
        return "onnx"
    return "gguf"


def summary(decided: Plan | OnnxPlan, *, tensors: bool = False) -> dict[str, Any]:
    """A plan as plain values for JSON: bytes, tokens, tokens/s. `tensors` adds one row for each tensor."""
    if isinstance(decided, Plan):
        return _manifest.summary(decided, tensors=tensors)
    return _onnx.summary(decided, tensors=tensors)


def conversion_summary(done: Conversion | OnnxConversion) -> dict[str, Any]:
    """What `convert --json` prints."""
    if isinstance(done, Conversion):
        return _manifest.conversion_summary(done)
    return _onnx.conversion_summary(done)
