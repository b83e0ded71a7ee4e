"""A folder as transformers saves it: config, card, safetensors in one file or in shards with an index."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgekit.checkpoint._files import file_name, inside, is_snapshot, read_card, read_json
from edgekit.checkpoint._float8 import fold_scales
from edgekit.checkpoint._model import Checkpoint, Source
from edgekit.checkpoint._quantised import declared_float8
from edgekit.checkpoint._tensor import TensorRef, dominant
from edgekit.errors import CorruptCheckpoint, UnsupportedModel
from edgekit.safetensors_file import SafetensorsFile, open_safetensors

PICKLES = (".bin", ".pt", ".pth", ".ckpt")

TO_SAFETENSORS = (
    'where torch is and the file is trusted: python -c "import glob, torch, safetensors.torch as s; '
    "w = {k: v.contiguous().clone() for f in sorted(glob.glob('*.bin') + glob.glob('*.pt*')) "
    "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}; s.save_file(w, 'model.safetensors')\""
)

SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.(?:safetensors|gguf)")


def open_folder(root: Path, ref: str) -> Checkpoint:
    try:
        names = {p.name for p in root.iterdir()}
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {root}: {e.strerror}") from None
    refuse_other(root, names, str(root))
    card = read_card(root)
    config = read_json(root, "config.json")
    declared = declared_float8(root, config, card, str(root))
    weight_files, weight_map = _weight_files(root)
    opened = [open_safetensors(inside(root, name)) for name in weight_files]
    found = fold_scales(_collect(opened, weight_map), declared)
    if not found:
        raise CorruptCheckpoint(f"{root}: the safetensors files hold no tensor")
    sources = tuple(
        Source(f.path, f.size, f.data_start, tuple((e.start, e.stop) for e in f.entries.values())) for f in opened
    )
    return Checkpoint(
        ref=ref,
        root=root,
        name=_folder_name(root, config),
        kind="safetensors",
        config=config,
        tensors=found,
        dtype=dominant(found.values()),
        card=card,
        revision=root.name if is_snapshot(root) else None,
        sources=sources,
    )


def refuse_other(root: Path, names: set[str], where: str) -> None:
    """UnsupportedModel for a folder or repository, `names` in it, that is not a model in safetensors."""
    weights = {n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_")}
    pickles = sorted(n for n in names if n.endswith(PICKLES) and n != "training_args.bin")
    ggufs = sorted(n for n in names if n.endswith(".gguf"))
    if "adapter_config.json" in names and not weights:
        base = read_json(root, "adapter_config.json").get("base_model_name_or_path") or "BASE_MODEL"
        hint = f"merge it into {base} first (peft: merge_and_unload, then save_pretrained) and convert the result"
        raise UnsupportedModel(f"{where} is a LoRA adapter, not a model", hint)
    if pickles and not weights:
        made = f"the hub offers safetensors of many models as a pull request: try {where}@refs/pr/1; or "
        raise UnsupportedModel(
            f"{where} has only pickles ({pickles[0]}), which can run any code when they are opened",
            (made if is_snapshot(root) else "") + TO_SAFETENSORS,
        )
    if ggufs and not weights:
        hint = f"download one and name the file, such as {ggufs[0]}"
        raise UnsupportedModel(f"{where} holds GGUF files, not a Hugging Face model", hint)
    if "config.json" not in names:
        hint = "a model folder as transformers saves it has config.json, tokenizer files and *.safetensors"
        if "params.json" in names:
            hint = "Mistral's own layout: take the repository's files in the transformers layout"
        raise UnsupportedModel(f"{where} has no config.json", hint)


def _weight_files(root: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and the index if there is one. In transformers' order: one file, an index, all."""
    names = sorted(p.name for p in root.glob("*.safetensors"))
    if "model.safetensors" in names:
        return ["model.safetensors"], None
    indices = sorted(p.name for p in root.glob("*.safetensors.index.json"))
    if indices:
        index = "model.safetensors.index.json"
        weight_map = _weight_map(root, index if index in indices else indices[0])
        return sorted(set(weight_map.values())), weight_map
    if not names:
        raise UnsupportedModel(f"{root} has no *.safetensors file", "was the download finished?")
    missing = _missing_shards(names)
    if missing:
        raise CorruptCheckpoint(f"{root}: {missing} is missing", "fetch it again; a download was perhaps cut short")
    return names, None


def _missing_shards(names: list[str]) -> str:
    """The first file that `...-00001-of-00003.safetensors` and its like promise and that is not there."""
    for name in names:
        match = SHARD.fullmatch(name)
        for i in range(1, int(match[3]) + 1) if match else ():
            assert match
            promised = f"{match[1]}-{i:05}-of-{match[3]}.safetensors"
            if promised not in names:
                return promised
    return ""


def _weight_map(root: Path, index: str) -> dict[str, str]:
    weight_map = read_json(root, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptCheckpoint(f"{root / index}: weight_map is not a table of tensor names and file names")
    return weight_map


def _collect(opened: Iterable[SafetensorsFile], weight_map: Mapping[str, str] | None) -> dict[str, TensorRef]:
    """Every tensor of every shard; shards and index must agree both ways."""
    out: dict[str, TensorRef] = {}
    for shard in opened:
        stamp = (shard.size, shard.mtime_ns)
        for name, e in shard.entries.items():
            if name in out:
                raise CorruptCheckpoint(f"{shard.path}: tensor {name} is also in {out[name].file.name}")
            if weight_map is not None and name not in weight_map:
                raise CorruptCheckpoint(f"{shard.path}: tensor {name} is not in the index")
            out[name] = TensorRef(name, e.shape, e.dtype, e.stop - e.start, shard.path, e.start, stamp)
    for name, file in (weight_map or {}).items():
        if name not in out:
            raise CorruptCheckpoint(f"{file} has no tensor {name}, which the index places there", "fetch it again")
        if out[name].file.name != Path(file).name:
            raise CorruptCheckpoint(
                f"tensor {name} is in {out[name].file.name}, the index says {file}", "fetch it again"
            )
    return out


def _folder_name(root: Path, config: Mapping[str, Any]) -> str:
    root = Path(os.path.normpath(root.absolute()))
    if is_snapshot(root):
        return file_name(root.parent.parent.name.rpartition("--")[2])
    return file_name(root.name or str(config.get("_name_or_path", "")).rpartition("/")[2])
