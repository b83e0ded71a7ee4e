"""Write a plan as one GGUF file: straight from the checkpoint, a slab of rows in memory at a time.

Knows nothing about which format a tensor should have; the plan says so. Leaves no file behind when it fails.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from edgekit.arch import Blueprint
from edgekit.artifact import need_disk, readable_os_errors
from edgekit.checkpoint import Checkpoint
from edgekit.errors import EdgekitError
from edgekit.gguf_file import MetaValue
from edgekit.planning import Plan, Planned
from edgekit.quant import ggml, gptq
from edgekit.units import Progress, silent
from edgekit.vocab import Vocabulary

Slab = npt.NDArray[np.float32]
Importance = Mapping[str, npt.NDArray[np.float32]]
"""GGUF tensor name -> mean squares of its input columns, float32 (cols,) or, for stacked experts, (experts, cols)."""

SLAB = 2 << 20
"""Weights decoded at once: 8 MiB as float32. Below 32 MiB, glibc takes the memory again instead of new pages."""

PIECE, WINDOW = 1 << 19, 6 << 20
"""Weights that one encoder takes at a time, and weights that may wait to be written."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: the file, its size and its hash."""

    path: Path
    nbytes: int
    sha256: str


class _Sink:
    """A file that hashes what passes and knows where it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.position = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.position += len(data)

    def pad_to(self, position: int) -> None:
        self.write(bytes(position - self.position))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class Feedback:
    """Second moments of the inputs, by tensor name, ready for error feedback; shared inputs are factored once.

    `moments[name]` is float32 (cols, cols), or (experts, cols, cols) for stacked experts.
    """

    def __init__(self, moments: Mapping[str, npt.NDArray[np.float32]]) -> None:
        self._moments = moments
        self._key: tuple[int, int] | None = None
        self._curvature: gptq.Curvature | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._moments

    def curvature(self, name: str, expert: int) -> gptq.Curvature:
        """The factors for one matrix. Only the last are kept: they are as large as the moment itself."""
        moment = self._moments[name]
        key = (id(moment), expert)
        if self._curvature is None or key != self._key:
            self._curvature = None
            self._curvature = gptq.prepare(moment[expert] if moment.ndim == 3 else moment)
            self._key = key
        return self._curvature


@dataclass(frozen=True, slots=True)
class Encoding:
    """How weights become bytes: threads, and what is known of the inputs. None: every input counts the same."""

    threads: int = 1
    importance: Importance | None = None
    feedback: Feedback | None = None


def write(plan: Plan, path: Path, encoding: Encoding = Encoding(), *, progress: Progress = silent) -> Written:
    """Write `plan` to `path` and return its hash. Raises DoesNotFit (disk), CorruptCheckpoint, EdgekitError."""
    need_disk(path.parent, plan.file_bytes)
    try:
        with readable_os_errors(path), path.open("wb") as file:
            sink = _Sink(file)
            _write_all(plan, sink, encoding, progress)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Written(path, sink.position, sink.hexdigest())


def _write_all(plan: Plan, sink: _Sink, encoding: Encoding, progress: Progress) -> None:
    sink.write(plan.header.bytes)
    total, done = sum(t.made.values for t in plan.tensors), 0
    progress("quantize", 0, total)
    # one reader decodes the next slab, and encoders take pieces of the ones before, while this thread writes in order
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(encoding.threads) as encoders:
        queue = _Queue(sink)
        for tensor, offset in zip(plan.tensors, plan.header.offsets, strict=True):
            queue.add(0, partial(_bytes_from, offset))
            row = 0
            for slab in _read_ahead(reader, tensor.made.stream(SLAB)):
                for part, expert in _by_expert(tensor, slab, row):
                    _submit(queue, encoders, tensor, part, expert, encoding)
                row += slab.shape[0]
                done += slab.size
                progress("quantize", done, total)
        queue.drain()
    sink.pad_to(plan.header.file_size)


class _Queue:
    """Pieces of the file in order, finished or not: at most WINDOW weights of them wait to be written."""

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink
        self._waiting: deque[tuple[int, Callable[[int], bytes | memoryview]]] = deque()
        self._weights = 0

    def add(self, weights: int, piece: Callable[[int], bytes | memoryview]) -> None:
        """`piece` gets the position it is written at, and blocks until its bytes are there."""
        self._waiting.append((weights, piece))
        self._weights += weights
        while self._weights > WINDOW:
            self._write_one()

    def drain(self) -> None:
        while self._waiting:
            self._write_one()

    def _write_one(self) -> None:
        weights, piece = self._waiting.popleft()
        self._sink.write(piece(self._sink.position))
        self._weights -= weights


def _bytes_from(offset: int, position: int) -> bytes:
    """The zeros between the end of one tensor and the place of the next."""
    assert position <= offset, (position, offset)
    return bytes(offset - position)


def _submit(
    queue: _Queue, encoders: ThreadPoolExecutor, tensor: Planned, part: Slab, expert: int, encoding: Encoding
) -> None:
    if encoding.feedback is not None and tensor.name in encoding.feedback and tensor.format.name in gptq.FORMATS:
        queue.drain()  # it brings threads of its own
        found = _encode(tensor, part, expert, encoding)
        queue.add(part.size, lambda _: found)
        return
    step = max(1, PIECE // part.shape[1])
    for start in range(0, part.shape[0], step):
        rows = part[start : start + step]
        future = encoders.submit(_encode, tensor, rows, expert, replace(encoding, threads=1))
        queue.add(rows.size, lambda _, future=future: future.result())  # type: ignore[misc]


def _by_expert(tensor: Planned, slab: Slab, row: int) -> Iterator[tuple[Slab, int]]:
    """Cut a slab that begins at `row` where one stacked expert ends and the next begins; a matrix is expert 0."""
    per_expert = tensor.shape[-2] if len(tensor.shape) == 3 else max(1, row + slab.shape[0])
    start = 0
    while start < slab.shape[0]:
        expert = (row + start) // per_expert
        stop = min(slab.shape[0], (expert + 1) * per_expert - row)
        yield slab[start:stop], expert
        start = stop


def _encode(tensor: Planned, rows: Slab, expert: int, encoding: Encoding) -> memoryview:
    """float32 (rows, cols) of one expert -> its bytes in the planned format. Names the tensor in what it raises."""
    weights = encoding.importance.get(tensor.name) if encoding.importance else None
    if weights is not None and weights.ndim == 2:
        weights = weights[expert]
    feedback = encoding.feedback
    try:
        if feedback is not None and tensor.name in feedback and tensor.format.name in gptq.FORMATS:
            curvature = feedback.curvature(tensor.name, expert)
            found = gptq.encode(rows, tensor.format, curvature, importance=weights, threads=encoding.threads)
            return found.data.reshape(-1).data
        return ggml.encode(rows, tensor.format, weights, encoding.threads).reshape(-1).data
    except EdgekitError as e:
        raise type(e)(f"{tensor.name}: {e}", e.hint) from None


def _read_ahead(reader: ThreadPoolExecutor, slabs: Iterator[Slab]) -> Iterator[Slab]:
    """`slabs`, each asked for while the one before is being used."""
    step = lambda: next(slabs, None)  # noqa: E731 - the reader needs a callable
    pending = reader.submit(step)
    while (slab := pending.result()) is not None:
        pending = reader.submit(step)
        yield slab


def metadata(checkpoint: Checkpoint, blueprint: Blueprint, vocabulary: Vocabulary | None) -> dict[str, MetaValue]:
    """Everything the file says except what the number format decides, in the order it is written.

    A GGUF source keeps its own keys: its vocabulary and chat template pass through untouched.
    """
    general: dict[str, MetaValue] = {
        "general.architecture": blueprint.arch,
        "general.type": "model",
        "general.name": display_name(checkpoint.name, vocabulary.name_hint if vocabulary else ""),
        "general.basename": checkpoint.name,
        "general.size_label": size_label(checkpoint.parameters),
    }
    licence = checkpoint.card.get("license")
    if isinstance(licence, str) and licence:
        general["general.license"] = licence
    if checkpoint.gguf is not None:
        kept = {k: v for k, v in checkpoint.gguf.metadata.items() if k.startswith(("general.", "tokenizer."))}
        for decided_anew in ("general.file_type", "general.quantization_version", "general.alignment"):
            kept.pop(decided_anew, None)
        return {**general, **kept, **blueprint.metadata}
    words = vocabulary.metadata() if vocabulary else {}
    return {**general, **blueprint.metadata, **words}


def display_name(name: str, hint: str) -> str:
    """A name to read, which makes llama.cpp treat spaces after special tokens as this vocabulary does.

    llama.cpp decides that by looking for `phi-3` or `phi3` in the name, and refuses a file that has the word without
    the tokens (llama-vocab.cpp, "Handle per token attributes"). `hint` is the word that this vocabulary needs.
    """
    text = re.sub(r"(?i)(phi)(3)", r"\1 \2", name.replace("-", " ").replace("_", " "))
    return f"{text} ({hint})" if hint else text


def size_label(parameters: int) -> str:
    """The size in the GGUF naming convention: 134515008 -> `135M`, 1100048384 -> `1.1B`."""
    for letter, unit in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= unit:
            value = parameters / unit
            return f"{value:.1f}{letter}".replace(".0", "") if value < 10 else f"{value:.0f}{letter}"
    return str(parameters)
