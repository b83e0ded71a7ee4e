"""edgekit: put a language model on a small device, and prove that it is still good.

    from edgekit import convert, plan, bench
    done = convert("demo", "rpi5")
    print(done.artifact.model, done.plan.file_bytes)

The names below are loaded when they are first used, so that importing edgekit costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Official builds of onnxruntime and onnxruntime-genai keep usage records unless this is set before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from edgekit.benchmark import bench
    from edgekit.certification import certify
    from edgekit.errors import EdgekitError
    from edgekit.evaluation import evaluate
    from edgekit.generation import answer
    from edgekit.inspection import inspect
    from edgekit.pipeline import Options, convert, plan
    from edgekit.runtime.opening import open_session as load
    from edgekit.target import Target

__all__ = [
    "EdgekitError",
    "Options",
    "Target",
    "answer",
    "bench",
    "certify",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "plan",
]

_WHERE = {
    "EdgekitError": ("edgekit.errors", "EdgekitError"),
    "Options": ("edgekit.pipeline", "Options"),
    "Target": ("edgekit.target", "Target"),
    "answer": ("edgekit.generation", "answer"),
    "bench": ("edgekit.benchmark", "bench"),
    "certify": ("edgekit.certification", "certify"),
    "convert": ("edgekit.pipeline", "convert"),
    "evaluate": ("edgekit.evaluation", "evaluate"),
    "inspect": ("edgekit.inspection", "inspect"),
    "load": ("edgekit.runtime.opening", "open_session"),
    "plan": ("edgekit.pipeline", "plan"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
