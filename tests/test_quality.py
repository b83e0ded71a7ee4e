"""Perplexity and divergence: against their definitions, and against what llama-perplexity prints for the same files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from edgekit import quality
from edgekit.errors import CorruptCheckpoint, EdgekitError, VerificationFailed
from edgekit.gguf_file import open_gguf
from edgekit.quality import Comparison
from edgekit.runtime.llama_cpp import LlamaSession, open_session
from tests.gguf_models import llama_gguf, noise_gguf, quantize

EXACT = {"threads": 1, "kv": "f32", "flash": "off"}
TOKENS = [int(i) for i in np.random.default_rng(3).integers(3, 265, 300)]

PRINTED = {
    "ppl_candidate": 4.486180, "ppl_candidate_stderr": 0.207532, "ppl_reference": 4.214633,
    "ppl_reference_stderr": 0.195628, "ln_ratio": 0.062439, "ln_ratio_stderr": 0.010120, "kl_mean": 0.072352,
    "kl_stderr": 0.003140, "kl_max": 2.134944, "kl_p999": 1.412825, "kl_p99": 0.544681, "kl_p90": 0.162867,
    "kl_median": 0.039617, "delta_p_mean": -0.02151, "delta_p_mean_stderr": 0.00228, "delta_p_rms": 0.09118,
    "delta_p_rms_stderr": 0.00422, "top1": 0.87302, "top1_stderr": 0.00857,
}  # fmt: skip
TAIL = ("kl_max", "kl_p999", "kl_p99")


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_gguf(tmp_path_factory.mktemp("quality") / "noise.gguf", spread=1.0)


@pytest.fixture(scope="module")
def other(noise: Path) -> Path:
    return quantize(noise, noise.with_name("q4_0.gguf"), 2)


@pytest.fixture
def session(noise: Path) -> Iterator[LlamaSession]:
    with open_session(noise, n_ctx=128, **EXACT) as opened:  # type: ignore[arg-type]
        yield opened


@pytest.fixture
def candidate(other: Path) -> Iterator[LlamaSession]:
    with open_session(other, n_ctx=128, **EXACT, outputs=9, n_batch=50) as opened:  # type: ignore[arg-type]
        yield opened


def scored(session: LlamaSession, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition, straight: (log-probabilities float64 (n, n_vocab), the tokens that came) of whole chunks."""
    logs, answers = [], []
    for start in range(0, len(TOKENS) - n_ctx + 1, n_ctx):
        chunk = TOKENS[start : start + n_ctx]
        rows = session.logits([1, *chunk[1:]]).astype(np.float64)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        for i in range(n_ctx // 2, n_ctx - 1):
            logs.append(rows[i])
            answers.append(chunk[i + 1])
    return np.array(logs), np.array(answers)


@pytest.mark.parametrize("n_ctx", [128, 100, 33])
def test_perplexity_is_its_definition(session: LlamaSession, n_ctx: int) -> None:
    logs, answers = scored(session, n_ctx)
    nll = -logs[np.arange(len(logs)), answers]
    calls: list[tuple[str, int, int]] = []
    found = quality.perplexity(session, TOKENS, n_ctx, progress=lambda *call: calls.append(call))
    chunks = 300 // n_ctx
    assert (found.tokens, found.chunks, found.n_ctx) == (len(nll), chunks, n_ctx)
    assert len(nll) == chunks * (n_ctx - 1 - n_ctx // 2)
    assert found.value == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert found.stderr == pytest.approx(found.value * nll.std(ddof=1) / math.sqrt(len(nll)), rel=1e-3)
    assert calls == [("perplexity", i + 1, chunks) for i in range(chunks)]


def test_comparison_is_its_definition(session: LlamaSession, candidate: LlamaSession) -> None:
    left, answers = scored(session, 100)
    right, _ = scored(candidate, 100)
    kl = (np.exp(left) * (left - right)).sum(axis=1)
    row = np.arange(len(answers))
    delta = np.exp(right[row, answers]) - np.exp(left[row, answers])
    ratio = left[row, answers] - right[row, answers]
    same = left.argmax(axis=1) == right.argmax(axis=1)
    found = quality.compare(session, candidate, TOKENS, 100)
    n = len(kl)
    expected = {
        "ln_ratio": ratio.mean(), "ln_ratio_stderr": ratio.std(ddof=1) / n**0.5, "kl_mean": kl.mean(),
        "kl_stderr": kl.std(ddof=1) / n**0.5, "kl_median": np.median(kl), "kl_max": kl.max(),
        "kl_p99": np.percentile(kl, 99), "delta_p_mean": delta.mean(), "delta_p_rms": (delta**2).mean() ** 0.5,
        "delta_p_mean_stderr": delta.std(ddof=1) / n**0.5, "top1": same.mean(),
        "top1_stderr": (same.mean() * (1 - same.mean()) / (n - 1)) ** 0.5,
    }  # fmt: skip
    assert 0 < expected["top1"] < 1 and expected["kl_mean"] > 1e-3
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-3, abs=1e-6), name
    assert found.ppl_reference == pytest.approx(quality.perplexity(session, TOKENS, 100).value)
    assert found.ppl_candidate == pytest.approx(quality.perplexity(candidate, TOKENS, 100).value)


def test_a_model_equals_itself(noise: Path, session: LlamaSession) -> None:
    with open_session(noise, n_ctx=128, **EXACT, outputs=5) as twin:  # type: ignore[arg-type]
        found = quality.compare(session, twin, TOKENS, 128, chunks=1)
    assert (found.top1, found.chunks, found.tokens) == (1.0, 1, 63)
    assert abs(found.kl_max) < 1e-5 and abs(found.ln_ratio) < 1e-5


def test_recorded_predictions_stand_in_for_the_model(
    tmp_path: Path, session: LlamaSession, candidate: LlamaSession
) -> None:
    stored = quality.record(session, TOKENS, 100, tmp_path / "reference.bin")
    assert stored == quality.open_stored(tmp_path / "reference.bin")
    assert (stored.chunks, stored.n_ctx, list(stored.tokens)) == (3, 100, TOKENS)
    assert [p.name for p in tmp_path.iterdir()] == ["reference.bin"]
    direct = quality.compare(session, candidate, TOKENS, 100)
    from_disk = quality.compare(stored, candidate, TOKENS, 100)
    assert from_disk == quality.compare(stored, candidate)
    for f in fields(Comparison):
        assert getattr(from_disk, f.name) == pytest.approx(getattr(direct, f.name), rel=0.01, abs=1e-5), f.name
    with pytest.raises(EdgekitError, match="another text"):
        quality.compare(stored, candidate, TOKENS[1:], 100)
    with pytest.raises(EdgekitError, match="another text"):
        quality.compare(stored, candidate, TOKENS, 128)


def test_damaged_recordings(tmp_path: Path, session: LlamaSession, candidate: LlamaSession) -> None:
    path = tmp_path / "reference.bin"
    quality.record(session, TOKENS, 100, path)
    data = path.read_bytes()
    theirs = data[: -8 - 8 * 3 * 49]  # as llama-perplexity writes it: without the exact losses
    path.write_bytes(theirs)
    assert quality.open_stored(path).nll is None
    assert quality.compare(quality.open_stored(path), candidate).kl_mean > 0
    for bad, message in (
        (theirs[:-1], "cut short"),
        (b"_logits_", "holds no stored"),
        (b"GGUF" * 20, "holds no stored"),
        (data[:8] + b"\xff" * 4 + data[12:], "holds no stored"),
        (data[:20] + b"\x09\x01\0\0" + data[24:], "tokens outside"),
    ):
        path.write_bytes(bad)
        with pytest.raises(CorruptCheckpoint, match=message):
            quality.open_stored(path)
    with pytest.raises(CorruptCheckpoint, match="cannot read"):
        quality.open_stored(tmp_path / "none")
    with pytest.raises(EdgekitError, match="cannot write"):
        quality.record(session, TOKENS, 100, tmp_path)


def test_too_little_text(session: LlamaSession, candidate: LlamaSession) -> None:
    with pytest.raises(EdgekitError, match="has 50 tokens; at least 128 are needed") as e:
        quality.perplexity(session, TOKENS[:50], 128)
    assert e.value.hint
    short = quality.perplexity(session, TOKENS[:50], 128, shorten=True)
    assert (short.n_ctx, short.chunks, short.tokens) == (50, 1, 24)
    assert quality.compare(session, candidate, TOKENS[:50], 128, shorten=True).tokens == 24
    with pytest.raises(EdgekitError, match="too short to score"):
        quality.perplexity(session, TOKENS[:15], 128, shorten=True)
    with pytest.raises(EdgekitError, match="do not fit in a context of 128"):
        quality.perplexity(session, TOKENS, 200)
    with pytest.raises(EdgekitError, match="no text"):
        quality.compare(session, candidate)


def test_different_vocabularies(tmp_path: Path, session: LlamaSession) -> None:
    with (
        open_session(noise_gguf(tmp_path / "more.gguf", extra_vocab=3), n_ctx=128, threads=1) as more,
        pytest.raises(EdgekitError, match="265 tokens in the reference, 268 in the other"),
    ):
        quality.compare(session, more, TOKENS, 128)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_no_number(tmp_path: Path, session: LlamaSession, value: float) -> None:
    path = noise_gguf(tmp_path / "broken.gguf")
    at = open_gguf(path).tensors["output.weight"].offset + 77 * 64 * 4
    with path.open("r+b") as file:
        file.seek(at)
        file.write(np.float32(value).tobytes())
    with open_session(path, n_ctx=128, threads=1) as broken:
        with pytest.raises(VerificationFailed, match=r"logit of token 77 is -?(nan|inf) at position 64 of chunk 0"):
            quality.perplexity(broken, TOKENS, 128)
        with pytest.raises(VerificationFailed, match="token 77"):
            quality.compare(session, broken, TOKENS, 128)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Path:
    return llama_gguf(test_data / "models" / "stories260K", tmp_path_factory.mktemp("stories") / "stories.gguf")


def text_of(session: LlamaSession, test_data: Path) -> list[int]:
    data = (test_data / "text" / "tinystories" / "tiny_stories_944k.txt").read_bytes()[:120_000]
    return session.tokenize(data.decode("utf-8", "ignore"), add_special=True)


def test_the_figures_of_llama_perplexity(stories: Path, test_data: Path) -> None:
    """`llama-perplexity -c 128 -b 128 --chunks 24` for F32, and `--kl-divergence` for its Q4_0 (the largest few of
    1,512 divergences depend on how a machine's kernels round)."""
    q4_0 = quantize(stories, stories.with_name("q4_0.gguf"), 2)
    with open_session(stories, n_ctx=128, threads=1) as full, open_session(q4_0, n_ctx=128, threads=1) as small:
        found = quality.compare(full, small, text_of(full, test_data), 128, chunks=24)
    for name, value in PRINTED.items():
        assert getattr(found, name) == pytest.approx(value, rel=0.03 if name in TAIL else 0.01), name


@pytest.mark.slow
def test_the_known_perplexity(stories: Path, test_data: Path) -> None:
    with open_session(stories, n_ctx=256, threads=1) as session:
        found = quality.perplexity(session, text_of(session, test_data), 256)
    assert (found.value, found.stderr) == (pytest.approx(5.8546, abs=1e-4), pytest.approx(0.08799, abs=1e-5))
