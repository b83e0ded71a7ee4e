"""The llama.cpp shared library, loaded once, silent. Knows its log and its thread pools; knows no model."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import re
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from typing import Any

_WARN, _ERROR, _CONT = 3, 4, 5  # ggml_log_level, ggml.h
_PREFIX = re.compile(r"^(?:[\w:~<>]+: |error loading model: |error loading model \w+: )*")


class Log:
    """Warnings and errors of the engine, newest last; nothing is printed."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=64)
        self._continues = False

    def __call__(self, level: int, text: bytes | None, _user: int | None) -> None:
        line = (text or b"").decode("utf-8", "replace")
        if level == _CONT:
            if self._continues and self._lines:
                last, head = self._lines.pop()
                self._lines.append((last, head + line))
            return
        self._continues = level in (_WARN, _ERROR)
        if self._continues:
            self._lines.append((level, line))

    def clear(self) -> None:
        self._lines.clear()

    def reason(self) -> str:
        """What went wrong, in the engine's own words without its function names; `` if it said nothing."""
        errors = [_PREFIX.sub("", line.strip()) for level, line in self._lines if level == _ERROR]
        said = [e for e in dict.fromkeys(errors) if e and e != "failed to load model"]
        return "; ".join(said)


@dataclass(frozen=True)
class Library:
    """`api`: the functions and structures of llama.h as llama_cpp declares them; `raw`: the library itself."""

    api: Any
    raw: Any
    log: Log
    callback: Any = field(repr=False)

    def listen(self) -> None:
        """Hear what the engine says from now on, and only that: its log has one receiver, which others may have set."""
        self.log.clear()
        self.api.llama_log_set(self.callback, None)


@cache
def library() -> Library:
    """Load llama.cpp, silence it, start its backends. Once a process; never undone (models may outlive any caller)."""
    api: Any = importlib.import_module("llama_cpp.llama_cpp")
    log = Log()
    loaded = Library(api, api._lib, log, api.llama_log_callback(log))
    loaded.listen()
    api.llama_backend_init()
    # Backends may log while the process ends, when no Python code can run any more: give them a C function then.
    nothing = ctypes.cast(ctypes.CDLL(None).abs, api.llama_log_callback)
    atexit.register(api.llama_log_set, nothing, None)
    return loaded


def build() -> tuple[str, str]:
    """(commit of ggml, version of llama.cpp) this library says it was built from; `unknown` where it does not say."""
    lib = library()
    return _text_of(lib.raw, "ggml_commit"), _text_of(lib.raw, "llama_version")


def devices() -> tuple[list[str], list[str], list[str]]:
    """(CPUs, GPUs, backends) by the names ggml's registry gives them; `backends` leaves out the CPU's own."""
    raw = library().raw
    cpus: list[str] = []
    gpus: list[str] = []
    backends: list[str] = []
    if not hasattr(raw, "ggml_backend_dev_count"):
        return cpus, gpus, backends
    _declare(raw)
    for i in range(raw.ggml_backend_dev_count()):
        device = raw.ggml_backend_dev_get(i)
        kind, name = raw.ggml_backend_dev_type(device), raw.ggml_backend_dev_description(device)
        # ggml_backend_dev_type: 0 CPU, 1 GPU, 2 IGPU, 3 ACCEL (ggml-backend.h)
        (gpus if kind in (1, 2) else cpus).append((name or b"").decode("utf-8", "replace").strip())
    for i in range(raw.ggml_backend_reg_count()):
        name = (raw.ggml_backend_reg_name(raw.ggml_backend_reg_get(i)) or b"").decode()
        if name != "CPU":
            backends.append(name)
    return cpus, gpus, backends


def new_threadpool(threads: int) -> int | None:
    """Threads that live as long as a context, or None where the library has none to offer.

    Without one ggml makes and destroys a pool for every graph. The parameters are filled by the library itself into
    a buffer larger than any version's structure, so that its layout need not be known.
    """
    raw = library().raw
    if not all(hasattr(raw, name) for name in ("ggml_threadpool_new", "llama_attach_threadpool")):
        return None
    params = ctypes.create_string_buffer(8192)
    raw.ggml_threadpool_params_init.argtypes = [ctypes.c_void_p, ctypes.c_int]
    raw.ggml_threadpool_params_init.restype = None
    raw.ggml_threadpool_params_init(params, threads)
    raw.ggml_threadpool_new.argtypes = [ctypes.c_void_p]
    raw.ggml_threadpool_new.restype = ctypes.c_void_p
    pool: int | None = raw.ggml_threadpool_new(params)
    return pool


def attach_threadpool(context: int, pool: int) -> None:
    raw = library().raw
    raw.llama_attach_threadpool.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    raw.llama_attach_threadpool.restype = None
    raw.llama_attach_threadpool(context, pool, None)


def free_threadpool(pool: int) -> None:
    """Only after the context it is attached to is gone."""
    raw = library().raw
    raw.ggml_threadpool_free.argtypes = [ctypes.c_void_p]
    raw.ggml_threadpool_free.restype = None
    raw.ggml_threadpool_free(pool)


def _text_of(raw: Any, function: str) -> str:
    if not hasattr(raw, function):
        return "unknown"
    call = getattr(raw, function)
    call.argtypes, call.restype = [], ctypes.c_char_p
    return (call() or b"unknown").decode("utf-8", "replace")


def _declare(raw: Any) -> None:
    pointer, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    for name, arguments, result in (
        ("ggml_backend_dev_count", [], size),
        ("ggml_backend_dev_get", [size], pointer),
        ("ggml_backend_dev_type", [pointer], ctypes.c_int),
        ("ggml_backend_dev_description", [pointer], text),
        ("ggml_backend_reg_count", [], size),
        ("ggml_backend_reg_get", [size], pointer),
        ("ggml_backend_reg_name", [pointer], text),
    ):
        function = getattr(raw, name)
        function.argtypes, function.restype = arguments, result
