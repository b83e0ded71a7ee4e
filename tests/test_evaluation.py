"""What `edgekit eval` measures: against llama-perplexity and transformers, and against what must hold by itself."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import evaluation, flips, pipeline, quality, tasks
from edgekit.errors import CorruptCheckpoint, EdgekitError, MissingExtra, UnknownName
from edgekit.evaluation import Evaluation, Options, evaluate
from edgekit.runtime.llama_cpp import open_session
from tests import pico

ROOT = Path(__file__).parents[1]
NO_FLIPS = Options(threads=1, floor=False)
HARNESS = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")

PRINTED = {
    "ppl_candidate": 103.909113, "ppl_candidate_stderr": 9.144907, "ppl_reference": 103.702540,
    "ppl_reference_stderr": 9.180156, "ln_ratio_stderr": 0.005931, "kl_mean": 0.016540, "kl_stderr": 0.000403,
    "kl_max": 0.117855, "kl_p99": 0.069550, "kl_median": 0.013035, "delta_p_rms": 0.02073, "top1": 0.87598,
}  # fmt: skip
"""llama-perplexity --kl-divergence for lab-7m Q4_0 against BF16: 8 chunks of 256 tokens of wikitext-2, one thread."""


def converted(model: Path, out: Path, quant: str) -> Path:
    options = pipeline.Options(out=out, quant=quant, calibration="none", verify="none")
    return pipeline.convert(str(model), "rpi5", options).out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.llama(tmp_path_factory.mktemp("eval") / "pico", hidden=256, layers=2, dtype="BF16")


@pytest.fixture(scope="module")
def small(model: Path) -> Path:
    return converted(model, model.parent / "small", "Q2_K")


@pytest.fixture(scope="module")
def same(model: Path) -> Path:
    return converted(model, model.parent / "same", "BF16")


@pytest.fixture(scope="module")
def trained(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A real model, its Q4_0 and its F32."""
    source, out = test_data / "models/lab-7m", tmp_path_factory.mktemp("trained")
    return source, converted(source, out / "q4_0", "Q4_0"), converted(source, out / "f32", "F32")


@pytest.fixture(scope="module")
def wiki(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "wiki.txt"
    text = (test_data / "text/wikitext-2-raw/wiki.test.raw").read_text(encoding="utf-8")
    path.write_text(text[:20_000], encoding="utf-8")
    return path


# --- divergence ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_figures_are_those_of_llama_perplexity(
    trained: tuple[Path, Path, Path], wiki: Path, tmp_path: Path
) -> None:
    source, q4, _ = trained
    options = replace(NO_FLIPS, text=wiki, n_ctx=256, chunks=8)
    found = evaluate(q4, source, options)
    for name, printed in PRINTED.items():
        # printed on a CPU with VNNI, where the two are within 1 %; others add up in another order, which shows in the
        # middle by 1.3 %, and in the tail, which hangs on few tokens, by 5 %
        near = 0.1 if name in ("kl_max", "kl_p99") else 0.03
        assert getattr(found.comparison, name) == pytest.approx(printed, rel=near), name
    stored = evaluate(q4, source, replace(options, save=tmp_path / "ref.npz"))
    assert stored.comparison.kl_mean == pytest.approx(found.comparison.kl_mean, rel=0.01)
    assert stored.comparison.ppl_reference == pytest.approx(found.comparison.ppl_reference, rel=1e-6)
    again = evaluate(q4, tmp_path / "ref.npz", NO_FLIPS)
    assert again.comparison.kl_mean == pytest.approx(stored.comparison.kl_mean, rel=1e-4)
    assert again.kind == "stored"


