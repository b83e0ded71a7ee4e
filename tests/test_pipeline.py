"""The main job through the front door: a checkpoint goes in, a sealed artefact that runs comes out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgekit import artifact, pipeline, verification
from edgekit.errors import CorruptCheckpoint, DoesNotFit, EdgekitError, OutputExists, UnknownName, VerificationFailed
from edgekit.gguf_file import open_gguf
from edgekit.pipeline import Options
from tests import pico


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.llama(tmp_path_factory.mktemp("models") / "pico-llama", hidden=256, layers=2, dtype="BF16")


def convert(model: Path, out: Path, target: str = "rpi5", **options: object) -> pipeline.Conversion:
    wanted = {"calibration": "none"} | options
    return pipeline.convert(str(model), target, Options(out=out, **wanted))  # type: ignore[arg-type]


def test_the_folder_holds_what_was_promised(model: Path, tmp_path: Path) -> None:
    done = convert(model, tmp_path / "out", quant="Q4_K_M")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["Modelfile", "README.md", "edgekit.json", "pico-llama-Q4_K_M.gguf"]
    assert done.artifact is not None
    done.artifact.verify()
    manifest = json.loads((tmp_path / "out/edgekit.json").read_text())
    assert manifest["plan"]["preset"] == "Q4_K_M"
    assert manifest["files"]["pico-llama-Q4_K_M.gguf"]["bytes"] == done.plan.file_bytes
    assert str(tmp_path) not in json.dumps(manifest), "a manifest does not tell where it was made"


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "IQ4_XS"])
def test_the_plan_is_exact_to_the_byte(model: Path, tmp_path: Path, quant: str) -> None:
    done = convert(model, tmp_path / "out", quant=quant)
    assert done.artifact is not None
    assert done.artifact.model.stat().st_size == done.plan.file_bytes
    found = open_gguf(done.artifact.model)
    assert {n: t.code for n, t in found.tensors.items()} == {t.name: t.format.code for t in done.plan.tensors}


def test_the_same_input_gives_the_same_bytes_on_any_number_of_threads(model: Path, tmp_path: Path) -> None:
    hashes = set()
    for i, threads in enumerate((1, 2, 3)):
        done = convert(model, tmp_path / str(i), quant="Q4_K_M", verify="none", threads=threads)
        assert done.artifact is not None
        hashes.add(artifact.sha256_of(done.artifact.model))
    assert len(hashes) == 1


def test_a_gguf_is_a_source_too_and_gives_the_same_tensors(model: Path, tmp_path: Path) -> None:
    whole = convert(model, tmp_path / "bf16", quant="BF16")
    direct = convert(model, tmp_path / "direct", quant="Q4_K_M")
    assert whole.artifact is not None
    assert direct.artifact is not None
    again = convert(whole.artifact.model, tmp_path / "again", quant="Q4_K_M")
    assert again.artifact is not None
    assert _tensors(direct.artifact.model) == _tensors(again.artifact.model)


def _tensors(path: Path) -> dict[str, bytes]:
    found, data = open_gguf(path), path.read_bytes()
    return {n: data[t.offset : t.offset + t.nbytes] for n, t in found.tensors.items()}


def test_full_verification_measures_the_distance_to_the_source(model: Path, tmp_path: Path) -> None:
    coarse = convert(model, tmp_path / "q2", quant="Q2_K", verify="full")
    fine = convert(model, tmp_path / "q8", quant="Q8_0", verify="full")
    assert coarse.certificate is not None
    assert fine.certificate is not None
    far, near = (c.certificate.figures["against_source"]["kl_mean"] for c in (coarse, fine))
    assert 0 <= near < far
    assert not list(tmp_path.rglob(".edgekit-*")), "the temporary reference is gone"


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    done = pipeline.convert(str(model), "rpi5", Options(out=tmp_path / "out"), dry_run=True)
    assert done.artifact is None
    assert list(tmp_path.iterdir()) == []


def test_an_existing_artefact_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", quant="Q8_0", verify="none")
    with pytest.raises(OutputExists, match="already"):
        convert(model, tmp_path / "out", quant="Q8_0", verify="none")


KILLED = """
import os, signal, sys
from edgekit import pipeline
from edgekit.export import gguf
count = 0
def die(task, done, total):
    global count
    count += task == "quantize"
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
from pathlib import Path
options = pipeline.Options(out=Path(sys.argv[2]), quant="Q4_K_M", calibration="none", force=True)
pipeline.convert(sys.argv[1], "rpi5", options, progress=die)
"""


def test_kill_9_half_way_leaves_the_old_artefact_and_nothing_that_looks_finished(model: Path, tmp_path: Path) -> None:
    before = convert(model, tmp_path / "out", quant="Q8_0", verify="none")
    assert before.artifact is not None
    code = subprocess.run([sys.executable, "-c", KILLED, str(model), str(tmp_path / "out")], check=False).returncode
    assert code == -signal.SIGKILL
    artifact.open_artifact(tmp_path / "out").verify()
    visible = [p.name for p in tmp_path.iterdir() if not p.name.startswith(".edgekit-partial-")]
    assert visible == ["out"]


@pytest.mark.slow
def test_ctrl_c_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    model = pico.llama(tmp_path / "big", hidden=1024, layers=12, vocab=2048)
    command = [sys.executable, "-m", "edgekit", "convert", str(model), "-t", "rpi5", "-q", "Q4_K_M", "-o", "out"]
    command += ["--calibration", "none"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".edgekit-partial-*/*.gguf")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big"]


TINY = """
title = "A board of 256 MiB"
family = "other"
[ram]
gib = [0.25]
source = "made up for this test"
[[backend]]
name = "cpu"
speed_class = "cpu-arm-dotprod"
"""


def test_what_cannot_fit_says_what_would(model: Path, tmp_path: Path) -> None:
    board = tmp_path / "tiny.toml"
    board.write_text(TINY)
    with pytest.raises(DoesNotFit) as caught:
        convert(model, tmp_path / "out", target=str(board), context=131072, quant="F32")
    assert "needs" in str(caught.value)
    assert "has" in str(caught.value)
    assert "--ctx-size" in caught.value.hint
    assert not (tmp_path / "out").exists()
    convert(model, tmp_path / "out", target=str(board), context=2048)


def test_rows_that_do_not_fit_are_listed_and_strict_refuses_them(tmp_path: Path) -> None:
    odd = pico.llama(tmp_path / "odd", hidden=192, layers=2)
    done = convert(odd, tmp_path / "out", quant="Q4_K_M")
    assert done.plan.fallbacks
    assert any("rows that" in w for w in done.warnings)
    with pytest.raises(EdgekitError, match="cannot hold"):
        convert(odd, tmp_path / "strict", quant="Q4_K_M", strict=True)


def test_a_damaged_tensor_is_found_by_verification(model: Path, tmp_path: Path) -> None:
    done = convert(model, tmp_path / "out", quant="Q8_0")
    assert done.artifact is not None
    found = open_gguf(done.artifact.model)
    info = found.tensors["blk.0.attn_k.weight"]
    with done.artifact.model.open("r+b") as f:
        f.seek(info.offset)
        f.write(np.random.default_rng(0).bytes(info.nbytes // 8))
    with pytest.raises(VerificationFailed, match=r"attn_k|finite"):
        verification.verify(done.artifact.model, done.plan, done.source.checkpoint, done.source.vocabulary)


def test_another_vocabulary_is_found_by_verification(model: Path, tmp_path: Path) -> None:
    """Swap two tokens of the file: same size, same shapes, still a valid GGUF, wrong ids."""
    done = convert(model, tmp_path / "out", quant="Q8_0")
    assert done.artifact is not None
    data = done.artifact.model.read_bytes()
    tokens = list(open_gguf(done.artifact.model).get("tokenizer.ggml.tokens"))
    a, b = (_entry(t) for t in _pair_of_equal_length(tokens))
    swapped = data.replace(a, b"\0MARK\0", 1).replace(b, a, 1).replace(b"\0MARK\0", b, 1)
    assert len(swapped) == len(data)
    assert swapped != data
    done.artifact.model.write_bytes(swapped)
    with pytest.raises(VerificationFailed, match="tokens differ"):
        verification.verify(done.artifact.model, done.plan, done.source.checkpoint, done.source.vocabulary)


def _entry(token: str) -> bytes:
    raw = token.encode()
    return len(raw).to_bytes(8, "little") + raw


def _pair_of_equal_length(tokens: list[str]) -> tuple[str, str]:
    letters = [t for t in tokens if len(t) == 1 and t.isascii() and t.isalpha()]
    return letters[0], letters[1]


def test_bad_names_are_answered_with_near_ones(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName) as caught:
        convert(model, tmp_path / "out", target="rpi-5")
    assert "rpi5" in caught.value.hint
    with pytest.raises(UnknownName) as caught:
        convert(model, tmp_path / "out", quant="Q4_K_N")
    assert "Q4_K_M" in caught.value.hint or "Q4_K_S" in caught.value.hint


def test_a_truncated_checkpoint_loses_nothing(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
        convert(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(pico.FAMILIES))
def test_every_family_goes_all_the_way(family: str, tmp_path: Path) -> None:
    """Plan, write, verify, seal: for every family, in a format that every row width here can hold."""
    root = pico.make(family, tmp_path / family)
    done = convert(root, tmp_path / "out", quant="Q8_0")
    assert done.certificate is not None
    assert [c.name for c in done.certificate.checks][:1] == ["tensors"]
    assert done.artifact is not None
    assert done.artifact.model.stat().st_size == done.plan.file_bytes


@pytest.mark.parametrize("name", ["my-phi-3-tune", "Phi3", "phi_3"])
def test_a_name_does_not_change_how_a_file_is_read(model: Path, tmp_path: Path, name: str) -> None:
    """llama.cpp refuses a file called phi-3 whose vocabulary lacks that family's tokens."""
    done = convert(model, tmp_path / "out", quant="Q8_0", name=name)
    assert done.artifact is not None
    assert done.artifact.model.name == f"{name}-Q8_0.gguf"


def test_nothing_heavy_is_imported_for_the_whole_job(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgekit import convert, Options;"
        "convert(sys.argv[1], 'rpi5', Options(out=Path(sys.argv[2]), quant='Q8_0'));"
        "bad = {'torch', 'transformers', 'onnxruntime', 'sentencepiece'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    run = [sys.executable, "-c", code, str(model), str(tmp_path / "out")]
    assert subprocess.run(run, check=False, env={**os.environ, "PYTHONWARNINGS": "default"}).returncode == 0
