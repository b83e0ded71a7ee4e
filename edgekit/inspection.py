"""What a GGUF file holds, read from its header: nothing is loaded and no runtime is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgekit.gguf_file import GgufFile, open_gguf, plain
from edgekit.quant import presets


@dataclass(frozen=True, slots=True)
class Inspection:
    """A header and what follows from it. `path` as the user gave it."""

    file: GgufFile
    nbytes: int

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def parameters(self) -> int:
        return sum(prod(t.shape) for t in self.file.tensors.values())

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.file.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / self.parameters if self.parameters else 0.0

    @property
    def bytes_by_format(self) -> dict[str, tuple[int, int]]:
        """Format -> (tensors, bytes), largest first."""
        count: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for t in self.file.tensors.values():
            count[t.type] += 1
            size[t.type] += t.nbytes
        return {name: (count[name], n) for name, n in size.most_common()}

    @property
    def preset(self) -> str:
        """The preset that `general.file_type` names, or what it says where that is none."""
        number = self.file.get("general.file_type")
        return next((p.name for p in presets.PRESETS.values() if p.file_type == number), f"unknown ({number})")

    def metadata(self, *, longest: int = 8) -> dict[str, Any]:
        """Plain values; an array longer than `longest` becomes its length and first items."""
        return {key: _short(plain(value), longest) for key, value in self.file.metadata.items()}

    def as_json(self, *, tensors: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {
            "file": self.path.name,
            "bytes": self.nbytes,
            "version": self.file.version,
            "preset": self.preset,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "formats": {k: {"tensors": n, "bytes": b} for k, (n, b) in self.bytes_by_format.items()},
            "metadata": self.metadata(),
        }
        if tensors:
            found["tensors"] = [
                {"name": t.name, "shape": list(t.shape), "format": t.type, "bytes": t.nbytes, "offset": t.offset}
                for t in self.file.tensors.values()
            ]
        return found


def inspect(path: Path) -> Inspection:
    """Read the header of `path`. Raises CorruptCheckpoint."""
    return Inspection(open_gguf(path), path.stat().st_size)


def _short(value: Any, longest: int) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [_short(v, longest) for v in value[:longest]]
        return items if len(value) <= longest else {"length": len(value), "first": items}
    if isinstance(value, Mapping):
        return dict(value)
    return value
