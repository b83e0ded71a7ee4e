"""The output folder and its `edgekit.json` manifest: staged beside, sealed, swapped in whole, checked again later.

Knows files and hashes; knows no model family, no number format and no runtime.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import CorruptCheckpoint, DoesNotFit, EdgekitError, OutputExists
from edgekit.units import Progress, show_bytes, silent

MANIFEST = "edgekit.json"
SCHEMA = 1
BENCH, EVALUATION = "bench.json", "evaluation.json"
"""Results that are kept beside what was sealed: not part of the model, and not hashed."""

_STAGE = ".edgekit-partial-"
_LARGEST_KEPT = 64 << 20


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished folder: `manifest` is the parsed edgekit.json, `model` the file that a runtime loads."""

    root: Path
    manifest: Mapping[str, Any]

    @property
    def model(self) -> Path:
        return self.root / str(self.manifest["model_file"])

    def verify(self, progress: Progress = silent) -> None:
        """Hash every listed file again. Raises CorruptCheckpoint naming the first that differs."""
        for name, entry in self.manifest["files"].items():
            path = inside(self.root, name)
            if not path.is_file():
                raise CorruptCheckpoint(f"{path} is missing", "convert again")
            if path.stat().st_size != entry["bytes"] or sha256_of(path, progress) != entry["sha256"]:
                raise CorruptCheckpoint(f"{path} is not the file that was sealed", "convert again, or copy it again")


def inside(root: Path, name: str) -> Path:
    """`root / name`, refused when it would leave `root` (a manifest is a file from outside)."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise CorruptCheckpoint(f"{root / MANIFEST} names {name!r}, which lies outside its folder")
    return path


def sha256_of(path: Path, progress: Progress = silent) -> str:
    """Hex sha256 of a file, read in 4 MiB pieces."""
    digest, total, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as f:
        while piece := f.read(4 << 20):
            digest.update(piece)
            done += len(piece)
            progress(f"hash {path.name}", done, total)
    return digest.hexdigest()


def open_artifact(path: Path) -> Artifact:
    """Open a folder made by `edgekit convert`. Raises EdgekitError, CorruptCheckpoint."""
    manifest = path / MANIFEST
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EdgekitError(f"{path} has no {MANIFEST}", "give a folder made by `edgekit convert`, or a .gguf") from None
    except (OSError, ValueError) as e:
        raise CorruptCheckpoint(f"{manifest}: {e}", "convert again") from None
    files = _files_of(data)
    if not files or data.get("schema") != SCHEMA or data.get("model_file") not in files:
        raise CorruptCheckpoint(f"{manifest} is not a manifest of schema {SCHEMA}", "convert again")
    for name in files:
        inside(path, name)
    return Artifact(path, data)


def _files_of(data: Any) -> Mapping[str, Any]:
    """The `files` of a parsed manifest; none where it is not of the shape that `seal` writes."""
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict):
        return {}
    sound = all(
        isinstance(v, dict) and isinstance(v.get("sha256"), str) and isinstance(v.get("bytes"), int)
        for v in files.values()
    )
    return files if sound else {}


GRAPHS = (
    "model.onnx",
    "onnx/model_quantized.onnx",
    "onnx/model.onnx",
    "onnx/decoder_model_merged_quantized.onnx",
    "onnx/decoder_model_merged.onnx",
)
"""Where an ONNX graph lies in a folder: as onnxruntime-genai lays it out, then as transformers.js does. Of an
encoder-decoder it is the decoder's; the encoder lies beside it."""


def model_file(ref: str | Path) -> Path:
    """The model file behind what a user typed: of an artefact folder or any folder with one model, or the file itself.

    A `.gguf`, or the `.onnx` graph whose weights lie beside it. Raises EdgekitError, CorruptCheckpoint.
    """
    path = Path(ref)
    if not path.is_dir():
        if not path.is_file():
            raise EdgekitError(f"there is no {path}", "edgekit convert MODEL --target TARGET makes one")
        return path
    if (path / MANIFEST).is_file():
        return open_artifact(path).model
    graph = next((path / name for name in GRAPHS if (path / name).is_file()), None)
    found = [*sorted(path.glob("*.gguf")), *([graph] if graph else sorted(path.glob("*.onnx")))]
    if len(found) == 1:
        return found[0]
    what = (
        "no .gguf and no .onnx file" if not found else f"{len(found)} models ({', '.join(p.name for p in found[:4])})"
    )
    raise EdgekitError(f"{path} holds {what} and no {MANIFEST}", "name one file, or run `edgekit convert` first")


