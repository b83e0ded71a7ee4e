"""Folding: every family computes the same with any scales; chosen scales lower the error; statistics follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from edgekit import folding
from edgekit.arch import Blueprint, blueprint
from edgekit.checkpoint import open_checkpoint
from edgekit.export.gguf import Feedback
from edgekit.quant import folding as scales_of
from edgekit.quant import ggml, gptq
from edgekit.quant.folding import Reader
from edgekit.runtime import activations
from tests import pico
from tests.test_arch import cosines, engine, prompt, write_f32

NORMS = {"attn_norm", "ffn_norm"}
PLACES = MappingProxyType(
    {
        "bert": {"attn_v"},
        "roberta": {"attn_v"},
        "xlm_roberta": {"attn_v"},
        "gpt2": NORMS | {"attn_qkv"},
        "gpt_neox": NORMS | {"attn_qkv"},
        "mixtral": NORMS | {"attn_v", "ffn_up_exps"},
        "olmo2": {"attn_v", "ffn_up"},
        "phi3": NORMS | {"attn_qkv", "ffn_up"},
        "qwen2_moe": NORMS | {"attn_v", "ffn_up_exps", "ffn_up_shexp"},
        "qwen3_moe": NORMS | {"attn_v", "ffn_up_exps"},
        "stablelm": {"attn_norm", "attn_v", "ffn_up"},
        "starcoder2": NORMS | {"attn_v"},
    }
)
LEFT_ALONE = ("modernbert", "nomic_bert")  # encoders are not calibrated; of them BERT's graph alone is known
USUAL = NORMS | {"attn_v", "ffn_up"}


def made_of(root: Path) -> Blueprint:
    return blueprint(open_checkpoint(str(root)))


def drawn(made: Blueprint, seed: int, *, powers: bool = False) -> dict[str, np.ndarray]:
    """Scales in [1/4, 4] for every place."""
    rng = np.random.default_rng(seed)
    found = {}
    for place in folding.places(made)[0]:
        logs = rng.uniform(-2, 2, place.shape)
        found[place.name] = np.exp2(np.rint(logs) if powers else logs).astype(np.float32)
    return found


def same_answers(made: Blueprint, folder: Path) -> None:
    """With drawn scales the logits are the same but for rounding; with powers of two, to the bit."""
    tokens, embed = prompt(), not made.geometry.causal
    wanted = engine(write_f32(made, folder / "before.gguf"), tokens, embed=embed)
    folded = folding.apply(made, drawn(made, 1))
    assert [(t.name, t.shape) for t in folded.tensors] == [(t.name, t.shape) for t in made.tensors]
    got = engine(write_f32(folded, folder / "after.gguf"), tokens, embed=embed)
    assert not np.array_equal(got, wanted)
    assert cosines(got, wanted).min() > 0.999999
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    exact = engine(
        write_f32(folding.apply(made, drawn(made, 2, powers=True)), folder / "exact.gguf"), tokens, embed=embed
    )
    np.testing.assert_array_equal(exact, wanted)


@pytest.mark.parametrize("family", [name for name in pico.FAMILIES if name not in LEFT_ALONE])
def test_every_family_computes_the_same(family: str, tmp_path: Path) -> None:
    made = made_of(pico.make(family, tmp_path))
    there, skipped = folding.places(made)
    assert {p.name.split(".")[2] for p in there} == PLACES.get(family, USUAL)
    assert len({p.name for p in there}) == len(there)
    assert all(reason for _, reason in skipped)
    same_answers(made, tmp_path)


def test_a_second_norm_and_branches_one_after_the_other(tmp_path: Path) -> None:
    kind = pico.FAMILIES["stablelm"]
    assert isinstance(kind, pico.Pico)
    made = made_of(replace(kind, settings={"use_parallel_residual": False})(tmp_path / "model"))
    assert {p.name.split(".")[2] for p in folding.places(made)[0]} == USUAL
    same_answers(made, tmp_path)


def test_streams_are_scaled_wherever_slabs_end(tmp_path: Path) -> None:
    made = made_of(pico.make("mixtral", tmp_path))
    folded = folding.apply(made, drawn(made, 3))
    for before, after in zip(made.tensors, folded.tensors, strict=True):
        slabs = list(after.stream(5 * before.shape[-1]))
        assert len(slabs) == len(list(before.stream(5 * before.shape[-1])))
        np.testing.assert_array_equal(np.concatenate(slabs).reshape(after.shape), after.load())


def test_what_is_not_known_is_left_alone(tmp_path: Path) -> None:
    made = made_of(pico.llama(tmp_path / "model"))
    there, skipped = folding.places(replace(made, arch="falcon"))
    assert there == ()
    assert skipped[0][0] == "falcon"
    odd = replace(made.tensors[3], name="blk.0.attn_gate.weight")
    there, skipped = folding.places(replace(made, tensors=(*made.tensors, odd)))
    assert {p.name.split(".")[1] for p in there} == {"1"}
    assert "attn_gate" in dict(skipped)["blk.0"]
    with pytest.raises(ValueError, match="positive"):
        folding.apply(made, {"blk.0.attn_norm": np.zeros(256, np.float32)})


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Blueprint, activations.Statistics, Path]:
    """A llama of noise, what its matrices read, and a folder."""
    folder = tmp_path_factory.mktemp("folding")
    made = made_of(pico.llama(folder / "model", hidden=128, ffn=192))
    return made, statistics(made, folder / "before.gguf"), folder


def matrices(made: Blueprint) -> list[str]:
    return [t.name for t in made.tensors if len(t.shape) > 1 and t.name.startswith("blk") and not t.keep_f32]


def statistics(made: Blueprint, path: Path) -> activations.Statistics:
    chunks = [prompt(seed=seed) for seed in range(4)]
    moments = [n for n in matrices(made) if "_exps" not in n]
    return activations.collect(write_f32(made, path), chunks, moments=moments, threads=1)


def everything(made: Blueprint, found: activations.Statistics, name: str = "Q4_0") -> folding.Folded:
    importance = {n: found.importance(n) for n in matrices(made)}
    return folding.fold(made, importance, found.second_moment, dict.fromkeys(matrices(made), ggml.FORMATS[name]))


@pytest.fixture(scope="module")
def folded(learned: tuple[Blueprint, activations.Statistics, Path]) -> folding.Folded:
    return everything(*learned[:2])


def test_statistics_are_those_of_the_folded_model(
    learned: tuple[Blueprint, activations.Statistics, Path], folded: folding.Folded
) -> None:
    made, found, folder = learned
    assert folded.moments is not None
    assert len(folded.scales) > 3
    assert all(g < 1 for g in folded.gains.values())
    assert folded.scales.keys() == folded.gains.keys()
    again = statistics(folded.blueprint, folder / "after.gguf")
    for name in matrices(made):
        np.testing.assert_allclose(folded.importance[name], again.importance(name), rtol=5e-3)
        moment = again.second_moment[name]
        np.testing.assert_allclose(folded.moments[name], moment, atol=1e-3 * moment.max())
    repeated = everything(made, found)
    assert all(np.array_equal(repeated.scales[p], s) for p, s in folded.scales.items())


def test_error_feedback_shares_what_is_shared_and_no_more(
    learned: tuple[Blueprint, activations.Statistics, Path], folded: folding.Folded
) -> None:
    made, found, _ = learned
    assert folded.moments is not None
    feedback = Feedback(folded.moments)
    assert "blk.0.attn_q.weight" in feedback
    assert "output.weight" not in feedback
    q, k = (feedback.curvature(f"blk.0.attn_{x}.weight", 0) for x in "qk")
    assert q is k
    columns = {
        r: p.columns(folded.scales[p.name])
        for p in folding.places(made)[0]
        if p.name in folded.scales
        for r in p.readers
    }
    for name in matrices(made):
        s = columns.get(name, np.float32(1))
        wanted = gptq.prepare(found.second_moment[name] / np.outer(s, s)).pivots
        np.testing.assert_allclose(feedback.curvature(name, 0).pivots, wanted, rtol=1e-3)


def test_experts_have_scales_of_their_own(tmp_path: Path) -> None:
    made = made_of(pico.make("mixtral", tmp_path))
    found = statistics(made, tmp_path / "before.gguf")
    folded = everything(made, found)
    scales = folded.scales["blk.1.ffn_up_exps"]
    assert scales.shape == (4, 192)
    assert not np.array_equal(scales[0], scales[1])
    again = statistics(folded.blueprint, tmp_path / "after.gguf")
    for name in matrices(made):
        np.testing.assert_allclose(folded.importance[name], again.importance(name), rtol=5e-3)


def test_reasons(learned: tuple[Blueprint, activations.Statistics, Path]) -> None:
    made, found, _ = learned
    importance = {n: found.importance(n) for n in matrices(made)}
    del importance["blk.1.ffn_down.weight"]
    formats = dict.fromkeys(matrices(made), ggml.FORMATS["Q4_0"])
    formats["blk.0.attn_output.weight"] = ggml.FORMATS["IQ3_S"]
    formats["blk.0.ffn_down.weight"] = ggml.FORMATS["BF16"]
    formats["blk.1.attn_q.weight"] = ggml.FORMATS["BF16"]
    folded = folding.fold(made, importance, None, formats)
    reasons = dict(folded.skipped)
    assert "IQ3_S" in reasons["blk.0.attn_v"]
    assert "rounded" in reasons["blk.0.ffn_up"]
    assert "blk.1.ffn_down.weight" in reasons["blk.1.ffn_up"]
    assert "output_norm" in reasons
    assert folded.moments is None
    if "blk.1.attn_norm" in folded.scales:  # a 16-bit reader: no digit may be lost
        logs = np.log2(folded.scales["blk.1.attn_norm"])
        assert np.array_equal(logs, np.rint(logs))
    places = {p.name for p in folding.places(made)[0]}
    assert places <= reasons.keys() | folded.scales.keys()


# --- choosing --------------------------------------------------------------------------------------------------------


def spoiled(cols: int, seed: int, spread: float, ties: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Weights (96, cols) and a second moment, of a layer whose channels somebody scaled by 2^±`spread`."""
    rng = np.random.default_rng(seed)
    bad = np.exp2(rng.uniform(-spread, spread, cols if ties is None else ties.max() + 1))
    bad = bad if ties is None else bad[ties]
    x = rng.standard_normal((4 * cols, cols)) @ (np.eye(cols) + rng.standard_normal((cols, cols)) * 0.5 / cols**0.5)
    w = rng.standard_normal((96, cols)) * bad
    return w.astype(np.float32), (x.T @ x / np.outer(bad, bad)).astype(np.float32)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_1", "Q4_K", "Q6_K", "Q3_K", "IQ4_NL"])
