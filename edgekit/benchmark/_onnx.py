"""An ONNX graph on the clock: decoders through onnxruntime-genai, everything else through onnxruntime alone.

The tests are those of llama-bench: a prompt is appended whole, a token at a time is appended and waited for, both to an
empty cache that is made anew for every repetition outside the clock. Nothing is sampled while it runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgekit import ort_library as library
from edgekit.benchmark._graph import weights_of
from edgekit.benchmark._plan import Clock, Sizes, decoder_tests, encoder_tests
from edgekit.benchmark._result import Measurement, Ran, Request
from edgekit.errors import EdgekitError, RuntimeFailed
from edgekit.host import detect
from edgekit.onnx_file import OnnxFile, open_onnx, require_runnable
from edgekit.runtime._common import Spent
from edgekit.runtime._ort_cache import Cached, takes_cache
from edgekit.runtime._ort_folder import DecoderFacts, Folder, cached_facts, decoder_facts, find
from edgekit.runtime._ort_genai import Settings as EngineSettings
from edgekit.runtime._ort_pair import Pair, encoder_of, takes_states
from edgekit.runtime._ort_seq2seq import TRAINED
from edgekit.units import Progress, show_count

Ids = npt.NDArray[np.int32]

_KV_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def run(request: Request, progress: Progress) -> Ran:
    """All tests of one graph. Raises RuntimeFailed, CorruptCheckpoint, MissingExtra, EdgekitError."""
    threads = detect().threads if request.settings.threads is None else request.settings.threads
    if not 1 <= threads <= 512:
        raise EdgekitError(f"{threads} threads", "between 1 and 512")
    path = Path(request.path)
    graph = open_onnx(path)
    graph.check(checksums=False)
    require_runnable(graph)
    folder = find(path)
    graphs = [graph]
    if takes_states(graph):
        graphs.append(open_onnx(encoder_of(path)))
    parts = [weights_of(each) for each in graphs]
    weights = replace(
        parts[0], parameters=sum(p.parameters for p in parts), nbytes=sum(p.nbytes for p in parts)
    )  # a token is written by the decoder alone
    model = _opened(folder, graph, threads)
    tests = model.tests(request, progress)
    kv = next((v.dtype for v in graph.inputs if "past" in v.name), "float32")
    return Ran(
        engine="onnxruntime",
        tests=tests,
        model_type=f"{_family(folder)} {show_count(weights.parameters)} {weights.format}",
        model_size=weights.nbytes,
        model_n_params=weights.parameters,
        bytes_per_token=weights.bytes_per_token,
        settings=replace(request.settings, threads=threads, kv=_KV_NAMES.get(kv, kv), kv_values=None),
        load_ms=model.load_ms,
        build=_build(model.devices),
    )


class _Timed(Protocol):
    """A loaded graph: `devices` as the engine names them, separated by commas."""

    load_ms: float
    devices: str

    def tests(self, request: Request, progress: Progress) -> tuple[Measurement, ...]: ...


def _opened(folder: Folder, graph: OnnxFile, threads: int) -> _Timed:
    if folder.genai is not None:
        return _Decoder(folder, decoder_facts(folder), _Genai(folder, threads))
    if takes_states(graph):
        return _Pair(folder, cached_facts(folder, graph, TRAINED), threads)
    if takes_cache(graph):
        facts = cached_facts(folder, graph)
        return _Decoder(folder, facts, _Alone(folder, facts, threads))
    return _Encoder(folder, threads)


def _family(folder: Folder) -> str:
    stated = folder.config.get("model_type") or (folder.genai or {}).get("model", {}).get("type")
    return stated if isinstance(stated, str) and stated.replace("-", "_").isidentifier() else "model"


# --- decoders --------------------------------------------------------------------------------------------------------


class _Engine(Protocol):
    load_ms: float
    devices: str

    def empty(self, room: int) -> Any:
        """Something that takes ids behind those it holds, with room for `room` tokens: has `append_tokens`."""

    def first(self, held: Any) -> None:
        """Choose the likeliest next token."""


class _Genai:
    """A folder that onnxruntime-genai loads."""

    def __init__(self, folder: Folder, threads: int) -> None:
        self._og = library.genai()
        start = time.perf_counter()
        with library.readable(folder.graph):
            settings = self._og.Config(str(folder.graph.parent))
            options = {"filename": folder.graph.name, "session_options": {"intra_op_num_threads": threads}}
            settings.overlay(json.dumps({"model": {"decoder": options}}))
            self._model = self._og.Model(settings)
        self.load_ms = 1e3 * (time.perf_counter() - start)
        self.devices = str(self._model.device_type)

    def empty(self, room: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=room, do_sample=False)
        return self._og.Generator(self._model, params)

    def first(self, held: Any) -> None:
        held.generate_next_token()


class _Alone:
    """A decoder that gives and takes its cache, as optimum exports it."""

    def __init__(self, folder: Folder, facts: DecoderFacts, threads: int) -> None:
        self._cached = Cached(folder.graph, facts.n_vocab, EngineSettings(facts.context, threads, None), Spent())
        self.load_ms, self.devices = self._cached.load_ms, "CPU"

    def empty(self, room: int) -> Any:
        self._cached.clear()
        return self

    def append_tokens(self, ids: Ids) -> None:
        self._cached.feed(ids)

    def first(self, held: Any) -> None:
        self._cached.last().argmax()


class _Decoder:
    """Prefill and decode with either engine."""

    def __init__(self, folder: Folder, facts: DecoderFacts, engine: _Engine) -> None:
        self._folder, self._facts, self._engine = folder, facts, engine
        self.load_ms, self.devices = engine.load_ms, engine.devices
        self._random = np.random.default_rng()

    def tests(self, request: Request, progress: Progress) -> tuple[Measurement, ...]:
        sizes = decoder_tests(request, self._folder.root.name, self._facts.context - 1)
        clock = Clock(request.repetitions, len(sizes), progress)
        with library.readable(self._folder.graph):
            return tuple(self._test(s, clock) for s in sizes)

    def _test(self, sizes: Sizes, clock: Clock) -> Measurement:
        n_prompt, n_gen, n_depth = sizes
        room = sum(sizes) + 1  # the first token of an answer needs a place too
        if room > self._facts.context:
            raise RuntimeFailed(
                f"{room} tokens do not fit in the {self._facts.context} of {self._folder.root.name}",
                "fewer with -p and -n, or convert with a larger --ctx-size",
            )

        def once() -> tuple[int, float | None]:
            held = self._engine.empty(room)
            if n_depth:
                held.append_tokens(self._draw(n_depth))
            parts = [self._draw(n_prompt)] if n_prompt else [self._draw(1) for _ in range(n_gen)]
            start = time.perf_counter_ns()
            for part in parts:
                held.append_tokens(part)
            took = time.perf_counter_ns() - start
            if not n_prompt:
                return took, None
            self._engine.first(held)
            return took, (time.perf_counter_ns() - start) / 1e6

        def warm_up() -> None:
            self._engine.empty(room).append_tokens(self._draw(n_prompt or 1))

        return clock.measure(sizes, warm_up, once)

    def _draw(self, count: int) -> Ids:
        return self._random.integers(0, self._facts.n_vocab, count, np.int32)


# --- encoder-decoders ------------------------------------------------------------------------------------------------


class _Pair:
    """A text is read by the encoder and its keys computed (prefill); another is written, a token at a time (decode)."""

    SOURCE = 32
    """Tokens that were read before the ones that are timed are written."""

    def __init__(self, folder: Folder, facts: DecoderFacts, threads: int) -> None:
        self._folder, self._facts = folder, facts
        self._pair = Pair(encoder_of(folder.graph), folder.graph, facts.n_vocab, threads, (), Spent())
        self.load_ms, self.devices = self._pair.load_ms, "CPU"
        self._random = np.random.default_rng()

    def tests(self, request: Request, progress: Progress) -> tuple[Measurement, ...]:
        sizes = decoder_tests(request, self._folder.root.name, self._facts.context)
        clock = Clock(request.repetitions, len(sizes), progress)
        return tuple(self._test(s, clock) for s in sizes)

    def _test(self, sizes: Sizes, clock: Clock) -> Measurement:
        n_prompt, n_gen, n_depth = sizes
        longest = max(n_prompt, n_gen + n_depth)
        if longest > self._facts.context:
            raise RuntimeFailed(
                f"{longest} tokens do not fit in the {self._facts.context} of {self._folder.root.name}",
                "fewer with -p and -n",
            )

        def once() -> tuple[int, float | None]:
            if n_prompt:
                ids = self._draw(n_prompt)
                start = time.perf_counter_ns()
                self._pair.read(ids)
                took = time.perf_counter_ns() - start
                self._pair.append([0])[-1].argmax()
                return took, (time.perf_counter_ns() - start) / 1e6
            self._pair.read(self._draw(self.SOURCE))
            for _ in range(1 + n_depth):  # the first one computes the encoder's keys
                self._pair.append(self._draw(1).tolist())
            start = time.perf_counter_ns()
            for token in self._draw(n_gen).tolist():
                self._pair.append([token])
            return time.perf_counter_ns() - start, None

        def warm_up() -> None:
            self._pair.read(self._draw(n_prompt or self.SOURCE))
            self._pair.append([0])

        return clock.measure(sizes, warm_up, once)

    def _draw(self, count: int) -> Ids:
        return self._random.integers(0, self._facts.n_vocab, count, np.int32)


# --- encoders --------------------------------------------------------------------------------------------------------


class _Encoder:
    """A graph from token ids to vectors, scores or labels."""

    def __init__(self, folder: Folder, threads: int) -> None:
        self._folder = folder
        start = time.perf_counter()
        self._session, _ = library.open_graph(folder.graph, threads, ())
        self.load_ms = 1e3 * (time.perf_counter() - start)
        self.devices = ",".join(p.removesuffix("ExecutionProvider") for p in self._session.get_providers())
        self._inputs: Mapping[str, str] = {i.name: i.type for i in self._session.get_inputs()}
        self._random = np.random.default_rng()

    def tests(self, request: Request, progress: Progress) -> tuple[Measurement, ...]:
        texts = encoder_tests(request, self._folder.root.name)
        clock = Clock(request.repetitions, len(texts), progress)
        with library.readable(self._folder.graph):
            return tuple(self._test(n, length, clock) for n, length in texts)

    def _test(self, texts: int, length: int, clock: Clock) -> Measurement:
        def once() -> tuple[int, float | None]:
            feeds = self._feeds(texts, length)
            start = time.perf_counter_ns()
            self._session.run(None, feeds)
            return time.perf_counter_ns() - start, None

        def warm_up() -> None:
            once()

        return clock.measure((length, 0, 0), warm_up, once, texts=texts)

    def _feeds(self, texts: int, length: int) -> dict[str, npt.NDArray[Any]]:
        """Whole texts without padding, of ids that the vocabulary has."""
        stated = self._folder.config.get("vocab_size")
        n_vocab = stated if isinstance(stated, int) and stated > 1 else 100
        shape = (texts, length)
        values: dict[str, npt.NDArray[Any]] = {
            "input_ids": self._random.integers(0, n_vocab, shape),
            "attention_mask": np.ones(shape),
            "token_type_ids": np.zeros(shape),
            "position_ids": np.broadcast_to(np.arange(length), shape),
        }
        unknown = [name for name in self._inputs if name not in values]
        if unknown or "input_ids" not in self._inputs:
            what = f"wants {unknown[0]!r}" if unknown else "takes no input_ids"
            raise EdgekitError(f"{self._folder.graph} {what}: no model of text", "give a graph that takes token ids")
        kinds = {"tensor(int32)": np.int32, "tensor(float)": np.float32}
        return {n: np.ascontiguousarray(values[n].astype(kinds.get(t, np.int64))) for n, t in self._inputs.items()}


def _build(devices: str) -> dict[str, Any]:
    """Which engine this is, under the names llama-bench uses."""
    version = metadata.version("onnxruntime")
    genai = ""
    with suppress(metadata.PackageNotFoundError):
        genai = f", onnxruntime-genai {metadata.version('onnxruntime-genai')}"
    others = [d for d in devices.split(",") if d != "CPU"]
    return {
        "build_commit": version,
        "build_number": 0,
        "cpu_info": detect().cpu or "",
        "gpu_info": ", ".join(others),
        "backends": ",".join(["onnxruntime", *others]),
        "runtime": f"onnxruntime {version}{genai}",
    }
