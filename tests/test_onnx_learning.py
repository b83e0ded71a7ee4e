"""Calibrating ONNX decoders: texts written side by side, what was learned is kept, what runs unasked, what is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import effort, onnx_effort, onnx_planning, onnx_tuning, pipeline, report
from edgekit.effort import Effort, Speed
from edgekit.errors import DoesNotFit, EdgekitError
from edgekit.export.onnx import _decoder
from edgekit.pipeline import OnnxConversion, Options
from edgekit.runtime import _ort_batch, lockstep
from edgekit.runtime._sampling import Sampling
from edgekit.runtime.onnxruntime import DecoderSession, open_decoder
from edgekit.target import Target
from tests import pico

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxruntime_genai", "torch")),
    reason="onnx, onnxruntime-genai or torch is not installed",
)

SMALL = {"normal": Effort(512, 512, 2, 5, 6), "low": Effort(512, 256, 2, 4, 0)}
LENGTH = 48


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(effort, "EFFORTS", SMALL)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.llama(tmp_path_factory.mktemp("models") / "pico-llama", hidden=256, layers=2)


@pytest.fixture(scope="module")
def float32(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _decoder.build(model, tmp_path_factory.mktemp("float32")).parent


@pytest.fixture
def session(float32: Path) -> Iterator[DecoderSession]:
    with open_decoder(float32, n_ctx=64, threads=1) as opened:
        yield opened


# --- texts side by side ----------------------------------------------------------------------------------------------


def begins(number: int) -> list[int]:
    """Openings of 1 to 9 tokens."""
    return [3 + (number * 37 + i * 11) % 500 for i in range(1 + number * 4 % 9)]


GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)
DRAWN = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.02, seed=5)


@pytest.mark.parametrize("how", [GREEDY, DRAWN])
def test_texts_are_those_that_are_written_one_at_a_time(session: DecoderSession, how: Sampling) -> None:
    """By onnxruntime-genai, which decodes one sequence with a cache of its own."""
    texts = lockstep.write(session, begins, 10 * LENGTH, how, length=LENGTH)
    assert len(texts) >= 10 and max(map(len, texts)) == LENGTH
    for number, text in enumerate(texts):
        given = begins(number)
        alone = session.generate(
            given, LENGTH - len(given), temperature=how.temperature, top_k=how.top_k, top_p=how.top_p,
            min_p=how.min_p, seed=how.seed + number,
        )  # fmt: skip
        wanted = (*given, *alone)
        assert text == wanted[: len(text)]
        assert len(text) == len(wanted) or text == texts[-1] or sum(map(len, texts)) >= 10 * LENGTH


def test_texts_are_what_transformers_likes_best(session: DecoderSession, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    texts = lockstep.write(session, begins, 4 * LENGTH, GREEDY, length=LENGTH)
    for number, text in enumerate(texts):
        with torch.no_grad():
            choices = source(torch.tensor([text])).logits[0].argmax(-1).tolist()
        begun = len(begins(number))
        assert list(text[begun:]) == choices[begun - 1 : -1]


def test_ended_texts_make_room(session: DecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the vocabulary ends a text: rows go at different times, and those left do not notice."""
    monkeypatch.setattr(type(session.vocabulary), "is_end", lambda _, token: token % 8 == 3)
    texts = lockstep.write(session, begins, 12 * LENGTH, DRAWN, length=LENGTH)
    assert len({len(t) for t in texts}) > 4
    alone = []
    for number in range(2 * len(texts)):
        given = begins(number)
        room = LENGTH - len(given)
        found = list(session.generate(given, room, temperature=1.0, top_k=0, top_p=1.0, min_p=0.02, seed=5 + number))
        alone += [(*given, *found)] if found else []  # an opening alone is no text
    assert all(text == whole[: len(text)] for text, whole in zip(texts, alone, strict=False))
    assert texts[:8] == alone[:8]


