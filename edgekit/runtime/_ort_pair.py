"""An encoder and its decoder, run by onnxruntime alone: source tokens in, logits of the next written token out.

Knows the inputs and outputs that optimum and transformers.js know; knows neither text nor sampling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint, RuntimeFailed, UnsupportedModel
from edgekit.onnx_file import OnnxFile
from edgekit.ort_library import onnxruntime, open_graph, readable
from edgekit.runtime import Logits
from edgekit.runtime._common import Spent, Tokens
from edgekit.runtime._ort_cache import PAST, PRESENT

STATES, BRANCH = "encoder_hidden_states", "use_cache_branch"

_KNOWN = ("input_ids", STATES, "encoder_attention_mask", BRANCH)
_AGAIN = "convert it again with edgekit convert --format onnx"


def takes_states(graph: OnnxFile) -> bool:
    """Whether `graph` is a decoder that reads what an encoder made."""
    return any(v.name == STATES for v in graph.inputs) and any(v.name == "logits" for v in graph.outputs)


def encoder_of(decoder: Path) -> Path:
    """The encoder's graph beside it, called alike. Raises CorruptCheckpoint."""
    found = decoder.with_name(re.sub(r"^decoder_model(_merged)?", "encoder_model", decoder.name))
    if found == decoder or not found.is_file():
        raise CorruptCheckpoint(f"{decoder} reads what an encoder made, and there is no {found.name} beside it", _AGAIN)
    return found


class Pair:
    """Both graphs loaded, with one text that is read and one that is written. `written`: tokens in the cache.

    The encoder's keys and values are computed with the first token and then handed back; all caches stay in
    onnxruntime's own values. Raises CorruptCheckpoint, RuntimeFailed, UnsupportedModel.
    """

    def __init__(
        self, encoder: Path, decoder: Path, n_vocab: int, threads: int, providers: Sequence[str], spent: Spent
    ) -> None:
        self.encoder, self.decoder, self.n_vocab, self.spent = encoder, decoder, n_vocab, spent
        start = perf_counter()
        reader, missing = open_graph(encoder, threads, providers)
        writer, lacks = open_graph(decoder, threads, providers)
        self._reader: Any = reader
        self._writer: Any = writer
        self.notes = tuple(dict.fromkeys((*missing, *lacks)))
        self._takes = {i.name for i in reader.get_inputs()}
        if self._takes - {"input_ids", "attention_mask"} or "input_ids" not in self._takes:
            raise UnsupportedModel(f"{encoder} wants {', '.join(sorted(self._takes))}: no encoder of text", _AGAIN)
        self._inputs = {i.name for i in writer.get_inputs()}
        self._empty = _caches(decoder, writer.get_inputs())
        presents = {o.name for o in writer.get_outputs()}
        self._outputs = ["logits", *(PRESENT + name.removeprefix(PAST) for name in self._empty)]
        if absent := set(self._outputs) - presents:
            raise UnsupportedModel(f"{decoder} gives no {min(absent)}: its cache cannot go on", _AGAIN)
        self._past: dict[str, Any] = {}
        self._states: Any = None
        self._mask: npt.NDArray[np.int64] = np.empty((1, 0), np.int64)
        self.written = 0
        self.load_ms = 1e3 * (perf_counter() - start)

    def read(self, ids: Tokens) -> None:
        """Begin anew: `ids` is the text that will be answered."""
        start = perf_counter()
        given = np.ascontiguousarray(ids[None], np.int64)
        self._mask = np.ones_like(given)
        feeds = {"input_ids": given, "attention_mask": self._mask}
        with readable(self.encoder):
            found = self._reader.run(["last_hidden_state"], {n: v for n, v in feeds.items() if n in self._takes})
        make = onnxruntime().OrtValue.ortvalue_from_numpy
        self._states = make(found[0])
        self._past = {name: make(value) for name, value in self._empty.items()}
        self.written = 0
        self.spent.add(0, perf_counter() - start)
        self.spent.tokens[False] += len(ids)

    def append(self, ids: Sequence[int]) -> Logits:
        """Write `ids` behind what is written -> logits of each, float32 (len(ids), n_vocab). Raises RuntimeFailed."""
        if self._states is None:
            raise RuntimeFailed("nothing has been read that could be answered", "give a prompt")
        start = perf_counter()
        binding = self._writer.io_binding()
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.array([ids], np.int64),
            "encoder_attention_mask": self._mask,
            BRANCH: np.array([self.written > 0]),
        }
        with readable(self.decoder):
            for name, value in feeds.items():
                if name in self._inputs:
                    binding.bind_cpu_input(name, value)
            for name, held in {STATES: self._states, **self._past}.items():
                if name in self._inputs:
                    binding.bind_ortvalue_input(name, held)
            for name in self._outputs:
                binding.bind_output(name, "cpu")
            self._writer.run_with_iobinding(binding)
            logits, *present = binding.get_outputs()
            rows = np.array(logits.numpy()[0], np.float32)
        if rows.shape != (len(ids), self.n_vocab):
            raise RuntimeFailed(f"{self.decoder} gives logits {rows.shape} for {len(ids)} of {self.n_vocab} tokens")
        for name, held in zip(self._empty, present, strict=True):
            # optimum's graphs hand back nothing where the encoder's keys were given
            if self.written == 0 or ".encoder." not in name:
                self._past[name] = held
        # the first step computes the encoder's keys: that is reading still
        self.spent.add(len(ids) if self.written else 0, perf_counter() - start)
        self.written += len(ids)
        return rows

    def close(self) -> None:
        self._reader = self._writer = self._states = None
        self._past = {}


def _caches(graph: Path, inputs: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
    """Caches of no token. Raises UnsupportedModel for an input that nobody could give."""
    empty: dict[str, npt.NDArray[Any]] = {}
    for i in inputs:
        if i.name.startswith(PAST) and i.type == "tensor(float)" and len(i.shape) == 4:
            _, heads, _, width = i.shape
            if not (isinstance(heads, int) and isinstance(width, int) and heads > 0 and width > 0):
                raise UnsupportedModel(f"{graph}: {i.name} has the shape {i.shape}, without heads and width", _AGAIN)
            empty[i.name] = np.empty((1, heads, 0, width), np.float32)
        elif i.name not in _KNOWN:
            raise UnsupportedModel(f"{graph} wants {i.name!r} ({i.type}, {i.shape}): no decoder of text", _AGAIN)
    if not empty:
        raise UnsupportedModel(f"{graph} takes no cache", "name decoder_model_merged.onnx, where there is one")
    return empty
