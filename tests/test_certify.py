"""`edgekit certify`: what is proven again, and that every kind of difference is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import artifact, folding, pipeline
from edgekit.certification import certify
from edgekit.errors import CorruptCheckpoint, EdgekitError, VerificationFailed
from edgekit.export import gguf
from edgekit.gguf_file import open_gguf
from edgekit.planning import with_formats
from edgekit.target import Target
from tests import pico
from tests.test_folding import drawn

ROOT = Path(__file__).parents[1]


def converted(model: Path, out: Path, quant: str = "Q4_K_M") -> Path:
    options = pipeline.Options(out=out, quant=quant, calibration="none", verify="none")
    return pipeline.convert(str(model), "rpi5", options).out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.llama(tmp_path_factory.mktemp("certify") / "pico", hidden=256, layers=2)


@pytest.fixture(scope="module")
def other(model: Path) -> Path:
    """The same shapes, other weights."""
    return pico.llama(model.parent / "other", hidden=256, layers=2, seed=1)


@pytest.fixture(scope="module")
def made(model: Path) -> Path:
    return converted(model, model.parent / "made")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def reseal(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Write the manifest anew over whatever lies in the folder, as somebody would who hides a change."""
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    (folder / artifact.MANIFEST).unlink()
    change(manifest)
    body = {k: v for k, v in manifest.items() if k not in ("schema", "files")}
    artifact.seal(folder, body, {})