def test_texts_do_not_depend_on_how_many_fit(session: DecoderSession, monkeypatch: pytest.MonkeyPatch) -> None:
    many = lockstep.write(session, begins, 6 * LENGTH, DRAWN, length=LENGTH)
    with session.side_by_side(LENGTH) as batch:
        batch.begin(3)
        a_text = batch.nbytes // 3
    assert a_text == 2 * 4 * 2 * 4 * 32 * LENGTH, "keys and values, float32, layers, heads, width, tokens"
    monkeypatch.setattr(_ort_batch, "BUDGET", 2 * a_text + 1)
    with session.side_by_side(LENGTH) as batch:
        assert batch.most == 2
    few = lockstep.write(session, begins, 6 * LENGTH, DRAWN, length=LENGTH)
    assert few[:4] == many[:4]


def test_caches_that_grow_hold_the_same(session: DecoderSession, float32: Path) -> None:
    """As optimum's graphs have them, whose attention joins past and present."""
    steps = np.random.default_rng(0).integers(3, 500, (12, 4)).astype(np.int32)
    found = []
    for in_place in (True, False):
        batch = _ort_batch.Batch(
            float32 / "model.onnx", session.n_vocab, session._settings, 16, 32, in_place=in_place
        )  # fmt: skip
        batch.begin(4)
        rows = [batch.step(tokens) for tokens in steps[:6]]
        batch.drop(1)
        rows += [batch.step(tokens[:3]) for tokens in steps[6:]]
        found.append(np.concatenate(rows))
        assert batch.nbytes == (16 if in_place else 12) * 3 * 2 * 2 * 4 * 32 * 4
        batch.close()
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    ids = [int(t[0]) for t in steps]
    np.testing.assert_allclose(session.logits(ids)[-1], found[0][-3], atol=1e-4)
    moved = [int(t[3]) for t in steps[:6]] + [int(t[1]) for t in steps[6:]]
    np.testing.assert_allclose(session.logits(moved)[-1], found[0][-2], atol=1e-4)


def test_a_session_goes_on_after_its_batch(session: DecoderSession) -> None:
    before = session.logits([5, 6, 7])
    with session.side_by_side(8) as batch:
        batch.begin(1)
        batch.step(np.array([5], np.int32))
    assert np.array_equal(session.logits([5, 6, 7]), before)
    session.close()
    with pytest.raises(EdgekitError, match="closed"), session.side_by_side(8):
        pass


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture
def learn(
    float32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[onnx_tuning.Knowledge, set[str]]]:
    def learning(**other: Any) -> tuple[onnx_tuning.Knowledge, set[str]]:
        """(what was learned, names of the steps that were computed)."""
        seen: set[str] = set()
        settings: dict[str, Any] = {"digest": "d" * 64, "exporter": "genai", "effort": "low"} | other
        stop = settings.pop("stop", "")

        def progress(task: str, done: int, total: int) -> None:
            if task == stop:
                raise KeyboardInterrupt
            seen.add(task)

        known = onnx_tuning.learn(
            float32,
            settings.pop("text", "self"),
            256,
            spill=tmp_path / "spill",
            threads=1,
            progress=progress,
            **settings,
        )
        return known, seen

    return learning


