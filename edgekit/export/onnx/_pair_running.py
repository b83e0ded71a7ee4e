"""An encoder and its decoder run as plainly as can be by onnxruntime: the proof's own way, apart from edgekit.runtime.

Knows the decoder in both its forms: the float32 one that computes the encoder's keys anew, and the one that ships.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.export.onnx._branching import BRANCH, PAST, PRESENT
from edgekit.export.onnx._running import empty_cache
from edgekit.ort_library import open_graph, readable

Floats = npt.NDArray[np.float32]


class Pair:
    """Both graphs on the CPU with `threads` threads."""

    def __init__(self, encoder: Path, decoder: Path, threads: int = 1) -> None:
        self.encoder, self.decoder = encoder, decoder
        self._encoder, self._decoder = (open_graph(path, threads, ())[0] for path in (encoder, decoder))
        self._inputs: dict[str, Any] = {v.name: v for v in self._decoder.get_inputs()}
        self._outputs = [v.name for v in self._decoder.get_outputs()]

    def states(self, ids: Sequence[int]) -> Floats:
        """What the encoder makes of a text: float32 (tokens, width)."""
        given = np.array([ids], np.int64)
        with readable(self.encoder):
            found = self._encoder.run(["last_hidden_state"], {"input_ids": given, "attention_mask": given * 0 + 1})
        return np.asarray(found[0][0], np.float32)

    def begin(self, states: Floats) -> Written:
        """A text that answers another, of which `states` is what the encoder made."""
        return Written(self, states)

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        with readable(self.decoder):
            found = self._decoder.run(self._outputs, {n: v for n, v in feeds.items() if n in self._inputs})
        return dict(zip(self._outputs, found, strict=True))

    def caches(self) -> dict[str, Any]:
        """Of no token."""
        return {n: empty_cache(v, 1, self.decoder) for n, v in self._inputs.items() if n.startswith(PAST)}


class Written:
    """The decoder with what it wrote so far. After the first step the states are gone: only their keys are left."""

    def __init__(self, pair: Pair, states: Floats) -> None:
        self._pair, self._states, self._past = pair, states[None], pair.caches()
        self._branches = any(".encoder." in name for name in self._past)
        self._begun = False

    def append(self, ids: Sequence[int]) -> Floats:
        """Read `ids` behind what is there -> their logits, float32 (len(ids), vocabulary)."""
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "encoder_attention_mask": np.ones(self._states.shape[:2], np.int64),
            "encoder_hidden_states": self._states,
            BRANCH: np.array([self._begun]),
        }
        found = self._pair.run(feeds | self._past)
        self._past = {n: found[n.replace(PAST, PRESENT, 1)] for n in self._past}
        if self._branches and not self._begun:
            self._states = np.zeros_like(self._states)
        self._begun = True
        return np.asarray(found["logits"][0], np.float32)

    def each(self, ids: Sequence[int]) -> Floats:
        """As `append`, one token after another."""
        return np.concatenate([self.append([token]) for token in ids])