@pytest.mark.parametrize("feedback", [False, True])
def test_what_was_spoiled_is_mended(name: str, feedback: bool) -> None:
    w, moment = spoiled(256, 5, 1.5)
    w = w[:48]
    curvature = gptq.prepare(moment) if feedback else None
    reader = Reader(w, ggml.FORMATS[name], np.diag(moment).copy(), curvature)
    fit = scales_of.fit([reader])
    assert fit.measured < 0.75
    assert abs(fit.forecast - fit.measured) < 0.2
    assert reader.scaled(fit.scales).error() == pytest.approx(fit.measured * reader.error())
    assert fit.scales.min() >= 1 / scales_of.LIMIT
    assert fit.scales.max() <= scales_of.LIMIT
    assert abs(np.log2(fit.scales).mean()) < 0.1


def test_scales_are_those_of_a_plain_descent() -> None:
    """The same descent, written as its formula says: every channel in turn, all of the cost anew."""
    w, moment = spoiled(32, 6, 1.0)
    costs = np.diag(moment).astype(np.float64)

    def formula(s: np.ndarray) -> float:
        return float((np.abs(w * s).max(axis=1) ** 2).sum() * (costs / s**2).sum())

    best = np.ones(32)
    for step in (0.5, 0.25, 0.125):
        for c in range(32):
            tries = [np.where(np.arange(32) == c, best * 2 ** (k * step), best) for k in (0, -1, 1, -2, 2)]
            tries = [s for s in tries if abs(np.log2(s[c])) <= 2.0001]
            best = min(tries, key=formula)
    fit = scales_of.fit([Reader(w, ggml.FORMATS["Q4_0"], costs.astype(np.float32))])
    wanted = [np.exp2(np.clip(power * (np.log2(best) - np.log2(best).mean()), -2, 2)) for power in (1, 0.5)]
    assert min(np.abs(fit.scales - s).max() for s in wanted) < 1e-4
    assert fit.forecast == pytest.approx(formula(fit.scales) / formula(np.ones(32)), rel=1e-4)