def keep(ref: str | Path, name: str, value: Any) -> Path:
    """Write `value` as JSON `name` into an artefact folder, beside what was sealed. Raises EdgekitError elsewhere."""
    folder = Path(ref)
    if not (folder / MANIFEST).is_file():
        raise EdgekitError(f"{folder} is no artefact folder to keep {name} in", "edgekit convert MODEL makes one")
    beside = folder / f".{name}.{os.getpid()}.part"
    try:
        with readable_os_errors(folder):
            beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            beside.replace(folder / name)
    finally:
        beside.unlink(missing_ok=True)
    return folder / name


def kept(folder: Path, name: str) -> Any:
    """What `keep` wrote, or None where there is nothing of that name. Raises CorruptCheckpoint."""
    path = folder / name
    try:
        if path.stat().st_size > _LARGEST_KEPT:
            raise CorruptCheckpoint(f"{path} is larger than {show_bytes(_LARGEST_KEPT)}", "remove it")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise CorruptCheckpoint(f"{path}: {e}", "remove it, and measure again") from None


@contextmanager
def staging(out: Path, *, force: bool) -> Iterator[Path]:
    """A fresh folder beside `out`. Leaving normally swaps it in as `out`; leaving by exception removes it.

    A killed process leaves only a hidden `.edgekit-partial-*` folder, which the next run for the same `out` clears.
    The swap is two renames: for an instant there is no `out`, never a mixture of old and new.
    Raises OutputExists unless `force`, or when `out` is there and was not made by edgekit.
    """
    refuse_overwrite(out, force=force)
    with readable_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(out)
        stage = out.parent / f"{_STAGE}{out.name}-{os.getpid()}"
        stage.mkdir()
    try:
        with readable_os_errors(out):
            yield stage
            _swap(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def refuse_overwrite(out: Path, *, force: bool) -> None:
    """Raise OutputExists when writing `out` would lose something. An empty folder loses nothing."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise OutputExists(f"{out} exists and was not made by edgekit", "choose another place with --out")
    if not force:
        raise OutputExists(f"{out} is there already", "add --force to replace it, or --out for another place")


@contextmanager
def readable_os_errors(where: Path) -> Iterator[None]:
    """Turn what the file system says into an EdgekitError that names the place."""
    try:
        yield
    except OSError as e:
        place = e.filename or where
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFit(
                f"the disk is full at {place}", "free some space, or choose another disk with --out"
            ) from e
        raise EdgekitError(f"cannot write {place}: {e.strerror or e}", "choose another place with --out") from e


def need_disk(folder: Path, nbytes: int) -> None:
    """Raise DoesNotFit when the disk that holds `folder` has less than `nbytes` free."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise DoesNotFit(
            f"{folder} needs {show_bytes(nbytes)} free and has {show_bytes(free)}",
            "free some space, or choose another disk with --out",
        )


def seal(stage: Path, manifest: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """Write the manifest last, with the size and sha256 of every other file. `hashes` are those known already."""
    files = {
        p.relative_to(stage).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": hashes.get(p.relative_to(stage).as_posix()) or sha256_of(p),
        }
        for p in sorted(stage.rglob("*"))
        if p.is_file()
    }
    text = json.dumps({"schema": SCHEMA, **manifest, "files": files}, indent=2, ensure_ascii=False)
    (stage / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _swap(stage: Path, out: Path) -> None:
    for path in stage.rglob("*"):
        if path.is_file():
            with path.open("rb") as f:
                os.fsync(f.fileno())
    old = None
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    elif out.exists():
        old = out.parent / f"{_STAGE}{out.name}-old-{os.getpid()}"
        out.replace(old)
    try:
        stage.replace(out)
    except OSError:
        if old:
            old.replace(out)
        raise
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _clear_stale(out: Path) -> None:
    """Remove what killed runs left; bring an old artefact back if one died between the two renames."""
    for path in out.parent.glob(f"{_STAGE}{out.name}-*"):
        tail = path.name.removeprefix(f"{_STAGE}{out.name}-")
        pid = tail.removeprefix("old-")
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if tail.startswith("old-") and not out.exists():
            path.replace(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
