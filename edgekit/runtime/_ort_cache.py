"""A decoder graph that takes and gives its KV cache, run by onnxruntime alone: tokens in, logits out.

Knows `past_key_values.N.key` and its kin as optimum exports them; offers what `_ort_genai.Decoder` offers, and knows
neither text nor sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import RuntimeFailed, UnsupportedModel
from edgekit.onnx_file import OnnxFile
from edgekit.ort_library import onnxruntime, open_graph, readable
from edgekit.runtime import Logits
from edgekit.runtime._common import Spent, Tokens, same_start
from edgekit.runtime._ort_genai import BATCH, Settings
from edgekit.units import MIB

PAST, PRESENT = "past_key_values.", "present."

_LOGITS_BUDGET = 64 * MIB
_FED = ("input_ids", "attention_mask", "position_ids")
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_WHOLE = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


def takes_cache(graph: OnnxFile) -> bool:
    """Whether `graph` is a decoder that takes and gives its cache through inputs and outputs."""
    return any(v.name.startswith(PAST) for v in graph.inputs) and any(v.name == "logits" for v in graph.outputs)


class Cached:
    """`graph` loaded, with one KV cache of at most `settings.n_ctx` tokens. `fed`: the tokens that the cache holds.

    The cache stays in values of onnxruntime's own: what one run gives, the next one takes, and nothing is copied to
    numpy in between. Raises CorruptCheckpoint, RuntimeFailed, UnsupportedModel.
    """

    def __init__(self, graph: Path, n_vocab: int, settings: Settings, spent: Spent) -> None:
        self.graph, self.n_vocab, self.n_ctx = graph, n_vocab, settings.n_ctx
        self.fed: list[int] = []
        self.spent = spent
        start = perf_counter()
        session, self.notes = open_graph(graph, settings.threads, settings.providers or ())
        self._session: Any = session
        self._whole, self._empty = _inputs(graph, session.get_inputs())
        self._outputs = ["logits", *(PRESENT + name.removeprefix(PAST) for name in self._empty)]
        absent = set(self._outputs) - {o.name for o in session.get_outputs()}
        if absent:
            raise UnsupportedModel(f"{graph} gives no {min(absent)}: its cache cannot go on", _AGAIN)
        self._past: dict[str, Any] = {}
        self._logits: Logits = np.empty((0, n_vocab), np.float32)
        self.load_ms = 1e3 * (perf_counter() - start)
        self.clear()

    @property
    def step(self) -> int:
        """Most tokens at once: their logits together are bounded to 64 MiB."""
        return max(1, min(BATCH, _LOGITS_BUDGET // (4 * self.n_vocab)))

    def forward(self, ids: Sequence[int]) -> Logits:
        """Run tokens behind those the cache holds -> their logits, float32 (len(ids), n_vocab). RuntimeFailed."""
        made = np.empty((len(ids), self.n_vocab), np.float32)
        whole = np.asarray(ids, np.int32)
        for start in range(0, len(ids), self.step):
            part = whole[start : start + self.step]
            self.append(part)
            made[start : start + len(part)] = self.rows(len(part))
        return made

    def append(self, ids: Tokens) -> None:
        """Run at most `step` tokens behind those the cache holds. Raises RuntimeFailed; the cache is then as before."""
        start = perf_counter()
        if len(self.fed) + len(ids) > self.n_ctx:
            raise RuntimeFailed(
                f"{len(self.fed) + len(ids)} tokens do not fit in a context of {self.n_ctx}",
                "shorten the text or raise --ctx-size",
            )
        binding = self._session.io_binding()
        with readable(self.graph):
            for name, value in self._feeds(ids).items():
                binding.bind_cpu_input(name, value)
            for name, held in self._past.items():
                binding.bind_ortvalue_input(name, held)
            for name in self._outputs:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            logits, *present = binding.get_outputs()
            self._logits = self._checked(logits.numpy())
        self._past = dict(zip(self._empty, present, strict=True))
        self.fed.extend(ids.tolist())
        self.spent.add(len(ids), perf_counter() - start)

    def _feeds(self, ids: Tokens) -> dict[str, npt.NDArray[Any]]:
        begin, end = len(self.fed), len(self.fed) + len(ids)
        values: dict[str, npt.NDArray[Any]] = {
            "input_ids": ids,
            "attention_mask": np.ones(end),
            "position_ids": np.arange(begin, end),
        }
        return {name: np.ascontiguousarray(values[name][None], kind) for name, kind in self._whole.items()}

    def _checked(self, logits: npt.NDArray[Any]) -> Logits:
        if logits.ndim != 3 or logits.shape[0] != 1 or logits.shape[2] != self.n_vocab:
            raise RuntimeFailed(
                f"{self.graph} gives logits of shape {logits.shape}, not for {self.n_vocab} tokens", _AGAIN
            )
        rows: Logits = np.array(logits[0], np.float32)
        return rows

    def feed(self, ids: Tokens) -> None:
        """Run any number of tokens; the last one's logits can be read afterwards."""
        for start in range(0, len(ids), self.step):
            self.append(ids[start : start + self.step])

    def last(self) -> Logits:
        """Logits of the token run last -> float32 (n_vocab)."""
        last: Logits = self._logits[-1]
        return last

    def rows(self, n: int) -> Logits:
        """Logits of the `n` tokens of the last `append` -> float32 (n, n_vocab). Raises RuntimeFailed."""
        if len(self._logits) != n:
            raise RuntimeFailed(
                f"{self.graph} gives the logits of the last position only",
                "measure a folder that `edgekit convert` made: it holds model_all.onnx as well",
            )
        return self._logits

    def keep(self, ids: Tokens) -> int:
        """Drop what the cache holds beyond the common start with `ids` -> tokens of `ids` that need no computing.

        The last token is always computed: its logits are wanted.
        """
        kept = same_start(self.fed, ids)
        if kept < len(self.fed):
            self._cut(kept)
        return kept

    def _cut(self, position: int) -> None:
        """Forget what is behind `position`: keys and values of earlier tokens do not depend on it."""
        make = onnxruntime().OrtValue.ortvalue_from_numpy
        if position:
            kept = {name: np.ascontiguousarray(v.numpy()[:, :, :position]) for name, v in self._past.items()}
        else:
            kept = self._empty
        self._past = {name: make(value) for name, value in kept.items()}
        del self.fed[position:]

    def clear(self) -> None:
        self._cut(0)

    def close(self) -> None:
        self._session = None
        self._past = {}


