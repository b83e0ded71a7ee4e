"""What llama.cpp's CPU backend loses by rounding the input of every matrix to 8 bits, beside what weights lose.

Knows graphs and the two roundings; knows no format of weights beyond the size of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, RuntimeFailed
from edgekit.quant import ggml
from edgekit.runtime import _ggml_tensor as raw
from edgekit.runtime._llama_library import library
from edgekit.runtime.llama_cpp import Context, ContextSettings, LlamaSession

Squares = npt.NDArray[np.float64]

_BATCH = 512


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of one matrix, float64 (cols,), means over tokens: squares of its input, and squared errors of rounding it in
    blocks of 32 (Q8_0, for weights in blocks of 32) and of 256 (Q8_K, for weights in blocks of 256; None where the
    columns do not divide). Which goes with which: `vec_dot_type` of type_traits_cpu, ggml-cpu.c."""

    squares: Squares
    by_32: Squares | None
    by_256: Squares | None


def inputs(session: LlamaSession, chunk: Sequence[int]) -> dict[str, Inputs]:
    """One small forward pass over at most 512 tokens. Stacks of experts are left out. Raises RuntimeFailed."""
    ids = session.model.checked(chunk[:_BATCH])
    raw.functions()
    reader = _Reader()
    settings = ContextSettings(max(32, len(ids)), session.threads, len(ids), len(ids), outputs=len(ids))
    callback = library().api.ggml_backend_sched_eval_callback(reader)
    context = Context(session.model, settings, cb_eval=callback)
    try:
        context.decode(ids, 0, 0)
    finally:
        context.close()
    if reader.failure is not None:
        raise reader.failure
    return reader.found


@dataclass
class _Reader:
    found: dict[str, Inputs] = field(default_factory=dict)
    failure: EdgekitError | None = None

    def __call__(self, address: int, ask: bool, _user: int | None) -> bool:
        node = raw.read(address)
        wanted = self.failure is None and bool(node.op == raw.operations()["MUL_MAT"])
        if ask or not wanted:
            return wanted and self._is_weight(node)
        try:
            self._measure(node)
        except EdgekitError as error:
            self.failure = error
        except (ValueError, MemoryError) as error:  # would vanish in C
            self.failure = RuntimeFailed(f"cannot read the activations: {error}")
        return self.failure is None

    def _is_weight(self, node: raw.Tensor) -> bool:
        weight = raw.read(node.src[0])
        plain = weight.op == raw.operations()["NONE"] and weight.name.endswith(b".weight")
        return bool(plain and weight.ne[2] * weight.ne[3] == 1 and raw.read(node.src[1]).type == raw.F32)

    def _measure(self, node: raw.Tensor) -> None:
        if not self._is_weight(node):
            return
        name = raw.read(node.src[0]).name.decode("utf-8", "replace")
        x = raw.values(node.src[1], np.float32)
        x = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
        cols = x.shape[1]
        by_32 = x - ggml.decode(ggml.encode(x, "Q8_0"), "Q8_0", cols) if cols % 32 == 0 else None
        by_256 = _rounding_of_256(x) if cols % 256 == 0 else None
        self.found[name] = Inputs(
            _mean_square(x),
            None if by_32 is None else _mean_square(by_32),
            None if by_256 is None else _mean_square(by_256),
        )


def _rounding_of_256(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What quantize_row_q8_K leaves: integers to 127 of a float32 step a block."""
    blocks = x.reshape(-1, 256)
    step = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    whole = np.rint(np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0))
    left: npt.NDArray[np.float32] = (blocks - whole * step).reshape(x.shape)
    return left


def _mean_square(x: npt.NDArray[np.float32]) -> Squares:
    found: Squares = np.square(x).mean(axis=0, dtype=np.float64)
    return found
