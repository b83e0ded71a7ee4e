"""Is this installation able to work? One finding a line, each with what to do where it is not."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from edgekit import cache, host
from edgekit.errors import EdgekitError
from edgekit.quant import ggml
from edgekit.recipe import Recipe
from edgekit.target import Target, match_target
from edgekit.units import show_bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `fix` is the next command where it is not `ok`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def diagnose() -> list[Finding]:
    """Look at everything; a check that fails becomes a finding, never an exception that a user could cause."""
    checks: tuple[Callable[[], Finding], ...] = (
        _python, _packages, _kernels, _runtime, _onnx, _machine, _disk, _cache, _hub, _data,
    )  # fmt: skip
    return [_guarded(check) for check in checks]


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (EdgekitError, OSError, ImportError) as e:
        return Finding(check.__name__.strip("_"), False, str(e), getattr(e, "hint", "") or "reinstall edgekit")


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding(
        "python", ok, f"{platform.python_version()} on {platform.platform()}", "" if ok else "use 3.11 or newer"
    )


def _packages() -> Finding:
    found, missing = [], []
    for name in ("edgekit", "llama-cpp-python", "tokenizers", "huggingface_hub", "numpy"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    fix = f"pip install {' '.join(missing)}" if missing else ""
    return Finding("packages", not missing, ", ".join(found) or "none", fix)


def _kernels() -> Finding:
    """Encode and decode one row through the native library: the self-test at load runs first."""
    row = np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, -1)
    fmt = ggml.FORMATS["Q4_K"]
    error = float(np.abs(ggml.decode(ggml.encode(row, fmt), fmt, 256) - row).max())
    return Finding("kernels", error < 0.2, f"ggml encodes and decodes; Q4_K error {error:.3f} on a ramp")


def _runtime() -> Finding:
    from edgekit.runtime import _llama_library as engine

    (commit, release), (cpus, gpus, backends) = engine.build(), engine.devices()
    parts = [f"llama.cpp {release} (ggml {commit})", *cpus, *(f"GPU {name}" for name in gpus), *backends]
    return Finding("runtime", True, ", ".join(parts) if gpus else f"{', '.join(parts)}, no GPU backend")


def _onnx() -> Finding:
    """ONNX is optional: what is installed of it, and what that is enough for."""
    runs = _versions("onnxruntime", "onnxruntime-genai")
    makes = _versions("onnx", "onnxscript", "torch", "transformers")
    if len(runs) < 2:
        return Finding(
            "onnx", True, 'not installed; pip install "edgekit[onnx-runtime]" runs it, "edgekit[onnx]" makes it'
        )
    can = "makes and runs it" if len(makes) == 4 else 'runs it; pip install "edgekit[onnx]" makes it'
    return Finding("onnx", True, f"{', '.join(runs + makes)}: {can}; telemetry is off")


def _versions(*names: str) -> list[str]:
    found = []
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found


def _cache() -> Finding:
    """What tuning learned and keeps."""
    used, most = cache.usage(), cache.limit()
    detail = (
        f"{show_bytes(used)} of at most {show_bytes(most)} in {cache.cache_dir()} (EDGEKIT_CACHE, EDGEKIT_CACHE_LIMIT)"
    )
    return Finding("cache", True, detail)


def _machine() -> Finding:
    found = host.detect()
    parts = [found.board or found.cpu or found.machine, f"{found.allowed_cores or found.logical_cores} cores"]
    if found.ram_bytes:
        parts.append(f"{show_bytes(found.ram_bytes)} RAM, {show_bytes(found.available_bytes or 0)} free")
    target = match_target(found)
    parts.append(f"matches target {target}" if target else "matches no shipped target: --target host")
    return Finding("machine", True, ", ".join(parts))


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    ok = free > 1 << 30 and os.access(Path.cwd(), os.W_OK)
    return Finding("disk", ok, f"{show_bytes(free)} free here", "" if ok else "convert in a folder with space: --out")


def _hub() -> Finding:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    token = "a token is set" if get_token() else "no token (only gated models need one)"
    offline = "; HF_HUB_OFFLINE is set: only cached models" if constants.HF_HUB_OFFLINE else ""
    return Finding("hub", True, f"{constants.ENDPOINT}, {token}, cache {cache}{offline}")


def _data() -> Finding:
    targets, recipes = len(Target.names()), len(Recipe.names())
    ok = targets > 0 and recipes > 0
    return Finding("data", ok, f"{targets} targets, {recipes} recipes", "" if ok else "reinstall edgekit")
