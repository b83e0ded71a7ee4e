"""A measurement in a process of its own, so that its memory is the model's. Knows pipes and signals, and no engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import edgekit.errors
from edgekit.benchmark._measure import measure
from edgekit.benchmark._result import BenchResult, Measurement, Request, Settings
from edgekit.errors import EdgekitError, RuntimeFailed
from edgekit.health import Health
from edgekit.units import Progress


def measure_apart(request: Request, progress: Progress) -> BenchResult:
    """`measure` in a child: it answers with one line of JSON for each step, and a last one with the result."""
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": root + (os.pathsep + inherited if inherited else "")}
    command = [sys.executable, "-m", "edgekit.benchmark", json.dumps(asdict(request))]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as talk,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=talk, text=True, encoding="utf-8", env=environment
        ) as child,
    ):  # fmt: skip
        try:
            result = _listen(child, progress)
            status = child.wait()
        finally:
            child.kill()
        talk.seek(0)
        said = talk.read()
    if result is None:
        why = f"signal {-status}" if status < 0 else f"status {status}"
        raise RuntimeFailed(
            f"the process that ran {Path(request.path).name} ended with {why}: "
            f"{said.strip()[-500:] or 'it said nothing'}",
            "signal 9 means that memory ran out: try a smaller model or context",
        )
    return result


def _listen(child: subprocess.Popen[str], progress: Progress) -> BenchResult | None:
    for line in child.stdout or ():
        try:
            answer = json.loads(line)
        except ValueError:
            continue  # an engine printed something of its own
        if "progress" in answer:
            task, done, total = answer["progress"]
            progress(task, done, total)
        elif "error" in answer:
            kind = getattr(edgekit.errors, answer["error"], EdgekitError)
            raise kind(answer["message"], answer["hint"])
        else:
            return _from_plain(answer["result"])
    return None


def _from_plain(data: dict[str, Any]) -> BenchResult:
    """What `asdict` and JSON made of a BenchResult, back again."""
    tests = tuple(Measurement(**t | {"samples_ns": tuple(t["samples_ns"])}) for t in data["tests"])
    health = {}
    for name in ("before", "after"):
        flags = data[name]["throttling"]
        health[name] = Health(**data[name] | {"throttling": None if flags is None else tuple(flags)})
    return BenchResult(**data | {"tests": tests, "settings": Settings(**data["settings"])} | health)


def work(request: str) -> None:
    """The child's side: `request` as JSON; answers on stdout."""

    def say(**answer: Any) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    wanted = json.loads(request)
    numbers = {k: None if wanted[k] is None else tuple(wanted[k]) for k in ("prompts", "counts")}
    try:
        asked = Request(**wanted | numbers | {"settings": Settings(**wanted["settings"])})
        result = measure(asked, lambda *step: say(progress=step))
    except EdgekitError as e:
        say(error=type(e).__name__, message=str(e), hint=e.hint)
    else:
        say(result=asdict(result))
