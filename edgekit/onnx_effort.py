"""What choosing an ONNX form costs, known before it runs: tokens of every step, seconds and memory on this machine.

Knows counts and speeds; runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod

from edgekit.effort import Speed, Work, find
from edgekit.export.onnx import MEMORY
from edgekit.onnx_planning import RUNTIME_OVERHEAD, OnnxPlan, Shape, kv_bytes, variants
from edgekit.runtime.lockstep import BUDGET, MOST

_CHUNK = 512  # tokens that are read as one text
_PROMPT = 24  # tokens of a question in its template, about
_FULL = 0.9  # onnxruntime's products of many rows, float32 or of blocks, against numpy's on one core
_ALONE = 5  # times that a token takes which is not read or written among many
_TURN = 2.2  # the same of one that is written among many, against one that is read
_PLAIN = 6e3  # operations a weight: of choosing scales and rounding
_EACH, _PAIR, _FACTOR = 6e4, 10.0, 2.0  # of error feedback: a weight, a pair of columns, a triple once for each input
_LAYER, _WORD = 1.2e6, 400.0  # operations of a token beside its matrices: a layer, and an entry of the vocabulary


def estimate(
    plan: OnnxPlan, effort: str = "normal", speed: Speed | None = None, *, source: str = "self", plans: int = 1
) -> Work:
    """What choosing takes with text of `source` (`self`, or a file) among `plans` variants, each plain and with error
    feedback. A pure function; seconds only with a `speed`.

    Nothing is taken off for what the cache holds. Raises UnknownName for the effort.
    """
    chosen = find(effort)
    rungs = 0 if chosen.rungs == 0 else len(variants(plan.task)) - plans
    tokens = {
        "text": chosen.tokens + chosen.held_out if source == "self" else 0,
        "reference": chosen.held_out,
        "answers": 2 * chosen.prompts * (chosen.answer_tokens + _PROMPT),
        "moments": chosen.tokens * _readings(plan.shape),
        "candidates": 2 * plans * chosen.held_out,
        "ladder": rungs * chosen.held_out,
    }
    return Work(tokens, None if speed is None else _seconds(plan, speed, tokens, plans, rungs, chosen.tokens))


def memory(plan: OnnxPlan) -> int:
    """Bytes that this takes at most: the float32 graph, and the caches of texts being written or moments in the
    making."""
    caches = min(BUDGET, MOST * kv_bytes(plan.shape, min(_CHUNK, plan.context)))
    made = min(MEMORY, _moment_bytes(plan.shape) + 8 * _CHUNK * plan.shape.ffn)
    return RUNTIME_OVERHEAD + 4 * plan.parameters + max(caches, made)


def _readings(shape: Shape) -> int:
    """How often the text is read for second moments: they are collected in groups that fit into memory. A group reads
    with the part of the graph before it, on average half of it."""
    groups = ceil(_moment_bytes(shape) / MEMORY)
    return max(1, ceil((groups + 1) / 2))


def _moment_bytes(shape: Shape) -> int:
    return sum(4 * cols * cols for cols in _inputs(shape))


def _inputs(shape: Shape) -> list[int]:
    """Columns of every distinct input of a matrix."""
    layer = [shape.hidden, shape.heads * shape.head_dim, shape.hidden, shape.ffn]
    return layer * shape.layers + [shape.hidden]


def _seconds(
    plan: OnnxPlan, speed: Speed, tokens: Mapping[str, int], plans: int, rungs: int, read: int
) -> dict[str, float]:
    weights = [s.shape for s in plan.stored if s.place in ("linear", "head") and len(s.shape) == 2]
    a_token = 2 * sum(map(prod, weights)) + _LAYER * plan.shape.layers + _WORD * plan.shape.vocab
    found = {name: n * a_token / (speed.flops * speed.threads * _FULL) for name, n in tokens.items()}
    found["answers"] *= _ALONE
    found["text"] *= _TURN
    inputs = _inputs(plan.shape)
    found["moments"] += read * sum(cols**2 for cols in inputs) / speed.flops
    plain = sum(map(prod, weights)) * _PLAIN / speed.threads
    fed_back = sum(rows * cols * (_EACH + _PAIR * cols) for rows, cols in weights) / speed.threads
    fed_back += _FACTOR * sum(cols**3 for cols in inputs)
    found["writing"] = ((plans + rungs) * plain + plans * fed_back) / speed.flops
    return found
