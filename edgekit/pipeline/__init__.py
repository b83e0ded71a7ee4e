"""The one pipeline: open, plan, run the stages, write, verify, seal. The only place that knows the order."""

from __future__ import annotations

from pathlib import Path

from edgekit.pipeline._gguf import (
    Conversion,
    alternatives,
    convert,
    file_name,
    importance_names,
    plan_all,
    plan_source,
    refuse_fallbacks,
)
from edgekit.pipeline._manifest import conversion_summary, summary, versions
from edgekit.pipeline._model import Options, Source, open_source, safe_name, size_budget
from edgekit.planning import Plan
from edgekit.target import Target
from edgekit.units import Progress, silent

__all__ = [
    "Conversion",
    "Options",
    "Source",
    "alternatives",
    "conversion_summary",
    "convert",
    "file_name",
    "importance_names",
    "open_source",
    "plan",
    "plan_all",
    "plan_source",
    "refuse_fallbacks",
    "safe_name",
    "size_budget",
    "summary",
    "versions",
]


def plan(model: str | Path, target: str = "host", options: Options = Options(), *, progress: Progress = silent) -> Plan:
    """The plan that `convert` would follow, whether it fits or not (`auto` raises DoesNotFit when nothing does)."""
    return plan_source(open_source(model, progress=progress), Target.load(target), options)