def test_scales_that_only_fit_their_rows_are_not_taken() -> None:
    """Noise is fitted with every sample of it; other rows of the same matrix show that nothing was there."""
    rng = np.random.default_rng(2)
    ones = np.ones(32, np.float32)
    kept = 0
    for _ in range(12):
        w, trial = rng.standard_normal((2, 96, 32)).astype(np.float32)
        assert scales_of.fit([Reader(w, ggml.FORMATS["Q4_0"], ones)]).measured < 0.995
        reader = Reader(w, ggml.FORMATS["Q4_0"], ones, trial=trial)
        fit = scales_of.fit([reader])
        assert fit.measured <= 1
        assert reader.scaled(fit.scales).error() == pytest.approx(fit.measured * reader.error())
        kept += bool((fit.scales == 1).all())
    assert kept > 6


def test_columns_that_are_tied_share_a_scale() -> None:
    heads = np.array([0, 0, 1, 1])
    ties = (heads[:, None] * 40 + np.arange(40)).reshape(-1)  # heads that end within groups
    w, moment = spoiled(160, 7, 1.5, ties)
    reader = Reader(w, ggml.FORMATS["Q4_0"], np.diag(moment).copy())
    fit = scales_of.fit([reader], ties)
    assert fit.scales.shape == (80,)
    assert fit.measured < 0.75
    assert reader.scaled(fit.scales[ties]).error() == pytest.approx(fit.measured * reader.error())


