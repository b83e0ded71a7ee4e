"""What the source model predicts on a text of ours: which text, how long, which positions, and the asking.

Knows the model's config and tokenizer files; the computing is done by transformers in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit import corpus
from edgekit.batches import open_tokenizer
from edgekit.errors import EdgekitError, MissingExtra, UnsupportedVocabulary
from edgekit.onnx_planning import TEXT2TEXT
from edgekit.vocab import read_vocabulary

Floats = npt.NDArray[np.float32]
Rounding = Mapping[str, tuple[int, int, int] | None]
"""`linear`, `head`, `embedding` -> (bits, weights a scale, activations a scale); None leaves float32. 0 weights a
scale: one for each output, -1: one for the matrix; 0 activations: one for the whole tensor, -1: not rounded."""

POSITIONS = 64
"""Positions whose logits are compared: enough to meet every layer and both sides of a window, few enough to keep."""
SHORTEST = 96
USUAL = 192
WRITTEN = 40
"""Tokens of what an encoder-decoder is made to write, each text."""
BEYOND = 64
"""Tokens past the sliding window."""
WORK = 2.5e12
"""Weights x tokens that a quick proof may take: with both models a few minutes on one core."""
LOGIT_BYTES = 3 << 29
"""The logits of one prompt, all positions: what a graph of every position returns at once."""

SENTENCES = (
    "No.",
    "The cat sat on the mat.",
    "A man is playing a guitar on a stage in front of a small crowd.",
    "Wie spät ist es? Um halb acht fängt das Konzert an.",
    "2 + 2 = 4; 3.14159 is close to pi, and 1e-10 is close to nothing.",
    corpus.TEXT[26:420],
    corpus.TEXT[420:1400],
)
"""What encoders are asked: from one word to a page."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the process is told. `positions`: those of the logits wanted (decoders); all where empty. `targets`: what an
    encoder-decoder writes for each text, its first token included."""

    root: str
    task: str
    texts: Sequence[Sequence[int]]
    positions: Sequence[int] = ()
    rounding: Rounding | None = None
    threads: int = 1
    targets: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Predictions:
    """Outputs by name for each text, float32, batch axis left out; `rounded`: the same with weights rounded.

    Of a decoder's logits only the rows of `positions`. `window`: the sliding window of the model, None without one;
    `passed`: whether the text is longer.
    """

    texts: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    outputs: tuple[Mapping[str, Floats], ...]
    rounded: tuple[Mapping[str, Floats], ...] = ()
    rounding: Rounding | None = None
    window: int | None = None
    targets: tuple[tuple[int, ...], ...] = ()

    @property
    def passed(self) -> bool:
        return self.window is None or max(map(len, self.texts)) > self.window


def predict_decoder(
    root: Path, *, context: int, parameters: int, rounding: Rounding | None = None, threads: int = 1, effort: int = 1
) -> Predictions:
    """The source's logits on one prompt of built-in text, longer than its sliding window where that can be afforded.

    `context`: tokens that the artefact is made for. `effort`: times the usual work. Raises EdgekitError if
    transformers cannot run the model, MissingExtra without it.
    """
    config = text_config(root)
    window = sliding_window(config)
    length = prompt_length(config, context, parameters, effort)
    ids = prompt(root, length, int(config.get("vocab_size", 0)) or 1 << 30)
    positions = spread(len(ids), window)
    request = Request(str(root), "text-generation", [ids], positions, rounding, threads)
    outputs, rounded = ask(request)
    return Predictions((tuple(ids),), positions, outputs, rounded, rounding, window)


def predict_encoder(
    root: Path, task: str, *, max_length: int, rounding: Rounding | None = None, threads: int = 1
) -> Predictions:
    """The source's outputs for SENTENCES, each cut to `max_length` tokens and read on its own."""
    texts = [encode(root, text, max_length) for text in SENTENCES]
    outputs, rounded = ask(Request(str(root), task, texts, (), rounding, threads))
    return Predictions(tuple(map(tuple, texts)), (), outputs, rounded, rounding)


def predict_pair(
    root: Path, *, context: int, rounding: Rounding | None = None, threads: int = 1, effort: int = 1
) -> Predictions:
    """An encoder-decoder's states of some SENTENCES, and its logits along other texts as if it had written those.

    `context`: most tokens of either. Texts of a word to a page; `effort`: times the usual length of what is written.
    """
    config = text_config(root)
    vocab = int(config.get("vocab_size", 0)) or 1 << 30
    first = start_token(root)
    texts = [[i for i in encode(root, SENTENCES[n], min(context, 512)) if i < vocab] for n in (0, 3, 6)]
    written = [[i for i in encode(root, SENTENCES[n]) if i < vocab] for n in (2, 4, 5)]
    targets = [[first, *ids][: min(context, WRITTEN * effort)] for ids in written]
    outputs, rounded = ask(Request(str(root), TEXT2TEXT, texts, (), rounding, threads, targets))
    return Predictions(tuple(map(tuple, texts)), (), outputs, rounded, rounding, targets=tuple(map(tuple, targets)))


