"""What a model family calls its tensors, what each is for, and how each *output* tensor is made. One file a family.

Knows names, shapes, metadata and KV geometry; knows no number format and reads no weight before it is asked to.
A family is the module called like config.json's `model_type`, a dash as an underscore; it holds one `FAMILY`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit import shelf
from edgekit.arch._names import file_order, role_of
from edgekit.arch._types import Array, Blueprint, Config, Geometry, LayerGeometry, Made, Role
from edgekit.checkpoint import Checkpoint
from edgekit.errors import UnsupportedModel

if TYPE_CHECKING:
    from edgekit.arch._family import Family

__all__ = [
    "Array",
    "Blueprint",
    "Config",
    "Geometry",
    "LayerGeometry",
    "Made",
    "Role",
    "blueprint",
    "file_order",
    "find",
    "roles_of_name",
]

roles_of_name = role_of


def find(checkpoint: Checkpoint) -> Family:
    """The family of a safetensors checkpoint, by `model_type` and `architectures`. Raises UnsupportedModel."""
    kind, classes = checkpoint.config.get("model_type"), checkpoint.config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise UnsupportedModel(f"config.json: architectures is {classes!r}, expected a list of names")
    families = shelf.names(__name__)
    if kind is None and classes:
        kind = next((name for name in families if _offered(name).architectures[0] == classes[0]), None)
    if not isinstance(kind, str) or _module(kind) not in families:
        raise _unknown("model family", kind if isinstance(kind, str) else " ".join(classes) or "?", families)
    family = _offered(_module(kind))
    if classes and not set(classes) & set(family.architectures):
        error = _unknown(f"{kind} model class", classes[0], family.architectures)
        if other := next((name for name in families if classes[0] in _offered(name).architectures), None):
            error.hint = f"{classes[0]} belongs to model_type {other!r}: config.json contradicts itself"
        raise error
    return family


def blueprint(checkpoint: Checkpoint) -> Blueprint:
    """The checkpoint seen through its family, or a GGUF's own view of itself.

    Reads headers and config only (a tied output matrix that is stored all the same is compared with the embedding).
    Raises UnsupportedModel for anything that no table describes, CorruptCheckpoint where files contradict each other.
    """
    if checkpoint.kind == "gguf":
        from edgekit.arch._gguf import passed_through

        return passed_through(checkpoint)
    from edgekit.arch._family import build

    return build(find(checkpoint), checkpoint)


def _module(model_type: str) -> str:
    return model_type.replace("-", "_")


def _offered(name: str) -> Family:
    family: Family = shelf.take(__name__, name).FAMILY
    return family


def _unknown(what: str, name: str, known: list[str] | tuple[str, ...]) -> UnsupportedModel:
    error = shelf.unknown(what, name, known)
    known_ones = f"known: {', '.join(sorted(known))}"
    return UnsupportedModel(str(error), error.hint if known_ones in error.hint else f"{error.hint}; {known_ones}")
