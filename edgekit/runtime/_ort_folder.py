"""What lies in a folder with ONNX graphs, and what its genai_config.json says. Reads JSON; loads no graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import artifact
from edgekit.errors import CorruptCheckpoint, EdgekitError
from edgekit.onnx_file import OnnxFile
from edgekit.units import show_bytes

GENAI = "genai_config.json"
ALL_POSITIONS = "model_all.onnx"
"""The same decoder as model.onnx, over the same weights, with the logits of every position."""

GRAPHS = artifact.GRAPHS
"""Where a graph lies in a folder."""

_LARGEST = 16 << 20
_MOST_TOKENS = 1 << 24
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_sequence_length")


@dataclass(frozen=True, slots=True)
class Folder:
    """`root` holds the tokenizer and config.json, `graph` is the model. `genai`: the parsed genai_config.json of a
    decoder; None for everything that onnxruntime runs alone."""

    root: Path
    graph: Path
    config: Mapping[str, Any]
    genai: Mapping[str, Any] | None

    @property
    def all_positions(self) -> Path:
        return self.graph.with_name(ALL_POSITIONS)


@dataclass(frozen=True, slots=True)
class DecoderFacts:
    """From genai_config.json. `planned`: the context to allocate if nobody asks for another (0: nobody chose one, as
    in what genai's builder writes); `providers`: names of execution providers, as genai has them; `windowed`: caches
    are as long as a sliding window."""

    n_vocab: int
    context: int
    planned: int
    stops: tuple[int, ...]
    threads: int | None
    providers: tuple[str, ...]
    windowed: bool = False
    head_size: int | None = None


def find(path: Path) -> Folder:
    """The folder behind `path`: itself, or where its .onnx file lies. Raises EdgekitError, CorruptCheckpoint."""
    if path.is_dir():
        return _folder(path, _graph_in(path))
    if not path.is_file():
        raise EdgekitError(f"there is no {path}", "edgekit convert MODEL --target TARGET --format onnx makes one")
    root = path.parent
    above = root.name == "onnx" and not (root / "config.json").is_file()
    return _folder(root.parent if above else root, path)


def _graph_in(root: Path) -> Path:
    genai = read_object(root / GENAI)
    if genai is not None:
        return _inside(root, _at(genai, "model", "decoder").get("filename", "model.onnx"))
    for name in GRAPHS:
        if (root / name).is_file():
            return root / name
    found = sorted(root.glob("*.onnx"))
    if len(found) == 1:
        return found[0]
    what = "no .onnx file" if not found else f"{len(found)} .onnx files and no {GENAI}"
    raise EdgekitError(f"{root} holds {what}", "name one file, or run `edgekit convert --format onnx` first")


def _folder(root: Path, graph: Path) -> Folder:
    if not graph.is_file():
        raise CorruptCheckpoint(f"{graph} is missing", "convert it again, or copy the whole folder again")
    genai = read_object(graph.with_name(GENAI))
    return Folder(root, graph, read_object(root / "config.json") or {}, genai)


def _inside(root: Path, name: object) -> Path:
    """A file that genai_config.json names: it may not lead out of its folder."""
    if not isinstance(name, str) or not name or not (root / name).resolve().is_relative_to(root.resolve()):
        raise CorruptCheckpoint(
            f"{root / GENAI}: the decoder's filename is {name!r}, no file of this folder",
            "convert it again, or copy the whole folder again",
        )
    return root / name


def decoder_facts(folder: Folder) -> DecoderFacts:
    """Raises CorruptCheckpoint for numbers that are absent or absurd, EdgekitError for what is no decoder."""
    where = folder.graph.with_name(GENAI)
    model = _at(folder.genai or {}, "model")
    decoder, search = _at(model, "decoder"), _at(folder.genai or {}, "search")
    if any(part in model for part in ("encoder", "vision", "speech")):
        raise EdgekitError(f"{where}: a model of more than one part is not known", "decoders and encoders of text are")
    options = _at(decoder, "session_options")
    n_vocab = _count(model.get("vocab_size"), where, "model.vocab_size")
    context = _count(model.get("context_length"), where, "model.context_length")
    longest = _count(search.get("max_length", context), where, "search.max_length")
    threads = options.get("intra_op_num_threads")
    head = decoder.get("head_size")
    return DecoderFacts(
        n_vocab=n_vocab,
        context=context,
        planned=longest if longest < context or folder.all_positions.is_file() else 0,  # ours: `context` is the plan's
        stops=_ids(model.get("eos_token_id"), n_vocab),
        threads=threads if isinstance(threads, int) and 0 < threads <= 512 else None,
        providers=_providers(options.get("provider_options")),
        windowed=isinstance(decoder.get("sliding_window"), dict),
        head_size=head if isinstance(head, int) and not isinstance(head, bool) and 0 < head <= 1 << 16 else None,
    )


def cached_facts(folder: Folder, graph: OnnxFile, length: int | None = None) -> DecoderFacts:
    """As `decoder_facts` where there is no genai_config.json: from graph and config.json. `length`: the context where
    that names none. Raises CorruptCheckpoint."""
    where, config = folder.root / "config.json", folder.config
    logits = next(v for v in graph.outputs if v.name == "logits")
    width = logits.shape[-1] if logits.shape else None
    length = next((config[key] for key in _LENGTHS if config.get(key)), length)
    generation = read_object(folder.root / "generation_config.json") or {}
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    n_vocab = _count(width if isinstance(width, int) else config.get("vocab_size"), where, "vocab_size")
    return DecoderFacts(
        n_vocab=n_vocab,
        context=_count(length, where, "max_position_embeddings"),
        planned=0,
        stops=_ids(stops, n_vocab),
        threads=None,
        providers=(),
    )


def _providers(value: object) -> tuple[str, ...]:
    """`[{"cuda": {...}}, ...]` -> names."""
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    return tuple(name for row in rows for name in row if isinstance(name, str))


def _ids(value: object, n_vocab: int) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [value]
    return tuple(i for i in found if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < n_vocab)


def _count(value: object, where: Path, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST_TOKENS:
        raise CorruptCheckpoint(f"{where}: {what} is {value!r}", "convert it again, or copy the whole folder again")
    return value


def _at(value: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    for key in keys:
        inner = value.get(key)
        value = inner if isinstance(inner, dict) else {}
    return value


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is no such file. Raises CorruptCheckpoint."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _LARGEST:
            raise CorruptCheckpoint(f"{path} is larger than {show_bytes(_LARGEST)}")
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise CorruptCheckpoint(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise CorruptCheckpoint(f"{path}: not JSON ({e})", "convert it again, or copy the whole folder again") from None
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path} is not a JSON object", "convert it again, or copy the whole folder again")
    return value
