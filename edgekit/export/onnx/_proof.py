"""Does a graph compute what the source computes? Its outputs against transformers', and against honest rounding.

Knows graphs as they are run by plain onnxruntime, and decoders by onnxruntime-genai; measures and judges. A float32
graph must agree to the noise of its arithmetic. A quantised one must be no further off than the source itself with its
weights rounded to nearest in the same format: a bound that holds for trained weights and for noise, and that no
permuted matrix, wrong nibble order or lost window passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.embedding import Pooling, finish, pool
from edgekit.errors import VerificationFailed
from edgekit.export.onnx._predictions import Predictions, Rounding, predict_decoder, predict_encoder
from edgekit.export.onnx._running import Decoder, Encoder
from edgekit.onnx_file import open_onnx
from edgekit.units import Progress, silent

Floats = npt.NDArray[np.float32]

RELATIVE = 2e-3
"""Largest difference of a float32 graph, of the size of the reference: other kernels, other order of sums."""
WORST = 2e-2
"""The same for a single position or text."""
CLEAR = 0.02
"""A choice is clear when the best logit leads by this share of their standard deviation."""
SLACK = 1.6
"""A quantised graph may be this much further off than rounding to nearest: other grids, other rounding."""
FLOOR = 0.01
"""Relative differences below it pass whatever is expected."""
FAR_KL = 0.5
"""Nats a token from the source from where on a model is called damaged, though its graph is right."""

AGAIN = "the graph is not what the model computes: please report this with `edgekit doctor --json`"


@dataclass(frozen=True, slots=True)
class Figures:
    """How far one set of predictions is from the source's.

    `compared`: positions, or texts of an encoder. `relative`: |difference| / |reference|, both less their mean for
    logits; `worst`: the same for the worst position; `top1`: share of positions that choose the same; `flips`: those
    that choose otherwise although the choice is clear; `kl`: nats a position, None for an encoder; `cosine`: the lowest
    of a text's vectors, None for a decoder. `window`: tokens of the model's sliding window; `passed`: the text is
    longer.
    """

    compared: int
    tokens: int
    relative: float
    worst: float
    max_abs: float
    top1: float
    flips: int
    kl: float | None = None
    cosine: float | None = None
    window: int | None = None
    passed: bool = True


@dataclass(frozen=True, slots=True)
class Proof:
    """What was measured; `expected`: the same for plain rounding of the source, None for a float32 graph."""

    figures: Figures
    expected: Figures | None = None
    warnings: tuple[str, ...] = ()


# --- decoders --------------------------------------------------------------------------------------------------------


def against_source(
    graph: Path,
    root: Path,
    *,
    context: int,
    rounding: Rounding | None = None,
    threads: int = 1,
    effort: int = 1,
    progress: Progress = silent,
) -> Proof:
    """Prove a decoder's graph of every position against the checkpoint in `root`, on a prompt of built-in text.

    The prompt is longer than a sliding window where context, memory and work allow (`Figures.passed` says whether).
    `rounding`: what the graph's weights were rounded to; None for a float32 graph. Raises VerificationFailed;
    EdgekitError if transformers or onnxruntime cannot run the model.
    """
    progress("prove", 0, 2)
    known = predict_decoder(
        root, context=context, parameters=parameters(graph), rounding=rounding, threads=threads, effort=effort
    )
    progress("prove", 1, 2)
    proof = judge_decoder(graph, known, exact=rounding is None, threads=threads)
    progress("prove", 2, 2)
    return proof


def judge_decoder(graph: Path, known: Predictions, *, exact: bool, threads: int = 1) -> Proof:
    """As `against_source`, with predictions that were asked for before."""
    rows = Decoder(graph, threads).logits(known.texts[0], known.positions)
    found = decoder_figures(known, known.outputs[0]["logits"], rows)
    if exact:
        return Proof(require_exact(graph, found), None, _unpassed(found))
    expected = decoder_figures(known, known.outputs[0]["logits"], known.rounded[0]["logits"])
    require_rounding(graph, found, expected)
    return Proof(found, expected, (*_unpassed(found), *far(found)))


def parameters(graph: Path) -> int:
    """Weights in `graph`, as far as their number decides how long a proof takes."""
    bits = {"float32": 32, "float16": 16, "uint8": 8}
    return sum(8 * t.nbytes // bits[t.dtype] for t in open_onnx(graph).tensors if t.dtype in bits)


def decoder_figures(known: Predictions, reference: Floats, rows: Floats) -> Figures:
    """How far the logits `rows`, float32 (positions, vocabulary), are from `reference`."""
    if rows.shape != reference.shape:
        raise VerificationFailed(f"the graph gives logits {rows.shape}, the model {reference.shape}", AGAIN)
    r, g = (x.astype(np.float64) for x in (reference, rows))
    r, g = r - r.mean(1, keepdims=True), g - g.mean(1, keepdims=True)
    p, q = (
        x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in (r, g)
    )
    same = r.argmax(1) == g.argmax(1)
    top = np.partition(r, -2, axis=1)
    clear = top[:, -1] - top[:, -2] > CLEAR * r.std(1)
    return Figures(
        compared=len(r),
        tokens=sum(map(len, known.texts)),
        relative=relative(r, g),
        worst=max(relative(a, b) for a, b in zip(r, g, strict=True)),
        max_abs=float(np.abs(reference.astype(np.float64) - rows).max()),
        top1=float(same.mean()),
        flips=int((clear & ~same).sum()),
        kl=float((np.exp(p) * (p - q)).sum(1).mean()),
        window=known.window,
        passed=known.passed,
    )


def relative(reference: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """|difference| / |reference|. Not finite counts as infinitely far."""
    difference = float(np.linalg.norm(found.astype(np.float64) - reference))
    size = float(np.linalg.norm(reference))
    return difference / size if np.isfinite(difference) and size else 0.0 if difference == 0 else float("inf")


def _unpassed(found: Figures) -> tuple[str, ...]:
    if found.passed:
        return ()
    return (f"the proof read {found.tokens} tokens: its sliding window of {found.window} was not reached",)


def far(found: Figures) -> tuple[str, ...]:
    if found.kl is None or found.kl < FAR_KL:
        return ()
    return (
        f"the rounding costs {found.kl:.2f} nats a token on built-in text, as the format does on such weights; "
        "try --quant int8",
    )


# --- judging ---------------------------------------------------------------------------------------------------------


def require_exact(graph: Path, found: Figures) -> Figures:
    """Raise VerificationFailed unless `found` is the noise of float32 arithmetic."""
    if not (found.relative <= RELATIVE and found.worst <= WORST and found.flips == 0):
        raise VerificationFailed(
            f"{graph.name} does not compute what the model computes: it differs by {found.relative:.2g} of its outputs "
            f"(at most {RELATIVE:g} is arithmetic), by {found.worst:.2g} at worst, "
            f"and {found.flips} of {found.compared} clear choices are others",
            AGAIN,
        )
    return found


def require_rounding(graph: Path, found: Figures, expected: Figures, slack: float = SLACK) -> None:
    """Raise VerificationFailed when `found` is further off than rounding explains."""
    bound = max(slack * expected.relative, FLOOR)
    far = not found.relative <= bound
    if found.kl is not None and expected.kl is not None:
        far = far or not found.kl <= max(slack**2 * expected.kl, FLOOR**2)
    if far:
        measure = "" if found.kl is None else f" and {found.kl:.3g} nats a token (expected {expected.kl:.3g})"
        raise VerificationFailed(
            f"{graph.name} is further from the model than its number format explains: {found.relative:.3g} of the "
            f"outputs (rounding to nearest: {expected.relative:.3g}){measure}",
            AGAIN,
        )


# --- encoders --------------------------------------------------------------------------------------------------------


def encoder_against_source(
    graph: Path,
    root: Path,
    task: str,
    *,
    pooling: Pooling | None = None,
    max_length: int = 512,
    rounding: Rounding | None = None,
    slack: float = SLACK,
    threads: int = 1,
    progress: Progress = silent,
) -> Proof:
    """Prove an encoder's graph against the checkpoint in `root` on sentences of one word to a page.

    Every sentence is read on its own and in one padded batch; both are held against transformers, which reads it on
    its own. `pooling`: how tokens become the vector whose cosine is reported. Raises as `against_source`.
    """
    progress("prove", 0, 2)
    known = predict_encoder(root, task, max_length=max_length, rounding=rounding, threads=threads)
    progress("prove", 1, 2)
    proof = judge_encoder(graph, known, pooling, exact=rounding is None, slack=slack, threads=threads)
    progress("prove", 2, 2)
    return proof


def judge_encoder(
    graph: Path,
    known: Predictions,
    pooling: Pooling | None = None,
    *,
    exact: bool,
    slack: float = SLACK,
    threads: int = 1,
) -> Proof:
    """As `encoder_against_source`, with predictions that were asked for before."""
    encoder = Encoder(graph, threads)
    alone = [encoder.outputs([ids])[0] for ids in known.texts]
    found = _encoder_figures(known, known.outputs, alone, pooling)
    padded = _encoder_figures(known, known.outputs, encoder.outputs(known.texts), pooling)
    if exact:
        require_exact(graph, found)
        return Proof(require_exact(graph, padded))
    expected = _encoder_figures(known, known.outputs, known.rounded, pooling)
    for figures in (found, padded):
        require_rounding(graph, figures, expected, slack)
    return Proof(found, expected, _padding(found, padded))


def _encoder_figures(
    known: Predictions,
    reference: Sequence[Mapping[str, Floats]],
    found: Sequence[Mapping[str, Floats]],
    pooling: Pooling | None,
) -> Figures:
    pairs = [pair for r, g in zip(reference, found, strict=True) for pair in _paired(r, g)]
    vectors = [(_vector(r, pooling), _vector(g, pooling)) for r, g in pairs]
    flat_r, flat_g = (np.concatenate([pair[i].reshape(-1) for pair in pairs]) for i in (0, 1))
    rows = [(a, b) for r, g in pairs for a, b in zip(np.atleast_2d(r), np.atleast_2d(g), strict=True)]
    same = [bool(a.argmax() == b.argmax()) for a, b in rows]
    return Figures(
        compared=len(known.texts),
        tokens=sum(map(len, known.texts)),
        relative=relative(flat_r, flat_g),
        worst=max(relative(r, g) for r, g in pairs),
        max_abs=float(np.abs(flat_r - flat_g).max()),
        top1=float(np.mean(same)),
        flips=0,
        cosine=min(_cosine(r, g) for r, g in vectors),
    )


def _paired(reference: Mapping[str, Floats], found: Mapping[str, Floats]) -> list[tuple[Floats, Floats]]:
    """The outputs that both have; where no name is shared, the first of each. Shapes must agree."""
    names = [(n, n) for n in reference if n in found] or [(next(iter(reference)), next(iter(found)))]
    for theirs, ours in names:
        if reference[theirs].shape != found[ours].shape:
            raise VerificationFailed(
                f"the graph's {ours} has shape {found[ours].shape}, the model's {theirs} {reference[theirs].shape}",
                AGAIN,
            )
    return [(reference[theirs], found[ours]) for theirs, ours in names]


def _vector(output: Floats, pooling: Pooling | None) -> Floats:
    """One vector of a text's output: pooled where the model says how, else as it is."""
    if pooling is None or output.ndim != 2:
        return output.reshape(-1)
    mask = np.ones((1, len(output)), np.int64)
    return np.asarray(finish(pool(output[None], mask, pooling), pooling)[0])


