"""A model on disk, opened by its headers: names, shapes, dtypes, config, card. Reads weights only when asked for some.

Knows no model family and no tokenizer.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from edgekit import hub
from edgekit.errors import CorruptCheckpoint, DownloadFailed, UnknownName, UnsupportedModel
from edgekit.gguf_file import GgufFile, open_gguf
from edgekit.safetensors_file import SafetensorsFile, open_safetensors
from edgekit.units import Progress, silent

Array = npt.NDArray[np.float32]

_STORED = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<u2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
}
_CHUNK = 1 << 18  # values converted at a time: fits a level-2 cache with its result, and bounds the memory beside it
_GGUF_DTYPES = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}


# --- tensors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scale:
    """What the values of an FP8 tensor are multiplied by: one factor for each `block` (rows, columns) of a matrix.

    `grid` is (matrices, block rows, block columns), the shape `tensor` is read in.
    """

    tensor: TensorRef
    grid: tuple[int, int, int]
    block: tuple[int, int]
    matrix_rows: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies. Nothing is read until `load` or `rows`; a call reads just its own bytes.

    `shape` in numpy order, `dtype` as safetensors spells it, `nbytes` as stored. Both calls raise CorruptCheckpoint
    when the file has changed since it was opened.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path = field(repr=False)
    start: int = field(repr=False)
    stamp: tuple[int, int] = field(repr=False, compare=False)
    scale: Scale | None = field(default=None, repr=False)

    @property
    def values(self) -> int:
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the tensor seen as 2-D: the last axis is the row; a scalar is (1, 1)."""
        return prod(self.shape[:-1]), self.shape[-1] if self.shape else 1

    def load(self) -> Array:
        """The whole tensor, float32, C-contiguous, `shape`."""
        return self.rows(0, self.matrix[0]).reshape(self.shape)

    def rows(self, start: int, stop: int) -> Array:
        """Rows start to stop of the 2-D view: float32 (stop - start, columns), C-contiguous."""
        n, cols = self.matrix
        if not 0 <= start <= stop <= n:
            raise IndexError(f"{self.name}: rows {start}:{stop} of {n}")
        out = np.empty((stop - start, cols), np.float32)
        with self._open() as fd:
            _read_values(self, fd.number, start * cols, out.reshape(-1))
        if self.scale:
            _apply_scale(self.scale, start, out)
        return out

    def _open(self) -> _Open:
        return _Open(self)


class _Open:
    """A file descriptor for as long as one read takes; refuses a file that is not the one opened before."""

    def __init__(self, ref: TensorRef) -> None:
        try:
            self.number = os.open(ref.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as e:
            raise CorruptCheckpoint(f"{ref.file}: tensor {ref.name} cannot be read: {e.strerror}") from None
        stat = os.fstat(self.number)
        if (stat.st_size, stat.st_mtime_ns) != ref.stamp:
            os.close(self.number)
            _changed(ref)

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.number)


def _changed(ref: TensorRef) -> NoReturn:
    raise CorruptCheckpoint(
        f"{ref.file} changed after it was opened; tensor {ref.name} is not safe to read", "start again"
    )


def _read_values(ref: TensorRef, fd: int, first: int, out: Array) -> None:
    """`out.size` values from value `first` on, as float32. 1-D `out`, filled in place."""
    stored = np.dtype(_STORED[ref.dtype])
    at = ref.start + first * stored.itemsize
    if ref.dtype == "F32":
        _fill(ref, fd, at, out)
        return
    raw = np.empty(min(_CHUNK, out.size), stored)
    for i in range(0, out.size, _CHUNK):
        part = out[i : i + _CHUNK]
        piece = raw[: part.size]
        _fill(ref, fd, at + i * stored.itemsize, piece)
        _to_float32(ref.dtype, piece, part)


