"""Error feedback on ggml's grids: bytes, promises and errors, with an independent computation beside each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.gguf_file import open_gguf
from edgekit.quant import ggml, gptq
from edgekit.quant._blocks import LAYOUTS
from edgekit.runtime.activations import collect
from edgekit.runtime.llama_cpp import open_session
from tests.gguf_models import llama_gguf

NAMES = sorted(gptq.FORMATS)
EXPECTED = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}


def problem(rows: int = 40, cols: int = 512, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights with a few outliers, and the second moment of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols), np.float32) * np.exp(0.5 * rng.standard_normal((rows, cols), np.float32))
    mixing = rng.standard_normal((cols // 2, cols), np.float32)
    x = rng.standard_normal((1500, cols // 2), np.float32) @ mixing + rng.standard_normal((1500, cols), np.float32)
    x *= np.exp(rng.standard_normal(cols)).astype(np.float32)
    return w, x.T @ x


def true_error(w: np.ndarray, data: np.ndarray, fmt: str, moment: np.ndarray, damp: float = 0.02) -> np.ndarray:
    """E·H·Eᵀ of each row in double precision, H damped by its definition."""
    error = (w - ggml.decode(data, fmt, w.shape[1])).astype(np.float64)
    h = moment.astype(np.float64) + damp * np.diag(moment).mean() * np.eye(len(moment))
    return np.einsum("ri,ij,rj->r", error, h, error)


def test_formats() -> None:
    assert gptq.FORMATS == EXPECTED


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_taken_apart_and_put_together(name: str) -> None:
    layout, (w, moment) = LAYOUTS[name], problem(rows=24)
    data = ggml.encode(w, name, np.diag(moment).astype(np.float32))
    blocks = layout.unpack(data)
    np.testing.assert_array_equal(layout.pack(blocks), data)
    np.testing.assert_allclose(layout.decode(blocks), ggml.decode(data, name, 512), rtol=1e-6, atol=1e-6)
    noise = np.random.default_rng(5).integers(0, 256, data.shape, np.uint8)  # every bit is somewhere
    np.testing.assert_array_equal(layout.pack(layout.unpack(noise)), noise)


@pytest.mark.parametrize("name", NAMES)
def test_error_is_as_claimed_and_far_below_plain(name: str) -> None:
    w, moment = problem()
    found = gptq.encode(w, name, moment)
    plain = ggml.encode(w, name, np.diag(moment).astype(np.float32))
    assert found.data.shape == plain.shape
    assert found.data.dtype == np.uint8
    np.testing.assert_allclose(found.error, true_error(w, found.data, name, moment), rtol=0.01)
    np.testing.assert_allclose(found.plain_error, true_error(w, plain, name, moment), rtol=0.01)
    assert (found.error <= found.plain_error).all()
    assert found.error.sum() < 0.5 * found.plain_error.sum()


def textbook(w: np.ndarray, moment: np.ndarray, step: np.ndarray, damp: float) -> np.ndarray:
    """GPTQ as its paper has it, on Q4_0's levels with given steps (rows, cols): the integers."""
    h = moment.astype(np.float64) + damp * np.diag(moment).mean() * np.eye(len(moment))
    factor = np.linalg.cholesky(np.linalg.inv(h)).T
    left, out = w.astype(np.float64).copy(), np.empty(w.shape, np.int64)
    for k in range(w.shape[1]):
        out[:, k] = np.clip(np.rint(left[:, k] / step[:, k]), -8, 7)
        error = (left[:, k] - out[:, k] * step[:, k]) / factor[k, k]
        left[:, k:] -= error[:, None] * factor[k, k:]
    return out


def test_without_descent_it_is_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_PASSES", 0)
    w, moment = problem(rows=30, cols=320)
    blocks = LAYOUTS["Q4_0"].unpack(gptq.encode(w, "Q4_0", moment).data)
    step = np.repeat(blocks.d.astype(np.float64), 32, axis=1)
    ours = blocks.q.reshape(30, 320).astype(np.int64) - 8
    # a tie rounded the other way changes what follows in its row, so a few may differ
    assert (ours == textbook(w, moment, step, 0.02)).mean() > 0.995


def test_descent_lowers_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    w, moment = problem()
    for name in ("Q4_0", "Q4_1", "Q2_K", "Q6_K", "IQ4_XS"):
        with monkeypatch.context() as patch:
            patch.setattr(gptq, "_PASSES", 0)
            before = gptq.encode(w, name, moment).error.sum()
        assert gptq.encode(w, name, moment).error.sum() < 0.97 * before, name


