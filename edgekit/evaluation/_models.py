"""The two models of an evaluation, whichever engine runs them: what they are, how they are opened, how big they are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgekit import artifact, pipeline, reference, verification
from edgekit import quality as stored_quality
from edgekit.errors import EdgekitError, UnsupportedModel, UnsupportedVocabulary
from edgekit.gguf_file import open_gguf
from edgekit.host import usable_cores
from edgekit.onnx_file import open_onnx
from edgekit.planning import Plan
from edgekit.quality import Stored
from edgekit.reference import CompactReference
from edgekit.runtime import Session
from edgekit.runtime.llama_cpp import POOLING
from edgekit.runtime.opening import engine_of, open_session
from edgekit.target import Target
from edgekit.units import Progress

_GENAI = "genai_config.json"


@dataclass(frozen=True)
class Model:
    """A model that can be run. `plan`: its tensors as a checkpoint, where they are not quantized and llama.cpp runs it.

    `trained`: tokens of context, 0 unknown. `n_vocab` None: only the open model tells. `nbytes`: graph and weights.
    """

    name: str
    path: Path
    encoder: bool
    nbytes: int
    trained: int = 0
    n_vocab: int | None = None
    plan: Plan | None = None
    precision: str = ""

    @property
    def engine(self) -> str:
        """`gguf` or `onnx`."""
        return engine_of(self.path)

    def open(self, n_ctx: int | None, threads: int | None) -> Session:
        """With room for `n_ctx` tokens; an encoder for vectors, with its own limit."""
        if not self.encoder:
            return open_session(self.path, n_ctx=n_ctx, threads=threads)
        size = min(n_ctx or ENCODER_CONTEXT, self.trained or ENCODER_CONTEXT)
        return open_session(self.path, n_ctx=size if self.engine == "gguf" else None, threads=threads)


ENCODER_CONTEXT = 512
"""Tokens of the longest text that an encoder is opened for: sentences are far shorter."""


def look(path: Path, name: str | None = None, plan: Plan | None = None, precision: str = "") -> Model:
    """What a model file says about itself, from headers only. Raises CorruptCheckpoint, RuntimeFailed."""
    if engine_of(path) == "onnx":
        return _look_onnx(path, name)
    file = open_gguf(path)
    arch = file.get("general.architecture")
    trained = file.get(f"{arch}.context_length")
    encoder = file.get(f"{arch}.pooling_type") is not None or file.get(f"{arch}.attention.causal") is False
    return Model(
        name or path.name, path, encoder, path.stat().st_size, trained if isinstance(trained, int) else 0,
        len(file.get("tokenizer.ggml.tokens", ())), plan, precision,
    )  # fmt: skip


def _look_onnx(path: Path, name: str | None) -> Model:
    from edgekit.runtime._ort_cache import takes_cache
    from edgekit.runtime._ort_folder import cached_facts, decoder_facts, find
    from edgekit.runtime._ort_pair import takes_states

    graph = open_onnx(path)
    if takes_states(graph):
        raise EdgekitError(
            f"{find(path).root.name} reads one text and writes another: a text alone has no perplexity to it",
            "edgekit certify ARTIFACT --against MODEL --level full measures the divergence of what it writes",
        )
    nbytes = path.stat().st_size + sum(file.stat().st_size for file in graph.external_files().values())
    folder = find(path)
    if folder.genai is None and not takes_cache(graph):
        return Model(name or folder.root.name, path, True, nbytes)
    facts = cached_facts(folder, graph) if folder.genai is None else decoder_facts(folder)
    return Model(name or folder.root.name, path, False, nbytes, facts.context, facts.n_vocab)


def candidate_of(ref: str | Path) -> Model:
    """The model that is evaluated: an artefact, a .gguf, an .onnx."""
    return look(artifact.model_file(ref))


def stored_predictions(path: Path) -> Stored | CompactReference | None:
    """Stored predictions, by the first bytes of the file; None for anything else."""
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError:
        return None
    if magic[:4] == b"PK\3\4":
        return reference.open_reference(path)
    if magic[:4] == b"GGUF" or path.suffix == ".onnx":
        return None
    return stored_quality.open_stored(path)


@contextmanager
def reference_for(
    against: str | Path, candidate: Model, *, beside: int | None, threads: int | None, progress: Progress
) -> Iterator[Model]:
    """The reference as a file on disk; one that had to be made is removed afterwards.

    `beside`: bytes of what is in memory with it; None: the candidate. A checkpoint becomes a GGUF in its own precision,
    for an ONNX candidate in F32: its graph computes in float32, and rounding of the reference's activations to 16 bits
    is nothing that it lost.
    """
    path = Path(against)
    if _is_made(path):
        file = artifact.model_file(path)
        yield look(file, path.name, _plan_of(file) if engine_of(file) == "gguf" else None)
        return
    source = pipeline.open_source(against, progress=progress)
    plan = _unquantised_plan(source)
    precision = "F32" if candidate.engine == "onnx" else verification.source_precision(plan)
    with verification.unquantised(
        work_folder(candidate.path), plan, threads=threads or usable_cores(), preset=precision,
        beside=candidate.nbytes if beside is None else beside, progress=progress,
    ) as made:  # fmt: skip
        yield look(made, source.checkpoint.name, plan, precision)


def _is_made(path: Path) -> bool:
    """Whether this is something that runs as it is, and not a checkpoint."""
    if path.suffix in (".gguf", ".onnx") or not path.is_dir():
        return path.suffix in (".gguf", ".onnx")
    made = (path / artifact.MANIFEST).is_file() or (path / _GENAI).is_file()
    return made or not (path / "config.json").is_file()


def _plan_of(path: Path) -> Plan | None:
    try:
        return _unquantised_plan(pipeline.open_source(path))
    except (UnsupportedModel, UnsupportedVocabulary):
        return None


def _unquantised_plan(source: pipeline.Source) -> Plan:
    # a named preset, since nothing is chosen here: what is used of it are the tensors, not their formats
    return pipeline.plan_source(source, Target.load("host"), pipeline.Options(quant="F16", context=ENCODER_CONTEXT))


def work_folder(path: Path) -> Path:
    """Beside the model, since /tmp may be memory; elsewhere when that cannot be written."""
    folder = path.absolute().parent
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def must_compare(model: Model) -> None:
    """Raise EdgekitError for a GGUF that scores: `similarity` knows vectors alone."""
    if model.engine != "gguf":
        return
    file = open_gguf(model.path)
    if file.get(f"{file.get('general.architecture')}.pooling_type") == POOLING["rank"]:
        raise EdgekitError(
            f"{model.name} is a classifier: eval compares predictions and vectors, not scores",
            "edgekit certify proves it against the model that it was made from",
        )


def same_kind(candidate: Model, other: Model) -> None:
    """Raise EdgekitError unless both predict tokens or both make vectors."""
    if candidate.encoder != other.encoder:
        encoder = candidate if candidate.encoder else other
        raise EdgekitError(f"{encoder.name} is an encoder: it predicts no tokens", "compare models of one kind")