def _fill(ref: TensorRef, fd: int, at: int, out: npt.NDArray[Any]) -> None:
    """Bytes from `at` on into `out`. By read, not by mmap: a file cut short must not kill the process."""
    if not out.size:
        return
    view = out.view(np.uint8).data
    done = 0
    try:
        while done < len(view):
            count = os.preadv(fd, [view[done:]], at + done)
            if not count:
                _changed(ref)
            done += count
    except OSError as e:
        raise CorruptCheckpoint(f"{ref.file}: tensor {ref.name} cannot be read: {e.strerror}") from None


def _to_float32(dtype: str, raw: npt.NDArray[Any], out: Array) -> None:
    if dtype == "BF16":
        bits = out.view(np.uint32)
        bits[:] = raw
        bits <<= 16
    elif dtype in {"F16", "F8_E4M3", "F8_E5M2"}:
        np.take(_table(dtype), raw, out=out, mode="clip")  # twice as fast as numpy's cast from float16
    else:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which the checks on values see
            out[:] = raw


@cache
def _table(dtype: str) -> Array:
    """Every value of a small float. E4M3 has no infinities (OCP FP8: bias 7, 0x7f is NaN), E5M2 is IEEE (bias 15)."""
    if dtype == "F16":
        with np.errstate(invalid="ignore"):  # signalling NaNs among them
            return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    exponent_bits, bias = (4, 7) if dtype == "F8_E4M3" else (5, 15)
    fraction_bits = 7 - exponent_bits
    out = np.empty(256, np.float32)
    for code in range(256):
        exponent = code >> fraction_bits & ((1 << exponent_bits) - 1)
        fraction = (code & ((1 << fraction_bits) - 1)) / (1 << fraction_bits)
        value = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        if dtype == "F8_E4M3" and code & 0x7F == 0x7F:
            value = float("nan")
        if dtype == "F8_E5M2" and exponent == 31:
            value = float("nan") if fraction else float("inf")
        out[code] = -value if code & 0x80 else value
    return out