def test_no_scale_where_nothing_is_to_be_gained() -> None:
    w = np.full((8, 64), 0.5, np.float32)
    fit = scales_of.fit([Reader(w, ggml.FORMATS["Q4_0"], np.ones(64, np.float32))])
    np.testing.assert_array_equal(fit.scales, np.ones(64))
    assert fit.measured == 1
    dead = scales_of.fit([Reader(np.zeros((8, 64), np.float32), ggml.FORMATS["Q4_0"], np.zeros(64, np.float32))])
    np.testing.assert_array_equal(dead.scales, np.ones(64))


def test_powers_of_two() -> None:
    w, moment = spoiled(256, 8, 2.0)
    fit = scales_of.fit([Reader(w, ggml.FORMATS["Q4_0"], np.diag(moment).copy())], whole_powers=True)
    assert fit.measured < 0.9
    np.testing.assert_array_equal(np.exp2(np.rint(np.log2(fit.scales))), fit.scales)


def test_a_divided_curvature_is_the_curvature_of_the_divided_moment() -> None:
    _, moment = spoiled(64, 9, 1.0)
    s = np.exp2(np.random.default_rng(1).uniform(-1, 1, 64)).astype(np.float32)
    for found in (gptq.prepare(moment), scales_of.divided(gptq.prepare(moment), s)):
        upper = found.unit + np.eye(64, dtype=np.float32)
        np.testing.assert_allclose(upper * found.pivots @ upper.T, found.hessian, atol=1e-4)
    exact = gptq.prepare(moment / np.outer(s, s), damp=1e-6)
    ours = scales_of.divided(gptq.prepare(moment, damp=1e-6), s)
    np.testing.assert_allclose(exact.unit, ours.unit, atol=2e-3)
    np.testing.assert_allclose(exact.pivots * exact.unscale, ours.pivots * ours.unscale, rtol=1e-2)
