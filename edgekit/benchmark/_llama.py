"""A GGUF on llama.cpp's clock: prefill, decode and embedding as llama-bench runs them, and bytes read for a token."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgekit.benchmark._plan import Clock, Sizes, decoder_tests, encoder_tests
from edgekit.benchmark._result import Measurement, Ran, Request, Settings
from edgekit.gguf_file import GgufFile, open_gguf
from edgekit.runtime.llama_cpp import Context, ContextSettings, Model, build_facts, open_model
from edgekit.units import Progress


def run(request: Request, progress: Progress) -> Ran:
    """All tests of one GGUF. Raises RuntimeFailed, CorruptCheckpoint."""
    build, path, settings = build_facts(), Path(request.path), request.settings
    with open_model(path, n_gpu_layers=settings.n_gpu_layers, mmap=settings.mmap) as model:
        if _is_encoder(open_gguf(path)):
            texts = encoder_tests(request, path.name)
            clock = Clock(request.repetitions, len(texts), progress)
            done = [_embed(model, n, length, settings, clock) for n, length in texts]
        else:
            sizes = decoder_tests(request, path.name)
            clock = Clock(request.repetitions, len(sizes), progress)
            done = [_predict(model, s, settings, clock) for s in sizes]
        return Ran(
            engine="llama.cpp",
            tests=tuple(test for test, _ in done),
            model_type=model.description,
            model_size=model.nbytes,
            model_n_params=model.parameters,
            bytes_per_token=bytes_per_token(path),
            settings=replace(settings, threads=done[-1][1]),
            load_ms=model.load_ms,
            build=build,
        )


def _is_encoder(file: GgufFile) -> bool:
    return file.get(f"{file.get('general.architecture')}.attention.causal") is False


def _predict(model: Model, sizes: Sizes, settings: Settings, clock: Clock) -> tuple[Measurement, int]:
    """One test of a decoder, and the threads it used."""
    n_prompt, n_gen, n_depth = sizes
    tokens = _Tokens(model)
    context = Context(model, _context_settings(settings, sum(sizes)))
    step = context.n_batch if n_prompt else 1

    def once() -> tuple[int, float | None]:
        context.forget()
        if n_depth:
            context.append(tokens.draw(n_depth), context.n_batch)
        ids = tokens.draw(n_prompt or n_gen)
        start = time.perf_counter_ns()
        context.append(ids, step)
        took = time.perf_counter_ns() - start
        if not n_prompt:
            return took, None
        context.likeliest(model.n_vocab)
        return took, (time.perf_counter_ns() - start) / 1e6

    try:
        test = clock.measure(sizes, lambda: context.append(tokens.draw(n_prompt or 1), step), once)
        return test, context.threads
    finally:
        context.close()


def _embed(model: Model, texts: int, length: int, settings: Settings, clock: Clock) -> tuple[Measurement, int]:
    """One test of an encoder: texts go in one after another, as `Session.embed` reads them."""
    tokens = _Tokens(model)
    context = Context(model, replace(_context_settings(settings, length), embeddings=True, outputs=0))

    def once() -> tuple[int, float | None]:
        ids = [np.array(tokens.draw(length), np.int32) for _ in range(texts)]
        start = time.perf_counter_ns()
        for text in ids:
            context.forget()
            context.decode(text, 0, 0)
        return time.perf_counter_ns() - start, None

    try:
        return clock.measure((length, 0, 0), lambda: _ignore(once()), once, texts=texts), context.threads
    finally:
        context.close()


def _ignore(_: object) -> None:
    """A warm-up's figures."""


def _context_settings(settings: Settings, n_ctx: int) -> ContextSettings:
    return ContextSettings(
        n_ctx=n_ctx, threads=settings.threads, n_batch=settings.n_batch, n_ubatch=settings.n_ubatch, kv=settings.kv,
        kv_values=settings.kv_values, flash=settings.flash, outputs=settings.n_batch,
    )  # fmt: skip


class _Tokens:
    """Random tokens, uniform over the vocabulary, behind BOS where it is wanted."""

    def __init__(self, model: Model) -> None:
        self._random = np.random.default_rng()
        self._n_vocab = model.n_vocab
        self._bos = model.bos if model.add_bos else None

    def draw(self, count: int) -> list[int]:
        ids: list[int] = self._random.integers(0, self._n_vocab, count).tolist()
        if self._bos is not None:
            ids[0] = self._bos
        return ids


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads, all shards together.

    Not counted: input embeddings that are not the output matrix too, and position and token type tables (one row
    each); of a mixture's experts only the share that is active.
    """
    files = [open_gguf(shard) for shard in _shards(path)]
    tied = not _is_encoder(files[0]) and not any("output.weight" in f.tensors for f in files)
    tables = {"position_embd.weight", "token_types.weight"} | (set() if tied else {"token_embd.weight"})
    share = _active_share(files[0])
    total = 0.0
    for tensor in (t for f in files for t in f.tensors.values()):
        if tensor.name not in tables:
            total += tensor.nbytes * (share if "_exps." in tensor.name else 1)
    return round(total)


def _active_share(file: GgufFile) -> float:
    arch = file.get("general.architecture")
    experts, used = file.get(f"{arch}.expert_count", 0), file.get(f"{arch}.expert_used_count", 0)
    return used / experts if experts and used else 1.0


def _shards(path: Path) -> list[Path]:
    """All files of a model split by llama.cpp's convention, `-00001-of-00003.gguf`; or the one."""
    split = re.fullmatch(r"(.+-)00001-of-([0-9]{5})\.gguf", path.name)
    if not split:
        return [path]
    return [path.with_name(f"{split[1]}{i:05d}-of-{split[2]}.gguf") for i in range(1, int(split[2]) + 1)]
