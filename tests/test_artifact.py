"""Artefact folders: swapped in whole, sealed, refused when they would lose something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit import artifact
from edgekit.artifact import MANIFEST
from edgekit.errors import CorruptCheckpoint, DoesNotFit, EdgekitError, OutputExists


def make(out: Path, text: str = "weights", *, force: bool = False) -> None:
    with artifact.staging(out, force=force) as stage:
        (stage / "m.gguf").write_text(text)
        artifact.seal(stage, {"model_file": "m.gguf"}, {})


def test_a_sealed_folder_opens_and_verifies(tmp_path: Path) -> None:
    make(tmp_path / "a")
    found = artifact.open_artifact(tmp_path / "a")
    found.verify()
    assert found.model.read_text() == "weights"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a/m.gguf").write_text("weighty")
    with pytest.raises(CorruptCheckpoint, match=r"m\.gguf"):
        artifact.open_artifact(tmp_path / "a").verify()


def test_leaving_by_exception_keeps_the_old_one(tmp_path: Path) -> None:
    make(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), artifact.staging(tmp_path / "a", force=True) as stage:
        (stage / "m.gguf").write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a/m.gguf").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    make(tmp_path / "a", "old")
    (tmp_path / "a/extra").write_text("x")
    with pytest.raises(OutputExists, match="already"):
        make(tmp_path / "a", "new")
    make(tmp_path / "a", "new", force=True)
    assert (tmp_path / "a/m.gguf").read_text() == "new"
    assert not (tmp_path / "a/extra").exists()


def test_what_edgekit_did_not_make_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.tex").write_text("years")
    with pytest.raises(OutputExists, match="not made by edgekit"):
        make(tmp_path / "a", force=True)
    assert (tmp_path / "a/thesis.tex").read_text() == "years"


KILLED = """
import os, signal, sys
from pathlib import Path
from edgekit import artifact
with artifact.staging(Path(sys.argv[1]), force=True) as stage:
    (stage / "m.gguf").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    code = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], check=False).returncode
    assert code == -9
    assert not (tmp_path / "a").exists()
    assert all(p.name.startswith(".edgekit-partial-") for p in tmp_path.iterdir())
    make(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "the next run clears what was left"


def test_death_between_the_two_renames_is_healed(tmp_path: Path) -> None:
    make(tmp_path / "a", "old")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "a").rename(tmp_path / f".edgekit-partial-a-old-{dead.pid}")
    with pytest.raises(ZeroDivisionError), artifact.staging(tmp_path / "a", force=True):
        raise ZeroDivisionError
    assert (tmp_path / "a/m.gguf").read_text() == "old"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_a_manifest_cannot_point_outside(tmp_path: Path, name: str) -> None:
    make(tmp_path / "a")
    data = json.loads((tmp_path / "a" / MANIFEST).read_text())
    data["files"][name] = data["files"]["m.gguf"]
    data["model_file"] = name
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(CorruptCheckpoint, match="outside"):
        artifact.open_artifact(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "files": {"x": 3}, "model_file": "x"}', "\x00"])
def test_a_broken_manifest_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CorruptCheckpoint, match=MANIFEST):
        artifact.open_artifact(tmp_path)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgekitError, match="cannot write"):
        make(tmp_path / "file" / "a")


def test_a_full_disk_is_a_clear_refusal(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="free"):
        artifact.need_disk(tmp_path / "not/yet/there", 1 << 60)
