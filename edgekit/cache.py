"""What was learned once, by the key of what it follows from: written whole, checked when read, bounded in size.

Knows folders, hashes and age; knows nothing of what the files mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.units import GIB, parse_bytes

SCHEMA = 1
"""Part of every key: raised when what is kept would be computed otherwise."""

LIMIT = 16 * GIB
"""Bytes that may be kept, unless EDGEKIT_CACHE_LIMIT says otherwise: second moments of a 1 B model are 4 GiB."""

_INDEX = "entry.json"
_BLOCK = 1 << 20
_ABANDONED = 30 * 86_400  # seconds after which nobody comes back to a journal


def cache_dir() -> Path:
    """Where it is kept: EDGEKIT_CACHE, or `edgekit` in the user's cache folder."""
    home = os.environ.get("EDGEKIT_CACHE")
    if home:
        return Path(home)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgekit"


def limit() -> int:
    """Bytes that may be kept: EDGEKIT_CACHE_LIMIT (`20GiB`; 0 keeps nothing). Raises EdgekitError for no size."""
    text = os.environ.get("EDGEKIT_CACHE_LIMIT")
    return LIMIT if not text else parse_bytes(text)


def usage() -> int:
    """Bytes that are kept now."""
    return sum(found.nbytes for found in _entries())


def key(**facts: Any) -> str:
    """A name for what follows from `facts` (plain values): 32 hexadecimal digits."""
    text = json.dumps({"schema": SCHEMA, **facts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder of files of one `kind`, in the cache once it is complete. Nothing is promised of one that is not."""

    kind: str
    key: str

    @property
    def path(self) -> Path:
        return cache_dir() / self.kind / self.key

    def find(self) -> Path | None:
        """The folder, if it is there and every file is what was written; what is damaged is removed."""
        path = self.path
        try:
            files = json.loads((path / _INDEX).read_text(encoding="utf-8"))
            whole = all(_facts(path / name) == tuple(facts) for name, facts in files.items())
        except (OSError, ValueError, TypeError, AttributeError):
            whole = False
        if not whole:
            shutil.rmtree(path, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):  # a cache that others write and we may only read
            os.utime(path)
        return path

    def admits(self, nbytes: int) -> bool:
        """Whether `nbytes` may be kept: within the limit, and on a disk that has room to spare for it."""
        if nbytes > limit():
            return False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return shutil.disk_usage(self.path.parent).free > nbytes + GIB // 4
        except OSError:
            return False

    @contextmanager
    def making(self) -> Iterator[Path]:
        """A folder to write into, which becomes the entry at the end of the block; on an error nothing is kept.

        Raises OSError where nothing can be written.
        """
        beside = self.path.with_name(f".{self.key}-{os.getpid()}")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            yield beside
            files = {path.name: _facts(path) for path in sorted(beside.iterdir())}
            (beside / _INDEX).write_text(json.dumps(files), encoding="utf-8")
            if not self.path.exists():  # another process may have been quicker
                beside.rename(self.path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        trim(limit(), keep=self.path)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def trim(most: int, keep: Path | None = None) -> None:
    """Remove what has not been used for longest until at most `most` bytes are kept, and what killed runs left."""
    for stale in cache_dir().glob("*/.*-*"):
        if not _alive(stale.name.rpartition("-")[2]):
            shutil.rmtree(stale, ignore_errors=True)
    for journal in cache_dir().glob("*/*.jsonl"):
        with contextlib.suppress(OSError):
            if journal.stat().st_mtime < time.time() - _ABANDONED:
                journal.unlink()
    found = sorted(_entries(), key=lambda e: e.used)
    total = sum(e.nbytes for e in found)
    for entry in found:
        if total <= most:
            break
        if entry.path != keep:
            shutil.rmtree(entry.path, ignore_errors=True)
            total -= entry.nbytes


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    nbytes: int
    used: float


def _entries() -> Iterator[_Found]:
    for index in cache_dir().glob(f"*/*/{_INDEX}"):
        folder = index.parent
        with contextlib.suppress(OSError):  # another process may remove it meanwhile
            yield _Found(folder, sum(f.stat().st_size for f in folder.iterdir()), folder.stat().st_mtime)


def _facts(path: Path) -> tuple[int, str]:
    """(bytes, sha256) of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:  # there, and of another user
        return True
    return True


class Journal(MutableMapping[str, Any]):
    """Values by name, kept one line each as they come: a run that is killed loses at most the last.

    Plain values only. A line that is damaged or was cut off counts as never written. Where nothing can be written it
    is a dictionary.
    """

    def __init__(self, kind: str, key: str) -> None:
        self.path = cache_dir() / kind / f"{key}.jsonl"
        self._values = dict(_lines(self.path))

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value
        if not limit():
            return
        text = json.dumps([name, value])
        with contextlib.suppress(OSError):  # a cache that cannot be written makes nothing wrong, only slow
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # first a line's end: the last writer may have been killed within its line
                file.write(f"\n{zlib.crc32(text.encode()):08x} {text}\n")

    def __delitem__(self, name: str) -> None:
        raise TypeError("a journal forgets nothing")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def remove(self) -> None:
        """Forget the file; the values stay."""
        self.path.unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        check, _, text = line.partition(b" ")
        if check == f"{zlib.crc32(text):08x}".encode() and text:
            name, value = json.loads(text)
            yield name, value
