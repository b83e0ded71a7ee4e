"""What tuning learns is kept: killed runs go on, further runs learn nothing, damage is noticed; and its estimates."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekit import cache, corpus, effort, learning, pipeline, planning, sensitivity, tuning, verification
from edgekit.effort import Effort, Speed
from edgekit.errors import CorruptCheckpoint, EdgekitError, UnknownName
from edgekit.runtime import steady
from edgekit.runtime.llama_cpp import Context, LlamaSession, open_session
from edgekit.target import Target
from tests import pico

SMALL = {"normal": Effort(512, 512, 2, 5, 2), "low": Effort(512, 256, 2, 4, 0)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(effort, "EFFORTS", SMALL)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.llama(tmp_path_factory.mktemp("tuning") / "pico", hidden=256, layers=1, dtype="F32")


@pytest.fixture(scope="module")
def source(model: Path) -> pipeline.Source:
    return pipeline.open_source(str(model))


def planned(source: pipeline.Source, quant: str = "Q4_0") -> planning.Plan:
    names = tuning.importance_names(source.blueprint)
    return planning.plan(source.blueprint, source.metadata, Target.load("rpi5"), quant=quant, importance=names)


class Run:
    """One conversion's learning, and what it cost: tokens computed, and how often the model was opened."""

    def __init__(self, folder: Path, source: pipeline.Source, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.source, self.tokens, self.opened = folder, source, 0, 0
        run = Context._run

        def counted(context: Context, tokens: np.ndarray, *rest: object) -> None:
            self.tokens += len(tokens)
            run(context, tokens, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(Context, "_run", counted)

    @contextlib.contextmanager
    def unquantised(self) -> Iterator[Path]:
        self.opened += 1
        with verification.unquantised(self.folder, planned(self.source), threads=1) as path:
            yield path

    def learn(self, text: str | Path = "self", quant: str = "Q4_0", kind: str = "low") -> learning.Knowledge:
        self.tokens = self.opened = 0
        (self.folder / "spill").mkdir(exist_ok=True)
        return tuning.learn(
            self.unquantised, planned(self.source, quant), text, None,
            digest="d" * 64, effort=kind, spill=self.folder / "spill", threads=1,
        )  # fmt: skip


@pytest.fixture
def run(source: pipeline.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, source, monkeypatch)


def test_another_size_learns_nothing_anew(run: Run) -> None:
    first = run.learn()
    assert run.opened == 1 and run.tokens > 20 * 512
    again = run.learn(quant="Q6_K")
    assert (run.opened, run.tokens) == (0, 0)
    assert again.sensitivity == first.sensitivity
    assert again.answers == first.answers and first.answers is not None
    assert again.judge.chunks == first.judge.chunks and np.array_equal(again.judge.logs, first.judge.logs)
    for name, values in first.importance.items():
        assert np.array_equal(values, again.importance[name])
        assert np.array_equal(first.moments[name], again.moments[name])
    assert (again.text, again.tokens, again.warnings) == (first.text, first.tokens, first.warnings)


def test_another_text_is_learned(run: Run, tmp_path: Path) -> None:
    run.learn()
    whole = run.tokens
    path = tmp_path / "t.txt"
    path.write_text(corpus.TEXT)
    by_file = run.learn(path)
    assert run.tokens > 0.8 * (whole - 768), "all but the writing of text and the answers"
    run.learn(path)
    assert run.tokens == 0
    path.write_text(corpus.TEXT[100:])
    assert run.learn(path).judge.chunks != by_file.judge.chunks
    assert run.tokens > 0


_KILLED = """
import os, signal, sys
from pathlib import Path
from edgekit import effort, learning, pipeline, planning, tuning
from edgekit.effort import Effort
from edgekit.target import Target
from tests import test_tuning as t
effort.EFFORTS = t.SMALL
model, gguf, spill, task, at = sys.argv[1:]
source = pipeline.open_source(model)
seen = 0
def progress(name, done, total):
    global seen
    seen += name == task
    if seen > int(at):
        os.kill(os.getpid(), signal.SIGKILL)
tuning.learn(Path(gguf), t.planned(source), "self", None, digest="d" * 64, effort="low", spill=Path(spill),
             threads=1, progress=progress)
"""


def killed(run: Run, model: Path, task: str, at: int = 0) -> None:
    """A run in a process of its own, killed when `task` tells its progress for the time after `at`."""
    with run.unquantised() as path:
        done = subprocess.run(
            [sys.executable, "-c", _KILLED, str(model), str(path), str(run.folder), task, str(at)],
            cwd=Path(__file__).parents[1], env=os.environ, check=False, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_run_goes_on_where_it_was(
    run: Run, model: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the text, in the calibration, and among the probes: what was finished is not computed again."""
    killed(run, model, "calibrate")
    assert {p.name for p in own_cache.iterdir() if list(p.glob("[!.]*"))} == {"text"}
    assert list((own_cache / "moments").glob(".*")), "the unfinished sums of a killed run"
    killed(run, model, "sensitivity", at=7)
    assert not [p for p in (own_cache / "moments").glob(".*") if "cache" not in p.name], "and they are gone"
    (journal,) = (own_cache / "probes").glob("*.jsonl")
    probes = [line for line in journal.read_text().splitlines() if '"probe ' in line]
    assert len(probes) == 7, "of what was told, the first is the reference"
    journal.write_bytes(journal.read_bytes() + b'\n1234abcd ["probe x, Q')
    calls: list[str] = []
    resumed = learning_with(run, calls)
    groups, formats = sensitivity.choose_probes(sensitivity.parts_of(run.source.blueprint), "low")
    assert {"write text", "calibrate", "read"}.isdisjoint(calls)
    assert calls.count("sensitivity") == sensitivity.passes(groups, formats, "low", combined=2) - 7
    assert not list((own_cache / "probes").glob("*.jsonl"))
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "other"))
    assert run.learn().sensitivity == resumed.sensitivity


def learning_with(run: Run, calls: list[str]) -> learning.Knowledge:
    with run.unquantised() as path:
        return tuning.learn(
            path, planned(run.source), "self", None,
            digest="d" * 64, effort="low", spill=run.folder, threads=1, progress=lambda task, *_: calls.append(task),
        )  # fmt: skip


def damage(folder: Path, how: str) -> None:
    victim = max((p for p in folder.iterdir() if p.name != "entry.json"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 16
    victim.write_bytes(data[:-9] if how == "cut" else data)
    if how == "gone":
        victim.unlink()


def test_what_is_damaged_is_learned_again(run: Run, own_cache: Path) -> None:
    first = run.learn()
    kinds = [("text", "flip"), ("moments", "flip"), ("moments", "gone"), ("reference", "cut"), ("answers", "cut")]
    for kind, how in kinds:
        damage(sorted((own_cache / kind).iterdir())[0], how)
        again = run.learn()
        assert run.opened == 1 and run.tokens > 0, kind
        assert again.answers == first.answers and np.array_equal(again.judge.ids, first.judge.ids)
    (costs,) = (own_cache / "sensitivity").iterdir()
    damage(costs, "flip")
    assert run.learn().sensitivity == first.sensitivity and run.opened == 1
    assert run.learn().sensitivity == first.sensitivity and run.opened == 0


def test_without_a_cache_nothing_is_kept_and_all_is_the_same(
    run: Run, own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = run.learn()
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("EDGEKIT_CACHE_LIMIT", "0")
    found = run.learn()
    assert found.sensitivity == kept.sensitivity
    assert not [p for p in (tmp_path / "none").rglob("*") if p.is_file()]
    assert list((tmp_path / "spill").glob("*.f32")), "second moments lie beside the artefact"
    for name in found.moments:
        assert np.array_equal(found.moments[name], kept.moments[name])


# --- the cache -------------------------------------------------------------------------------------------------------


def filled(name: str, nbytes: int) -> cache.Entry:
    entry = cache.Entry("things", name)
    with entry.making() as folder:
        (folder / "data").write_bytes(bytes(nbytes))
    return entry


def test_what_was_used_longest_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE_LIMIT", "2500")
    first, second = filled("a", 1000), filled("b", 1000)
    for entry, age in ((first, 20), (second, 10)):
        os.utime(entry.path, (time.time() - age,) * 2)
    assert first.find() is not None, "used just now"
    third = filled("c", 1000)
    assert (first.find() is not None, second.find(), third.find() is not None) == (True, None, True)
    assert 2000 < cache.usage() <= 2500
    assert not cache.Entry("things", "d").admits(3000)
    monkeypatch.setenv("EDGEKIT_CACHE_LIMIT", "much")
    with pytest.raises(EdgekitError, match="much"):
        cache.limit()


def test_an_entry_is_whole_or_not_there(own_cache: Path) -> None:
    with pytest.raises(ZeroDivisionError), cache.Entry("things", "a").making() as folder:
        (folder / "data").write_text("half")
        raise ZeroDivisionError
    assert cache.Entry("things", "a").find() is None
    assert list((own_cache / "things").iterdir()) == []
    (own_cache / "things" / f".a-{2**22 + 7}").mkdir()
    cache.trim(1 << 30)
    assert list((own_cache / "things").iterdir()) == [], "what a killed process left"


def test_a_journal_loses_a_cut_line_only(own_cache: Path) -> None:
    journal = cache.Journal("probes", "k")
    journal["a"], journal["b"] = [0.1, 1e-300], {"x": 1}
    with journal.path.open("a") as file:
        file.write('00000000 ["c", 1]\ndeadbeef ["d"')
    again = cache.Journal("probes", "k")
    assert dict(again) == {"a": [0.1, 1e-300], "b": {"x": 1}}
    again["e"] = 5
    assert dict(cache.Journal("probes", "k")) == {"a": [0.1, 1e-300], "b": {"x": 1}, "e": 5}


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_the_outcome_has_a_ladder_and_flips(run: Run, source: pipeline.Source, tmp_path: Path) -> None:
    decided, target = planned(source, "Q4_K_M"), Target.load("rpi5")
    (tmp_path / "out").mkdir()
    out = tuning.tune(
        run.unquantised, decided, "self", None, tmp_path / "out",
        target=target, budget=decided.file_bytes, digest="d" * 64, effort="normal", prefer="quality", threads=1,
    )  # fmt: skip
    assert [c.kind for c in out.candidates] == ["preset", "feedback", "mix", "random"]
    assert len(out.ladder) == 2
    assert all(c.kl > 0 and c.kl_stderr > 0 and 0 < c.top1 <= 1 and not c.shipped for c in out.ladder)
    stock = out.candidates[0]
    assert "Q4_K_M" not in {c.name for c in out.ladder}
    for rung in out.ladder:
        made = planned(source, rung.name)
        assert rung.nbytes == made.file_bytes
        assert (rung.nbytes > stock.nbytes) == (rung.kl < stock.kl)
    assert out.flips is not None and len(out.flips.answers) == 2 and out.flips.max_tokens == 5
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file()) == [out.written.path.name]


def test_rungs_are_around_the_size(source: pipeline.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        effort, "EFFORTS", {"normal": Effort(1, 1, 1, 1, 6), "low": SMALL["low"], "high": Effort(1, 1, 1, 1, None)}
    )
    decided, target = planned(source, "Q4_K_M"), Target.load("rpi5")
    found = tuning.rungs(decided, decided.file_bytes, target, effort="normal")
    sizes = [p.file_bytes for p in found]
    assert len(found) == 6 and sizes == sorted(sizes, reverse=True)
    assert min(sizes) < decided.file_bytes < max(sizes)
    assert tuning.rungs(decided, decided.file_bytes, target, effort="low") == ()
    assert len(tuning.rungs(decided, decided.file_bytes, target, effort="high")) > 10


def test_rungs_that_take_too_long_are_named(
    run: Run, source: pipeline.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "RUNG_SECONDS", 0.0)
    known = run.learn()
    tried = {"preset": tuning.Attempt(planned(source), known.importance, None)}
    out = tuning.choose(tried, known, tmp_path, threads=1, rungs=[planned(source, "Q6_K"), planned(source, "Q8_0")])
    assert out.ladder == ()
    assert "Q6_K, Q8_0" in out.warnings[-1]
    assert out.doubt == 1.0


# --- what it will cost -----------------------------------------------------------------------------------------------


def test_work_is_stated_beforehand(run: Run, source: pipeline.Source) -> None:
    """Tokens that the engine computed, all steps of learning, against what was said before."""
    plan = planned(source)
    said = effort.estimate(plan, "low")
    assert said.seconds is None
    run.learn()
    steps = ("text", "importance", "reference", "probes")
    stated = sum(said.tokens[s] for s in steps) + said.tokens["answers"] // 2
    passes = said.tokens["probes"] // 4096
    # a probe reads no more text than there is: 512 tokens here, of which a pass has room for 4,096
    assert run.tokens <= stated - passes * (4096 - 512) + 600, "and a few words to find and to look at the weights"
    assert run.tokens >= 0.7 * (stated - passes * (4096 - 512))
    assert str(said).startswith(f"{said.passes} forward passes of 4,096 tokens (text 1, importance 1, reference 1")


def test_a_forecast_follows_machine_and_model(source: pipeline.Source, tmp_path: Path) -> None:
    slow, quick = (effort.estimate(planned(source), "low", Speed(f, 1)).seconds for f in (1e9, 1e10))
    assert slow is not None and quick is not None and slow == pytest.approx(10 * quick)
    wide = pipeline.open_source(str(pico.llama(tmp_path / "wide", hidden=512, layers=2, dtype="F32")))
    more = effort.estimate(planned(wide), "low", Speed(1e10, 1)).seconds
    assert more is not None and more > 2 * quick
    by_file = effort.estimate(planned(source), "low", source="t.txt")
    assert by_file.tokens["text"] == 0
    with pytest.raises(UnknownName, match="effort"):
        effort.estimate(planned(source), "huge")


def test_the_forecast_is_of_the_right_size(run: Run, source: pipeline.Source) -> None:
    """Processor time of learning on one thread, against the forecast: within a factor, for a model this small."""
    plan = planned(source)
    said = effort.estimate(plan, "low", effort.measure_speed(1))
    start = time.process_time()
    run.learn()
    spent = time.process_time() - start
    assert said.seconds is not None
    assert spent / 20 < said.seconds < 20 * spent


def test_tuning_without_being_asked(source: pipeline.Source) -> None:
    assert tuning.worth_it(planned(source), "low", Speed(1e11, 2)) is None
    why = tuning.worth_it(planned(source), "low", Speed(1e6, 1))
    assert why is not None and "--calibration self" in why and " h " in why


@pytest.mark.parametrize(("times", "threads"), [([2.0, 1.0], 1), ([1.0, 2.0], 2)])
def test_threads_that_do_not_help_are_left_out(
    run: Run, monkeypatch: pytest.MonkeyPatch, times: list[float], threads: int
) -> None:
    asked: list[int] = []

    def spent(session: LlamaSession) -> float:
        asked.append(session.threads)
        assert real(session) > 0
        return times[len(asked) - 1]

    real = steady.seconds
    monkeypatch.setattr(steady, "seconds", spent)
    with run.unquantised() as path:
        with steady.open_steady(path, n_ctx=64, threads=2) as session:
            assert (asked, session.threads) == ([2, 1], threads)
            found = session.logits(range(3, 40))
        with open_session(path, n_ctx=64, threads=2) as plain:
            assert np.array_equal(found, plain.logits(range(3, 40)))


def test_measured_costs_are_saved(run: Run) -> None:
    found = run.learn().sensitivity
    again = sensitivity.from_json(json.loads(json.dumps(found.as_json())))
    assert again == found
    assert again.correction == found.correction and len(again.combined) == 2
    part = found.parts[0]
    assert again.cost(part.name, "Q3_K", cpu=True) == found.cost(part.name, "Q3_K", cpu=True)
    with pytest.raises(CorruptCheckpoint):
        sensitivity.from_json({"groups": [[1]]})
