"""Does the artefact do what the source does? Tokens, prompts, numbers: each check says what it compared and saw.

Knows the order of the checks and what counts as a failure; the measuring itself is in quality.py and the runtime.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import artifact, chat, corpus, quality
from edgekit.arch import Role
from edgekit.checkpoint import Checkpoint
from edgekit.errors import DoesNotFit, EdgekitError, VerificationFailed
from edgekit.export import gguf
from edgekit.generation import template_of
from edgekit.gguf_file import GgufFile, open_gguf, plain
from edgekit.planning import Plan, Planned
from edgekit.planning import plan as decide
from edgekit.quant import ggml
from edgekit.runtime import Session
from edgekit.runtime.llama_cpp import LlamaSession, open_session
from edgekit.target import Target
from edgekit.units import Progress, show_bytes, silent
from edgekit.vocab import Vocabulary

LEVELS = ("none", "quick", "full")

QUICK_CONTEXT = 256
"""Tokens per chunk of the built-in perplexity text: small, so that `quick` stays quick on a board."""

CONVERSATIONS: tuple[tuple[Mapping[str, str], ...], ...] = (
    ({"role": "user", "content": "Hello"},),
    (
        {"role": "user", "content": "  What is 2 + 2?\n"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Größe 東京 🙂 <b>&amp;</b>"},
    ),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}),
)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: what was compared and the outcome in words."""

    name: str
    detail: str


@dataclass(frozen=True)
class Certificate:
    """What was verified, and the figures. `warnings` are differences that were found, named and allowed."""

    level: str
    checks: tuple[Check, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def verify(
    path: Path,
    decided: Plan,
    checkpoint: Checkpoint,
    vocabulary: Vocabulary | None,
    *,
    level: str = "quick",
    threads: int | None = None,
    progress: Progress = silent,
) -> Certificate:
    """Check `path` against the checkpoint it was made from. Raises VerificationFailed for the first difference."""
    if level not in LEVELS:
        raise EdgekitError(f"no verification level called {level!r}", f"known: {', '.join(LEVELS)}")
    if level == "none":
        return Certificate(level)
    checks: list[Check] = []
    figures: dict[str, Any] = {}
    steps = 5 if level == "full" else 4
    progress("verify", 0, steps)
    file = open_gguf(path)
    figures["tensor_error"] = check_tensors(file, decided)
    checks.append(Check("tensors", f"{len(decided.tensors)} tensors decode to the source within their format's error"))
    progress("verify", 1, steps)
    with open_session(
        path, n_ctx=2 * QUICK_CONTEXT, threads=threads, embeddings=not decided.geometry.causal
    ) as session:
        words, warnings = check_tokens(session, file, checkpoint, vocabulary)
        checks.append(words)
        if session.scoring and vocabulary is not None:
            checks.append(check_pairs(session, vocabulary, decided))
        progress("verify", 2, steps)
        checks.append(check_template(file, checkpoint, vocabulary))
        progress("verify", 3, steps)
        figures |= check_numbers(session, decided)
        checks.append(Check("numbers", _numbers_detail(figures)))
        progress("verify", 4, steps)
    if level == "full" and decided.geometry.causal:
        figures["against_source"] = compare_with_source(path, decided, threads=threads, progress=progress)
        checks.append(Check("divergence", "KL divergence and top-1 agreement against the unquantised model"))
        progress("verify", 5, steps)
    return Certificate(level, tuple(checks), figures, warnings)


# --- tensors ---------------------------------------------------------------------------------------------------------


def check_tensors(file: GgufFile, decided: Plan) -> dict[str, float]:
    """Decode the first rows of every tensor as they lie in the file and compare with the source.

    Returns {format: largest relative RMS error}. What is above the bound of its format was written or read wrongly:
    no rounding explains it.
    """
    worst: dict[str, float] = {}
    for tensor in decided.tensors:
        info = file.tensors.get(tensor.name)
        if info is None or info.shape != tensor.shape or info.code != tensor.format.code:
            raise VerificationFailed(f"{file.path.name}: tensor {tensor.name} is not what was planned", _REPORT)
        error = _relative_error(file.path, info.offset, tensor)
        if not error <= _bound(tensor):
            raise VerificationFailed(
                f"{tensor.name} in {tensor.format.name} differs from the source by {error:.3f} of its size "
                f"(at most {_bound(tensor):.3f} is rounding)",
                _REPORT,
            )
        worst[tensor.format.name] = max(error, worst.get(tensor.format.name, 0.0))
    return worst


_REPORT = "please report this with `edgekit doctor --json`"


def _relative_error(path: Path, offset: int, tensor: Planned) -> float:
    cols = tensor.shape[-1]
    expected = next(tensor.made.stream(64 * cols))[:64]
    size = tensor.format.row_bytes(cols) * expected.shape[0]
    data = np.fromfile(path, np.uint8, size, offset=offset)
    if data.size != size:
        raise VerificationFailed(f"{path.name} ends inside tensor {tensor.name}", "convert again")
    got = ggml.decode(data, tensor.format, cols)
    scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    error = float(np.sqrt(np.mean(np.square(got.astype(np.float64) - expected))))
    return error / scale if scale else error


def _bound(tensor: Planned) -> float:
    """Relative RMS error that rounding can cause: about 2^-bits of a block's range; ternary keeps signs only."""
    if tensor.format.bits < 3:
        return 1.0
    return min(1.0, 2.0 ** (3.0 - tensor.format.bits)) if tensor.format.bits < 16 else 0.01


# --- tokens and prompts ----------------------------------------------------------------------------------------------


def check_tokens(
    session: Session, file: GgufFile, checkpoint: Checkpoint, vocabulary: Vocabulary | None
) -> tuple[Check, tuple[str, ...]]:
    """Every string of the built-in corpus gives the ids of the model's own tokenizer. Also returns warnings."""
    if vocabulary is None:
        return _same_keys(file, checkpoint), ()
    reference = vocabulary.reference()
    strings = corpus.parity_strings(vocabulary)
    excused = []
    for text in strings:
        wanted = reference.encode(text, add_special=True)
        got = session.tokenize(text, add_special=True)
        if wanted == got:
            continue
        reason = vocabulary.excuse(text)
        if not reason:
            raise VerificationFailed(_token_difference(text, wanted, got), "edgekit inspect MODEL shows its tokenizer")
        excused.append(reason)
    same = len(strings) - len(excused)
    detail = f"{same} of {len(strings)} strings give the ids of the model's own tokenizer"
    if excused:
        detail += f"; {len(excused)} differ for known reasons, see the notes"
    return Check("tokens", detail), tuple(dict.fromkeys(excused))


PAIRS = (("Where is it?", "In the kitchen."), ("2 + 2", "is 4, as everybody knows"), ("Größe", "東京"))


def check_pairs(session: LlamaSession, vocabulary: Vocabulary, decided: Plan) -> Check:
    """Two texts that are read together get the ids, and the segments, that the model's own tokenizer gives them."""
    reference = vocabulary.reference()
    segments = next((t.shape[0] for t in decided.tensors if t.made.role is Role.TOKEN_TYPE), 1)
    for first, second in PAIRS:
        (wanted, kinds), got = reference.pair(first, second), session.pair(first, second)
        if wanted != got:
            raise VerificationFailed(_token_difference(f"{first} / {second}", wanted, got), "try --format onnx")
        if segments > 1 and any(kinds):
            raise VerificationFailed(
                "the tokenizer puts the second text of a pair into a segment of its own; llama.cpp has all text in the "
                "first", "try --format onnx",
            )  # fmt: skip
    return Check("pairs", f"{len(PAIRS)} pairs of texts give the ids of the model's own tokenizer")


def _token_difference(text: str, wanted: Sequence[int], got: Sequence[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got)))
    return (
        f"tokens differ for {text[:60]!r}, first at {at}: the model's tokenizer gives {list(wanted[at : at + 6])}, "
        f"llama.cpp gives {list(got[at : at + 6])}"
    )