def run(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    command = [sys.executable, "-m", "edgekit", "certify", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# --- what holds ------------------------------------------------------------------------------------------------------


def test_a_sound_artefact_is_certified_in_one_document_or_one_screen(made: Path, model: Path) -> None:
    done = run(str(made), "--against", str(model), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["certified"] is True
    names = [check["name"] for check in found["certificate"]["checks"]]
    assert names == ["files", "source", "tensors", "tokens", "chat template", "numbers"]
    assert 0 < found["certificate"]["figures"]["tensor_error"]["Q4_K"] < 0.2
    shown = run(str(made), "--against", str(model))
    assert shown.returncode == 0, shown.stderr
    assert "certified" in shown.stdout and "sha256" in shown.stdout


def test_full_measures_the_divergence(made: Path, model: Path) -> None:
    found = certify(made, model, level="full", threads=1)
    assert found.certificate.figures["against_source"]["kl_mean"] > 0
    assert not list(made.parent.rglob(".edgekit-*")), "the temporary reference is gone"


@pytest.mark.parametrize("family", ["bert", "qwen2_moe"])
def test_other_families_are_certified(family: str, tmp_path: Path) -> None:
    source = pico.make(family, tmp_path)
    out = converted(source, tmp_path / "out", "Q5_K_M")
    assert certify(out, source, threads=1).certificate.checks[-1].name == "numbers"


def test_a_gguf_is_a_source_as_well(made: Path, model: Path, tmp_path: Path) -> None:
    whole = converted(model, tmp_path / "whole", "BF16")
    source = artifact.model_file(whole)
    checks = certify(converted(source, tmp_path / "small"), source, threads=1).certificate.checks
    assert "tokenizer keys" in checks[3].detail
    with pytest.raises(VerificationFailed, match="digest"):
        certify(made, source, threads=1)


def test_every_format_holds_what_it_promises(model: Path, tmp_path: Path) -> None:
    for quant in ("Q2_K", "Q4_0", "F16"):
        assert certify(converted(model, tmp_path / quant, quant), model, threads=1).format == "gguf"


def test_folded_scales_are_read_back(copy: Path, model: Path) -> None:
    source = pipeline.open_source(model)
    rows = artifact.open_artifact(copy).manifest["plan"]["tensors"]
    formats = {row["name"]: row["format"] for row in rows}
    blueprint = folding.apply(source.blueprint, drawn(source.blueprint, 3))
    host = Target.load("host")
    plain = pipeline.plan_source(pipeline.Source(source.checkpoint, blueprint, source.vocabulary, source.metadata),
                                 host, pipeline.Options(quant="F16", context=64))  # fmt: skip
    gguf.write(with_formats(plain, formats, host, ""), artifact.model_file(copy), gguf.Encoding(1))
    reseal(copy)
    with pytest.raises(VerificationFailed, match="differs from the source"):
        certify(copy, model, threads=1)  # nothing says that it was folded
    reseal(copy, lambda m: m.update(candidates=[{"kind": "folded", "shipped": True}]))
    found = certify(copy, model, threads=1)
    assert "folded at 8 places" in found.certificate.warnings[0]
    # a matrix that was changed beside the folding is found all the same
    spoil(copy, "blk.1.ffn_gate.weight", 8)
    reseal(copy)
    with pytest.raises(VerificationFailed, match=r"blk\.1\.ffn_gate"):
        certify(copy, model, threads=1)


# --- what does not ---------------------------------------------------------------------------------------------------


def spoil(folder: Path, tensor: str, count: int) -> None:
    """Overwrite the scales of the tensor's first blocks."""
    path = artifact.model_file(folder)
    info = open_gguf(path).tensors[tensor]
    data = bytearray(path.read_bytes())
    block = info.nbytes * 256 // int(np.prod(info.shape))
    for i in range(count):
        data[info.offset + i * block : info.offset + i * block + 2] = np.float16(3).tobytes()
    path.write_bytes(data)


def test_one_flipped_byte_is_exit_code_4(copy: Path, model: Path) -> None:
    path = artifact.model_file(copy)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = run(str(copy), "--against", str(model), "--json")
    assert done.returncode == 4
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == 4
    assert path.name in answer["error"] and "sealed" in answer["error"]
    assert "Traceback" not in done.stderr


def test_another_model_is_exit_code_4(made: Path, other: Path) -> None:
    done = run(str(made), "--against", str(other))
    assert done.returncode == 4
    assert "digest" in done.stderr and "edgekit eval" in done.stderr


def test_weights_of_another_model_are_found_without_the_digest(copy: Path, other: Path) -> None:
    digest = pipeline.open_source(other).checkpoint.digest
    reseal(copy, lambda m: m["source"].update(digest=digest))
    with pytest.raises(VerificationFailed, match="differs from the source"):
        certify(copy, other, threads=1)


def test_a_change_that_was_sealed_again_is_found(copy: Path, model: Path) -> None:
    spoil(copy, "blk.0.attn_q.weight", 8)
    reseal(copy)
    with pytest.raises(VerificationFailed, match=r"blk\.0\.attn_q"):
        certify(copy, model, threads=1)


def test_a_model_with_other_tensors_is_found(copy: Path, tmp_path: Path) -> None:
    deeper = pico.llama(tmp_path / "deeper", hidden=256, layers=3)
    reseal(copy, lambda m: m["source"].update(digest=pipeline.open_source(deeper).checkpoint.digest))
    with pytest.raises(VerificationFailed, match=r"only the model has a tensor blk\.2"):
        certify(copy, deeper, threads=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("plan"),
        lambda m: m["plan"].update(tensors=[{"name": "x", "format": "Q9_Z"}]),
        lambda m: m["plan"].update(tensors="all"),
        lambda m: m["plan"].update(context=-1),
        lambda m: m.pop("source"),
        lambda m: m.update(format="safetensors"),
    ],
    ids=["no plan", "a format", "no table", "context", "no source", "kind"],
)
def test_a_manifest_that_says_nothing_is_damage(change: Callable[[Any], None], copy: Path, model: Path) -> None:
    reseal(copy, change)
    with pytest.raises(CorruptCheckpoint):
        certify(copy, model, threads=1)


def test_what_is_no_artefact_is_said_in_words(model: Path, made: Path) -> None:
    with pytest.raises(EdgekitError, match="is one file"):
        certify(artifact.model_file(made), model)
    with pytest.raises(EdgekitError, match="no level called"):
        certify(made, model, level="none")
    assert run(str(made), "--against", "no/such/model").returncode == 1


# --- ONNX ------------------------------------------------------------------------------------------------------------

ONNX = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxruntime_genai", "torch", "transformers")),
    reason="the extra `onnx` is not installed",
)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, its int8 ONNX artefact)."""
    root = tmp_path_factory.mktemp("onnx")
    model = pico.llama(root / "pico", hidden=128, layers=2, ffn=256, tied=True)
    options = pipeline.Options(out=root / "made", format="onnx", quant="int8", verify="none", threads=1)
    return model, pipeline.convert(str(model), "rpi5", options).out


@ONNX
@pytest.mark.slow
def test_an_onnx_artefact_is_certified(graph: tuple[Path, Path]) -> None:
    model, made = graph
    found = certify(made, model, threads=1)
    assert found.format == "onnx"
    names = [check.name for check in found.certificate.checks]
    assert names[:2] == ["files", "source"] and {"bits", "tokens", "numbers", "text"} <= set(names)
    assert found.as_json()["versions"]["onnxruntime"]


@ONNX
@pytest.mark.slow
def test_an_onnx_artefact_that_was_changed_is_found(graph: tuple[Path, Path], tmp_path: Path) -> None:
    model, made = graph
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    data = bytearray((copy / "model.onnx.data").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8192] = bytes(8192)
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(VerificationFailed, match=r"model\.onnx\.data"):
        certify(copy, model, threads=1)
    reseal(copy)
    with pytest.raises(VerificationFailed):
        certify(copy, model, threads=1)  # the hash is right, the numbers are not
    other = pico.llama(tmp_path / "other", hidden=128, layers=2, ffn=256, tied=True, seed=1)
    with pytest.raises(VerificationFailed, match="digest"):
        certify(made, other, threads=1)
    reseal(copy, lambda m: m.update(nodes=[{"node": "x"}]))
    with pytest.raises(CorruptCheckpoint):
        certify(copy, model, threads=1)