def test_hardly_any_weight_is_better_on_a_neighbouring_level() -> None:
    w, moment = problem()
    data = gptq.encode(w, "Q4_0", moment).data
    blocks = LAYOUTS["Q4_0"].unpack(data)
    step = np.repeat(blocks.d.astype(np.float64), 32, axis=1)
    h = moment / np.diag(moment).mean() + 0.02 * np.eye(512)
    error = w - ggml.decode(data, "Q4_0", 512)
    levels = blocks.q.reshape(w.shape).astype(int)
    better = np.zeros(w.shape, bool)
    for move in (-1, 1):
        change = -move * step
        gains = 2 * change * (error @ h) + change**2 * np.diag(h) < 0
        better |= gains & (levels + move >= 0) & (levels + move <= 15)
    assert better.mean() < 0.05  # 0.19 without descent


def test_a_search_that_loses_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    w, moment = problem(rows=8)
    good = gptq._sweep

    def spoil(weights: np.ndarray, *rest: object) -> object:
        columns = good(weights, *rest)  # type: ignore[arg-type]
        columns.q[:, :4] = 0
        return columns

    monkeypatch.setattr(gptq, "_PASSES", 0)
    monkeypatch.setattr(gptq, "_sweep", spoil)
    found = gptq.encode(w, "Q4_0", moment)
    plain = ggml.encode(w, "Q4_0", np.diag(moment).astype(np.float32))
    np.testing.assert_array_equal(found.data[:4], plain[:4])
    np.testing.assert_array_equal(found.error[:4], found.plain_error[:4])
    assert (found.error[4:] < found.plain_error[4:]).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q3_K"])
def test_bytes_depend_on_nothing_but_the_input(name: str) -> None:
    w, moment = problem(rows=600, cols=256)
    once = gptq.encode(w, name, moment, threads=1).data
    np.testing.assert_array_equal(gptq.encode(w, name, moment, threads=3).data, once)
    np.testing.assert_array_equal(gptq.encode(w, name, gptq.prepare(moment)).data, once)
    np.testing.assert_array_equal(gptq.encode(w, name, moment * np.float32(1024)).data, once)
    np.testing.assert_array_equal(gptq.encode(w, name, moment.astype(np.float64)).data, once)


