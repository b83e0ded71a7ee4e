"""Recipes: the shipped four, and what is refused before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit import recipe as module
from edgekit.errors import InvalidSpec, UnknownName
from edgekit.quant.ggml import FORMATS
from edgekit.quant.presets import PRESETS
from edgekit.recipe import Recipe

EXPORT = '[export]\nquant = "Q8_0"\n'


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(f'title = "Mine"\n{text}', encoding="utf-8")
    return path


def test_the_five_are_shipped() -> None:
    assert {"best", "default", "fastest", "q8", "smallest"} <= set(Recipe.names())


@pytest.mark.parametrize("name", Recipe.names())
def test_shipped_recipes_name_real_presets(name: str) -> None:
    export = Recipe.load(name).export
    for preset in export.candidates if export.quant == "auto" else (export.quant,):
        assert preset in PRESETS
        assert export.calibration != "none" or not FORMATS[PRESETS[preset].default].needs_importance


def test_what_each_is_for() -> None:
    default, smallest = Recipe.load("default").export, Recipe.load("smallest").export
    bits = [FORMATS[PRESETS[name].default].bits for name in default.candidates]
    assert bits == sorted(bits, reverse=True), "best first: quality falls with bits"
    bits = [FORMATS[PRESETS[name].default].bits for name in smallest.candidates]
    assert bits == sorted(bits), "smallest first"
    assert (default.prefer, smallest.prefer, Recipe.load("fastest").export.prefer) == ("quality", "size", "speed")
    assert Recipe.load("q8").export.quant == "Q8_0"
    assert (default.verify, default.kv, default.format) == ("quick", "f16", "gguf")


def test_stages_keep_order_and_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STAGES", "edgekit.quant")  # a shelf that is not empty
    text = '[[stage]]\nname = "presets"\nlayers = 4\n[[stage]]\nname = "ggml"\nparams = { a = [1] }\n'
    stages = Recipe.load(write(tmp_path, text + EXPORT)).stage
    assert [(s.name, s.params) for s in stages] == [("presets", {"layers": 4}), ("ggml", {"a": [1]})]


def test_unknown_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="no stage called 'no_such_stage'"):
        Recipe.load(write(tmp_path, '[[stage]]\nname = "no_such_stage"\n' + EXPORT))
    monkeypatch.setattr(module, "STAGES", "edgekit.quant")
    with pytest.raises(UnknownName) as e:
        Recipe.load(write(tmp_path, '[[stage]]\nname = "preset"\n' + EXPORT))
    assert "did you mean 'presets'?" in e.value.hint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "export"),
        ("[export]\n", "needs candidates"),
        ('[export]\nquant = "Q8_0"\ncandidates = ["Q4_0"]\n', "candidates are for"),
        ('[export]\ncandidates = ["Q4_0", "Q4_0"]\n', "listed twice"),
        ('[export]\nquant = "Q8_0"\nctxsize = 3\n', "export.ctxsize"),
        ('[export]\nquant = "Q8_0"\nctx_size = 0\n', "export.ctx_size"),
        ('[export]\nquant = "Q8_0"\nkv = "q3_0"\n', "export.kv"),
        ('[export]\nquant = "../x"\n', "export.quant"),
        ('[export]\nquant = "Q8_0"\nformat = "tflite"\n', "export.format"),
        ('[export]\nquant = "Q8_0"\nverify = "maybe"\n', "export.verify"),
        ("[[stage]]\nlayers = 3\n" + EXPORT, "stage.0.name"),
        ('[[stage]]\nname = "x"\nparams = {}\nlayers = 3\n' + EXPORT, "not both"),
        ('name = "a/b"\n' + EXPORT, "name"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InvalidSpec) as e:
        Recipe.load(write(tmp_path, text))
    assert complaint in str(e.value)
    assert "mine.toml" in str(e.value)


def test_unknown_recipe_suggests() -> None:
    with pytest.raises(UnknownName) as e:
        Recipe.load("smalest")
    assert "did you mean 'smallest'?" in e.value.hint