def _apply_scale(scale: Scale, first: int, out: Array) -> None:
    """Multiply rows `first`... of the 2-D view, in place."""
    factors = scale.tensor.load().reshape(-1, scale.grid[2])
    height, width = scale.block
    at = first
    while at < first + len(out):
        matrix, row = divmod(at, scale.matrix_rows)
        stop = min(first + len(out), matrix * scale.matrix_rows + min((row // height + 1) * height, scale.matrix_rows))
        line = factors[matrix * scale.grid[1] + row // height]
        if height == 1 and len(line) == 1:  # a factor a row: all rows of this matrix at once
            stop = min(first + len(out), (matrix + 1) * scale.matrix_rows)
            out[at - first : stop - first] *= factors[at : at + stop - at]
        else:
            out[at - first : stop - first] *= np.repeat(line, width)[: out.shape[1]]
        at = stop


# --- FP8 scales ----------------------------------------------------------------------------------------------------

_ACTIVATION_SCALES = (
    ".input_scale",
    ".input_scale_ub",
    ".output_scale",
    "activation_scale",
    ".qscale_act",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
)


@dataclass(frozen=True, slots=True)
class _Float8:
    """What the config says of an FP8 checkpoint: the block one scale is for, None for whole rows or tensors."""

    block: tuple[int, int] | None


def _fold_scales(found: dict[str, TensorRef], declared: _Float8 | None) -> dict[str, TensorRef]:
    """FP8 tensors with their scale inside; scale tensors gone. Other checkpoints come back as they are.

    Scales are factors whatever they are called: `weight_scale_inv` (DeepSeek, Qwen FP8) is multiplied with, as
    `weight_scale` (compressed-tensors, fbgemm, ModelOpt) and `qscale_weight` (Mistral) are.
    """
    out = dict(found)
    eights = [ref for ref in found.values() if ref.dtype.startswith("F8")]
    for ref in eights:
        stem = ref.name.removesuffix("weight")
        scale = next(
            (s for s in (f"{ref.name}_scale_inv", f"{ref.name}_scale", f"{stem}qscale_weight") if s in out), ""
        )
        if scale:
            out[ref.name] = replace(ref, scale=_scale(ref, out.pop(scale), declared))
        elif declared:
            raise CorruptCheckpoint(f"{ref.file}: tensor {ref.name} is {ref.dtype} and has no scale beside it")
    if eights:
        for name in [n for n in out if n.endswith(_ACTIVATION_SCALES)]:
            del out[name]  # for activations and the KV cache: the runtime computes those in its own formats
    return out


def _scale(ref: TensorRef, scale: TensorRef, declared: _Float8 | None) -> Scale:
    rows, cols = ref.matrix
    height = ref.shape[-2] if len(ref.shape) > 1 else 1
    shape = scale.shape
    if scale.values == 1:
        return Scale(scale, (1, 1, 1), (max(rows, 1), cols), max(rows, 1))
    if len(shape) == len(ref.shape) - 1:
        shape = (*shape, 1)  # a factor a row
    if len(shape) == len(ref.shape) > 1 and shape[:-2] == ref.shape[:-2]:
        grid = (prod(shape[:-2]), shape[-2], shape[-1])
        for block in (declared.block if declared else None, (1, cols), (height, cols)):
            if block and grid[1:] == (-(-height // block[0]), -(-cols // block[1])):
                return Scale(scale, grid, block, height)
    stated = f", blocks of {declared.block}" if declared and declared.block else ""
    raise UnsupportedModel(f"{ref.file}: tensor {ref.name} {ref.shape} has scales of shape {scale.shape}{stated}")


# --- the checkpoint ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """What of a weight file goes into the digest."""

    path: Path
    size: int
    data_start: int
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Checkpoint:
    """A model opened by its headers. `tensors` are in file order; `dtype` is the one most weights are stored in.

    kind `safetensors`: `root` is the model's folder, `config` its config.json, `gguf` None. kind `gguf`: `root` is the
    folder of the file, `config` empty, the metadata in `gguf.metadata` (of a split file, the first part's, without its
    `split.` keys). `card` holds what the model card says in front (`license`, `base_model`, ...). `revision` is the
    commit of a hub download.
    """

    ref: str
    root: Path
    name: str
    kind: str
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorRef] = field(repr=False)
    dtype: str
    gguf: GgufFile | None = field(default=None, repr=False)
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)
    revision: str | None = None
    sources: tuple[_Source, ...] = field(default=(), repr=False)

    @property
    def parameters(self) -> int:
        """Number of weights: values of every floating-point tensor, FP8 scales not counted."""
        return sum(t.values for t in self.tensors.values() if "F" in t.dtype)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) that names this content, not its place: for work folders and manifests.

        Over the small files that decide a conversion (config, tokenizer, templates) in full, and of each weight file
        name, size, header, and 4 KiB out of the middle of every tensor. Any training step changes it; a single weight
        edited by hand may not. Folder, times and the model card do not count.
        """
        return _digest(self.root if self.kind == "safetensors" else None, self.sources)


SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Files beside the weights that a conversion reads."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TO_SAFETENSORS = (
    'where torch is and the file is trusted: python -c "import glob, torch, safetensors.torch as s; '
    "w = {k: v.contiguous().clone() for f in sorted(glob.glob('*.bin') + glob.glob('*.pt*')) "
    "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}; s.save_file(w, 'model.safetensors')\""
)


def open_checkpoint(ref: str | Path, *, revision: str | None = None, progress: Progress = silent) -> Checkpoint:
    """Open a folder, a `.gguf` file, `demo`, or a hub id `org/name[@revision]`, which is downloaded if it must be.

    Reads headers only. `progress` counts downloaded bytes. Raises CorruptCheckpoint (damaged or unsafe files),
    UnsupportedModel (pickles, adapters, weights quantised by others), DownloadFailed.
    """
    text, path = str(ref), Path(ref).expanduser()
    here = bool(text) and _exists(path)
    if revision and here:
        raise UnknownName(f"{text} is on this machine and has no revision {revision!r}", "leave the revision out")
    if text == "demo" and not here:
        return replace(_open_folder(_demo(), text), name="edgekit-demo")
    if not here:
        return _open_hub(text, revision, progress)
    return _open_folder(path, text) if path.is_dir() else _open_file(path, text)


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (OSError, ValueError):  # a name too long, a zero in it: not a file either
        return False
    return True


def _demo() -> Path:
    package = Path(str(files("edgekit")))
    for folder in (package / "_data" / "demo", package / "demo"):
        if (folder / "config.json").is_file():
            return folder
    raise CorruptCheckpoint("this installation has no demo model", "install edgekit from a wheel, or name a model")


def _open_hub(ref: str, revision: str | None, progress: Progress) -> Checkpoint:
    named = None if Path(ref).is_absolute() else hub.parse_id(ref)
    near = _near(Path(ref).expanduser())
    if not named:
        repo, _, file = ref.rpartition("/")
        if file.endswith(".gguf") and not near and hub.parse_id(repo):
            near = f"if it is on the hub: hf download {repo} {file} --local-dir ."
        raise UnknownName(f"no file or folder {ref!r}, and it is not a hub id like org/name[@revision]", near)
    repo = named[0]

    def refuse_early(root: Path, names: set[str]) -> None:
        _refuse_other(root, names, repo)
        _declared_float8(root, _read_json(root, "config.json"), _read_card(root), repo)

    try:
        root = hub.download(repo, revision or named[1], progress=progress, check=refuse_early)
    except DownloadFailed as e:
        raise DownloadFailed(str(e), "; ".join(filter(None, (near, e.hint)))) from None
    return _open_folder(root, ref)


def _near(path: Path) -> str:
    """A hint at a local file or folder of nearly that name."""
    try:
        names = [p.name for p in path.absolute().parent.iterdir() if p.is_dir() or p.suffix == ".gguf"]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean the local {str(path.with_name(close[0]))!r}?" if close else ""


def _open_file(path: Path, ref: str) -> Checkpoint:
    if path.suffix == ".gguf":
        return _open_gguf(path, ref)
    if path.suffix in _PICKLES:
        raise UnsupportedModel(f"{path} is a pickle, which can run any code when it is opened", _TO_SAFETENSORS)
    hint = (
        f"name its folder: {path.parent}"
        if path.suffix in {".safetensors", ".json"}
        else "a folder, a .gguf or a hub id"
    )
    raise UnsupportedModel(f"{path} is not a model by itself", hint)


# --- safetensors folders -------------------------------------------------------------------------------------------


def _open_folder(root: Path, ref: str) -> Checkpoint:
    try:
        names = {p.name for p in root.iterdir()}
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {root}: {e.strerror}") from None
    _refuse_other(root, names, str(root))
    card = _read_card(root)
    config = _read_json(root, "config.json")
    declared = _declared_float8(root, config, card, str(root))
    weight_files, weight_map = _weight_files(root)
    opened = [open_safetensors(_inside(root, name)) for name in weight_files]
    found = _fold_scales(_collect(opened, weight_map), declared)
    if not found:
        raise CorruptCheckpoint(f"{root}: the safetensors files hold no tensor")
    sources = tuple(
        _Source(f.path, f.size, f.data_start, tuple((e.start, e.stop) for e in f.entries.values())) for f in opened
    )
    return Checkpoint(
        ref=ref,
        root=root,
        name=_folder_name(root, config),
        kind="safetensors",
        config=config,
        tensors=found,
        dtype=_dominant(found.values()),
        card=card,
        revision=root.name if _is_snapshot(root) else None,
        sources=sources,
    )


def _refuse_other(root: Path, names: set[str], where: str) -> None:
    """UnsupportedModel for a folder or repository, `names` in it, that is not a model in safetensors."""
    weights = {n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_")}
    pickles = sorted(n for n in names if n.endswith(_PICKLES) and n != "training_args.bin")
    ggufs = sorted(n for n in names if n.endswith(".gguf"))
    if "adapter_config.json" in names and not weights:
        base = _read_json(root, "adapter_config.json").get("base_model_name_or_path") or "BASE_MODEL"
        hint = f"convert its base with it: edgekit convert {base} --lora {where}"
        raise UnsupportedModel(f"{where} is a LoRA adapter, not a model", hint)
    if pickles and not weights:
        made = f"the hub offers safetensors of many models as a pull request: try {where}@refs/pr/1; or "
        raise UnsupportedModel(
            f"{where} has only pickles ({pickles[0]}), which can run any code when they are opened",
            (made if _is_snapshot(root) else "") + _TO_SAFETENSORS,
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
        match = _SHARD.fullmatch(name)
        for i in range(1, int(match[3]) + 1) if match else ():
            assert match
            promised = f"{match[1]}-{i:05}-of-{match[3]}.safetensors"
            if promised not in names:
                return promised
    return ""


_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.(?:safetensors|gguf)")


def _weight_map(root: Path, index: str) -> dict[str, str]:
    weight_map = _read_json(root, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptCheckpoint(f"{root / index}: weight_map is not a table of tensor names and file names")
    return weight_map


def _inside(root: Path, name: str) -> Path:
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


def _read_json(root: Path, name: str) -> dict[str, Any]:
    """A JSON object out of a file of the model's folder."""
    path = _inside(root, name)
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


_MAX_JSON_BYTES = 64 << 20  # an index of 100,000 tensors has about 10 MB


def _dominant(refs: Iterable[TensorRef]) -> str:
    counts: Counter[str] = Counter()
    for ref in refs:
        counts[ref.dtype] += ref.values
    return counts.most_common(1)[0][0]


# --- checkpoints that others have quantised ------------------------------------------------------------------------

_KNOWN_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "ModelOpt",
    "mlx": "MLX",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
    "bitnet": "BitNet",
    "aqlm": "AQLM",
    "torchao": "torchao",
}


def _declared_float8(root: Path, config: Mapping[str, Any], card: Mapping[str, Any], where: str) -> _Float8 | None:
    """What the config says of FP8; UnsupportedModel for every other kind of quantised weights."""
    settings = _quantisation(root, config)
    if not settings:
        return None
    method = str(settings.get("quant_method") or "unknown").lower()
    if method in {"fp8", "fbgemm_fp8"}:
        return _Float8(_block(settings.get("weight_block_size")))
    if method == "compressed-tensors":
        schemes = [
            g.get("weights") or {} for g in (settings.get("config_groups") or {}).values() if isinstance(g, dict)
        ]
        if schemes and all(w.get("type") == "float" and w.get("num_bits") == 8 for w in schemes):
            return _Float8(_block(schemes[0].get("block_structure")))
    if method == "modelopt" and settings.get("quant_algo") == "FP8":
        return _Float8(None)
    raise _quantised(where, _what(method, settings), card)


def _quantisation(root: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantisation settings, wherever the tool that made them puts them; empty where there are none."""
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            found = holder.get(key)
            if isinstance(found, dict) and found.get("quant_method"):
                return found
            if isinstance(found, dict) and "load_in_4bit" in found:  # bitsandbytes before it wrote its name
                loads = found["load_in_4bit"] or found.get("load_in_8bit")
                return {**found, "quant_method": "bitsandbytes"} if loads else {}
    for key in ("quantization", "quantization_config"):  # mlx-lm writes both, without a method
        found = config.get(key)
        if isinstance(found, dict) and found:
            return {**found, "quant_method": "mlx" if "group_size" in found else "unknown"}
    if (root / "hf_quant_config.json").is_file():
        found = _read_json(root, "hf_quant_config.json").get("quantization")
        return {**(found if isinstance(found, dict) else {}), "quant_method": "modelopt"}
    return {}


def _block(value: object) -> tuple[int, int] | None:
    """(rows, columns) of `[128, 128]` or `128x128`."""
    parts = value.split("x") if isinstance(value, str) else value
    if not isinstance(parts, list) or len(parts) != 2:
        return None
    rows, cols = (int(v) if str(v).isdecimal() else 0 for v in parts)
    return (rows, cols) if rows and cols else None


def _what(method: str, settings: Mapping[str, Any]) -> str:
    bits = settings.get("bits") or settings.get("w_bit") or ("4" if settings.get("load_in_4bit") else "")
    detail = settings.get("quant_algo") or settings.get("format") or (f"{bits} bits" if bits else "")
    return f"{_KNOWN_METHODS.get(method, method)}{f' ({detail})' if detail else ''}"


def _quantised(where: str, what: str, card: Mapping[str, Any]) -> UnsupportedModel:
    base = card.get("base_model")
    original = base[0] if isinstance(base, list) and base else base
    hint = f"edgekit convert {original}" if original else "convert the 16-bit checkpoint that it was made from"
    return UnsupportedModel(f"{where} is already quantised: {what}", hint)


# --- GGUF as a source ----------------------------------------------------------------------------------------------


def _open_gguf(path: Path, ref: str) -> Checkpoint:
    parts = [open_gguf(p) for p in _gguf_parts(path)]
    whole = _without_split(parts)
    tensors: dict[str, TensorRef] = {}
    for part in parts:
        stat = part.path.stat()
        for info in part.tensors.values():
            if info.type not in _GGUF_DTYPES:
                raise _quantised(str(part.path), f"tensor {info.name} is {info.type}", {})
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
        dtype=_dominant(tensors.values()),
        gguf=whole,
        card=_gguf_card(whole),
        sources=tuple(_gguf_source(p) for p in parts),
    )


def _gguf_parts(path: Path) -> list[Path]:
    """All files of a split GGUF, in order; just `path` for one that is whole."""
    match = _SHARD.fullmatch(path.name)
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


def _gguf_source(file: GgufFile) -> _Source:
    spans = tuple((t.offset, t.offset + t.nbytes) for t in file.tensors.values())
    return _Source(file.path, file.path.stat().st_size, file.data_start, spans)


def _gguf_name(file: GgufFile) -> str:
    for key in ("general.name", "general.basename"):
        name = file.get(key)
        if isinstance(name, str) and name.strip():
            return _file_name(name)
    stem = _SHARD.sub(r"\1", file.path.name).removesuffix(".gguf")
    return _file_name(re.sub(r"[-._](?:BF16|F16|F32)$", "", stem, flags=re.IGNORECASE))


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


# --- names, cards, digests -----------------------------------------------------------------------------------------


def _is_snapshot(root: Path) -> bool:
    root = root.absolute()
    return root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")


def _folder_name(root: Path, config: Mapping[str, Any]) -> str:
    root = Path(os.path.normpath(root.absolute()))
    if _is_snapshot(root):
        return _file_name(root.parent.parent.name.rpartition("--")[2])
    return _file_name(root.name or str(config.get("_name_or_path", "")).rpartition("/")[2])


def _file_name(name: str) -> str:
    """`name` with nothing in it that a file system or a shell could mind."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


_MAX_CARD_BYTES = 1 << 20


def _read_card(root: Path) -> dict[str, Any]:
    """The front matter of README.md: `key: value` and lists of plain values. Anything nested is left out."""
    if not (root / "README.md").is_file():
        return {}
    try:
        with _inside(root, "README.md").open("rb") as file:
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


_SAMPLE = 4096


def _digest(root: Path | None, sources: tuple[_Source, ...]) -> str:
    total = hashlib.sha256(b"edgekit checkpoint 1\n")
    try:
        _hash_content(total, root, sources)
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {e.filename}: {e.strerror}", "start again") from None
    return total.hexdigest()


def _hash_content(total: hashlib._Hash, root: Path | None, sources: tuple[_Source, ...]) -> None:
    for name in SMALL_FILES if root else ():
        assert root
        if (root / name).is_file():
            total.update(f"{name}\n".encode() + hashlib.sha256(_inside(root, name).read_bytes()).digest())
    for source in sources:
        total.update(f"{source.path.name}\n{source.size}\n".encode())
        with source.path.open("rb", buffering=0) as file:
            total.update(os.pread(file.fileno(), source.data_start, 0))
            for start, stop in source.spans:
                size = min(_SAMPLE, stop - start)
                total.update(os.pread(file.fileno(), size, (start + stop - size) // 2))
