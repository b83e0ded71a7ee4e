"""A GGUF with 16- or 32-bit weights as a checkpoint, whole or split."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.checkpoint._files import file_name
from edgekit.checkpoint._folder import SHARD
from edgekit.checkpoint._model import Checkpoint, Source
from edgekit.checkpoint._quantised import quantised
from edgekit.checkpoint._tensor import TensorRef, dominant
from edgekit.errors import CorruptCheckpoint, UnsupportedModel
from edgekit.gguf_file import GgufFile, open_gguf

_GGUF_DTYPES = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}


def open_gguf_model(path: Path, ref: str) -> Checkpoint:
    parts = [open_gguf(p) for p in _gguf_parts(path)]
    whole = _without_split(parts)
    tensors: dict[str, TensorRef] = {}
    for part in parts:
        stat = part.path.stat()
        for info in part.tensors.values():
            if info.type not in _GGUF_DTYPES:
                raise quantised(str(part.path), f"tensor {info.name} is {info.type}", {})
            if info.name in tensors:
                raise CorruptCheckpoint(f"{part.path}: tensor {info.name} is also in {tensors[info.name].file.name}")
            stamp = (stat.st_size, stat.st_mtime_ns)
            ref_ = TensorRef(info.name, info.shape, info.type, info.nbytes, part.path, info.offset, stamp)
            tensors[info.name] = ref_
    if not tensors:
        raise UnsupportedModel(f"{path} has no tensors: a vocabulary only", "name a GGUF with weights")
    return Checkpoint(
        ref=ref,
        root=path.parent,
        name=_gguf_name(whole),
        kind="gguf",
        config={},
        tensors=tensors,
        dtype=dominant(tensors.values()),
        gguf=whole,
        card=_gguf_card(whole),
        sources=tuple(_gguf_source(p) for p in parts),
    )


def _gguf_parts(path: Path) -> list[Path]:
    """All files of a split GGUF, in order; just `path` for one that is whole."""
    match = SHARD.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match[3])
    if not 1 <= count <= 10_000:
        raise CorruptCheckpoint(f"{path}: {count} parts")
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise CorruptCheckpoint(f"{part} is missing", f"all {count} parts have to lie beside {path.name}")
    return parts


def _without_split(parts: list[GgufFile]) -> GgufFile:
    """The first part with the keys of gguf-split checked and gone, so that metadata can go into one new file."""
    first = parts[0]
    for number, part in enumerate(parts):
        count, at = part.get("split.count", 1), part.get("split.no", 0)
        if count != len(parts) or at != number:
            raise CorruptCheckpoint(
                f"{part.path}: its name says part {number} of {len(parts)}, its metadata {at} of {count}"
            )
    found = sum(len(part.tensors) for part in parts)
    announced = first.get("split.tensors.count", found)
    if announced != found:
        raise CorruptCheckpoint(f"{first.path}: the parts hold {found} tensors, {announced} are announced")
    return replace(first, metadata={k: v for k, v in first.metadata.items() if not k.startswith("split.")})


def _gguf_source(file: GgufFile) -> Source:
    spans = tuple((t.offset, t.offset + t.nbytes) for t in file.tensors.values())
    return Source(file.path, file.path.stat().st_size, file.data_start, spans)


def _gguf_name(file: GgufFile) -> str:
    for key in ("general.name", "general.basename"):
        name = file.get(key)
        if isinstance(name, str) and name.strip():
            return file_name(name)
    stem = SHARD.sub(r"\1", file.path.name).removesuffix(".gguf")
    return file_name(re.sub(r"[-._](?:BF16|F16|F32)$", "", stem, flags=re.IGNORECASE))


def _gguf_card(file: GgufFile) -> dict[str, Any]:
    """License and origin out of `general.*`, under the names a model card has for them."""
    keys = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
        "tags": "general.tags",
        "language": "general.languages",
    }
    card = {name: file.get(key) for name, key in keys.items() if file.get(key)}
    url = file.get("general.base_model.0.repo_url")
    if isinstance(url, str) and url:
        card["base_model"] = url.removeprefix("https://huggingface.co/")
    return card
