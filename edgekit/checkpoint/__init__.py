"""A model on disk, opened by its headers: names, shapes, dtypes, config, card. Reads weights only when asked for some.

Knows no model family and no tokenizer.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from edgekit import hub
from edgekit.checkpoint._files import read_card, read_json
from edgekit.checkpoint._folder import PICKLES, TO_SAFETENSORS, open_folder, refuse_other
from edgekit.checkpoint._gguf import open_gguf_model
from edgekit.checkpoint._model import SMALL_FILES, Checkpoint
from edgekit.checkpoint._quantised import declared_float8
from edgekit.checkpoint._tensor import TensorRef
from edgekit.errors import CorruptCheckpoint, DownloadFailed, UnknownName, UnsupportedModel
from edgekit.units import Progress, silent

__all__ = ["SMALL_FILES", "Checkpoint", "TensorRef", "open_checkpoint"]


def open_checkpoint(ref: str | Path, *, revision: str | None = None, progress: Progress = silent) -> Checkpoint:
    """Open a folder, a `.gguf` file, `demo`, or a hub id `org/name[@revision]`, which is downloaded if it must be.

    Reads headers only. `progress` counts downloaded bytes. Raises CorruptCheckpoint (damaged or unsafe files),
    UnsupportedModel (pickles, adapters, weights quantised by others), DownloadFailed.
    """
    text, path = str(ref), Path(ref).expanduser()
    here = bool(text) and _exists(path)
    if revision and here:
        raise UnknownName(f"{text} is on this machine and has no revision {revision!r}", "leave the revision out")
    if text == "demo" and not here:
        return replace(open_folder(_demo(), text), name="edgekit-demo")
    if not here:
        return _open_hub(text, revision, progress)
    return open_folder(path, text) if path.is_dir() else _open_file(path, text)


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (OSError, ValueError):  # a name too long, a zero in it: not a file either
        return False
    return True


def _demo() -> Path:
    package = Path(str(files("edgekit")))
    for folder in (package / "_data" / "demo", package / "demo"):
        if (folder / "config.json").is_file():
            return folder
    raise CorruptCheckpoint("this installation has no demo model", "install edgekit from a wheel, or name a model")


def _open_hub(ref: str, revision: str | None, progress: Progress) -> Checkpoint:
    named = None if Path(ref).is_absolute() else hub.parse_id(ref)
    near = _near(Path(ref).expanduser())
    if not named:
        repo, _, file = ref.rpartition("/")
        if file.endswith(".gguf") and not near and hub.parse_id(repo):
            near = f"if it is on the hub: hf download {repo} {file} --local-dir ."
        raise UnknownName(f"no file or folder {ref!r}, and it is not a hub id like org/name[@revision]", near)
    repo = named[0]

    def refuse_early(root: Path, names: set[str]) -> None:
        refuse_other(root, names, repo)
        declared_float8(root, read_json(root, "config.json"), read_card(root), repo)

    try:
        root = hub.download(repo, revision or named[1], progress=progress, check=refuse_early)
    except DownloadFailed as e:
        raise DownloadFailed(str(e), "; ".join(filter(None, (near, e.hint)))) from None
    return open_folder(root, ref)


def _near(path: Path) -> str:
    """A hint at a local file or folder of nearly that name."""
    try:
        names = [p.name for p in path.absolute().parent.iterdir() if p.is_dir() or p.suffix == ".gguf"]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean the local {str(path.with_name(close[0]))!r}?" if close else ""


def _open_file(path: Path, ref: str) -> Checkpoint:
    if path.suffix == ".gguf":
        return open_gguf_model(path, ref)
    if path.suffix in PICKLES:
        raise UnsupportedModel(f"{path} is a pickle, which can run any code when it is opened", TO_SAFETENSORS)
    hint = (
        f"name its folder: {path.parent}"
        if path.suffix in {".safetensors", ".json"}
        else "a folder, a .gguf or a hub id"
    )
    raise UnsupportedModel(f"{path} is not a model by itself", hint)
