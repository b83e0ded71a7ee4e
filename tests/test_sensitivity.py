"""Weights overwritten in a loaded model, a compact reference, measured costs and what is decided from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekit import mixing, pipeline, planning, quality, sensitivity
from edgekit.errors import CorruptCheckpoint, DoesNotFit, EdgekitError, RuntimeFailed, UnknownName
from edgekit.export import gguf
from edgekit.forecast import CLASSES
from edgekit.gguf_file import open_gguf
from edgekit.quant import Format, ggml
from edgekit.reference import CompactReference, open_reference, record
from edgekit.runtime import activations
from edgekit.runtime.llama_cpp import LlamaSession, open_session
from edgekit.runtime.rounding import inputs
from edgekit.runtime.weights import Weights
from edgekit.sensitivity import Sensitivity
from edgekit.target import Target
from tests import pico

TOKENS = [int(i) for i in np.random.default_rng(3).integers(3, pico.VOCAB, 512)]
CHUNKS = [TOKENS[i : i + 128] for i in range(0, 512, 128)]
DOWN = "blk.1.ffn_down.weight"


def mixed(plan: planning.Plan, formats: sensitivity.Assignment) -> planning.Plan:
    return planning.with_formats(plan, formats, Target.load("rpi5"), "measured")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Source:
    return pipeline.open_source(pico.llama(tmp_path_factory.mktemp("pico") / "m", layers=2, tied=True, dtype="F32"))


def written(source: pipeline.Source, path: Path, quant: str, assignment: dict[str, str] | None = None) -> Path:
    plan = planning.plan(source.blueprint, source.metadata, Target.load("rpi5"), quant=quant)
    gguf.write(mixed(plan, assignment or {}), path)
    return path


@pytest.fixture(scope="module")
def plain(source: pipeline.Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(source, tmp_path_factory.mktemp("plain") / "f32.gguf", "F32")


@pytest.fixture(scope="module")
def session(plain: Path) -> Iterator[LlamaSession]:
    with open_session(plain, n_ctx=128, threads=1, mmap=False) as opened:
        yield opened


# --- weights ---------------------------------------------------------------------------------------------------------


def test_every_matrix_is_found_and_read(session: LlamaSession, source: pipeline.Source) -> None:
    with Weights(session) as weights:
        assert set(weights.names) == {p.name for p in sensitivity.parts_of(source.blueprint)}
        for made in source.blueprint.tensors:
            if made.name in weights.names:
                assert weights.shape(made.name) == made.shape
                assert np.array_equal(weights.read(made.name), made.load())
        assert np.array_equal(weights.read(DOWN, 3, 5), weights.read(DOWN)[3:5])


def test_a_replaced_matrix_is_what_the_model_computes_with(session: LlamaSession, plain: Path, tmp_path: Path) -> None:
    """As if its file had been written so; the embedding is tied, and is the output too."""
    data, stored = bytearray(plain.read_bytes()), open_gguf(plain).tensors
    before = session.logits(CHUNKS[0])
    with Weights(session) as weights:
        for name in (DOWN, "token_embd.weight"):
            values = np.roll(weights.read(name), 1, axis=0)
            weights.replace(name, values)
            data[stored[name].offset : stored[name].offset + values.nbytes] = values.tobytes()
        ours = session.logits(CHUNKS[0])
    (tmp_path / "other.gguf").write_bytes(data)
    with open_session(tmp_path / "other.gguf", n_ctx=128, threads=1, mmap=False) as opened:
        assert np.array_equal(opened.logits(CHUNKS[0]), ours)
    assert not np.array_equal(ours, before)
    assert np.array_equal(session.logits(CHUNKS[0]), before)


def test_everything_is_restored_after_an_error(session: LlamaSession) -> None:
    before = session.logits(CHUNKS[0])
    with pytest.raises(ZeroDivisionError), Weights(session) as weights:
        weights.replace(DOWN, np.zeros(weights.shape(DOWN), np.float32))
        weights.replace("blk.0.attn_q.weight", np.ones((2, 256), np.float32), 7)
        assert np.abs(session.logits(CHUNKS[0]) - before).max() > 0.01
        raise ZeroDivisionError
    assert np.array_equal(session.logits(CHUNKS[0]), before)


@pytest.mark.parametrize("fmt", ["F16", "BF16"])
def test_values_are_rounded_to_the_type_they_are_stored_in(source: pipeline.Source, fmt: str, tmp_path: Path) -> None:
    path = written(source, tmp_path / "half.gguf", fmt)
    with open_session(path, n_ctx=32, threads=1, mmap=False) as opened, Weights(opened) as weights:
        assert weights.stored(DOWN) == fmt
        before = weights.read(DOWN)
        values = before + np.float32(1 / 3)
        weights.replace(DOWN, values)
        assert np.array_equal(weights.read(DOWN), ggml.decode(ggml.encode(values, fmt), fmt, values.shape[1]))
        weights.restore(DOWN)
        assert np.array_equal(weights.read(DOWN), before)


def test_what_cannot_be_overwritten_is_refused(source: pipeline.Source, plain: Path, tmp_path: Path) -> None:
    with open_session(plain, n_ctx=32, threads=1) as mapped, pytest.raises(RuntimeFailed, match="mapped from its file"):
        Weights(mapped)
    path = written(source, tmp_path / "q8.gguf", "Q8_0")
    with (
        open_session(path, n_ctx=32, threads=1, mmap=False) as quantised,
        pytest.raises(RuntimeFailed, match=r"only floats|not in plain memory"),
    ):
        Weights(quantised)


def test_wrong_names_shapes_and_rows(session: LlamaSession) -> None:
    with Weights(session) as weights:
        with pytest.raises(UnknownName, match=r"blk\.9"):
            weights.read("blk.9.ffn_down.weight")
        with pytest.raises(EdgekitError, match=DOWN):
            weights.replace(DOWN, np.zeros((256, 256), np.float32))
        with pytest.raises(EdgekitError, match="rows 255 to 257"):
            weights.replace(DOWN, np.zeros((2, 512), np.float32), 255)


@pytest.mark.slow
def test_stacks_of_experts(tmp_path: Path) -> None:
    source = pipeline.open_source(pico.make("mixtral", tmp_path))
    path = written(source, tmp_path / "moe.gguf", "F32")
    name = "blk.1.ffn_down_exps.weight"
    with open_session(path, n_ctx=64, threads=1, mmap=False) as opened:
        before = opened.logits(TOKENS[:32])
        with Weights(opened) as weights:
            values = weights.read(name)
            assert values.shape == weights.shape(name) == (4, 128, 192)
            assert np.array_equal(weights.read(name, 130, 131)[0], values[1, 2])
            weights.replace(name, -values)
            assert np.abs(opened.logits(TOKENS[:32]) - before).max() > 0.01
        assert np.array_equal(opened.logits(TOKENS[:32]), before)
        groups = sensitivity.group(sensitivity.parts_of(source.blueprint), 1)
        importance = {name: np.ones((4, 192), np.float32)}
        found = sensitivity.measure(opened, groups, ("Q4_K",), [TOKENS[:64]], importance)
        assert {p.format for p in found.probes} == {"Q4_0"}  # its rows hold no block of 256
        assert all(p.kl > 0 for p in found.probes)


# --- the compact reference -------------------------------------------------------------------------------------------


def test_the_compact_reference_agrees_with_the_whole(
    session: LlamaSession, source: pipeline.Source, tmp_path: Path
) -> None:
    stored = record(session, CHUNKS, top=32, samples=16)
    path = written(source, tmp_path / "q.gguf", "Q4_K_M")
    with open_session(path, n_ctx=128, threads=1) as candidate:
        whole = quality.compare(session, candidate, TOKENS, 128)
        part = stored.compare(candidate)
    assert part.tokens == whole.tokens
    assert part.kl_mean == pytest.approx(whole.kl_mean, rel=0.05)  # noise over noise: half the mass is in the tail
    assert part.ln_ratio == pytest.approx(whole.ln_ratio, abs=1e-6)
    assert (part.top1, part.ppl_reference) == pytest.approx((whole.top1, whole.ppl_reference))


def test_a_small_vocabulary_is_kept_whole_and_exact(
    session: LlamaSession, source: pipeline.Source, tmp_path: Path
) -> None:
    stored = record(session, CHUNKS, top=pico.VOCAB)
    with open_session(written(source, tmp_path / "q.gguf", "Q4_K_M"), n_ctx=128, threads=1) as candidate:
        assert stored.compare(candidate).kl_mean == pytest.approx(
            quality.compare(session, candidate, TOKENS, 128).kl_mean, rel=1e-4
        )
    assert stored.compare(session).kl_mean < 1e-10


def test_the_estimate_is_unbiased(session: LlamaSession, source: pipeline.Source, tmp_path: Path) -> None:
    """Two likeliest tokens and two drawn: each estimate is poor, their mean is not."""
    with open_session(written(source, tmp_path / "q.gguf", "Q5_K_M"), n_ctx=128, threads=1) as candidate:
        exact = quality.compare(session, candidate, TOKENS[:128], 128).kl_mean
        drawn = [record(session, CHUNKS[:1], top=2, samples=2, seed=s).compare(candidate).kl_mean for s in range(40)]
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert error < 0.05 * exact
    assert abs(np.mean(drawn) - exact) < 4 * error


def test_saved_and_opened_again(session: LlamaSession, tmp_path: Path) -> None:
    stored = record(session, CHUNKS, top=16, samples=8, skip=0.25)
    stored.save(tmp_path / "r.npz")
    again = open_reference(tmp_path / "r.npz")
    assert isinstance(again, CompactReference)
    assert (again.chunks, again.n_vocab, again.skip, again.top) == (stored.chunks, stored.n_vocab, 0.25, 16)
    assert again.compare(session) == stored.compare(session)
    assert [p.name for p in tmp_path.iterdir()] == ["r.npz"]


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "tokens", "rows", "infinite"])
def test_a_damaged_reference_is_refused(session: LlamaSession, tmp_path: Path, damage: str) -> None:
    stored, path = record(session, CHUNKS[:1], top=8, samples=4), tmp_path / "r.npz"
    if damage == "tokens":
        stored = replace(stored, chunks=((*stored.chunks[0][:-1], 1 << 20),))
    if damage == "rows":
        stored = replace(stored, ids=stored.ids[:-1])
    if damage == "infinite":
        stored.logs[3, 3] = np.inf
    stored.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    if damage == "text":
        path.write_text("no numbers")
    if damage == "pickle":
        np.save(path.with_suffix(".npy"), np.array([{}], object), allow_pickle=True)
        path.with_suffix(".npy").replace(path)
    with pytest.raises(CorruptCheckpoint):
        open_reference(path)


def test_references_refuse_what_they_cannot_compare(session: LlamaSession) -> None:
    with pytest.raises(EdgekitError, match="8 tokens is too short"):
        record(session, [TOKENS[:8]])
    with pytest.raises(EdgekitError, match="do not fit in a context of 128"):
        record(session, [TOKENS[:200]])
    with pytest.raises(EdgekitError, match="vocabularies differ"):
        replace(record(session, CHUNKS[:1]), n_vocab=99).compare(session)


# --- sensitivity -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(source: pipeline.Source) -> tuple[sensitivity.Part, ...]:
    return sensitivity.parts_of(source.blueprint)


@pytest.fixture(scope="module")
def measured(session: LlamaSession, parts: tuple[sensitivity.Part, ...]) -> Sensitivity:
    groups = sensitivity.group(parts, 1)
    both = [{p.name: fmt for p in parts} for fmt in ("Q2_K", "Q4_K")]
    return sensitivity.measure(session, groups, ("Q2_K", "Q4_K", "Q6_K"), CHUNKS, {}, combined=both)


def test_groups_follow_the_effort(parts: tuple[sensitivity.Part, ...]) -> None:
    wide = [
        sensitivity.Part(p.name.replace("blk.0", f"blk.{i}"), p.shape, p.role)
        for p in parts
        for i in (range(16) if p.name.startswith("blk.0") else [0] if p.name == "token_embd.weight" else [])
    ]
    chosen = {e: sensitivity.choose_probes(wide, e) for e in ("low", "normal", "high")}
    assert [(len(g), len(f)) for g, f in chosen.values()] == [(43, 1), (113, 1), (113, 2)]
    for (effort, (groups, formats)), most in zip(chosen.items(), (48, 120, 480), strict=True):
        assert sensitivity.passes(groups, formats, effort, combined=4) <= most
        assert sorted(p.name for g in groups for p in g.parts) == sorted(p.name for p in wide)
    assert len(sensitivity.choose_probes(parts)[1]) == 4  # two layers
    with pytest.raises(UnknownName, match="effort"):
        sensitivity.choose_probes(wide, "huge")


def test_passes_are_counted_beforehand(session: LlamaSession, parts: tuple[sensitivity.Part, ...]) -> None:
    groups, seen = sensitivity.group(parts, 2)[:3], []
    sensitivity.measure(
        session, groups, ("Q4_K", "Q6_K"), CHUNKS[:1], {}, considered=("Q4_K",), progress=lambda *a: seen.append(a)
    )
    total = sensitivity.passes(groups, ("Q4_K", "Q6_K"))
    assert total == 7
    assert seen == [("sensitivity", i, total) for i in range(1, total + 1)]


def test_costs_are_those_of_the_file(
    session: LlamaSession, source: pipeline.Source, measured: Sensitivity, tmp_path: Path
) -> None:
    """A probe in the running model against a file with that group quantised."""
    group = next(g for g in measured.groups if g.name.startswith("ffn_down"))
    probe = next(p for p in measured.probes if (p.group, p.format) == (group.name, "Q2_K"))
    path = written(source, tmp_path / "q.gguf", "F32", {p.name: "Q2_K" for p in group.parts})
    with open_session(path, n_ctx=128, threads=1) as candidate:
        real = record(session, CHUNKS, skip=1 / 8).compare(candidate).kl_mean
    assert probe.kl == pytest.approx(real, rel=0.05)  # the file also rounds what it multiplies with
    assert sum(measured.cost(p.name, "Q2_K") for p in group.parts) == pytest.approx(probe.kl)


def test_the_model_is_left_as_it_was_and_the_result_is_the_same(
    session: LlamaSession, parts: tuple[sensitivity.Part, ...], measured: Sensitivity
) -> None:
    before = session.logits(CHUNKS[0])
    groups = sensitivity.group(parts, 1)[:2]
    again = sensitivity.measure(session, groups, ("Q2_K", "Q4_K", "Q6_K"), CHUNKS, {})
    assert again.probes == tuple(p for p in measured.probes if p.group in {g.name for g in groups})
    assert np.array_equal(session.logits(CHUNKS[0]), before)

    def fails(*_: object) -> np.ndarray:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sensitivity.measure(session, groups, ("Q4_K",), CHUNKS, {}, encode=fails)
    assert np.array_equal(session.logits(CHUNKS[0]), before)


def test_fewer_bits_cost_more(measured: Sensitivity) -> None:
    for part in measured.parts:
        costs = {o.name: o.cost for o in measured.options(part.name)}
        assert 0 < costs["Q8_0"] < costs["Q6_K"] < costs["Q5_K"] < costs["Q4_K"] < costs["Q3_K"] < costs["Q2_K"]
        assert "IQ2_XS" not in costs  # needs importance, and there is none
        assert measured.cost(part.name, "F16") == 0
    with pytest.raises(UnknownName, match="IQ2_XS"):
        measured.cost(DOWN, "IQ2_XS")


def test_combinations_correct_the_prediction(measured: Sensitivity) -> None:
    for seen in measured.combined:
        assert measured.predict(seen.assignment) == pytest.approx(seen.kl, rel=0.05)
    uncorrected = replace(measured, assignments=())
    assert uncorrected.correction == (1, 1)
    assert uncorrected.predict({DOWN: "Q4_K"}) == pytest.approx(measured.cost(DOWN, "Q4_K"))


def test_a_cost_below_its_noise_is_not_taken_for_nothing(measured: Sensitivity) -> None:
    name = next(g.name for g in measured.groups if g.name.startswith("attn_k"))
    probes = tuple(
        replace(p, kl=-1e-6, stderr=1e-5) if (p.group, p.format) == (name, "Q4_K") else p for p in measured.probes
    )
    before, after = (s.cost("blk.0.attn_k.weight", "Q4_K") for s in (measured, replace(measured, probes=probes)))
    assert before / 3 < after < before * 3


def test_another_encoder_is_measured(session: LlamaSession, parts: tuple[sensitivity.Part, ...]) -> None:
    rows: dict[str, int] = {}

    def worse(name: str, expert: int, values: np.ndarray, fmt: Format) -> np.ndarray:
        rows[name] = rows.get(name, 0) + len(values)
        return ggml.encode(values * np.float32(1.1), fmt)

    groups = [g for g in sensitivity.group(parts, 1) if g.name.startswith("ffn_up")]
    kls = [
        sensitivity.measure(session, groups, ("Q6_K",), CHUNKS, {}, considered=("Q6_K",), encode=e).probes[0].kl
        for e in (None, worse)
    ]
    assert kls[1] > 5 * kls[0]
    # once to tell formats apart, once for the probe
    assert rows == {p.name: 2 * p.shape[0] for g in groups for p in g.parts}


def test_inputs_are_rounded_too(
    session: LlamaSession, source: pipeline.Source, measured: Sensitivity, tmp_path: Path
) -> None:
    """What a file on a CPU loses beside its weights: little in blocks of 32, more in blocks of 256."""
    judge = record(session, CHUNKS, skip=1 / 8)
    for fmt in ("Q8_0", "Q6_K"):
        whole = {p.name: fmt for p in measured.parts}
        with open_session(written(source, tmp_path / f"{fmt}.gguf", "F32", whole), n_ctx=128, threads=1) as candidate:
            real = judge.compare(candidate).kl_mean
        with Weights(session) as weights:
            for name in whole:
                values = weights.read(name)
                rows = values.reshape(-1, values.shape[-1])
                decoded = ggml.decode(ggml.encode(rows, fmt), fmt, rows.shape[1])
                weights.replace(name, decoded.reshape(values.shape))
            of_weights = judge.compare(session).kl_mean
        inputs_alone = measured.added(whole, cpu=True) - measured.added(whole)
        assert real > of_weights
        assert inputs_alone == pytest.approx(real - of_weights, rel=0.5)


def test_rounding_of_inputs_is_what_ggml_does(session: LlamaSession) -> None:
    seen = inputs(session, CHUNKS[0])
    with Weights(session) as weights:
        assert set(seen) == set(weights.names)
    stats = activations.collect(session, CHUNKS[:1], threads=1)
    for name, one in seen.items():
        assert np.allclose(one.squares, stats.sums[name] / 128, rtol=1e-4)
        assert one.by_32 is not None and one.by_256 is not None
        assert 0 < one.by_32.sum() < one.by_256.sum() < 1e-3 * one.squares.sum()


# --- mixing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["Q4_K_M", "Q2_K", "Q5_K_S"])
def test_a_mix_hits_its_size_from_below(
    source: pipeline.Source, measured: Sensitivity, preset: str, tmp_path: Path
) -> None:
    plan = planning.plan(source.blueprint, source.metadata, Target.load("rpi5"), quant=preset)
    chosen = mixing.mix(plan, measured, plan.file_bytes)
    randoms = [mixing.random_mix(plan, measured, plan.file_bytes, seed=s) for s in (1, 1, 2)]
    assert randoms[0] == randoms[1] != randoms[2]
    for one in (chosen, randoms[0], randoms[2]):
        made = mixed(plan, one)
        gguf.write(made, tmp_path / "m.gguf")
        assert (tmp_path / "m.gguf").stat().st_size == made.file_bytes
        assert 0.995 * plan.file_bytes <= made.file_bytes <= plan.file_bytes
        assert measured.added(chosen) <= measured.added(one)
    stock = {t.name: t.format.name for t in plan.tensors if t.name in chosen}
    assert measured.added(chosen) <= measured.added(stock)
    norms = [t for t in mixed(plan, chosen).tensors if t.name not in chosen]
    assert norms and all(t.format.name == "F32" for t in norms)


def test_a_mix_knows_what_the_target_runs_slowly(source: pipeline.Source, measured: Sensitivity) -> None:
    target = Target.load("rpi5")
    plan = planning.plan(source.blueprint, source.metadata, target, quant="Q2_K")
    free, bound = (set(mixing.mix(plan, measured, plan.file_bytes, t).values()) for t in (None, target))
    assert any(target.prefers(f) == "slow" for f in free)
    assert not any(target.prefers(f) == "slow" for f in bound)


def test_speed_takes_formats_that_are_quick(source: pipeline.Source, measured: Sensitivity) -> None:
    target = Target.load("rpi5")
    plan = planning.plan(source.blueprint, source.metadata, target, quant="Q5_K_M")
    by = {p: mixing.mix(plan, measured, plan.file_bytes, target, prefer=p) for p in mixing.PREFERENCES}
    load = {
        p: planning.workload(mixed(plan, m).tensors, plan.geometry, 256, "f16").weights_by_format for p, m in by.items()
    }
    factor = CLASSES[target.backend_named().speed_class].factor
    time = {p: sum(n / factor(f) for f, n in weights.items()) for p, weights in load.items()}
    assert time["speed"] < time["quality"]
    costs = [measured.added(by[p], cpu=True) for p in ("speed", "quality")]
    assert 1 <= costs[0] / costs[1] <= mixing.GIVEN
    with pytest.raises(UnknownName, match="preference"):
        mixing.mix(plan, measured, plan.file_bytes, target, prefer="beauty")


def test_too_small_a_budget_names_the_smallest(source: pipeline.Source, measured: Sensitivity) -> None:
    plan = planning.plan(source.blueprint, source.metadata, Target.load("rpi5"), quant="Q4_K_M")
    with pytest.raises(DoesNotFit, match="smallest possible file") as caught:
        mixing.mix(plan, measured, 10_000)
    smallest = int(str(caught.value.hint).split("at least ")[1].split()[0])
    made = mixed(plan, mixing.mix(plan, measured, smallest))
    assert made.file_bytes == smallest
    with pytest.raises(DoesNotFit):
        mixing.random_mix(plan, measured, smallest - 1)
