"""Many texts written at once: a sequence of one context each, all of them one token further with every batch.

Knows sequences and turns; knows neither what texts begin with nor what they are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edgekit.runtime._llama_library import library
from edgekit.runtime.llama_cpp import Context, ContextSettings, LlamaSession, Sampling
from edgekit.units import MIB, Progress, silent

Opening = Callable[[int], Sequence[int]]
"""The token ids that text number n begins with: at least one."""

MOST = 32
"""Sequences side by side: a matrix product of more rows is hardly faster a row."""

_CACHE_BUDGET = 768 * MIB  # of keys and values, all sequences together


def side_by_side(session: LlamaSession, length: int) -> int:
    """How many texts of `length` tokens are written at once: the same on every machine, so that texts are too."""
    api, model = library().api, session.model.handle
    heads = max(1, api.llama_model_n_head(model))
    width = api.llama_model_n_head_kv(model) * (api.llama_model_n_embd(model) // heads)
    a_text = 4 * width * api.llama_model_n_layer(model) * length  # keys and values of 16 bits
    return int(min(MOST, max(1, _CACHE_BUDGET // max(1, a_text))))


def write(
    session: LlamaSession,
    opening: Opening,
    tokens: int,
    sampling: Sampling,
    *,
    length: int,
    shortest: int = 1,
    progress: Progress = silent,
) -> list[tuple[int, ...]]:
    """About `tokens` tokens of texts of at most `length` each, openings included, in the order of their numbers.

    A text ends with an end token (not part of it), at `length`, or when there are enough tokens; in its place begins
    the next. Texts of fewer than `shortest` tokens are left out. Text number n is drawn with the seed of `sampling`
    plus n: the same session, openings, figures and seed give the same texts. The memory of the session is not touched.
    """
    count = min(side_by_side(session, length), max(1, tokens // length))
    settings = ContextSettings(count * length, session.threads, count, count, outputs=count, sequences=count)
    context = Context(session.model, settings)
    work = _Work(session, context, opening, sampling, length, [])
    try:
        work.slots += [work.begin(i) for i in range(count)]
        while work.written < tokens:
            work.step()
            progress("write text", min(work.written, tokens), tokens)
        texts = sorted(work.done + [slot for slot in work.slots if slot.written], key=lambda slot: slot.number)
    finally:
        for slot in work.slots:
            slot.free()
        context.close()
    return [tuple(slot.ids) for slot in texts if len(slot.ids) >= shortest]


@dataclass
class _Slot:
    """One text: `ids` so far, of which `fed` have been read; `begun` were given."""

    number: int
    ids: list[int]
    begun: int
    sampler: int
    free: Callable[[], None] = field(repr=False)
    fed: int = 0

    @property
    def written(self) -> int:
        return len(self.ids) - self.begun


@dataclass
class _Work:
    session: LlamaSession
    context: Context
    opening: Opening
    sampling: Sampling
    length: int
    slots: list[_Slot]
    done: list[_Slot] = field(default_factory=list)
    numbers: int = 0
    finished: int = 0

    @property
    def written(self) -> int:
        """Tokens of all texts, as far as they have been read."""
        return self.finished + sum(slot.fed for slot in self.slots)

    def begin(self, sequence: int) -> _Slot:
        self.context.forget_sequence(sequence)
        number, self.numbers = self.numbers, self.numbers + 1
        given = list(self.opening(number))[: max(1, self.length - 1)]
        ids = self.session.model.checked(given)
        api = library().api
        drawn = replace(self.sampling, seed=self.sampling.seed + number)
        sampler = drawn.build(api, self.session.n_vocab, ids)
        return _Slot(number, ids.tolist(), len(ids), sampler, lambda: api.llama_sampler_free(sampler))

    def step(self) -> None:
        """Every text reads its next token; those that have read all they hold write one."""
        tokens = np.array([slot.ids[slot.fed] for slot in self.slots], np.int32)
        self.context.advance(tokens, np.array([slot.fed for slot in self.slots], np.int32))
        for sequence, slot in enumerate(self.slots):
            slot.fed += 1
            if slot.fed == len(slot.ids) and self._ends(slot, sequence):
                self.finished += len(slot.ids)
                self.done.append(slot)
                self.slots[sequence] = self.begin(sequence)
                slot.free()

    def _ends(self, slot: _Slot, row: int) -> bool:
        model = self.session.model
        token = library().api.llama_sampler_sample(slot.sampler, self.context.handle, row)
        if not model.is_end(token):
            slot.ids.append(token)
        return model.is_end(token) or len(slot.ids) >= self.length
