"""The divergence of a model from itself: below it figures mean nothing. Knows batches and precisions of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgekit import quality, verification
from edgekit.errors import DoesNotFit
from edgekit.evaluation._models import Model, work_folder
from edgekit.evaluation._what import Floor, Options
from edgekit.host import usable_cores
from edgekit.runtime import Session
from edgekit.runtime.llama_cpp import LlamaSession, open_session
from edgekit.units import Progress

FLOOR_CHUNKS = 8
"""Chunks that the noise floor is measured on: it is the same everywhere, and a second reference is expensive."""

SMALL_BATCH = 32
"""Tokens a batch for reading a text a second time with other kernels."""


def noise_floor(
    source: Session, model: Model, tokens: list[int], n_ctx: int, options: Options, progress: Progress
) -> tuple[Floor | None, tuple[str, ...]]:
    """The reference against itself: its weights in the other of F32 and BF16, or, quantized, read in small batches."""
    if not options.floor:
        return None, ()
    if model.engine != "gguf":
        return None, ("no noise floor: it needs a reference that llama.cpp runs, a checkpoint or a GGUF",)
    chunks = min(options.chunks or FLOOR_CHUNKS, FLOOR_CHUNKS)
    try:
        with _twin(model, options, n_ctx, progress) as (method, twin, flip):
            exact, other = (twin, source) if flip else (source, twin)
            found = quality.compare(exact, other, tokens, n_ctx, chunks=chunks, progress=progress)
    except DoesNotFit as e:
        return None, (f"the noise floor was not measured: {e}",)
    return Floor(method, found.kl_mean, found.kl_stderr, found.top1, found.tokens), ()


@contextmanager
def _twin(model: Model, options: Options, n_ctx: int, progress: Progress) -> Iterator[tuple[str, LlamaSession, bool]]:
    """(what was done, the session, whether it is the reference of the two): F32 is the more exact one."""
    if model.plan is None:
        with _in_small_batches(model.path, n_ctx, options) as session:
            yield f"the reference read in batches of {SMALL_BATCH} tokens against itself", session, False
        return
    own = model.precision or verification.source_precision(model.plan)
    other = "BF16" if own == "F32" else "F32"
    with (
        verification.unquantised(
            work_folder(model.path), model.plan, threads=options.threads or usable_cores(), preset=other,
            beside=model.nbytes, progress=progress,
        ) as made,
        open_session(made, n_ctx=n_ctx, threads=options.threads) as session,
    ):  # fmt: skip
        exact, rounded = ("F32", own) if other == "F32" else (own, other)
        yield f"{rounded} against {exact}", session, other == "F32"


@contextmanager
def _in_small_batches(path: Path, n_ctx: int, options: Options) -> Iterator[LlamaSession]:
    """The kernels for a few tokens, which generating uses, round otherwise than those for many."""
    verification.need_memory(2 * path.stat().st_size)
    with open_session(path, n_ctx=n_ctx, threads=options.threads, n_batch=SMALL_BATCH, n_ubatch=SMALL_BATCH) as session:
        yield session


def jitter(
    model: Model, session: Session, tokens: Sequence[int], n_ctx: int, options: Options, progress: Progress
) -> Floor | None:
    """The candidate against itself. Blocks of weights meet activations rounded to 8 bits, and the smallest difference
    before that rounding becomes one of its size: no figure of this file on this text is finer. GGUF only:
    onnxruntime-genai has no such choice of batches."""
    if not options.floor or model.engine != "gguf":
        return None
    chunks = min(options.chunks or FLOOR_CHUNKS, FLOOR_CHUNKS)
    try:
        with _in_small_batches(model.path, n_ctx, options) as again:
            found = quality.compare(session, again, tokens, n_ctx, chunks=chunks, progress=progress)
    except DoesNotFit:
        return None
    method = f"the artefact read in batches of {SMALL_BATCH} tokens against itself"
    return Floor(method, found.kl_mean, found.kl_stderr, found.top1, found.tokens)
