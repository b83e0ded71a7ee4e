"""An ONNX graph on the clock: decoders through onnxruntime-genai, encoders through onnxruntime.

The tests are those of llama-bench: a prompt is appended whole, a token at a time is appended and waited for, both to a
generator just large enough, made anew for every repetition outside the clock. Nothing is sampled while it runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.benchmark._graph import weights_of
from edgekit.benchmark._plan import Clock, Sizes, decoder_tests, encoder_tests
from edgekit.benchmark._result import Measurement, Ran, Request
from edgekit.errors import CorruptCheckpoint, EdgekitError, RuntimeFailed
from edgekit.host import detect
from edgekit.onnx_file import open_onnx
from edgekit.runtime import _ort_library as library
from edgekit.units import Progress, show_count

CONFIG = "genai_config.json"
_LARGEST_CONFIG = 16 << 20
_KV_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def run(request: Request, progress: Progress) -> Ran:
    """All tests of one graph. Raises RuntimeFailed, CorruptCheckpoint, MissingExtra, EdgekitError."""
    path = Path(request.path)
    threads = detect().threads if request.settings.threads is None else request.settings.threads
    if not 1 <= threads <= 512:
        raise EdgekitError(f"{threads} threads", "between 1 and 512")
    file = open_onnx(path)
    file.check(checksums=False)
    weights = weights_of(file)
    config = _decoder_config(path)
    model: _Decoder | _Encoder = _Encoder(path, threads) if config is None else _Decoder(path, config, threads)
    tests = model.tests(request, progress)
    kv = next((v.dtype for v in file.inputs if "past" in v.name), "")
    return Ran(
        engine="onnxruntime",
        tests=tests,
        model_type=f"{model.kind} {show_count(weights.parameters)} {weights.format}",
        model_size=weights.nbytes,
        model_n_params=weights.parameters,
        bytes_per_token=weights.bytes_per_token,
        settings=replace(request.settings, threads=threads, kv=_KV_NAMES.get(kv, "f32"), kv_values=None),
        load_ms=model.load_ms,
        build=_build(model.devices),
    )


class _Decoder:
    """A folder that onnxruntime-genai loads."""

    def __init__(self, path: Path, config: Mapping[str, Any], threads: int) -> None:
        self.path, self._og = path, library.genai()
        self.kind = str(config["model"].get("type", "decoder"))
        self._n_vocab = int(config["model"].get("vocab_size") or 0)
        self._most = int(config["model"].get("context_length") or 0)
        if self._n_vocab < 1:
            raise CorruptCheckpoint(f"{path.parent / CONFIG} names no vocab_size", "convert it again")
        start = time.perf_counter()
        with library.readable(path.parent):
            settings = self._og.Config(str(path.parent))
            options = {"filename": path.name, "session_options": {"intra_op_num_threads": threads}}
            settings.overlay(json.dumps({"model": {"decoder": options}}))
            self._model = self._og.Model(settings)
        self.load_ms = 1e3 * (time.perf_counter() - start)
        self.devices = str(self._model.device_type)
        self._random = np.random.default_rng()

    def tests(self, request: Request, progress: Progress) -> tuple[Measurement, ...]:
        sizes = decoder_tests(request, self.path.parent.name)
        clock = Clock(request.repetitions, len(sizes), progress)
        with library.readable(self.path.parent):
            return tuple(self._test(s, clock) for s in sizes)

    def _test(self, sizes: Sizes, clock: Clock) -> Measurement:
        n_prompt, n_gen, n_depth = sizes
        if self._most and sum(sizes) > self._most:
            raise RuntimeFailed(
                f"{sum(sizes)} tokens do not fit in the {self._most} that {self.path.parent.name} was made for",
                "fewer with -p and -n, or convert with a larger --ctx-size",
            )

        def once() -> tuple[int, float | None]:
            generator = self._generator(sum(sizes) + 1)
            if n_depth:
                generator.append_tokens(self._draw(n_depth))
            parts = [self._draw(n_prompt)] if n_prompt else [self._draw(1) for _ in range(n_gen)]
            start = time.perf_counter_ns()
            for part in parts:
                generator.append_tokens(part)
            took = time.perf_counter_ns() - start
            if not n_prompt:
                return took, None
            generator.generate_next_token()
            return took, (time.perf_counter_ns() - start) / 1e6

        def warm_up() -> None:
            self._generator(sum(sizes)).append_tokens(self._draw(n_prompt or 1))

        return clock.measure(sizes, warm_up, once)

    def _generator(self, room: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=room, do_sample=False)
        return self._og.Generator(self._model, params)

    def _draw(self, count: int) -> npt.NDArray[np.int32]:
        return self._random.integers(0, self._n_vocab, count, np.int32)


class _Encoder:
    """A graph from token ids to vectors, scores or labels."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.kind = path, _family(path)
        start = time.perf_counter()
        self._session, _ = library.open_graph(path, threads, ())
        self.load_ms = 1e3 * (time.perf_counter() - start)
        self.devices = ",".join(p.removesuffix("ExecutionProvider") for p in self._session.get_providers())
        self._inputs = {i.name: i.type for i in self._session.get_inputs()}
        if "input_ids" not in self._inputs:
            raise EdgekitError(f"{path} takes {', '.join(self._inputs)} and no input_ids", "bench a text model")
        self._random = np.random.default_rng()

    def tests(self, request: Request, progress: Progress) -> tuple[Measurement, ...]:
        texts = encoder_tests(request, self.path.name)
        clock = Clock(request.repetitions, len(texts), progress)
        with library.readable(self.path):
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
        """Whole texts without padding: ids that every vocabulary has."""
        shape = (texts, length)
        values: dict[str, npt.NDArray[Any]] = {
            "input_ids": self._random.integers(0, self._n_vocab(), shape),
            "attention_mask": np.ones(shape),
            "token_type_ids": np.zeros(shape),
            "position_ids": np.broadcast_to(np.arange(length), shape),
        }
        unknown = [name for name in self._inputs if name not in values]
        if unknown:
            raise EdgekitError(f"{self.path} wants an input {unknown[0]!r} that is not known", "bench a text model")
        kinds = {"tensor(int32)": np.int32, "tensor(float)": np.float32}
        return {n: np.ascontiguousarray(values[n].astype(kinds.get(t, np.int64))) for n, t in self._inputs.items()}

    def _n_vocab(self) -> int:
        stated = _config_of(self.path).get("vocab_size")
        return stated if isinstance(stated, int) and stated > 1 else 100


def _family(path: Path) -> str:
    stated = _config_of(path).get("model_type")
    return stated if isinstance(stated, str) and stated.isidentifier() else "encoder"


def _config_of(path: Path) -> Mapping[str, Any]:
    """The config.json beside the graph or, in transformers.js's layout, in the folder above; {} without one."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "config.json").is_file():
            return _read_json(folder / "config.json")
    return {}


def _decoder_config(path: Path) -> Mapping[str, Any] | None:
    """What onnxruntime-genai reads, or None where it is not there: then the graph is an encoder's."""
    config = path.parent / CONFIG
    if not config.is_file():
        return None
    found = _read_json(config)
    if not isinstance(found.get("model"), Mapping):
        raise CorruptCheckpoint(f"{config} describes no model", "convert it again")
    return found


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise CorruptCheckpoint(f"{path} is larger than {_LARGEST_CONFIG >> 20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CorruptCheckpoint(f"{path}: {e}", "convert it again") from None
    if not isinstance(found, Mapping):
        raise CorruptCheckpoint(f"{path} holds no settings", "convert it again")
    return found


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
