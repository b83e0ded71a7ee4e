"""What an evaluation is asked for and what it answers. Runs nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgekit import flips, pipeline
from edgekit.flips import Flips, Prompt
from edgekit.quality import Comparison
from edgekit.similarity import Agreement
from edgekit.tasks import Score


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured, and on what. None = the default.

    `prompts` None: no answers are compared. `save`: a file for the reference's predictions. `floor`: whether the
    noise floor is measured.
    """

    text: Path | None = None
    chunks: int | None = None
    n_ctx: int | None = None
    threads: int | None = None
    floor: bool = True
    save: Path | None = None
    prompts: tuple[Prompt, ...] | None = None
    answer_tokens: int = flips.MAX_TOKENS
    tasks: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Floor:
    """The divergence that is there although the weights are the same: what lies below cannot be told from nothing."""

    method: str
    kl_mean: float
    kl_stderr: float
    top1: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """Everything measured. `kind`: the reference is a `model` or was `stored`; sizes are of the files, bytes.

    A language model has a `comparison`, an encoder `embeddings` instead. `jitter` is the floor of the artefact itself:
    how far it is from itself when the same text is read in small batches. `flips`, `floor`, `jitter` and
    `reference_tasks` are None or empty where they were not wanted or cannot be had; `notes` say why.
    """

    artifact: str
    reference: str
    kind: str
    text: str
    nbytes: int
    reference_nbytes: int | None
    comparison: Comparison | None
    floor: Floor | None = None
    jitter: Floor | None = None
    flips: Flips | None = None
    tasks: tuple[Score, ...] = ()
    reference_tasks: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()
    embeddings: Agreement | None = None
    engine: str = "gguf"

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the versions that took part."""
        found = asdict(replace(self, flips=None))
        more = ("llama-cpp-python", *(("onnxruntime", "onnxruntime-genai") if self.engine == "onnx" else ()))
        changed = self.flips.as_json() if self.flips else None
        return found | {"flips": changed, "versions": pipeline.versions(more)}
