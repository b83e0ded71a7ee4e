"""One HTML page about artefacts: opens from disk, asks no network, runs no script.

Knows how facts become a page; measures nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from edgekit.artifact import readable_os_errors
from edgekit.errors import EdgekitError, OutputExists
from edgekit.report._facts import Facts, read_facts
from edgekit.report._page import MARK, page

__all__ = ["Facts", "page", "read_facts", "write"]


def write(artifacts: Sequence[Path], out: Path | None = None, *, force: bool = False) -> Path:
    """Write the page about `artifacts` to `out` (report.html in the first one) and return its path.

    A report that is there is replaced; another file only with `force`. Raises OutputExists, and what opening an
    artefact raises.
    """
    if not artifacts:
        raise EdgekitError("no artefact to report on", "edgekit report ARTIFACT")
    text = page([read_facts(folder) for folder in artifacts])
    out = out or artifacts[0] / "report.html"
    if out.is_dir():
        raise EdgekitError(f"{out} is a folder", f"--out {out / 'report.html'}")
    if out.exists() and not force and not _ours(out):
        raise OutputExists(f"{out} is no report of edgekit's", "choose another --out, or add --force")
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with readable_os_errors(out):
            beside.write_text(text, encoding="utf-8")
            beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return out


def _ours(path: Path) -> bool:
    with readable_os_errors(path), path.open("rb") as file:
        return MARK.encode() in file.read(400)