def test_bytes_do_not_depend_on_the_threads_of_blas(tmp_path: Path) -> None:
    np.savez(tmp_path / "problem.npz", *problem(520, 512))  # a moment may: it is a product of matrices itself
    code = (
        f"import hashlib; from tests.test_gptq import *; w, m = np.load({str(tmp_path / 'problem.npz')!r}).values();"
        "print(hashlib.sha256(gptq.encode(w, 'Q4_K', m, threads=2).data).hexdigest())"
    )
    said = set()
    for threads in ("1", "2"):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        run = [sys.executable, "-c", code]
        root = Path(__file__).parents[1]
        said.add(subprocess.run(run, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(said) == 1


@pytest.mark.parametrize("name", ["Q4_0", "Q5_K", "IQ4_NL"])
def test_columns_that_saw_nothing_are_rounded_plainly(name: str) -> None:
    w, moment = problem()
    dead = np.zeros(512, bool)
    dead[[0, 33, 34, 200, 511]] = dead[256:288] = True
    moment[dead] = moment[:, dead] = 0
    found = gptq.encode(w, name, moment)
    assert (found.error <= found.plain_error).all()
    blocks = LAYOUTS[name].unpack(found.data)
    values, layout = ggml.decode(found.data, name, 512), LAYOUTS[name]
    step = np.repeat(blocks.d.astype(np.float32)[..., None] * blocks.scale, layout.group).reshape(40, 512)
    inside = np.abs(w - values) <= np.abs(step) * (0.501 if name != "IQ4_NL" else 12.1)
    assert inside[:, dead].mean() > 0.97  # the others lie beyond the ends of their grid
    assert inside[:, ~dead].mean() < 0.97


def test_a_moment_of_nothing_gives_rows_no_worse_than_plain() -> None:
    w, moment = problem(rows=16)
    found = gptq.encode(w, "Q4_K", np.zeros_like(moment), importance=np.ones(512, np.float32))
    error = ((w - ggml.decode(found.data, "Q4_K", 512)) ** 2).sum(axis=1)
    plain = ((w - ggml.decode(ggml.encode(w, "Q4_K", np.ones(512, np.float32)), "Q4_K", 512)) ** 2).sum(axis=1)
    assert (error <= plain * (1 + 1e-5)).all()


def test_zero_and_tiny_rows() -> None:
    w, moment = problem(rows=4)
    w[0], w[1] = 0, w[1] * 1e-7
    w[2, :256] = 0
    for name in NAMES:
        found = gptq.encode(w, name, moment)
        assert not ggml.decode(found.data, name, 512)[0].any(), name
        assert np.isfinite(found.error).all(), name
        assert (found.error <= found.plain_error).all(), name


def test_few_tokens_make_a_moment_of_low_rank() -> None:
    w, _ = problem()
    x = np.random.default_rng(2).standard_normal((5, 512), np.float32)
    found = gptq.encode(w, "Q4_0", x.T @ x)
    assert found.error.sum() < found.plain_error.sum()


def test_other_formats_are_left_to_ggml() -> None:
    w, moment = problem(rows=8)
    importance = np.diag(moment).astype(np.float32)
    for name in ("IQ3_S", "F16", "TQ2_0"):
        found = gptq.encode(w, name, moment, importance=importance)
        np.testing.assert_array_equal(found.data, ggml.encode(w, name, importance))
        np.testing.assert_array_equal(found.error, found.plain_error)


def test_bad_input_is_named() -> None:
    w, moment = problem(rows=4)
    with pytest.raises(EdgekitError, match="second moment of 512 columns"):
        gptq.encode(w[:, :256], "Q4_0", moment)
    broken = moment.copy()
    broken[3, 4] = np.nan
    with pytest.raises(EdgekitError, match="finite"):
        gptq.encode(w, "Q4_0", broken)
    with pytest.raises(EdgekitError, match="square"):
        gptq.encode(w, "Q4_0", moment[:100])
    indefinite = moment.copy()
    indefinite[0, 1] = indefinite[1, 0] = 1e9
    with pytest.raises(EdgekitError, match="not positive definite"):
        gptq.encode(w, "Q4_0", indefinite)
    w[2, 9] = np.inf
    with pytest.raises(EdgekitError, match="row 2, column 9"):
        gptq.encode(w, "Q4_0", moment)
    with pytest.raises(EdgekitError, match="blocks of 256"):
        gptq.encode(w[:, :32], "Q4_K", moment[:32, :32])


def mean_kl(path: Path, chunks: list[list[int]], against: list[np.ndarray]) -> float:
    with open_session(path, n_ctx=512, threads=1) as session:
        found = [log_softmax(session.logits(chunk)) for chunk in chunks]
    return float(np.mean([(np.exp(p) * (p - q)).sum(axis=1).mean() for p, q in zip(against, found, strict=True)]))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.slow
def test_a_trained_model_loses_far_less(test_data: Path, tmp_path: Path) -> None:
    """All matrices of lab-7m in Q4_0: KL on text it was not calibrated on, feedback against importance alone."""
    source = llama_gguf(test_data / "models" / "lab-7m", tmp_path / "lab.gguf")
    calibration = (test_data / "text" / "calibration" / "groups_merged.txt").read_text()
    held_out = (test_data / "text" / "wikitext-2-raw" / "wiki.test.raw").read_text()[:40_000]
    matrices = {n: t for n, t in open_gguf(source).tensors.items() if len(t.shape) == 2 and n != "token_embd.weight"}
    with open_session(source, n_ctx=512, threads=1) as session:
        ids = session.tokenize(calibration, add_special=False)[: 512 * 24]
        found = collect(session, [ids[i : i + 512] for i in range(0, len(ids), 512)], moments=[*matrices], threads=1)
        ids = session.tokenize(held_out, add_special=False)[: 512 * 3]
        chunks = [ids[i : i + 512] for i in range(0, len(ids), 512)]
        against = [log_softmax(session.logits(chunk)) for chunk in chunks]
    losses = []
    for feedback in (False, True):
        path = tmp_path / "candidate.gguf"
        path.write_bytes(source.read_bytes())
        with path.open("r+b") as file:
            for name, info in matrices.items():
                stored = np.fromfile(source, np.float32, info.nbytes // 4, offset=info.offset).reshape(info.shape)
                moment = found.second_moment[name]
                data = (
                    gptq.encode(stored, "Q4_0", moment).data
                    if feedback
                    else ggml.encode(stored, "Q4_0", found.importance(name))
                )
                file.seek(info.offset)
                file.write(ggml.decode(data, "Q4_0", info.shape[1]).tobytes())
        losses.append(mean_kl(path, chunks, against))
    assert losses[1] < 0.6 * losses[0], losses
