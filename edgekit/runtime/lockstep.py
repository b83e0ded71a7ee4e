"""Many texts written at once by an ONNX graph, all at the same position; those that have ended make room.

Knows texts and turns; knows neither what texts begin with nor what they are for. (llama.cpp's: runtime/parallel.py.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from edgekit.runtime import Logits
from edgekit.runtime._common import checked
from edgekit.runtime._ort_batch import BUDGET, MOST
from edgekit.runtime._sampling import Sampler, Sampling
from edgekit.runtime.onnxruntime import DecoderSession
from edgekit.units import Progress, silent

__all__ = ["BUDGET", "MOST", "Opening", "write"]

Opening = Callable[[int], Sequence[int]]
"""The token ids that text number n begins with: at least one."""


def write(
    session: DecoderSession,
    opening: Opening,
    tokens: int,
    sampling: Sampling,
    *,
    length: int,
    shortest: int = 1,
    progress: Progress = silent,
) -> list[tuple[int, ...]]:
    """About `tokens` tokens of texts of at most `length` each, openings included, in the order of their numbers.

    Texts begin together, as many as the graph allows; where one is longer at its opening, it reads on while others
    write. A text ends with an end token (not part of it), at `length`, or when there are enough tokens; when all have
    ended the next begin. Texts of fewer than `shortest` tokens are left out. Text number n is drawn with the seed of
    `sampling` plus n: the same graph, openings, figures and seed give the same texts. What the session had read before
    is forgotten.
    """
    texts: list[_Text] = []
    done = 0
    with session.side_by_side(length) as batch:
        while done < tokens:
            wanted = min(batch.most, max(1, ceil((tokens - done) / length)))
            going = [_begin(session, opening, n, sampling, length) for n in range(len(texts), len(texts) + wanted)]
            texts += going
            batch.begin(wanted)
            at = 0
            while going and done < tokens:
                rows = batch.step(np.array([text.ids[at] for text in going], np.int32))
                at += 1
                done += len(going)
                for row in reversed(range(len(going))):
                    if not going[row].goes_on(session, rows[row], at, length):
                        batch.drop(row)
                        going[row] = going[-1]
                        going.pop()
                progress("write text", min(done, tokens), tokens)
    return [tuple(text.ids) for text in texts if len(text.ids) >= max(shortest, text.begun + 1)]


@dataclass
class _Text:
    """`ids` so far, of which `begun` were given."""

    ids: list[int]
    begun: int
    sampler: Sampler

    def goes_on(self, session: DecoderSession, row: Logits, read: int, length: int) -> bool:
        """Whether there is a token to read after the first `read` ones, whose logits are `row`."""
        if read < len(self.ids):
            return True
        token = self.sampler.draw(row)
        if session.vocabulary.is_end(token):
            return False
        self.ids.append(token)
        return len(self.ids) < length


def _begin(session: DecoderSession, opening: Opening, number: int, sampling: Sampling, length: int) -> _Text:
    given = list(opening(number))[: max(1, length - 1)]
    ids = checked(given, session.n_vocab, session.folder.root.name).tolist()
    return _Text(ids, len(ids), Sampler(replace(sampling, seed=sampling.seed + number), ids))