def _cosine(a: Floats, b: Floats) -> float:
    product = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.dot(a.astype(np.float64), b)) / product if product else 1.0


def _padding(alone: Figures, padded: Figures) -> tuple[str, ...]:
    assert alone.cosine is not None and padded.cosine is not None
    if alone.cosine - padded.cosine < 1e-3:
        return ()
    return (
        f"texts of different lengths in one batch disturb each other: cosine {padded.cosine:.4f} to the source "
        f"instead of {alone.cosine:.4f}; batch texts of a length, or read them one by one",
    )


# --- the form that ships ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Greedy:
    """`same` of `tokens` greedy tokens are the ones the other graph likes best; `gap`: the largest lead that another
    token had, in standard deviations of the logits; `relative`: difference of the logits behind the first prompt."""

    prompts: int
    tokens: int
    same: int
    gap: float
    relative: float


def same_greedy(
    shipped: Path,
    unpruned: Path,
    prompts: Sequence[Sequence[int]],
    n: int = 16,
    *,
    noise: float = 0.0,
    threads: int = 1,
) -> Greedy:
    """Let onnxruntime-genai continue `prompts` with the folder `shipped`; `unpruned`, a graph of every position run by
    plain onnxruntime, must like each of its `n` tokens best, or as well as the best but for noise.

    `noise`: how far rounding moves the logits, relative. Activations in 8 bits round otherwise one token at a time than
    many at once, so that a lead of a few times that says nothing; the logits behind the prompts, which both read at
    once, have no such excuse. Raises VerificationFailed.
    """
    from edgekit.export.onnx._running import continue_greedily

    answers = [continue_greedily(shipped, ids, n, threads) for ids in prompts]
    judge = Decoder(unpruned, threads)
    gaps, same, differences = [0.0], 0, []
    for ids, (tokens, first) in zip(prompts, answers, strict=True):
        asked = range(len(ids) - 1, len(ids) - 1 + len(tokens))
        rows = judge.logits([*ids, *tokens[:-1]], tuple(asked)).astype(np.float64)
        differences.append(relative(rows[0] - rows[0].mean(), first - first.mean()))
        lead = (rows.max(1) - rows[np.arange(len(tokens)), list(tokens)]) / rows.std(1)
        same += int((lead == 0).sum())
        gaps += lead.tolist()
    found = Greedy(len(prompts), sum(len(t) for t, _ in answers), same, max(gaps), max(differences))
    if not (found.gap <= max(2.5 * CLEAR, min(1.0, 6 * noise)) and found.relative <= WORST):
        raise VerificationFailed(
            f"the shipped graph in {shipped.name} does not continue prompts as {unpruned.name} would: {found.same} of "
            f"{found.tokens} tokens are the same, its logits differ by {found.relative:.2g}",
            AGAIN,
        )
    return found