_AGAIN = "convert it again with edgekit convert --format onnx"


def _inputs(graph: Path, inputs: Sequence[Any]) -> tuple[dict[str, type], dict[str, npt.NDArray[Any]]]:
    """(integer inputs with their types, caches of no token). Raises UnsupportedModel for an input nobody could give."""
    whole: dict[str, type] = {}
    empty: dict[str, npt.NDArray[Any]] = {}
    for i in inputs:
        if i.name in _FED and i.type in _WHOLE:
            whole[i.name] = _WHOLE[i.type]
        elif i.name.startswith(PAST) and i.type in _TYPES and len(i.shape) == 4:
            _, heads, _, width = i.shape
            if not (isinstance(heads, int) and isinstance(width, int) and heads > 0 and width > 0):
                raise UnsupportedModel(f"{graph}: {i.name} has the shape {i.shape}, without heads and width", _AGAIN)
            empty[i.name] = np.empty((1, heads, 0, width), _TYPES[i.type])
        else:
            raise UnsupportedModel(f"{graph} wants {i.name!r} ({i.type}, {i.shape}): no decoder of text", _AGAIN)
    if "input_ids" not in whole:
        raise UnsupportedModel(f"{graph} takes no input_ids", "give a graph that takes token ids")
    return whole, empty