@pytest.mark.slow
def test_the_noise_floor_lies_far_below_the_loss(trained: tuple[Path, Path, Path], wiki: Path) -> None:
    source, q4, f32 = trained
    options = Options(threads=1, text=wiki, n_ctx=256, chunks=2)
    found = evaluate(q4, source, options)
    assert found.floor is not None
    assert found.floor.method == "BF16 against F32"
    assert 0 < found.floor.kl_mean < found.comparison.kl_mean / 50
    assert found.jitter is not None
    assert found.floor.kl_mean < found.jitter.kl_mean < found.comparison.kl_mean / 5
    exact = evaluate(f32, source, replace(options, floor=False))
    assert exact.comparison.kl_mean == pytest.approx(found.floor.kl_mean, rel=0.5), "an F32 file is at the floor"
    quantized = evaluate(q4, q4, options)
    assert quantized.floor is not None
    assert "batches" in quantized.floor.method
    assert 0 < quantized.floor.kl_mean < found.comparison.kl_mean / 5


def test_a_model_does_not_differ_from_itself(model: Path, same: Path) -> None:
    found = evaluate(same, model, replace(NO_FLIPS, prompts=flips.builtin_prompts()[:3], answer_tokens=8))
    assert found.comparison.kl_mean == pytest.approx(0, abs=1e-9)
    assert found.comparison.top1 == 1
    assert found.flips is not None
    assert found.flips.changed == ()
    assert len(found.flips.answers) == 3
    assert not list(same.parent.rglob(".edgekit-*")), "the temporary reference is gone"


@pytest.mark.parametrize("kind", ["folder", "artefact", "gguf"])
def test_every_kind_of_reference_gives_the_same_divergence(kind: str, model: Path, same: Path, small: Path) -> None:
    against = {"folder": model, "artefact": same, "gguf": same / "pico-BF16.gguf"}[kind]
    found = evaluate(small, against, NO_FLIPS)
    assert found.kind == "model"
    assert found.comparison.kl_mean > 1e-3
    assert found.comparison.kl_mean == pytest.approx(evaluate(small, model, NO_FLIPS).comparison.kl_mean, rel=1e-6)


def test_a_reference_of_llama_perplexity_is_read(same: Path, small: Path, tmp_path: Path) -> None:
    with open_session(same / "pico-BF16.gguf", n_ctx=128, threads=1) as session:
        quality.record(session, list(range(3, 260)), 128, tmp_path / "base.bin")
    found = evaluate(small, tmp_path / "base.bin", replace(NO_FLIPS, prompts=flips.builtin_prompts()))
    assert found.comparison.chunks == 2
    assert found.floor is None
    assert found.flips is None
    assert "no model" in found.notes[0]