def _same_keys(file: GgufFile, checkpoint: Checkpoint) -> Check:
    assert checkpoint.gguf is not None
    source = {k: plain(v) for k, v in checkpoint.gguf.metadata.items() if k.startswith("tokenizer.")}
    copy = {k: plain(v) for k, v in file.metadata.items() if k.startswith("tokenizer.")}
    for key in source.keys() | copy.keys():
        if source.get(key) != copy.get(key):
            raise VerificationFailed(f"{key} differs from the source GGUF", _REPORT)
    return Check("tokens", f"{len(source)} tokenizer keys are those of the source GGUF")


def chat_template(checkpoint: Checkpoint, vocabulary: Vocabulary | None) -> chat.Template | None:
    """The source's default chat template with the texts of its special tokens, or None."""
    if vocabulary is not None:
        text = vocabulary.chat_template
        return chat.Template(text, vocabulary.special_texts()) if text is not None else None
    return template_of(checkpoint.gguf) if checkpoint.gguf else None


def check_template(file: GgufFile, checkpoint: Checkpoint, vocabulary: Vocabulary | None) -> Check:
    """The template in the file, with the file's own special tokens, renders what the source's renders."""
    source, copy = chat_template(checkpoint, vocabulary), template_of(file)
    if source is None or copy is None:
        if source is not copy:
            raise VerificationFailed("the chat template did not reach the file", _REPORT)
        return Check("chat template", "no chat template, in the source and here")
    same = 0
    for messages in CONVERSATIONS:
        wanted, got = _rendered(source, messages), _rendered(copy, messages)
        if wanted != got:
            raise VerificationFailed(f"the chat template renders {got!r}, the source's {wanted!r}", _REPORT)
        same += wanted[0] == "text"
    if not same:
        return Check("chat template", "the same text; it refuses every plain conversation, here as in the source")
    return Check("chat template", f"{same} conversations render the same")