def test_what_was_learned_is_not_learned_again(learn: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, steps = learn()
    assert steps == {"write text", "read", "answer", "observe"}

    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(onnx_tuning, "open_decoder", unwanted)
    again, steps = learn()
    assert steps == set()
    assert again.answers == first.answers and first.answers is not None
    assert np.array_equal(again.judge.logs, first.judge.logs)
    assert again.moments.keys() == first.moments.keys()
    assert all(np.array_equal(again.moments[name], m) for name, m in first.moments.items())
    monkeypatch.undo()
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(effort, "EFFORTS", SMALL)
    for other in ({"digest": "e" * 64}, {"exporter": "optimum"}):
        assert learn(**other)[1] == {"write text", "read", "answer", "observe"}
    assert learn(effort="normal")[1] == {"write text", "read", "answer"}, "what it learns from is the same text"


def test_a_run_that_was_stopped_goes_on_where_it_was(learn: Any, own_cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        learn(stop="observe")
    assert {p.name for p in own_cache.iterdir() if list(p.glob("[!.]*"))} == {"text", "reference", "answers"}
    known, steps = learn()
    assert steps == {"observe"}
    before = {name: np.array(m) for name, m in known.moments.items()}
    (kept,) = (own_cache / "onnx-moments").glob("[!.]*")
    victim = max(kept.iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-5] ^= 16
    victim.write_bytes(data)
    again, steps = learn()
    assert steps == {"observe"}, "what is damaged is learned again"
    assert all(np.array_equal(again.moments[name], m) for name, m in before.items())


def test_without_a_cache_moments_lie_beside_the_artefact(
    learn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = learn()
    monkeypatch.setenv("EDGEKIT_CACHE_LIMIT", "0")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "none"))
    found, _ = learn()
    assert list((tmp_path / "spill").glob("*.npy"))
    assert not [p for p in (tmp_path / "none").rglob("*") if p.is_file()]
    assert all(np.array_equal(found.moments[name], m) for name, m in kept.moments.items())


# --- what runs, and what is told -------------------------------------------------------------------------------------


def convert(model: Path, out: Path, *, dry_run: bool = False, **options: Any) -> OnnxConversion:
    done = pipeline.convert(str(model), "rpi5", Options(out=out, format="onnx", **options), dry_run=dry_run)
    assert isinstance(done, OnnxConversion)
    return done


def test_four_bits_calibrate_unasked_and_are_shown_among_all_variants(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = Options(out=tmp_path / "out", format="onnx", quant="int4-b32", verify="none")
    done = pipeline.convert(str(model), "rpi5", options, progress=lambda t, _, total: None if total else said.append(t))
    assert isinstance(done, OnnxConversion) and done.outcome is not None
    assert any("forward passes of 4,096 tokens (text 1," in line and "here" in line for line in said)
    assert [c.kind for c in done.candidates] == ["preset", "feedback"]
    assert [c.name for c in done.outcome.ladder] == ["int8", "int8-b128", "int4", "int4-b128"]
    source, target = pipeline.open_onnx(str(model), Options()), Target.load("rpi5")
    for rung in done.outcome.ladder:
        assert rung.nbytes == pipeline.plan_onnx(source, target, Options(quant=rung.name)).file_bytes
        assert rung.kl > 0 and rung.kl_stderr > 0 and not rung.shipped
    by_name = {c.name: c.kl for c in done.outcome.ladder}
    assert by_name["int8"] < by_name["int4"] < done.candidates[0].kl
    manifest = json.loads((tmp_path / "out" / "edgekit.json").read_text())
    assert [c["name"] for c in manifest["ladder"]] == list(by_name)
    assert manifest["flips"]["prompts"] == 2 and manifest["flips"]["max_tokens"] == 5
    assert manifest["calibration"]["text"] == "self, seed 1"
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()], "no work files are left"
    page = tmp_path / "page.html"
    report.write([tmp_path / "out"], page)
    shown = page.read_text()
    assert all(name in shown for name in ("int8-b128", "int4-b128", "int4-b32 with error feedback"))
    assert "of 2 greedy answers differ" in shown
    plain = convert(model, tmp_path / "plain", quant="int4-b32", calibration="none", verify="none")
    assert plain.outcome is None
    assert "ladder" not in json.loads((tmp_path / "plain" / "edgekit.json").read_text())


def test_what_is_not_asked_for_depends_on_the_time_but_a_size_does_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def notes(**options: Any) -> str:
        return " ".join(convert(model, tmp_path / "out", dry_run=True, **options).warnings)

    assert "calibrat" not in notes(quant="int4")
    monkeypatch.setattr(effort, "measure_speed", lambda *_: Speed(1e6, 1))
    assert "h here: --calibration self does it" in notes(quant="int4")
    assert "calibrat" not in notes(quant="int8"), "nothing is to be seen at 8 bits"
    assert "calibrat" not in notes(quant="int4", calibration="none")
    assert "calibrat" not in notes(target_bpw=7.5), "a size is best met by measuring"
    monkeypatch.undo()
    monkeypatch.setattr(onnx_effort, "memory", lambda _: 1 << 60)
    assert "memory" in notes(quant="int4")
    with pytest.raises(DoesNotFit, match="memory"):
        convert(model, tmp_path / "out", quant="int4", calibration="self")


def test_a_size_runs_the_gate_over_every_variant_that_fits(model: Path, tmp_path: Path) -> None:
    done = convert(model, tmp_path / "out", target_bpw=8.0, effort="low", verify="none")
    assert done.outcome is not None and done.outcome.ladder == ()
    names = {c.name for c in done.candidates}
    assert names == {f"{v}{how}" for v in ("int4", "int4-b32", "int4-b128") for how in ("", " with error feedback")}
    best = next(c for c in done.candidates if c.shipped)
    assert best.kl <= done.candidates[0].kl and done.plan.label in best.name
    assert (best is done.candidates[0]) == (done.outcome.doubt == 1.0)
    with pytest.raises(EdgekitError, match="importance matrix"):
        convert(model, tmp_path / "no", quant="int4", calibration="imatrix.gguf")


def test_encoders_learn_fixed_scales_and_nothing_else(tmp_path: Path) -> None:
    bert = pico.make("bert", tmp_path / "bert")
    for quant, text, said in (
        ("int8", "t.txt", "learns nothing from text"),
        ("int8", "self", "learns nothing from text"),
        ("int8-dynamic", "t.txt", "learns nothing from text"),
        ("int8-static", "self", "writes no text"),
    ):
        with pytest.raises(EdgekitError, match=said) as caught:
            convert(bert, tmp_path / "out", dry_run=True, quant=quant, calibration=text)
        assert "calibration" in caught.value.hint
    for quant in ("int8", "int8-static"):
        assert not convert(bert, tmp_path / "out", dry_run=True, quant=quant, recipe="best").warnings


# --- what it will cost -----------------------------------------------------------------------------------------------


def test_work_is_stated_beforehand(model: Path, learn: Any) -> None:
    source = pipeline.open_onnx(str(model), Options())
    plan = pipeline.plan_onnx(source, Target.load("rpi5"), Options(quant="int4"))
    said = onnx_effort.estimate(plan, "low")
    known, _ = learn()
    assert said.tokens["text"] == 768 and said.tokens["ladder"] == 0 and said.seconds is None
    assert known.tokens == pytest.approx(said.tokens["moments"], rel=0.1)
    assert known.judge.tokens == pytest.approx(said.tokens["reference"], rel=0.2)
    assert said.tokens["candidates"] == 2 * said.tokens["reference"]
    more = onnx_effort.estimate(plan, "normal", source="t.txt", plans=2)
    assert more.tokens["text"] == 0
    assert more.tokens["ladder"] == (len(onnx_planning.DECODERS) - 2) * 512
    slow, quick = (onnx_effort.estimate(plan, "low", Speed(flops, 1)).seconds for flops in (1e9, 1e10))
    assert slow is not None and quick is not None and slow == pytest.approx(10 * quick)
    assert onnx_effort.memory(plan) > 4 * plan.parameters


@pytest.mark.slow
def test_error_feedback_is_what_a_trained_model_ships(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effort, "EFFORTS", {"low": Effort(4096, 4096, 8, 16, 0)})
    done = convert(test_data / "models" / "lab-7m", tmp_path / "out", quant="int4", effort="low")
    plain, fed = done.candidates
    assert fed.shipped and fed.kl < 0.6 * plain.kl
    assert done.outcome is not None and done.outcome.doubt < 0.05
    assert done.outcome.flips is not None and len(done.outcome.flips.answers) == 8
