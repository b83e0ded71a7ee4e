"""The command line as a user meets it: help, exit codes, one JSON document, no traceback, nothing heavy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import edgekit
from edgekit.cli import app
from tests import pico

ROOT = Path(__file__).parents[1]


def run(*args: str, cwd: Path | None = None, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgekit", *args],
        cwd=cwd or ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **env},
    )


def commands() -> list[tuple[str, ...]]:
    group: Any = typer.main.get_command(app)
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found.append((name,))
        found += [(name, sub) for sub in getattr(command, "commands", {})]
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.llama(tmp_path_factory.mktemp("cli") / "pico", hidden=256, layers=2)


@pytest.fixture(scope="module")
def made(model: Path) -> Path:
    out = model.parent / "made"
    done = run("convert", str(model), "-t", "rpi5", "-q", "Q4_K_M", "-o", str(out), "--calibration", "none")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_and_is_in_the_readme(command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
    documents = (ROOT / "README.md").read_text() + (ROOT / "docs/commands.md").read_text()
    assert f"edgekit {' '.join(command)}" in documents


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_option_has_help_text(command: tuple[str, ...]) -> None:
    node: Any = typer.main.get_command(app)
    for part in command:
        node = node.commands[part]
    assert node.help
    assert [p.name for p in node.params if getattr(p, "help", None) is None and p.name != "help"] == []


def test_help_and_import_load_nothing_heavy() -> None:
    code = (
        "import sys, edgekit, edgekit.cli\n"
        "try: edgekit.cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'transformers', 'llama_cpp', 'tokenizers', 'huggingface_hub', 'jinja2'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_public_names_exist_and_are_documented() -> None:
    for name in edgekit.__all__:
        assert getattr(edgekit, name).__doc__, name


def test_convert_ends_with_one_screen_that_says_everything(made: Path, model: Path) -> None:
    done = run("convert", str(model), "-t", "rpi5", "-q", "Q4_K_M", "-o", str(made), "--force", "--calibration", "none")
    assert done.returncode == 0, done.stderr
    for word in ("made", "size", "memory", "speed", "proof", "next", "edgekit run", "tok/s", "ollama create"):
        assert word in done.stdout, word


@pytest.mark.parametrize(
    "args",
    [
        ("plan", "{model}", "-t", "rpi5", "--json"),
        ("plan", "{model}", "--all-targets", "--json"),
        ("convert", "{model}", "-t", "rpi5", "--dry-run", "--json", "-o", "nowhere"),
        ("inspect", "{made}", "--json", "--tensors"),
        ("run", "{made}", "Hello", "--json", "-n", "8"),
        ("bench", "{made}", "-p", "16", "-n", "4", "-r", "1", "--json"),
        ("targets", "list", "--json"),
        ("targets", "show", "rpi5", "--json"),
        ("recipes", "show", "default", "--json"),
        ("doctor", "--json"),
    ],
    ids=lambda a: " ".join(a[:2]),
)
def test_json_is_exactly_one_document(args: tuple[str, ...], model: Path, made: Path, tmp_path: Path) -> None:
    done = run(*(a.format(model=model, made=made) for a in args), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("convert", "{model}", "-t", "rpi-5"), 1, "did you mean 'rpi5'"),
        (("convert", "{model}", "-q", "Q4_K_Z"), 1, "did you mean 'Q4_K_"),
        (("convert", "no/such/folder", "-t", "rpi5"), 1, "no/such/folder"),
        (("convert", "{model}", "--recipe", "smalest"), 1, "did you mean 'smallest'"),
        (("convert", "{model}", "--verify", "somewhat"), 2, "somewhat"),
        (("convert",), 2, "MODEL"),
        (("run", "{model}", "Hello"), 1, "edgekit convert"),
        (("inspect", "README.md"), 1, "GGUF"),
        (("bench", "{made}", "-p", "many"), 1, "-p 512"),
        (("run", "{made}", " "), 1, "empty"),
        (("frobnicate",), 2, "frobnicate"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, tuple) else str(v),
)
def test_every_mistake_is_answered_in_words(
    args: tuple[str, ...], code: int, says: str, model: Path, made: Path
) -> None:
    done = run(*(a.format(model=model, made=made) for a in args))
    assert done.returncode == code, done.stderr
    flat = re.sub(r"[\s│]+", " ", done.stderr)
    assert says in flat
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_what_does_not_fit_exits_3_with_needs_and_has(model: Path, tmp_path: Path) -> None:
    board = tmp_path / "tiny.toml"
    board.write_text(
        'title = "Tiny"\nfamily = "other"\nram = { gib = [0.25], source = "made up" }\n'
        '[[backend]]\nname = "cpu"\nspeed_class = "cpu-arm-dotprod"\n'
    )
    done = run("convert", str(model), "-t", str(board), "-c", "131072", "-q", "F32", cwd=tmp_path)
    assert done.returncode == 3
    assert "needs" in done.stderr
    assert "hint:" in done.stderr


def test_errors_are_json_too_when_json_was_asked_for(model: Path) -> None:
    done = run("convert", str(model), "-t", "nonsense-board", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["exit_code"] == 1


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m edgekit targets list | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_a_name_with_brackets_is_not_taken_for_markup(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "with [red] brackets"
    done = run("convert", str(model), "-t", "rpi5", "-q", "Q8_0", "-o", str(out), "--verify", "none")
    assert done.returncode == 0, done.stderr
    assert "[red]" in done.stdout.replace("\n", "")


def test_the_documents_name_no_command_that_does_not_exist() -> None:
    known = {" ".join(c) for c in commands()}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in _code_lines(path.read_text()):
            match = re.match(r"(?:\$ )?edgekit ([a-z]+)(?: (list|show|detect))?", line)
            if match:
                assert match[1] in known, f"{path.name}: {line}"


def _code_lines(text: str) -> list[str]:
    found, inside = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside:
            found.append(line)
    return found
