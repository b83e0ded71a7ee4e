"""What a model is read with to learn which weights matter: text of the user's, or text that the model writes itself.

Gives token ids in chunks, and the statistics of reading them, kept in a cache by content. Chooses no format.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import cache, chat, corpus
from edgekit.errors import EdgekitError, VerificationFailed
from edgekit.gguf_file import open_gguf
from edgekit.imatrix_file import Imatrix, open_imatrix, write_imatrix
from edgekit.runtime import Session, activations, lockstep, parallel
from edgekit.runtime.llama_cpp import LlamaSession, Sampling
from edgekit.runtime.moments import Moment, open_moments
from edgekit.runtime.onnxruntime import DecoderSession
from edgekit.units import MIB, Progress, silent

CHUNK = 512
"""Tokens read as one text: what llama-imatrix takes unless told otherwise."""

SHORTEST = 256
"""Tokens below which a calibration text says too little to be used."""

SHORT = 16
"""Tokens below which a text that the model wrote is left out: an opening and no more."""

FEW = 32
"""Tokens that a matrix or expert must have seen for its importance to mean something."""

OPENINGS = (
    "Explain in simple words how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "List five uses of salt, with one sentence for each.",
    "What is the difference between a list and a tuple in Python?",
    "Translate into French: The train leaves at nine.",
    "Summarise the water cycle.",
    "Write a function that reverses a string.",
    "Give me a recipe for tomato soup.",
    "Who were the main figures of the French Revolution?",
    "Plan a weekend in a small town by the sea.",
    "How does vaccination protect people?",
    "Solve step by step: 17 * 23 - 45.",
    "Write an e-mail asking for a refund.",
    "What should I look at when I buy a used car?",
    "Describe the taste of coffee to somebody who never had any.",
    "Write a SQL query for the ten newest customers.",
)
"""How self-written texts begin where the model has a chat template."""


@dataclass(frozen=True, slots=True)
class Text:
    """Calibration text as token ids: `chunks` of at most CHUNK, each a text of its own; `name` for the manifest."""

    name: str
    chunks: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.chunks))

    @property
    def digest(self) -> str:
        """sha256 (hex) of the ids."""
        digest = hashlib.sha256()
        for chunk in self.chunks:
            digest.update(np.asarray([len(chunk), *chunk], "<i4").tobytes())
        return digest.hexdigest()


# --- text of the user's ----------------------------------------------------------------------------------------------


def read_text(path: Path, session: Session, template: chat.Template | None, *, limit: int | None = None) -> Text:
    """Text or `.jsonl` of chats, as ids. `limit` bounds the tokens. Raises EdgekitError naming the line."""
    texts = (
        [_render(line, where, template) for line, where in _records(path)] if _is_jsonl(path) else [plain_text(path)]
    )
    return Text(path.name, tuple(_enough(_cut(texts, session, limit), path.name)))


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson")


def plain_text(path: Path) -> str:
    """What is in the file. Raises EdgekitError for one that is not UTF-8 or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise EdgekitError(f"{path}: byte {e.start} is not UTF-8", "save the text as UTF-8") from None
    except OSError as e:
        raise EdgekitError(f"cannot read {path}: {e.strerror}", "--calibration FILE, self or none") from None


