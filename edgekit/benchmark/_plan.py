"""Which tests are run, and how each is repeated. Pure but for the clock; knows no engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from edgekit.benchmark._result import ENCODER_TESTS, GENERATE, PROMPT, Measurement, Request
from edgekit.errors import EdgekitError
from edgekit.units import Progress

Sizes = tuple[int, int, int]
"""Prompt tokens, tokens to generate, tokens in memory before."""

Run = Callable[[], tuple[int, float | None]]
"""Runs a test once: nanoseconds, and milliseconds to the first token where there is one."""


def decoder_tests(request: Request, name: str, room: int | None = None) -> list[Sizes]:
    """The tests of a decoder; those that nobody asked for keep to `room` tokens. Raises EdgekitError for what only an
    encoder can be asked."""
    if request.texts:
        raise EdgekitError(f"{name} writes text, one text at a time", "leave --texts out")
    free = PROMPT if room is None else max(1, room - request.depth)
    prompts = (min(PROMPT, free),) if request.prompts is None else request.prompts
    counts = (min(GENERATE, free),) if request.counts is None else request.counts
    return [(p, 0, request.depth) for p in prompts] + [(0, n, request.depth) for n in counts]


def encoder_tests(request: Request, name: str) -> list[tuple[int, int]]:
    """(texts, tokens of each) for an encoder. Raises EdgekitError for what only a decoder can be asked."""
    if request.counts or request.depth:
        raise EdgekitError(f"{name} is an encoder: it generates nothing", "leave -n out, or write -n 0")
    if request.prompts is None and not request.texts:
        return list(ENCODER_TESTS)
    lengths: Sequence[int] = request.prompts or (ENCODER_TESTS[-1][1],)
    return list(product((max(1, request.texts),), lengths))


@dataclass
class Clock:
    """Repeats tests after a warm-up each, and tells the progress over all of them."""

    repetitions: int
    tests: int
    progress: Progress
    _done: int = 0

    def measure(self, sizes: Sizes, warm_up: Callable[[], None], run: Run, *, texts: int = 0) -> Measurement:
        """One test: `warm_up` once, then `run` for every repetition."""
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        warm_up()
        self._step()
        samples, firsts = [], []
        for _ in range(self.repetitions):
            ns, first = run()
            samples.append(ns)
            firsts.append(first)
            self._step()
        known = [first for first in firsts if first is not None]
        return Measurement(*sizes, started, tuple(samples), statistics.median(known) if known else None, texts)

    def _step(self) -> None:
        self._done += 1
        self.progress("bench", self._done, self.tests * (self.repetitions + 1))
