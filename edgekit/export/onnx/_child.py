"""An exporter in a process of its own: what it prints is followed, its last lines are kept for when it fails.

Knows processes and the files that travel with a model; knows no exporter.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgekit.checkpoint._files import inside
from edgekit.errors import RuntimeFailed

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
"""For every exporter's environment: no hub, no word to Microsoft."""

CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files that go beside a decoder's graph as the model has them: exporters' copies are written anew by transformers."""

_LAST = 12


def carry(root: Path, folder: Path) -> None:
    """Copy what of CARRIED the model in `root` has. Raises CorruptCheckpoint for a link out of its folder."""
    for name in CARRIED:
        if (root / name).is_file():
            shutil.copyfile(inside(root, name), folder / name)


def follow(
    command: Sequence[str | Path], environment: Mapping[str, str], understood: Callable[[str], bool]
) -> tuple[int, Sequence[str]]:
    """Run `command` to its end -> (status, its last lines). `understood` is given every line it prints and says whether
    that was news of its progress, which is not worth keeping."""
    last: deque[str] = deque(maxlen=_LAST)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    ) as child:
        try:
            for line in child.stdout or ():
                if not understood(line) and line.strip():
                    last.append(line.rstrip())
            status = child.wait()
        finally:
            child.kill()  # Ctrl-C; nothing if it has ended
    return status, last


def failure(who: str, verb: str, name: str, size: str, status: int, said: Sequence[str]) -> RuntimeFailed:
    """The error for `who`, which was to `verb` (build, export) the model `name` and ended with `status`; `size` says
    how large that model is."""
    if status == -signal.SIGKILL:  # on Linux nearly always the kernel, out of memory
        return RuntimeFailed(
            f"{who} was killed while {verb}ing {name}, {size}", "free some memory, or use a machine with more"
        )
    why = said[-1] if said else f"status {status}"
    return RuntimeFailed(f"{who} could not {verb} {name}: {why}", "it said:\n" + "\n".join(said))