def test_a_chat_file_is_read_in_the_template(same: Path, small: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turn = {"messages": [{"role": "user", "content": "the cat sat on the mat " * 40}]}
    chats.write_text(f"{json.dumps(turn)}\n" * 4)
    found = evaluate(small, same, replace(NO_FLIPS, text=chats, n_ctx=64, chunks=3))
    assert (found.comparison.chunks, found.text) == (3, "chats.jsonl")


def test_what_is_kept_is_what_was_measured(same: Path, small: Path) -> None:
    found = evaluate(small, same, replace(NO_FLIPS, prompts=flips.builtin_prompts()[:2], answer_tokens=4))
    path = evaluation.keep(found, small)
    data = json.loads(path.read_text())
    assert data["comparison"]["kl_mean"] == found.comparison.kl_mean
    assert data["flips"]["prompts"] == 2
    with pytest.raises(EdgekitError, match="no artefact folder"):
        evaluation.keep(found, small / "pico-Q2_K.gguf")


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_another_vocabulary_is_refused(small: Path, tmp_path: Path) -> None:
    other = pico.llama(tmp_path / "other", hidden=256, layers=1, vocab=700)
    with pytest.raises(EdgekitError, match=r"vocabular|different tokens"):
        evaluate(small, other, NO_FLIPS)
    with pytest.raises(EdgekitError, match=r"vocabular"):
        evaluate(small, other, replace(NO_FLIPS, save=tmp_path / "x.npz"))
    assert not (tmp_path / "x.npz").exists()


def test_broken_references_and_texts_are_named(same: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.npz").write_bytes(b"PK\3\4 but no archive")
    (tmp_path / "junk.bin").write_bytes(b"something else entirely, long enough to be read")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 999)
    (tmp_path / "short.txt").write_text("too short")
    for name, error in (
        ("junk.npz", CorruptCheckpoint),
        ("junk.bin", CorruptCheckpoint),
        ("absent.gguf", EdgekitError),
    ):
        with pytest.raises(error, match=name.partition(".")[0]):
            evaluate(small, tmp_path / name, NO_FLIPS)
    for name, says in (("latin.txt", "byte 3 is not UTF-8"), ("short.txt", "too short"), ("no.txt", "cannot read")):
        with pytest.raises(EdgekitError, match=says):
            evaluate(small, same, replace(NO_FLIPS, text=tmp_path / name))
    with pytest.raises(EdgekitError, match="no folder"):
        evaluate(small, same, replace(NO_FLIPS, save=tmp_path / "nowhere/ref.npz"))


def test_a_stored_reference_keeps_its_own_text(same: Path, small: Path, tmp_path: Path) -> None:
    evaluate(small, same, replace(NO_FLIPS, save=tmp_path / "ref.npz"))
    with pytest.raises(EdgekitError, match="its own text"):
        evaluate(small, tmp_path / "ref.npz", replace(NO_FLIPS, chunks=2))


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_changed_answer_says_where_it_parts(model: Path, small: Path) -> None:
    found = evaluate(small, model, replace(NO_FLIPS, prompts=flips.builtin_prompts()[:6], answer_tokens=12))
    assert found.flips is not None
    assert found.flips.changed, "a model of noise at 2 bits answers otherwise"
    for answer in found.flips.answers:
        assert answer.changed == (answer.reference != answer.candidate)
        assert answer.at is None or 0 <= answer.at < answer.tokens <= 12


def test_prompts_are_lines_or_chats(tmp_path: Path) -> None:
    plain, chats = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("What is ice?\n\n  And steam?\n")
    assert [p.text for p in flips.read_prompts(plain)] == ["What is ice?", "And steam?"]
    rows: Sequence[Any] = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\u2028there"},
                      {"role": "assistant", "content": "dropped"}]},
        {"prompt": "Why?"}, "How?",
    ]  # fmt: skip
    chats.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    found = flips.read_prompts(chats)
    assert [p.text for p in found] == ["Hi\u2028there", "Why?", "How?"]
    assert [m["role"] for m in found[0].messages] == ["system", "user"]
    assert flips.prompts_from("none") is None
    assert len(set(flips.PROMPTS)) == 24


@pytest.mark.parametrize("line", ["{", '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"x": 1}', "[1]", '""'])
def test_a_line_that_is_no_prompt_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'"fine"\n{line}\n')
    with pytest.raises(EdgekitError, match="line 2"):
        flips.read_prompts(path)


def test_a_prompt_longer_than_the_context_is_refused(same: Path, small: Path) -> None:
    long = flips.Prompt(({"role": "user", "content": "word " * 5000},))
    with pytest.raises(EdgekitError, match="tokens, the context"):
        evaluate(small, same, replace(NO_FLIPS, prompts=(long,)))