def _records(path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(plain_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield json.loads(line), where
        except ValueError as e:
            raise EdgekitError(f"{where} is not JSON: {e}", 'write {"messages": [...]} or {"text": "..."}') from None


def _render(record: Any, where: str, template: chat.Template | None) -> str:
    """One record: `messages` (role and content), `conversations` (from and value), or `text`."""
    if isinstance(record, Mapping):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        messages = _messages(record)
        if messages:
            if template is None:
                return "\n\n".join(m["content"] for m in messages)
            return template.render(messages, add_generation_prompt=False)
    raise EdgekitError(f"{where} holds no chat and no text", 'write {"messages": [...]} or {"text": "..."}')


_ROLES = {"human": "user", "gpt": "assistant"}


def _messages(record: Mapping[str, Any]) -> list[Mapping[str, str]]:
    turns = record.get("messages") or record.get("conversations")
    if isinstance(turns, list):
        found = [_turn(t) for t in turns if isinstance(t, Mapping)]
        return [t for t in found if t] if len(found) == len(turns) and all(found) else []
    if isinstance(record.get("prompt"), str):
        answer = next((record[k] for k in ("response", "completion") if isinstance(record.get(k), str)), "")
        asked = {"role": "user", "content": record["prompt"]}
        return [asked, {"role": "assistant", "content": answer}] if answer else [asked]
    return []


def _turn(turn: Mapping[str, Any]) -> dict[str, str]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        return {}
    return {"role": _ROLES.get(role, role), "content": content}


def _cut(texts: Sequence[str], session: Session, limit: int | None) -> Iterator[tuple[int, ...]]:
    """Chunks of CHUNK ids (of the context, where that is shorter), all texts in a row; the last one may be shorter."""
    ids: list[int] = []
    size = min(CHUNK, session.n_ctx)
    given, most = 0, limit if limit is not None else 1 << 62
    for text in texts:
        ids += session.tokenize(text, add_special=True)
        while len(ids) >= size and given < most:
            yield tuple(ids[:size])
            ids, given = ids[size:], given + size
        if given >= most:
            return
    if ids:
        yield tuple(ids[: max(1, most - given)])


def _enough(chunks: Iterator[tuple[int, ...]], name: str) -> list[tuple[int, ...]]:
    found = list(chunks)
    tokens = sum(map(len, found))
    if tokens < SHORTEST:
        raise EdgekitError(
            f"{name} has {tokens} tokens; at least {SHORTEST} are needed to calibrate", "give more text, or use self"
        )
    # a short rest at the end would count as a text of its own
    return found if len(found[-1]) >= SHORTEST // 4 or len(found) == 1 else found[:-1]


# --- text of the model's own -----------------------------------------------------------------------------------------


def write_text(
    session: LlamaSession | DecoderSession,
    template: chat.Template | None,
    tokens: int,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Text:
    """About `tokens` tokens that the model writes itself: sampled at temperature 1, so that it says what it believes.

    Texts begin with a question in the model's template, and every other one with a few words of the built-in prose:
    a model without a template gets only those. Many are written at once. The same seed gives the same text.
    """
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.02, repeat_penalty=1.0, seed=seed)
    length = min(CHUNK, session.n_ctx)

    def begin(number: int) -> list[int]:
        return opening(session, template, number)

    if isinstance(session, LlamaSession):
        chunks = parallel.write(session, begin, tokens, sampling, length=length, shortest=SHORT, progress=progress)
    else:
        chunks = lockstep.write(session, begin, tokens, sampling, length=length, shortest=SHORT, progress=progress)
    return Text(f"self, seed {seed}", tuple(chunks))


def opening(session: Session, template: chat.Template | None, number: int) -> list[int]:
    """What text `number` of the model's own begins with: a question in its template, or a few words of prose."""
    if template is not None and number % 2 == 0:
        question = OPENINGS[number // 2 % len(OPENINGS)]
        text = template.render([{"role": "user", "content": question}])
        bos = template.specials.get("bos_token")
        return session.tokenize(text, add_special=not (bos and text.startswith(bos)))[: CHUNK // 2]
    words = corpus.TEXT.split()
    start = number * 97 % max(1, len(words) - 8)
    return session.tokenize(" ".join(words[start : start + 6]), add_special=True)


# --- reading it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibrated:
    """What reading gave: the importance matrix, and second moments for the names asked for, float32 (cols, cols)."""

    imatrix: Imatrix
    moments: Mapping[str, Moment]
    tokens: int
    warnings: tuple[str, ...] = ()


def recall(text: Text, *, digest: str, moments: Sequence[str] = ()) -> Calibrated | None:
    """What `calibrate` would give for the model of `digest`, if the cache holds it: no model is needed for that."""
    folder = _entry(text, digest, moments).find()
    if folder is None:
        return None
    imatrix = open_imatrix(folder / _IMATRIX)
    stored = open_moments(folder) if moments else {}
    return Calibrated(imatrix, stored, text.tokens, coverage(imatrix))


def calibrate(
    session: LlamaSession,
    text: Text,
    *,
    digest: str,
    moments: Sequence[str] = (),
    spill: Path | None = None,
    progress: Progress = silent,
) -> Calibrated:
    """Read `text` with the model behind `session`. `digest` names the model's content.

    Importance, and the second moments of the matrices in `moments`, are kept in the cache and taken from there the next
    time. Where moments would be too much for it they go to files in `spill`, or stay in memory without. Raises
    VerificationFailed for values that are not finite, EdgekitError for names in `moments` that the model lacks.
    """
    known = recall(text, digest=digest, moments=moments)
    if known is not None:
        return known
    entry = _entry(text, digest, moments)
    if not entry.admits(_ROOM + moment_bytes(session.model.path, moments)):
        return _read(session, text, moments, spill, progress)
    with entry.making() as folder:
        found = _read(session, text, moments, folder if moments else None, progress)
        write_imatrix(folder / _IMATRIX, found.imatrix)
    return found


_IMATRIX = "imatrix.gguf"
_ROOM = 16 * MIB  # for an importance matrix, the largest of which are a few MiB


def _entry(text: Text, digest: str, moments: Sequence[str]) -> cache.Entry:
    name = cache.key(model=digest, text=text.digest, moments=sorted(moments), engine=engine())
    return cache.Entry("moments" if moments else "importance", name)


def engine() -> str:
    """What computes: part of the key of all that is learned with it."""
    return f"llama-cpp-python {metadata.version('llama-cpp-python')}"


def moment_bytes(model: Path, names: Sequence[str]) -> int:
    """Bytes that the second moments of these matrices take, at most; matrices of a layer share those of one input."""
    tensors = open_gguf(model).tensors
    shapes = {_INPUT.sub(r"\1", name): tensors[name].shape for name in names if name in tensors}
    return sum(4 * (shape[0] if len(shape) == 3 else 1) * shape[-1] ** 2 for shape in shapes.values())


_INPUT = re.compile(r"(attn_|ffn_)(?:q|k|v|gate|up)(?=\.)")


def _read(
    session: LlamaSession, text: Text, moments: Sequence[str], folder: Path | None, progress: Progress
) -> Calibrated:
    found = activations.collect(session, text.chunks, moments=moments, spill=folder, progress=progress)
    imatrix = _imatrix(found, text)
    return Calibrated(imatrix, found.second_moment, found.tokens, coverage(imatrix))


def _imatrix(found: activations.Statistics, text: Text) -> Imatrix:
    sums, counts = {}, {}
    for name, values in found.sums.items():
        if not np.isfinite(values).all():
            raise VerificationFailed(f"the inputs of {name} are not finite", "the checkpoint is broken: try another")
        sums[name] = np.atleast_2d(values).astype(np.float32)
        counts[name] = found.counts[name].astype(np.float32)
    return Imatrix(sums, counts, (text.name,), len(text.chunks), CHUNK, text.name)


def coverage(imatrix: Imatrix) -> tuple[str, ...]:
    """One sentence for each matrix whose experts, or which itself, saw too few tokens."""
    found = []
    for name, counts in imatrix.counts.items():
        poor = int((counts < FEW).sum())
        if poor and len(counts) > 1:
            found.append(f"{name}: {poor} of {len(counts)} experts saw fewer than {FEW} tokens")
        elif poor:
            found.append(f"{name} saw {int(counts[0])} tokens, fewer than {FEW}")
    return tuple(found)
