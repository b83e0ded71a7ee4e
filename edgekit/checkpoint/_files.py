"""The small files of a model's folder, read with suspicion: JSON, the model card, names, links."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from edgekit.errors import CorruptCheckpoint


def inside(root: Path, name: str) -> Path:
    """`root / name`, if that stays in the folder. A link may only lead into the blobs of a hub cache."""
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or "\0" in name:
        raise CorruptCheckpoint(f"{root}: {name!r} points outside the folder")
    if not path.is_file():
        raise CorruptCheckpoint(f"{root}: {name} is missing", "fetch it again; a download was perhaps cut short")
    # one step only: the hub library itself may link a blob on, into a store that its repositories share
    step = Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path
    if step.parent.name == "blobs" and step.parent.parent.name.startswith("models--"):
        return path
    if not path.resolve().is_relative_to(root.resolve()):
        raise CorruptCheckpoint(
            f"{path} is a link that leads outside the folder, to {path.resolve()}", "copy the file itself"
        )
    return path


_MAX_JSON_BYTES = 64 << 20  # an index of 100,000 tensors has about 10 MB


def read_json(root: Path, name: str) -> dict[str, Any]:
    """A JSON object out of a file of the model's folder."""
    path = inside(root, name)
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptCheckpoint(f"{path} has {path.stat().st_size} bytes; more than any {name} needs")
        parsed = json.loads(path.read_bytes())
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise CorruptCheckpoint(f"{path} is not JSON: {e}") from None
    if not isinstance(parsed, dict):
        raise CorruptCheckpoint(f"{path} holds a JSON {type(parsed).__name__}, not an object")
    return parsed


_MAX_CARD_BYTES = 1 << 20


def read_card(root: Path) -> dict[str, Any]:
    """The front matter of README.md: `key: value` and lists of plain values. Anything nested is left out."""
    if not (root / "README.md").is_file():
        return {}
    try:
        with inside(root, "README.md").open("rb") as file:
            lines = file.read(_MAX_CARD_BYTES).decode("utf-8-sig", "replace").splitlines()
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {root / 'README.md'}: {e.strerror}") from None
    if not lines or lines[0].rstrip() != "---":
        return {}
    out: dict[str, Any] = {}
    key = ""
    for line in lines[1:]:
        if line.rstrip() == "---":
            return out
        item = re.fullmatch(r"\s*-\s+([^:]+|\S+:\S.*)", line)
        pair = re.fullmatch(r"([A-Za-z_][\w-]*):(?:\s+(.*))?", line)
        if pair:
            key, value = pair[1], (pair[2] or "").strip()
            out.pop(key, None)
            if value and value[0] not in "|>{&*!":
                out[key] = _yaml_value(value)
        elif item and isinstance(out.setdefault(key, []), list):
            out[key].append(_yaml_scalar(item[1]))
    return {}  # never closed: not front matter


def _yaml_value(text: str) -> str | list[str]:
    if text.startswith("[") and text.endswith("]"):
        return [_yaml_scalar(part) for part in text[1:-1].split(",") if part.strip()]
    return _yaml_scalar(text)


def _yaml_scalar(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return re.sub(r"\s+#.*$", "", text)


def is_snapshot(root: Path) -> bool:
    root = root.absolute()
    return root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")


def file_name(name: str) -> str:
    """`name` with nothing in it that a file system or a shell could mind."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
