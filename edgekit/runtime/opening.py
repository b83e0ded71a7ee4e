"""Which engine runs what a user typed: an artefact folder, a .gguf, an .onnx, a folder of onnxruntime-genai.

Knows names and first bytes; knows neither engine from the inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgekit.artifact import MANIFEST, model_file, open_artifact
from edgekit.errors import EdgekitError
from edgekit.gguf_file import open_gguf
from edgekit.runtime import Session

DEFAULT_CONTEXT = 4096
"""Tokens of context where nobody chose a number."""


def open_session(
    ref: str | Path,
    *,
    n_ctx: int | None = None,
    threads: int | None = None,
    embeddings: bool | None = None,
    pooling: str | None = None,
    providers: Sequence[str] | None = None,
) -> Session:
    """Open `ref` with the engine that its format needs.

    `n_ctx` None: what an ONNX artefact was planned for, else 4096 tokens or as many as the model was trained with if
    those are fewer; 0: all of them. `threads` None: the cores worth using. `embeddings` None: encoders give vectors,
    all others text. `pooling` is for GGUF, `providers` for ONNX (names as in targets; None: the
    artefact's own; what cannot be had is noted).
    Raises EdgekitError, MissingExtra, CorruptCheckpoint, RuntimeFailed.
    """
    path = model_file(ref)
    if engine_of(path) == "onnx":
        if pooling is not None:
            raise EdgekitError("pooling= is for GGUF", "an ONNX model is pooled as the files beside it say")
        from edgekit.runtime import onnxruntime

        return onnxruntime.open_session(
            path,
            n_ctx=n_ctx,
            threads=threads,
            providers=_planned_providers(ref) if providers is None else providers,
            embeddings=embeddings is True,
        )
    if providers is not None:
        raise EdgekitError("providers= is for ONNX", "a GGUF runs where llama.cpp was built for")
    from edgekit.runtime import llama_cpp

    encoder, trained = _kind_of(path)
    size = min(DEFAULT_CONTEXT, trained or DEFAULT_CONTEXT) if n_ctx is None else n_ctx
    wanted = encoder if embeddings is None else embeddings
    return llama_cpp.open_session(path, n_ctx=size, threads=threads, embeddings=wanted, pooling=pooling)


def _planned_providers(ref: str | Path) -> tuple[str, ...] | None:
    """What the artefact was made to run on; None where no manifest says, or it is the CPU alone."""
    root = Path(ref)
    if not (root / MANIFEST).is_file():
        return None
    said = open_artifact(root).manifest.get("providers")
    names = tuple(name for name in said if isinstance(name, str)) if isinstance(said, list) else ()
    return names if set(names) - {"CPU"} else None


def engine_of(path: Path) -> str:
    """`gguf` or `onnx`, for a file that `model_file` gave: by its name, which for a GGUF its first bytes bear out."""
    return "onnx" if path.suffix == ".onnx" else "gguf"


def _kind_of(path: Path) -> tuple[bool, int]:
    """(whether a GGUF is an encoder, the context it was trained with or 0). Raises CorruptCheckpoint, RuntimeFailed."""
    file = open_gguf(path)
    arch = file.get("general.architecture")
    trained = file.get(f"{arch}.context_length")
    return file.get(f"{arch}.attention.causal") is False, trained if isinstance(trained, int) and trained > 0 else 0
