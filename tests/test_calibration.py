"""Calibration text, what is learned from it, and the gate that decides by text held out from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgekit import calibration, corpus, effort, pipeline, tuning
from edgekit.errors import EdgekitError
from edgekit.gguf_file import open_gguf
from edgekit.imatrix_file import open_imatrix
from edgekit.pipeline import Options
from edgekit.runtime import parallel
from edgekit.runtime.llama_cpp import LlamaSession, Sampling, open_session
from edgekit.verification import chat_template
from tests import pico


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.llama(tmp_path_factory.mktemp("calibration") / "pico", hidden=256, layers=2, dtype="F32")


@pytest.fixture(scope="module")
def made(model: Path) -> pipeline.Conversion:
    done = pipeline.convert(str(model), "rpi5", Options(out=model.parent / "f32", quant="F32", verify="none"))
    assert isinstance(done, pipeline.Conversion)
    return done


@pytest.fixture
def session(made: pipeline.Conversion):  # type: ignore[no-untyped-def]
    assert made.artifact is not None
    with open_session(made.artifact.model, n_ctx=256, threads=1) as opened:
        yield opened


def test_plain_text_is_cut_into_chunks_up_to_the_limit(session: LlamaSession, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(corpus.TEXT)
    found = calibration.read_text(tmp_path / "t.txt", session, None, limit=1024)
    assert [len(c) for c in found.chunks] == [256] * 4, "no longer than the context"
    ids = session.tokenize(corpus.TEXT, add_special=True)
    assert [i for c in found.chunks for i in c] == ids[:1024]


def test_chats_are_rendered_with_the_models_template(
    session: LlamaSession, made: pipeline.Conversion, tmp_path: Path
) -> None:
    turn = {"messages": [{"role": "user", "content": "Why? " * 80}, {"role": "assistant", "content": "Because. " * 80}]}
    other = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "You."}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(turn) + "\n\n" + json.dumps(other) + "\n")
    template = chat_template(made.source.checkpoint, made.source.vocabulary)
    found = calibration.read_text(tmp_path / "c.jsonl", session, template)
    text = session.detokenize([i for c in found.chunks for i in c], special=True)
    assert text.count("<|im_start|>assistant") == 2


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("t.txt", b"short", "at least 256"),
        ("t.txt", b"caf\xe9 " * 900, "not UTF-8"),
        ("t.jsonl", b'{"text": "' + b"word " * 900 + b'"}\n{"text": 3}\n', "line 2"),
        ("t.jsonl", b'{"text": "x"\n', "line 1 is not JSON"),
        ("t.jsonl", b'{"messages": [{"role": "user"}]}\n', "line 1"),
    ],
)
def test_bad_text_is_named(session: LlamaSession, tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(EdgekitError, match=says):
        calibration.read_text(tmp_path / name, session, None)


def test_the_model_writes_the_same_text_from_the_same_seed(session: LlamaSession, made: pipeline.Conversion) -> None:
    template = chat_template(made.source.checkpoint, made.source.vocabulary)
    first = calibration.write_text(session, template, 300, seed=1)
    again = calibration.write_text(session, template, 300, seed=1)
    other = calibration.write_text(session, template, 300, seed=2)
    assert first == again
    assert first.digest != other.digest
    assert 250 < first.tokens < 350, "about; what was begun last is cut off"


def test_texts_written_side_by_side_are_those_written_alone(session: LlamaSession) -> None:
    """Each sequence sees itself only, whatever its neighbours hold and whoever wrote in its place before."""
    openings = [
        session.tokenize(corpus.TEXT[at : at + 20 + 7 * (at // 100)], add_special=True) for at in range(0, 900, 100)
    ]
    greedy = Sampling(0.0, 0, 1.0, 0.0, 1.0, 0)
    found = parallel.write(session, lambda n: openings[n % 9], 4 * 64 + 90, greedy, length=64)
    assert len(found) > 5, "five at once, and others in their place"
    for number, text in enumerate(found):
        opening = openings[number % 9]
        alone = list(session.generate(opening, 64 - len(opening)))
        at = next((i for i, (a, b) in enumerate(zip(text, opening + alone, strict=False)) if a != b), None)
        if at is not None:  # another batch rounds differently: only what is as likely may differ
            rows = session.logits(text[:at])[-1]
            assert at > len(opening)
            assert abs(rows[text[at]] - rows[(opening + alone)[at]]) < 0.02
        assert len(text) > len(opening)


def test_a_text_does_not_depend_on_threads(made: pipeline.Conversion) -> None:
    assert made.artifact is not None
    texts = []
    for threads in (1, 2):
        with open_session(made.artifact.model, n_ctx=128, threads=threads) as opened:
            texts.append(calibration.write_text(opened, None, 600, seed=4))
    assert texts[0] == texts[1]
    assert len(texts[0].chunks) > 3


def test_importance_is_kept_by_content(session: LlamaSession, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(corpus.TEXT)
    text = calibration.read_text(tmp_path / "t.txt", session, None, limit=512)
    calls: list[str] = []
    first = calibration.calibrate(session, text, digest="a" * 64, progress=lambda task, *_: calls.append(task))
    assert "calibrate" in calls
    calls.clear()
    again = calibration.calibrate(session, text, digest="a" * 64, progress=lambda task, *_: calls.append(task))
    assert not calls, "the second time nothing is read"
    for name, values in first.imatrix.importance().items():
        np.testing.assert_array_equal(values, again.imatrix.importance()[name])


def test_experts_that_saw_too_little_are_reported() -> None:
    from edgekit.imatrix_file import Imatrix

    sums = {"blk.0.ffn_up_exps.weight": np.ones((4, 8), np.float32), "blk.0.attn_q.weight": np.ones((1, 8), np.float32)}
    counts = {"blk.0.ffn_up_exps.weight": np.array([500, 3, 0, 90], np.float32), "blk.0.attn_q.weight": np.array([9.0])}
    found = calibration.coverage(Imatrix(sums, counts))
    assert found[0].startswith("blk.0.ffn_up_exps.weight: 2 of 4 experts")
    assert "blk.0.attn_q.weight saw 9 tokens" in found[1]


def test_the_bootstrap_tells_a_difference_from_noise() -> None:
    rng = np.random.default_rng(0)
    stock = rng.exponential(0.01, 8000)
    assert tuning.chance_no_better(stock * 0.9, stock) < 0.01
    noise = rng.permutation(stock)
    assert 0.05 < tuning.chance_no_better(noise, stock) < 0.95
    assert tuning.chance_no_better(stock * 1.1, stock) > 0.99


def test_an_importance_matrix_of_the_users_is_taken_and_checked(
    model: Path, made: pipeline.Conversion, session: LlamaSession, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(corpus.TEXT)
    text = calibration.read_text(tmp_path / "t.txt", session, None, limit=1024)
    calibration.calibrate(session, text, digest="b" * 64)
    (kept,) = (tmp_path / "cache" / "importance").glob("*/*.gguf")
    imatrix = tmp_path / "imatrix.gguf"
    imatrix.write_bytes(kept.read_bytes())
    options = Options(out=tmp_path / "with", quant="IQ2_XS", calibration=str(imatrix), verify="none")
    done = pipeline.convert(str(model), "rpi5", options)
    assert done.artifact is not None
    assert "IQ2_XS" in {t.type for t in open_gguf(done.artifact.model).tensors.values()}
    assert "blk.0.attn_q.weight" in open_imatrix(imatrix).sums
    other = pico.llama(tmp_path / "other", hidden=512, layers=2, dtype="F32")
    with pytest.raises(EdgekitError, match=r"256 columns, this model.s has 512"):
        pipeline.convert(str(other), "rpi5", Options(out=tmp_path / "no", quant="Q4_K_M", calibration=str(imatrix)))


@pytest.mark.slow
def test_the_gate_ships_nothing_worse_than_the_preset(tmp_path: Path) -> None:
    """The demo model and Python's own sources: feedback and the mix must beat the stock preset at its bytes."""
    sources = sorted(Path(json.__file__).parent.parent.glob("[a-d]*.py"))
    (tmp_path / "text.txt").write_text("\n".join(p.read_text(encoding="utf-8") for p in sources)[:60_000])
    options = Options(out=tmp_path / "out", quant="Q4_0", calibration=str(tmp_path / "text.txt"), effort="low")
    done = pipeline.convert("demo", "rpi5", options)
    assert done.outcome is not None
    kl = {c.kind: c for c in done.outcome.candidates}
    shipped = next(c for c in done.outcome.candidates if c.shipped)
    assert shipped.kl <= kl["preset"].kl
    assert kl["feedback"].kl < 0.8 * kl["preset"].kl
    assert shipped.kl < kl["random"].kl
    assert all(c.nbytes <= kl["preset"].nbytes for c in done.outcome.candidates)
    assert done.artifact is not None
    manifest = json.loads((tmp_path / "out" / "edgekit.json").read_text())
    assert {c["kind"] for c in manifest["candidates"]} == {"preset", "feedback", "mix", "random"}
    assert done.artifact.model.stat().st_size == shipped.nbytes
    assert sorted(p.name for p in (tmp_path / "out").iterdir())[0] == "Modelfile", "no work files are left"