def _rendered(template: chat.Template, messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """("text", prompt), or ("error", why): many templates refuse a system turn, and the copy must do the same."""
    try:
        return "text", template.render(messages)
    except EdgekitError as e:
        return "error", str(e)


# --- numbers ---------------------------------------------------------------------------------------------------------


def check_numbers(session: LlamaSession, decided: Plan) -> dict[str, Any]:
    """Finite outputs, and for a decoder the perplexity of the built-in text."""
    if session.encoder and session.scoring:
        scores = session.scores([corpus.TEXT[:200], (corpus.TEXT[200:300], corpus.TEXT[300:400])])
        if not np.isfinite(scores).all():
            raise VerificationFailed("the scores are not finite", "try another preset, for example -q Q8_0")
        return {"labels": int(scores.shape[1])}
    if not decided.geometry.causal:
        vectors = session.embed([corpus.TEXT[:200], corpus.TEXT[200:400]])
        if not np.isfinite(vectors).all():
            raise VerificationFailed("the embeddings are not finite", "try another preset, for example -q Q8_0")
        return {"embedding_width": int(vectors.shape[1])}
    tokens = session.tokenize(corpus.TEXT, add_special=False)
    limit = min(QUICK_CONTEXT, decided.geometry.context or QUICK_CONTEXT)
    found = quality.perplexity(session, tokens, limit)
    if not math.isfinite(found.value):
        raise VerificationFailed("the perplexity is not finite", "try another preset, for example -q Q8_0")
    return {"perplexity": found.value, "perplexity_stderr": found.stderr, "perplexity_tokens": found.tokens}


def _numbers_detail(figures: Mapping[str, Any]) -> str:
    if "perplexity" in figures:
        return f"all logits finite; perplexity {figures['perplexity']:.2f} on the built-in text"
    if "labels" in figures:
        return f"scores of {figures['labels']} {'label' if figures['labels'] == 1 else 'labels'}, all finite"
    return f"embeddings of width {figures['embedding_width']}, all finite"


def compare_with_source(
    path: Path, decided: Plan, *, threads: int | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Perplexity, KL divergence and top-1 agreement of `path` against the unquantised weights, as plain values."""
    with unquantised(path.parent, decided, threads=threads or 1, progress=progress) as reference:
        limit = min(QUICK_CONTEXT, decided.geometry.context or QUICK_CONTEXT)
        with (
            open_session(reference, n_ctx=limit, threads=threads) as source,
            open_session(path, n_ctx=limit, threads=threads) as candidate,
        ):
            tokens = source.tokenize(corpus.TEXT, add_special=False)
            return asdict(quality.compare(source, candidate, tokens, limit, progress=progress))


def source_precision(decided: Plan) -> str:
    """The preset that holds the source's tensors without loss: F32, BF16 or F16."""
    kinds = {source.dtype for t in decided.tensors for source in t.made.sources}
    return "F32" if "F32" in kinds or "F64" in kinds else "BF16" if "BF16" in kinds else "F16"


@contextmanager
def unquantised(
    folder: Path,
    decided: Plan,
    *,
    threads: int,
    preset: str | None = None,
    beside: int | None = None,
    progress: Progress = silent,
) -> Iterator[Path]:
    """A temporary GGUF of the same tensors in `preset` (the source's own precision), in `folder`; removed afterwards.

    `beside`: bytes of the models that are in memory with it, those of `decided` unless said otherwise. Raises
    DoesNotFit when disk or memory has no room for it.
    """
    blank = Target.load("host")
    preset = preset or source_precision(decided)
    reference = decide(decided.blueprint, decided.metadata, blank, quant=preset, context=QUICK_CONTEXT)
    artifact.need_disk(folder, reference.file_bytes)
    need_memory(reference.file_bytes + (decided.file_bytes if beside is None else beside))
    with tempfile.TemporaryDirectory(prefix=".edgekit-reference-", dir=folder) as temporary:
        yield gguf.write(reference, Path(temporary) / "reference.gguf", gguf.Encoding(threads), progress=progress).path


def need_memory(nbytes: int, hint: str = "") -> None:
    """Raise DoesNotFit when models of `nbytes` together are more than the memory that is free."""
    import psutil

    free = psutil.virtual_memory().available
    if free < nbytes:
        raise DoesNotFit(
            f"both models in memory take {show_bytes(nbytes)}, and {show_bytes(free)} of memory is free",
            hint or "use --verify quick here, and `edgekit eval` on a larger machine",
        )