def start_token(root: Path) -> int:
    """What an encoder-decoder's text begins with. Raises EdgekitError where neither config says."""
    for name in ("generation_config.json", "config.json"):
        try:
            said = json.loads((root / name).read_bytes())
        except (OSError, ValueError):
            continue
        for key in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(said.get(key), int):
                return int(said[key])
    raise EdgekitError(f"{root} names no decoder_start_token_id", "add it to its config.json")


# --- the text --------------------------------------------------------------------------------------------------------


def text_config(root: Path) -> dict[str, Any]:
    """config.json, its `text_config` laid over it."""
    try:
        config = json.loads((root / "config.json").read_bytes())
    except (OSError, ValueError) as e:
        raise EdgekitError(f"cannot read {root / 'config.json'}: {e}") from None
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else dict(config)


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Tokens that a layer with a sliding window sees, where the config has such layers."""
    size = config.get("sliding_window")
    if not isinstance(size, int) or size <= 0 or config.get("use_sliding_window") is False:
        return None
    kinds = config.get("layer_types")
    return size if not isinstance(kinds, list) or "sliding_attention" in kinds else None


def prompt_length(config: Mapping[str, Any], context: int, parameters: int, effort: int = 1) -> int:
    """Tokens of the prompt: past the window, within the context, the work and the memory that a proof may take."""
    window = sliding_window(config) or 0
    wanted = max(USUAL * effort, window + BEYOND)
    trained = config.get("max_position_embeddings")
    limits = [context, int(effort * WORK / max(parameters, 1))]
    limits.append(LOGIT_BYTES // (4 * max(1, int(config.get("vocab_size") or 1))))
    if isinstance(trained, int) and trained > 0:
        limits.append(trained)
    return max(min(wanted, *limits), min(SHORTEST, *limits[:1], *limits[3:]))


def spread(length: int, window: int | None) -> tuple[int, ...]:
    """POSITIONS of `length`, evenly; half of them past the window where the text reaches so far."""
    if window is None or not 0 < window < length - 1:
        return _even(0, length, POSITIONS)
    return _even(0, window, POSITIONS // 2) + _even(window, length, POSITIONS // 2)


def _even(start: int, stop: int, count: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(n) for n in np.linspace(start, stop - 1, min(count, stop - start)).round()))


def prompt(root: Path, length: int, vocab: int) -> list[int]:
    """Exactly `length` ids: prose, code and many scripts in the model's own tokens, each round starting elsewhere."""
    text = "\n".join([corpus.TEXT, *corpus.STRINGS])
    ids = [i for i in encode(root, text) if i < vocab]
    if not ids:
        raise UnsupportedVocabulary(f"the tokenizer in {root} has no token for English prose")
    out = list(ids)
    while len(out) < length:
        start = 1 + len(out) * 7919 % len(ids)
        out += ids[start:] + ids[:start]
    return out[:length]


def encode(root: Path, text: str, max_length: int | None = None) -> list[int]:
    """Ids of `text` by the model's own tokenizer, special tokens around; at most `max_length`, those still around."""
    if not (root / "tokenizer.json").is_file():
        return read_vocabulary(root, text_config(root)).reference().encode(text, add_special=True)[:max_length]
    return list(open_tokenizer(root, max_length=max_length).encode([text])[0].ids)


# --- the asking ------------------------------------------------------------------------------------------------------


def ask(request: Request) -> tuple[tuple[Mapping[str, Floats], ...], tuple[Mapping[str, Floats], ...]]:
    """(outputs, rounded outputs) of every text, from a process that holds torch and the model while it runs."""
    with tempfile.TemporaryDirectory(prefix="edgekit-reference-") as folder:
        told, answer = Path(folder, "request.json"), Path(folder, "answer.npz")
        told.write_text(json.dumps(asdict(request)), encoding="utf-8")
        paths = [str(Path(corpus.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": str(request.threads),
        }
        command = [sys.executable, "-m", "edgekit.export.onnx._reference", str(told), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise _failed(request, done.returncode, done.stderr)
        with np.load(answer, allow_pickle=False) as arrays:
            found = {name: np.asarray(arrays[name], np.float32) for name in arrays.files}
    count = range(len(request.texts))
    plain = tuple(_of(found, f"{n}:") for n in count)
    rounded = tuple(_of(found, f"rounded:{n}:") for n in count) if request.rounding else ()
    return plain, rounded


def _of(found: Mapping[str, Floats], prefix: str) -> dict[str, Floats]:
    return {name.removeprefix(prefix): array for name, array in found.items() if name.startswith(prefix)}


def _failed(request: Request, code: int, said: str) -> EdgekitError:
    lines = [line for line in said.strip().splitlines() if line.strip()]
    reason = lines[-1][:400] if lines else f"it ended with {code}"
    if "ModuleNotFoundError" in reason:
        return MissingExtra(f"the proof needs transformers and torch: {reason}", 'pip install "edgekit[onnx]"')
    if code in (-9, 137):
        reason = "it was killed, probably for memory"
    return EdgekitError(f"transformers did not run {request.root}: {reason}", "--verify none converts without a proof")
