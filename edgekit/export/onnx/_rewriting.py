"""What every rewriting of a float32 graph does alike: the files, what is left over, the report.

Knows the data file and what stays in it; knows no number format's arithmetic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgekit.artifact import readable_os_errors
from edgekit.errors import OutputExists
from edgekit.export.onnx._matrices import readers
from edgekit.export.onnx._tensors import FLOAT, DataFile, tensors_of
from edgekit.quant.nbits import NBits
from edgekit.units import Progress

if TYPE_CHECKING:
    from onnx import ModelProto

_LARGE = 1 << 20  # float32 tensors from here on are reported


@dataclass(frozen=True, slots=True)
class Quantised:
    """A node that reads quantised weights. `shape`: (outputs, inputs) or (entries, width); `error`: |w - q| / |w|;
    `shares`: the node whose bytes it reads too."""

    node: str
    op: str
    shape: tuple[int, int]
    fmt: NBits
    error: float
    shares: str | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """A float32 tensor above 1 MiB that was not quantised."""

    name: str
    nbytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """`data_bytes`: size of the data file; `graph_bytes`: of the graph beside it. `encoder`: what was done to the other
    graph, where this is the decoder of a pair."""

    graph: Path
    data: Path
    nodes: tuple[Quantised, ...]
    left: tuple[Left, ...]
    data_bytes: int
    graph_bytes: int
    encoder: Report | None = None


class Rewriting(ABC):
    """One run over a graph. `nodes` and `left` are for the report; `made`: names of tensors written so far; `reasons`:
    why a tensor stays float32, by its name."""

    def __init__(self, model: ModelProto, source: Path, progress: Progress) -> None:
        self.model, self.source, self.progress = model, source, progress
        self.nodes: list[Quantised] = []
        self.left: list[Left] = []
        self.reasons: dict[str, str] = {}
        self.made: set[str] = set()

    @abstractmethod
    def write(self, file: BinaryIO, location: str) -> None:
        """Write the data into `file`, which the graph will call `location`, and rewrite the graph."""

    def copy_rest(self, out: DataFile) -> None:
        """Move every tensor that was not quantised into the data file, small ones into the graph."""
        for tensor in tensors_of(self.model.graph):
            if tensor.name in self.made:
                continue
            size = out.take(tensor, self.source.parent)
            if size > _LARGE and tensor.data_type == FLOAT:
                reason = f"read by {readers(self.model.graph, tensor.name)}, which has no quantised form"
                self.left.append(Left(tensor.name, size, self.reasons.get(tensor.name, reason)))


def run(work: Rewriting, out: Path) -> Report:
    """Do the work, into `out` and its data file; neither is left behind when it fails. Raises OutputExists."""
    data = out.with_name(out.name + ".data")
    for path in (out, data):
        if path.exists():
            raise OutputExists(f"{path} exists", "write to an empty folder")
    with readable_os_errors(out):
        try:
            with data.open("xb") as file:
                work.write(file, data.name)
            out.write_bytes(work.model.SerializeToString())
        except BaseException:
            data.unlink(missing_ok=True)
            out.unlink(missing_ok=True)
            raise
    return Report(out, data, tuple(work.nodes), tuple(work.left), data.stat().st_size, out.stat().st_size)
