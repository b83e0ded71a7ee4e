"""Encoder graphs run by onnxruntime: texts in; vectors, scores or labelled tokens out.

Knows graph inputs and batches; pooling, prompts and labels are read elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from edgekit.batches import Batch, Text, Tokenizer, open_tokenizer
from edgekit.chat import Template
from edgekit.classify import Labels, is_reranker, read_labels
from edgekit.classify import scores as scored
from edgekit.embedding import Pooling, finish, pool, positions, read_pooling
from edgekit.errors import EdgekitError, RuntimeFailed, UnsupportedModel
from edgekit.onnx_file import OnnxFile
from edgekit.ort_library import open_graph, readable
from edgekit.runtime import Logits, Timings
from edgekit.runtime._common import Spent
from edgekit.runtime._ort_folder import Folder
from edgekit.runtime._ort_vocabulary import Vocabulary

_HIDDEN = ("last_hidden_state", "token_embeddings", "hidden_states")
_POOLED = ("sentence_embedding", "pooler_output", "embeddings", "text_embeds")
_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(bool)": np.bool_}


@dataclass(frozen=True, slots=True)
class Tagged:
    """A token of a text and its scores. `start`, `stop`: characters of the text; `scores`: float32 (labels)."""

    start: int
    stop: int
    label: str
    score: float
    scores: Logits


class EncoderSession:
    """See `edgekit.runtime.Session`. What the graph is made for decides what can be asked: `embed` of one that gives
    hidden states, `scores` of a classifier or reranker, `tags` of a token classifier; it writes no text."""

    encoder = True
    template: Template | None = None
    chat_template: str | None = None

    def __init__(
        self,
        folder: Folder,
        graph: OnnxFile,
        *,
        n_ctx: int | None,
        threads: int,
        providers: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        start = perf_counter()
        self.folder, self.threads = folder, threads
        self._inputs = _inputs(graph)
        self._output, self.task = _output(graph)
        self.pooling = read_pooling(folder.root) if self.task == "embedding" else Pooling()
        self._limit = _limit(folder, self.pooling, n_ctx)
        opened, missing = open_graph(folder.graph, threads, providers)
        self._session: Any = opened
        self._kinds = {i.name: _TYPES.get(i.type, np.int64) for i in opened.get_inputs()}
        self._notes = [*notes, *missing]
        self._cut = False
        self._spent = Spent()
        self._load_ms = 1e3 * (perf_counter() - start)
        self.finish_reason = ""

    @property
    def n_vocab(self) -> int:
        size = self.folder.config.get("vocab_size")
        return size if isinstance(size, int) and size > 0 else len(self.vocabulary)

    @property
    def n_ctx(self) -> int:
        """Tokens of a text, special ones included; what is longer is cut. 0: no limit is known."""
        return self._limit or 0

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.folder.root, self.folder.config)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.folder.root, max_length=self._limit, lower=self.pooling.lower)

    @cached_property
    def labels(self) -> Labels:
        """What the columns of `scores` are called. Raises CorruptCheckpoint."""
        config = self.folder.config
        return read_labels(config, rerank=self.task == "classification" and is_reranker(config))

    @property
    def bos(self) -> int | None:
        return self.vocabulary.bos

    @property
    def add_bos(self) -> bool:
        return self.vocabulary.add_bos

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    def metadata(self) -> Mapping[str, str]:
        """Scalars of config.json as `config.KEY`."""
        scalars = {k: v for k, v in self.folder.config.items() if isinstance(v, str | int | float | bool)}
        return {f"config.{key}": str(value) for key, value in scalars.items()}

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        return self.vocabulary.tokenize(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return self.vocabulary.detokenize(tokens, special=special)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self.vocabulary.piece(token, special=special)

    # --- what it is asked ----------------------------------------------------------------------------------------

    def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> Logits:
        """One vector a text -> float32 (len(texts), dim), as sentence-transformers makes it from the model's files.

        `normalize` None: as those files say. `prompt` goes in front of every text, or the one they call `prompt_name`,
        or their default. Longer texts are cut, which `notes` tells. Raises RuntimeFailed, EdgekitError.
        """
        self._must("embedding", "embed")
        lead = self.pooling.prompt(prompt, prompt_name)
        skip = 0 if self.pooling.include_prompt or not lead else self._prompt_tokens(lead)
        made: Logits | None = None
        for batch, (found,) in self._run([lead + text for text in texts]):
            rows = found if found.ndim == 2 else pool(found, batch.mask, self.pooling, skip=skip)
            rows = finish(rows, self.pooling, normalize=normalize)
            made = np.empty((len(texts), rows.shape[1]), np.float32) if made is None else made
            made[list(batch.rows)] = rows
        return np.empty((0, 0), np.float32) if made is None else made

    def scores(self, texts: Sequence[Text]) -> Logits:
        """Scores of texts, or of pairs read together -> float32 (len(texts), labels); columns are `labels.names`.

        Probabilities as transformers' pipeline gives them, or for a reranker what sentence-transformers' CrossEncoder
        does. Raises RuntimeFailed, EdgekitError.
        """
        self._must("classification", "scores")
        made = np.empty((len(texts), len(self.labels.names)), np.float32)
        for batch, (found,) in self._run(texts):
            made[list(batch.rows)] = scored(found, self.labels)
        return made

    def tags(self, texts: Sequence[str]) -> list[list[Tagged]]:
        """The label of every token, special ones left out, text by text. Raises RuntimeFailed, EdgekitError."""
        self._must("token-classification", "tags")
        places = self._tokenizer.encode(texts)
        made: list[list[Tagged]] = [[] for _ in texts]
        for batch, (found,) in self._run(texts):
            for row, values in zip(batch.rows, scored(found, self.labels), strict=True):
                made[row] = _tagged(places[row], values, self.labels)
        return made

    def logits(self, tokens: Sequence[int]) -> Logits:
        self._no_text("logits")

    def logits_chunks(self, tokens: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, Logits]]:
        self._no_text("logits")

    def generate(self, tokens: Sequence[int], max_tokens: int, **_: Any) -> Iterator[int]:
        self._no_text("generate")

    def stream(self, tokens: Sequence[int], max_tokens: int, **_: Any) -> Iterator[str]:
        self._no_text("stream")

    def timings(self) -> Timings:
        """All of it is prefill."""
        ms, tokens = self._spent.ms, self._spent.tokens
        return Timings(self._load_ms, ms[False] + ms[True], tokens[False] + tokens[True], 0.0, 0)

    def reset(self) -> None:
        self._spent.clear()

    def close(self) -> None:
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- how ---------------------------------------------------------------------------------------------------------

    def _run(self, texts: Sequence[Text]) -> Iterator[tuple[Batch, list[Logits]]]:
        """Batches of like lengths, each with the graph's output."""
        if self._session is None:
            raise RuntimeFailed(f"{self.folder.root.name} has been closed", "open it again")
        for batch in self._tokenizer.batches(texts):
            start = perf_counter()
            with readable(self.folder.graph):
                found = self._session.run([self._output], self._feeds(batch))
            self._spent.add(int(batch.mask.sum()), perf_counter() - start)
            self._note_cut(batch, texts)
            yield batch, [np.asarray(f, np.float32) for f in found]

    def _feeds(self, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        values = {"input_ids": batch.ids, "attention_mask": batch.mask, "token_type_ids": batch.types}
        if "position_ids" in self._inputs:
            values["position_ids"] = np.broadcast_to(np.arange(batch.ids.shape[1]), batch.ids.shape)
        return {name: np.ascontiguousarray(values[name], self._kinds[name]) for name in self._inputs}

    def _prompt_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, the special ones before it counted, that behind it not."""
        ids = self.vocabulary.tokenize(prompt, add_special=True)
        return len(ids) - (bool(ids) and self.vocabulary.is_special(ids[-1]))

    def _note_cut(self, batch: Batch, texts: Sequence[Text]) -> None:
        """Say once that texts are cut: `batch` is as long as a text may be, so one of its texts may be longer."""
        limit = self._limit
        if limit is None or self._cut or batch.ids.shape[1] < limit:
            return
        whole = [texts[row] for row, mask in zip(batch.rows, batch.mask, strict=True) if mask.all()]
        if any(isinstance(t, tuple) or len(self.tokenize(t, add_special=True)) > limit for t in whole):
            self._cut = True
            self._notes.append(f"texts of more than {limit} tokens are cut to that")

    def _must(self, task: str, verb: str) -> None:
        if self.task != task:
            offers = {"embedding": "embed", "classification": "scores", "token-classification": "tags"}[self.task]
            raise RuntimeFailed(f"{self.folder.root.name} is made for {self.task}: it has no {verb}", f"use {offers}")

    def _no_text(self, verb: str) -> NoReturn:
        raise RuntimeFailed(
            f"{self.folder.root.name} is an encoder: it writes no text, so it has no {verb}",
            "use embed, scores or tags",
        )


def _inputs(graph: OnnxFile) -> tuple[str, ...]:
    """Names of what must be fed. Raises UnsupportedModel for what no text gives."""
    names = tuple(v.name for v in graph.inputs if v.name not in graph.initializers)
    unknown = [n for n in names if n not in ("input_ids", "attention_mask", "token_type_ids", "position_ids")]
    if unknown or "input_ids" not in names:
        what = f"wants {unknown[0]!r}" if unknown else "takes no input_ids"
        raise UnsupportedModel(f"{graph.path} {what}: no encoder of text", "give a graph that takes token ids")
    return names


def _output(graph: OnnxFile) -> tuple[str, str]:
    """(name of the output to read, what the graph is for). Raises UnsupportedModel."""
    ranks = {v.name: len(v.shape) if v.shape is not None else 0 for v in graph.outputs}
    if "logits" in ranks:
        return "logits", "token-classification" if ranks["logits"] == 3 else "classification"
    named = next((n for n in (*_HIDDEN, *_POOLED[:1]) if n in ranks), None)
    named = named or next((n for n, rank in ranks.items() if rank == 3), None)
    named = named or next((n for n in _POOLED if n in ranks), None)
    if named is None:
        raise UnsupportedModel(f"{graph.path} gives {', '.join(ranks) or 'nothing'}: no hidden states and no logits")
    return named, "embedding"


def _limit(folder: Folder, pooling: Pooling, n_ctx: int | None) -> int | None:
    """The fewest of: what was asked, what the pooling's files say, what there are positions for."""
    if n_ctx is not None and 0 < n_ctx < 3:
        raise EdgekitError(f"a context of {n_ctx} tokens", "an encoder needs room for its special tokens: 3 or more")
    known = [pooling.max_length or positions(folder.config), n_ctx or None]
    return min((n for n in known if n), default=None)


def _tagged(encoding: Any, values: Logits, labels: Labels) -> list[Tagged]:
    found = []
    places = zip(encoding.offsets, encoding.special_tokens_mask, values, strict=False)
    for (start, stop), is_special, row in places:
        if not is_special:
            best = int(row.argmax())
            found.append(Tagged(start, stop, labels.names[best], float(row[best]), row))
    return found