@pytest.mark.slow
def test_high_effort_tries_folded_scales_and_short_contexts_are_read_in_short_texts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model trained for 256 tokens, probed with the encoder of the final file; the folded candidate is as valid."""
    monkeypatch.setattr(effort, "EFFORTS", {"high": effort.Effort(1024, 1024, 2, 4, 0)})
    (tmp_path / "t.txt").write_text(corpus.TEXT)
    options = Options(out=tmp_path / "out", quant="Q4_0", calibration=str(tmp_path / "t.txt"), effort="high")
    done = pipeline.convert(str(model), "rpi5", options)
    assert done.outcome is not None
    kl = {c.kind: c.kl for c in done.outcome.candidates}
    assert set(kl) == {"preset", "feedback", "mix", "folded", "random"}
    assert kl["folded"] < kl["preset"], "folding changes no output, so its KL is that of rounding alone"


def test_what_is_not_asked_for_depends_on_the_time_but_a_size_does_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only with importance may a plan take the smallest presets: that shows whether there will be any."""
    monkeypatch.setattr(effort, "worth_it", lambda *_: "it would take about a day here: --calibration self does it")
    slow = pipeline.convert(str(model), "rpi5", Options(out=tmp_path / "a", quant="Q4_K_M"), dry_run=True)
    assert any("about a day" in note for note in slow.warnings)
    plain = pipeline.plan(str(model), "rpi5", Options(quant="Q2_K"))
    small = Options(out=tmp_path / "b", target_size=plain.file_bytes - 1)
    sized = pipeline.convert(str(model), "rpi5", small, dry_run=True)
    assert isinstance(sized, pipeline.Conversion)
    assert sized.plan.preset.needs_importance
    assert not any("about a day" in note for note in sized.warnings)
