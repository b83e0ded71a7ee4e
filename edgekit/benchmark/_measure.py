"""One measurement in this process: which engine, how much memory, the state of the machine. Times nothing itself."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from edgekit.benchmark._result import BenchResult, Request
from edgekit.health import examine
from edgekit.host import detect
from edgekit.units import Progress


def measure(request: Request, progress: Progress) -> BenchResult:
    """Run what was asked. Raises what the engine raises."""
    before, baseline = examine(), _resident()
    if request.path.lower().endswith(".onnx"):
        from edgekit.benchmark import _onnx

        ran = _onnx.run(request, progress)
    else:
        from edgekit.benchmark import _llama

        ran = _llama.run(request, progress)
    return BenchResult(
        tests=ran.tests,
        model_filename=request.path,
        model_type=ran.model_type,
        model_size=ran.model_size,
        model_n_params=ran.model_n_params,
        bytes_per_token=ran.bytes_per_token,
        settings=ran.settings,
        load_ms=ran.load_ms,
        peak_rss_bytes=_peak(),
        baseline_rss_bytes=baseline,
        build=ran.build,
        machine=asdict(detect()),
        before=before,
        after=examine(),
        engine=ran.engine,
    )


def _resident() -> int:
    """Bytes of memory this process has resident now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """Most bytes resident since the program started.

    Linux: VmHWM, since ru_maxrss begins with what the parent had at the fork (kernel: exec_mmap). Elsewhere:
    ru_maxrss, in bytes on macOS (getrusage(2)).
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
