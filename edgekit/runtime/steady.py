"""Sessions with as many threads as really help now: all of them, or one where others keep the cores busy.

llama.cpp's threads wait for one another by spinning: with a core taken by somebody else, two can be ten times slower
than one. Knows clocks; knows neither files nor what is asked.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

from edgekit.runtime.llama_cpp import LlamaSession, open_session

_TOKENS, _RUNS = 64, 2


def open_steady(path: str | Path, *, n_ctx: int, threads: int | None = None, mmap: bool = True) -> LlamaSession:
    """As `open_session`, with one thread where that reads a few tokens faster than `threads` do: half a second for a
    small model, a few for a large one. Raises as `open_session`."""
    session = open_session(path, n_ctx=n_ctx, threads=threads, mmap=mmap)
    if session.threads == 1:
        return session
    try:
        spent = seconds(session)
        alone = session.with_threads(1)
        if seconds(alone) < spent:
            session.context.close()
            return alone
        alone.context.close()
        session.reset()
        return session
    except BaseException:
        session.close()
        raise


def seconds(session: LlamaSession) -> float:
    """Of reading a few tokens, the quickest of two runs after one to warm up."""
    ids = [token % session.n_vocab for token in range(1, 1 + min(_TOKENS, session.n_ctx))]
    session.logits(ids)
    found = []
    for _ in range(_RUNS):
        start = perf_counter()
        session.logits(ids)
        found.append(perf_counter() - start)
    session.reset()
    return min(found)
