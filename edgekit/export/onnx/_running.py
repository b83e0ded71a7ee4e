"""Graphs run as plainly as can be: onnxruntime with an empty past, onnxruntime-genai with greedy search.

The proof's own way of running, apart from edgekit.runtime, so that neither hides a fault of the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import CorruptCheckpoint, VerificationFailed
from edgekit.ort_library import SILENT, genai, open_graph, readable

Floats = npt.NDArray[np.float32]


class Decoder:
    """A decoder's graph that returns logits of every position, on the CPU with `threads` threads."""

    def __init__(self, graph: Path, threads: int = 1) -> None:
        self.graph = graph
        self.session = _open(graph, threads)

    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> Floats:
        """float32 (positions, vocabulary): rows of one pass over `ids` with nothing before them."""
        feeds: dict[str, Any] = {}
        for value in self.session.get_inputs():
            if value.name == "input_ids":
                feeds[value.name] = np.array([ids], np.int64)
            elif value.name == "attention_mask":
                feeds[value.name] = np.ones((1, len(ids)), np.int64)
            elif value.name == "position_ids":
                feeds[value.name] = np.arange(len(ids), dtype=np.int64)[None]
            else:
                feeds[value.name] = empty_cache(value, 1, self.graph)
        with readable(self.graph):
            found = self.session.run(["logits"], feeds)[0]
        if found.ndim != 3 or found.shape[1] != len(ids):
            raise VerificationFailed(
                f"{self.graph.name} returns logits {found.shape} for {len(ids)} tokens, not one row a token",
                "the graph that ships returns the last position only: name the one of all positions",
            )
        return np.asarray(found[0][list(positions)], np.float32)


def empty_cache(value: Any, sequences: int, graph: Path) -> npt.NDArray[Any]:
    """A cache with nothing in it, for `value` (an input of the session of `graph`): as many sequences, no past, and
    its sizes; genai_config.json's `head_size` for one unnamed. Raises VerificationFailed, CorruptCheckpoint."""
    shape = []
    for axis in value.shape:
        if isinstance(axis, int):
            shape.append(axis)
        elif "batch" in str(axis):
            shape.append(sequences)
        elif "sequence" in str(axis) or "past" in str(axis):
            shape.append(0)
        else:
            shape.append(_head_size(graph.parent))
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    if value.type not in kinds:
        raise VerificationFailed(f"{graph.name}: input {value.name} of {value.type} is not known", "report this")
    return np.zeros(shape, kinds[value.type])


class Encoder:
    """An encoder's graph; every floating-point output is returned."""

    def __init__(self, graph: Path, threads: int = 1) -> None:
        self.graph = graph
        self.session = _open(graph, threads)
        self.names = [v.name for v in self.session.get_outputs() if "float" in v.type]

    def outputs(self, texts: Sequence[Sequence[int]]) -> list[Mapping[str, Floats]]:
        """Outputs of each text, its padding cut off, the texts being one batch padded on the right."""
        longest = max(map(len, texts))
        ids, mask = np.zeros((2, len(texts), longest), np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        known = {"input_ids": ids, "attention_mask": mask}
        feeds = {v.name: known.get(v.name, np.zeros_like(ids)) for v in self.session.get_inputs()}
        with readable(self.graph):
            found = self.session.run(self.names, feeds)
        return [
            {name: _unpadded(x[row], len(text), longest) for name, x in zip(self.names, found, strict=True)}
            for row, text in enumerate(texts)
        ]


def _unpadded(output: npt.NDArray[Any], length: int, padded: int) -> Floats:
    return np.asarray(output[:length] if output.shape[:1] == (padded,) else output, np.float32)


def continue_greedily(folder: Path, ids: Sequence[int], n: int, threads: int = 1) -> tuple[list[int], Floats]:
    """(at most `n` tokens, float32 logits behind the prompt): onnxruntime-genai on the folder as it would ship."""
    library = genai()
    with readable(folder):
        config = library.Config(str(folder))
        options = {"intra_op_num_threads": threads, "log_severity_level": SILENT}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        model = library.Model(config)
        params = library.GeneratorParams(model)
        params.set_search_options(do_sample=False)  # the length as it ships: a windowed cache has a least one
        generator = library.Generator(model, params)
        generator.append_tokens(np.array([ids], np.int32))
        first = np.array(generator.get_logits(), np.float32).reshape(-1)
        tokens: list[int] = []
        while len(tokens) < n and not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
    return tokens, first


def _open(graph: Path, threads: int) -> Any:
    return open_graph(graph, threads, ())[0]


def _head_size(folder: Path) -> int:
    try:
        size = json.loads((folder / "genai_config.json").read_bytes())["model"]["decoder"]["head_size"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CorruptCheckpoint(f"{folder / 'genai_config.json'}: no head_size in it ({e})") from None
    if not isinstance(size, int) or not 0 < size <= 1 << 16:
        raise CorruptCheckpoint(f"{folder / 'genai_config.json'}: head_size is {size!r}")
    return size
