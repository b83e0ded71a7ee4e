"""onnxruntime and onnxruntime-genai, imported once and quietly; what they refuse, in our words.

Knows their names, providers and exceptions; knows no model.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from edgekit.errors import CorruptCheckpoint, EdgekitError, MissingExtra, RuntimeFailed, UnknownName

PROVIDERS: Mapping[str, tuple[str, str]] = {
    "CPU": ("CPUExecutionProvider", "CPU"),
    "CUDA": ("CUDAExecutionProvider", "cuda"),
    "CoreML": ("CoreMLExecutionProvider", "CoreML"),
    "DirectML": ("DmlExecutionProvider", "dml"),
    "MIGraphX": ("MIGraphXExecutionProvider", "MIGraphX"),
    "OpenVINO": ("OpenVINOExecutionProvider", "OpenVINO"),
    "QNN": ("QNNExecutionProvider", "QNN"),
    "TensorRT": ("TensorrtExecutionProvider", "NvTensorRtRtx"),
    "VitisAI": ("VitisAIExecutionProvider", "VitisAI"),
    "WebGPU": ("WebGpuExecutionProvider", "WebGPU"),
    "XNNPACK": ("XnnpackExecutionProvider", "XNNPACK"),
}
"""Names in targets -> (onnxruntime's, onnxruntime-genai's, which Config.append_provider takes)."""

SILENT = 4  # ORT_LOGGING_LEVEL_FATAL: what goes wrong is raised as well


def onnxruntime() -> Any:
    """The package `onnxruntime`; edgekit/__init__.py has turned its telemetry off. Raises MissingExtra."""
    return _imported("onnxruntime")


def genai() -> Any:
    """The package `onnxruntime_genai`, likewise. Raises MissingExtra."""
    _imported("onnxruntime")  # it holds the library that genai loads
    return _imported("onnxruntime_genai")


@cache
def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        missing = e.name in (None, name)
        what = f"{name.replace('_', '-')} is not installed" if missing else f"{name} does not load: {e}"
        raise MissingExtra(what, 'pip install "edgekit[onnx-runtime]"') from None


@cache
def failures() -> tuple[type[Exception], ...]:
    """What the two libraries raise: onnxruntime classes of its own, straight from Exception; genai RuntimeError."""
    state: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    theirs = [c for c in vars(state).values() if isinstance(c, type) and issubclass(c, Exception)]
    return (RuntimeError, ValueError, *theirs)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the engine raises about `path` into an EdgekitError."""
    onnxruntime()
    try:
        yield
    except EdgekitError:
        raise
    except failures() as error:
        raise refused(path, str(error)) from None


_LEAD = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_PLACE = re.compile(r"/[\w./+-]+\.(?:h|cc|cpp):\d+ .*?(?:\) |\) const )(?=[A-Z\w])")
_AGAIN = "convert it again, or copy the whole folder again"

_KNOWN: Sequence[tuple[str, type[EdgekitError], str, str]] = (
    (
        r"interface not available|not supported in this build|not been built with|Unknown provider name",
        RuntimeFailed,
        "its execution provider is not in this build of onnxruntime-genai",
        "run it on the CPU, or install the build for that device",
    ),
    (
        r"External data path does not exist|ValidateExternalDataPath",
        CorruptCheckpoint,
        "its weights are not beside it",
        "keep model.onnx and its .data file in one folder: " + _AGAIN,
    ),
    (
        r"External initializer|external data|Failed to (?:load|read) external|out of bounds|GetExtDataFromTensorProto",
        CorruptCheckpoint,
        "the file of its weights is not the one it was written with",
        _AGAIN,
    ),
    (
        r"Unsupported model IR version|opset \d+ is under development|ValidateOpsetForDomain",
        RuntimeFailed,
        "it is newer than this onnxruntime",
        "pip install --upgrade onnxruntime onnxruntime-genai",
    ),
    (
        r"Protobuf parsing failed|No graph was found|INVALID_PROTOBUF|ModelProto does not have a graph",
        CorruptCheckpoint,
        "it is no ONNX graph, or a damaged one",
        _AGAIN,
    ),
    (r"[Ff]ile doesn't exist|No such file", CorruptCheckpoint, "the file is missing", _AGAIN),
    (
        r"genai_config\.json|context_length is 0|Unknown value|JSON Error",
        CorruptCheckpoint,
        "its genai_config.json is not one that this onnxruntime-genai reads",
        _AGAIN,
    ),
    (
        r"bad_alloc|[Ff]ailed to allocate|out of memory",
        RuntimeFailed,
        "not enough memory",
        "a smaller --ctx-size, or fewer bits: --quant int4",
    ),
    (
        r"is not a registered function/op|Could not find an implementation",
        RuntimeFailed,
        "this onnxruntime has no kernel for one of its operators",
        "pip install --upgrade onnxruntime onnxruntime-genai",
    ),
)
"""What the engines say (tried on onnxruntime 1.32 and genai 0.18) -> error, our words, the next command."""


def refused(path: Path, said: str) -> EdgekitError:
    """The error for what an engine said about `path`, its own words at the end."""
    text = _PLACE.sub("", _LEAD.sub("", said)).strip().splitlines()
    reason = text[0][:400] if text else "no reason given"
    for pattern, kind, words, hint in _KNOWN:
        if re.search(pattern, said):
            return kind(f"{path}: {words} ({reason})", hint)
    return RuntimeFailed(f"onnxruntime refused {path}: {reason}", f"edgekit inspect {path} shows what it holds")


def wanted(providers: Sequence[str] | None) -> tuple[str, ...]:
    """Names of PROVIDERS, most wanted first, `CPU` left out: it is there in any case. Raises UnknownName."""
    known = {alias.lower(): name for name, aliases in PROVIDERS.items() for alias in (name, *aliases)}
    found = []
    for name in providers or ():
        if name.lower() not in known:
            raise UnknownName(f"no execution provider called {name!r}", f"known: {', '.join(PROVIDERS)}")
        found.append(known[name.lower()])
    return tuple(dict.fromkeys(n for n in found if n != "CPU"))


def options(threads: int) -> Any:
    """onnxruntime.SessionOptions for `threads` threads on one operator, silent."""
    made = onnxruntime().SessionOptions()
    made.intra_op_num_threads = threads
    made.log_severity_level = SILENT
    return made


def open_graph(path: Path, threads: int, providers: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """(InferenceSession, notes). What was asked for and is not there, or was dropped on the way, is noted.

    Raises CorruptCheckpoint, RuntimeFailed.
    """
    ort = onnxruntime()
    there = set(ort.get_available_providers())
    asked = [PROVIDERS[name][0] for name in providers]
    notes = [_absent(name) for name in providers if PROVIDERS[name][0] not in there]
    usable = [name for name in asked if name in there]
    with readable(path):
        session = ort.InferenceSession(str(path), options(threads), providers=[*usable, "CPUExecutionProvider"])
    used = session.get_providers()
    notes += [
        f"onnxruntime did not start {name} for this graph: it runs on {_short(used)}"
        for name in providers
        if PROVIDERS[name][0] in usable and PROVIDERS[name][0] not in used
    ]
    return session, tuple(notes)


def _absent(name: str) -> str:
    return f"this onnxruntime has no {name} ({PROVIDERS[name][0]}): the model runs without it"


def _short(used: Sequence[str]) -> str:
    return ", ".join(name.removesuffix("ExecutionProvider") for name in used)
