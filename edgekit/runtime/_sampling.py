"""The next token out of a row of logits, as llama.cpp's sampler chain takes it: the same steps, the same draws.

For engines that leave sampling to us. Knows numbers only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import log

import numpy as np
import numpy.typing as npt

from edgekit.runtime._common import PENALTY_WINDOW

Row = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Temperature 0 takes the likeliest token; otherwise penalty, top-k, top-p, min-p, temperature, a seeded draw."""

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0


class Sampler:
    """A `Sampling` at work; `seen` are the tokens before the first one drawn."""

    def __init__(self, how: Sampling, seen: Iterable[int] = ()) -> None:
        self._how = how
        self._window: deque[int] = deque(seen, maxlen=PENALTY_WINDOW)
        # std::mt19937 and MT19937 are one generator; the legacy seeding of numpy is that of the C++ standard
        self._random = np.random.RandomState(how.seed & 0xFFFFFFFF)

    def draw(self, logits: Row) -> int:
        """A token id from float32 (n_vocab). The token then counts as seen."""
        how = self._how
        if how.repeat_penalty != 1.0 and self._window:
            logits = self._penalised(logits)
        token = int(logits.argmax()) if how.temperature <= 0 else self._drawn(logits)
        if how.repeat_penalty != 1.0:
            self._window.append(token)
        return token

    def _penalised(self, logits: Row) -> Row:
        """llama_sampler_penalties_apply: what was seen is divided if positive, multiplied if not."""
        penalty, seen = np.float32(self._how.repeat_penalty), np.fromiter(set(self._window), np.int64)
        out, values = logits.copy(), logits[seen]
        out[seen] = np.where(values <= 0, values * penalty, values / penalty)
        return out

    def _drawn(self, logits: Row) -> int:
        ids = self._kept(logits)
        scaled = logits[ids] / np.float32(self._how.temperature)
        weights = np.exp(scaled - scaled.max()).astype(np.float64)
        running = np.cumsum(weights)
        point = running[-1] * self._uniform()
        return int(ids[min(int(np.searchsorted(running, point)), len(ids) - 1)])

    def _kept(self, logits: Row) -> npt.NDArray[np.intp]:
        """Token ids that top-k, top-p and min-p leave: likeliest first where the first two sort, else as numbered."""
        how, ids = self._how, np.arange(len(logits))
        if how.top_k > 0 or how.top_p < 1.0:
            ids = _largest(logits, how.top_k)
            if how.top_p < 1.0:
                values = logits[ids]
                share = np.exp(values - values[0])
                share = np.cumsum(share / share.sum(dtype=np.float32), dtype=np.float32)
                ids = ids[: int(np.searchsorted(share, np.float32(how.top_p))) + 1]
        if how.min_p > 0.0:
            values = logits[ids]
            ids = ids[values >= values.max() + np.float32(log(how.min_p))]
        return ids

    def _uniform(self) -> float:
        """std::uniform_real_distribution<double> as libstdc++ draws it: two words of 32 bits, the low one first."""
        low, high = (int(word) for word in self._random.randint(0, 1 << 32, size=2, dtype=np.uint32))
        return min((low + high * 4294967296.0) / 18446744073709551616.0, float(np.nextafter(1.0, 0.0)))


def _largest(logits: Row, k: int) -> npt.NDArray[np.intp]:
    """The ids of the `k` largest (0: of all), largest first; of equal ones the lower id."""
    size = len(logits)
    ids = np.argpartition(logits, size - k)[size - k :] if 0 < k < size else np.arange(size)
    return ids[np.lexsort((ids, -logits[ids]))]