# --- the command -----------------------------------------------------------------------------------------------------


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekit", *args]
    environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def test_the_command_prints_one_document_or_one_screen(same: Path, small: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("[bold]the cat[/nonsense]\nthe dog\n")
    options = ("--against", str(same), "--no-floor", "--prompts", str(prompts), "-n", "6", "-t", "1")
    done = run("eval", str(small), *options, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["flips"]["prompts"] == 2
    assert math.isfinite(data["comparison"]["kl_mean"])
    done = run("eval", str(small), *options)
    assert done.returncode == 0, done.stderr
    for word in ("perplexity", "KL", "top-1", "Δp", "2 greedy answers", "±"):
        assert word in done.stdout, word
    assert "--text" in done.stderr


def test_tasks_without_the_harness_say_what_to_install(same: Path, small: Path) -> None:
    if find_spec("lm_eval") is not None:
        pytest.skip("lm-evaluation-harness is installed")
    with pytest.raises(MissingExtra) as caught:
        evaluate(small, same, replace(NO_FLIPS, tasks=("arc_easy",)))
    assert "edgekit[tasks]" in caught.value.hint


# --- tasks -----------------------------------------------------------------------------------------------------------

ARC = """
task: arc_from_disk
dataset_path: json
dataset_kwargs:
  data_files: {{validation: "{data}"}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@HARNESS
@pytest.mark.slow
def test_a_task_from_disk_is_scored_for_both(
    trained: tuple[Path, Path, Path], test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "arc.yaml"
    path.write_text(ARC.format(data=test_data / "text/tasks/ai2_arc_ARC-Easy.validation.jsonl"))
    _, q4, f32 = trained
    found: Evaluation = evaluate(q4, f32, replace(NO_FLIPS, tasks=(str(path),), limit=12))
    (score,), (other,) = found.tasks, found.reference_tasks
    assert (score.task, score.metric, score.samples) == ("arc_from_disk", "acc", 12)
    assert 0 <= score.value <= 1
    assert other.stderr is not None
    assert score.value * 12 == pytest.approx(round(score.value * 12))


@HARNESS
def test_an_unknown_task_is_answered_with_a_near_one(same: Path, tmp_path: Path) -> None:
    with open_session(same / "pico-BF16.gguf", n_ctx=64, threads=1) as session:
        with pytest.raises(UnknownName) as caught:
            tasks.run(session, ["arc_eazy"])
        assert "arc_easy" in caught.value.hint
        with pytest.raises(EdgekitError, match="no task file"):
            tasks.run(session, [str(tmp_path / "absent.yaml")])


@HARNESS
@pytest.mark.slow
def test_the_harness_gets_the_likelihoods_of_transformers(trained: tuple[Path, Path, Path]) -> None:
    import torch
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, _, f32 = trained
    judge, tokenizer = AutoModelForCausalLM.from_pretrained(source).float(), AutoTokenizer.from_pretrained(source)

    def likelihood(context: str, text: str) -> tuple[float, bool]:
        before = tokenizer(context).input_ids
        # as the harness cuts it: the context's own ids, and what is left of the whole behind as many
        whole, first = before + tokenizer(context + text).input_ids[len(before) :], len(before)
        with torch.no_grad():
            logs = judge(torch.tensor([whole])).logits[0].log_softmax(-1)
        rows = logs[first - 1 : len(whole) - 1]
        chosen = torch.tensor(whole[first:])
        return float(rows.gather(1, chosen[:, None]).sum()), bool((rows.argmax(-1) == chosen).all())

    pairs = [("Question: What is ice?\nAnswer:", " frozen water"), ("def f(x):\n    ", "return x"), ("A B C", " D"),
             ("A B C", " E and F"), ("import numpy as", " np")]  # fmt: skip
    with open_session(next(f32.glob("*.gguf")), n_ctx=512, threads=1, kv="f32") as session:
        lm = tasks.harness_model(session)
        found = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
        rolled = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("A B C D E F " * 90,), 0)])
        written = lm.generate_until(
            [Instance("generate_until", {}, ("def f(x):", {"until": ["\n\n"], "max_gen_toks": 12}), 0)]
        )
    for (context, text), (score, greedy) in zip(pairs, found, strict=True):
        n = len(context) - len(context.rstrip())  # the harness moves this white space to the answer
        wanted, best = likelihood(context[: len(context) - n], context[len(context) - n :] + text)
        assert score == pytest.approx(wanted, rel=5e-4)
        assert greedy == best
    assert np.isfinite(rolled).all()
    assert rolled[0] < 0
    assert "\n\n" not in written[0]
