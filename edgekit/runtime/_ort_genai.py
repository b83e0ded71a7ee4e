"""A decoder graph run by onnxruntime-genai: tokens in, logits out, the KV cache in between.

Knows og.Model and og.Generator; knows neither text nor sampling.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edgekit.errors import EdgekitError, RuntimeFailed
from edgekit.ort_library import PROVIDERS, SILENT, genai, readable
from edgekit.runtime import Logits
from edgekit.runtime._common import Spent, Tokens, same_start
from edgekit.runtime._ort_folder import ALL_POSITIONS
from edgekit.units import MIB

BATCH = 512
"""Most tokens of a prompt at once: more are not faster, and activations grow with them."""

_LOGITS_BUDGET = 64 * MIB


@dataclass(frozen=True, slots=True)
class Settings:
    """`n_ctx`: tokens the KV cache is allocated for. `providers`: names of ort_library.PROVIDERS, None: those of
    genai_config.json. `windowed`: that file describes caches as long as a sliding window, which model.onnx has."""

    n_ctx: int
    threads: int
    providers: tuple[str, ...] | None
    windowed: bool = False


class Decoder:
    """`graph` of the folder it lies in, loaded, with one KV cache. `fed`: the tokens that the cache holds.

    Raises CorruptCheckpoint, RuntimeFailed.
    """

    def __init__(self, graph: Path, n_vocab: int, settings: Settings, spent: Spent) -> None:
        self.graph, self.n_vocab, self.n_ctx = graph, n_vocab, settings.n_ctx
        self.fed: list[int] = []
        self.spent = spent
        self.notes: tuple[str, ...] = ()
        start = perf_counter()
        self._model: Any = self._load(settings)
        self._generator: Any = None
        self._last_only = False
        self.load_ms = 1e3 * (perf_counter() - start)
        self._fresh()

    def _load(self, settings: Settings) -> Any:
        """With the providers asked for; if those cannot be had, without, and a note says why."""
        og = genai()
        with readable(self.graph):
            if settings.providers is None:
                config = self._config(og, settings)
            else:
                config = self._config(og, settings, settings.providers)
        try:
            with readable(self.graph):
                model = og.Model(config)
        except EdgekitError as error:
            if settings.providers == ():
                raise
            with readable(self.graph):
                model = og.Model(self._config(og, settings, ()))
            names = ", ".join(settings.providers or ()) or "the execution provider of its genai_config.json"
            self.notes = (f"{self.graph.name} runs on the CPU, without {names}: {error}",)
            return model
        self.notes = _unused(settings.providers, str(model.device_type))
        return model

    def _config(self, og: Any, settings: Settings, providers: Sequence[str] | None = None) -> Any:
        config = og.Config(str(self.graph.parent))
        session = {"intra_op_num_threads": settings.threads, "log_severity_level": SILENT}
        model: dict[str, Any] = {"decoder": {"filename": self.graph.name, "session_options": session}}
        if settings.windowed and self.graph.name == ALL_POSITIONS:
            # its caches are whole: to genai, a window over everything, which may be half of `context_length` at most
            whole = {"window_size": settings.n_ctx, "slide_key_value_cache": False, "slide_inputs": False}
            model["decoder"]["sliding_window"] = whole
            model["context_length"] = 2 * settings.n_ctx
        config.overlay(json.dumps({"model": model, "search": {"max_length": settings.n_ctx}}))
        if providers is not None:
            config.clear_providers()
            for name in providers:
                config.append_provider(PROVIDERS[name][1])
        return config

    def _fresh(self) -> None:
        """An empty cache. A new generator allocates it anew; there is never more than one."""
        og = genai()
        self._generator = None
        with readable(self.graph):
            params = og.GeneratorParams(self._model)
            params.set_search_options(max_length=self.n_ctx, batch_size=1, num_beams=1)
            self._generator = og.Generator(self._model, params)
        self.fed.clear()

    @property
    def step(self) -> int:
        """Most tokens at once: where a graph gives the logits of every one of them, they are bounded to 64 MiB."""
        return BATCH if self._last_only else max(1, min(BATCH, _LOGITS_BUDGET // (4 * self.n_vocab)))

    def append(self, ids: Tokens) -> None:
        """Run at most `step` tokens behind those the cache holds. Raises RuntimeFailed."""
        start = perf_counter()
        try:
            with readable(self.graph):
                self._generator.append_tokens(ids)
        except EdgekitError:
            self._fresh()  # what a failed run left in the cache is not known
            raise
        self.spent.add(len(ids), perf_counter() - start)
        self.fed.extend(ids.tolist())

    def feed(self, ids: Tokens) -> None:
        """Run any number of tokens; the last one's logits can be read afterwards."""
        start = 0
        while start < len(ids):
            part = ids[start : start + self.step]
            self.append(part)
            if start == 0 and len(part) > 1 and not self._last_only:
                self._last_only = self._generator.get_output("logits").shape[1] == 1
            start += len(part)

    def last(self) -> Logits:
        """Logits of the token run last -> float32 (n_vocab)."""
        return np.asarray(self._generator.get_logits(), np.float32).reshape(-1)[-self.n_vocab :]

    def rows(self, n: int) -> Logits:
        """Logits of the `n` tokens of the last `append` -> float32 (n, n_vocab). Raises RuntimeFailed."""
        found = self._generator.get_output("logits")
        if found.shape[1] != n:
            raise RuntimeFailed(
                f"{self.graph} gives the logits of the last position only",
                "measure a folder that `edgekit convert` made: it holds model_all.onnx as well",
            )
        return np.array(found[0], np.float32)

    def keep(self, ids: Tokens) -> int:
        """Drop what the cache holds beyond the common start with `ids` -> tokens of `ids` that need no computing.

        The last token is always computed: its logits are wanted. A cache that cannot be cut there is emptied.
        """
        kept = same_start(self.fed, ids)
        if kept and kept < len(self.fed):
            kept = kept if self._rewound(kept) else 0
        if kept == 0 and self.fed:
            self._fresh()
        return kept

    def _rewound(self, position: int) -> bool:
        try:
            self._generator.rewind_to(position)
        except RuntimeError:  # windowed caches have lost what came before
            return False
        del self.fed[position:]
        return True

    def clear(self) -> None:
        if self.fed and not self._rewound(0):
            self._fresh()

    def close(self) -> None:
        self._generator = self._model = None


def _unused(providers: Sequence[str] | None, device: str) -> tuple[str, ...]:
    """What was asked for and taken without a word, although the model runs on the CPU."""
    apart = [name for name in providers or () if name in ("CUDA", "TensorRT", "DirectML", "WebGPU", "QNN")]
    if apart and device.upper() == "CPU":
        return (f"onnxruntime-genai took {', '.join(apart)} without complaint and runs on the CPU",)
    return ()
