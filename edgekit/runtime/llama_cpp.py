"""GGUF files through llama.cpp's C interface. Knows contexts, sampling and memory; knows no recipe and no metric."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Self

import numpy as np

from edgekit.batches import Text
from edgekit.chat import Template
from edgekit.classify import Labels
from edgekit.classify import scores as scored
from edgekit.embedding import Pooling, finish, read_pooling, shortened, shortened_pair
from edgekit.errors import EdgekitError, RuntimeFailed
from edgekit.gguf_file import open_gguf
from edgekit.host import detect
from edgekit.runtime import Logits, Timings
from edgekit.runtime._common import PENALTY_WINDOW, Spent, Tokens, Writer, checked, encoded, room_for, same_start
from edgekit.runtime._llama_library import (
    attach_threadpool,
    build,
    devices,
    free_threadpool,
    library,
    new_threadpool,
)
from edgekit.runtime._sampling import Sampling as Draws
from edgekit.runtime._text import TextStream
from edgekit.units import MIB, show_count

Flash = Literal["auto", "on", "off"]

KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "iq4_nl": 20}
"""Names of KV cache types -> ggml_type (ggml.h)."""

FLASH: dict[str, int] = {"auto": -1, "off": 0, "on": 1}
"""llama_flash_attn_type (llama.h)."""

POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
"""llama_pooling_type (llama.h)."""

_OUTPUT_BUDGET = 64 * MIB
_DECODE_ERRORS = {
    1: "the context is full",
    2: "the computation was aborted",
    -1: "the engine rejected the batch",
    -2: "not enough memory for the computation",
    -3: "the computation failed",
}


class Model:
    """A loaded GGUF: its vocabulary and its facts. `close` (or leave the `with`) after everything made from it."""

    def __init__(self, path: Path, handle: int, load_ms: float) -> None:
        self._api = library().api
        self.path, self.load_ms = path, load_ms
        self._handle: int | None = handle
        self._finalizer = weakref.finalize(self, self._api.llama_model_free, handle)
        self._vocab = self._api.llama_model_get_vocab(handle)
        self.n_vocab: int = self._api.llama_vocab_n_tokens(self._vocab)

    @property
    def handle(self) -> int:
        """The `llama_model *`. Raises RuntimeFailed once closed."""
        if self._handle is None:
            raise RuntimeFailed(f"{self.path.name} has been closed", "open it again")
        return self._handle

    @cached_property
    def description(self) -> str:
        """Family, size and type as the engine names them, e.g. `llama 1B Q4_K - Medium`; a size that it has no name for
        is counted."""
        named = _read_string(lambda buffer, size: self._api.llama_model_desc(self.handle, buffer, size)) or ""
        return named.replace("?B", show_count(self.parameters).replace(" ", ""))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return int(self._api.llama_model_size(self.handle))

    @cached_property
    def parameters(self) -> int:
        return int(self._api.llama_model_n_params(self.handle))

    @cached_property
    def n_ctx_train(self) -> int:
        return int(self._api.llama_model_n_ctx_train(self.handle))

    @cached_property
    def bos(self) -> int | None:
        return _token_or_none(self._api.llama_vocab_bos(self._vocab))

    @cached_property
    def eos(self) -> int | None:
        return _token_or_none(self._api.llama_vocab_eos(self._vocab))

    @cached_property
    def add_bos(self) -> bool:
        return bool(self._api.llama_vocab_get_add_bos(self._vocab))

    @cached_property
    def pair_frame(self) -> tuple[list[int], list[int], list[int]]:
        """Tokens before two texts that are read together, behind each of them, and between them beside that."""
        api, vocab = self._api, self._vocab
        sep = _token_or_none(api.llama_vocab_sep(vocab))

        def kept(token: int | None, wanted: bool) -> list[int]:
            return [token] if wanted and token is not None else []

        return (
            kept(self.bos, self.add_bos),
            kept(self.eos, api.llama_vocab_get_add_eos(vocab)),
            kept(sep, api.llama_vocab_get_add_sep(vocab)),
        )

    @cached_property
    def chat_template(self) -> str | None:
        text = self._api.llama_model_chat_template(self.handle, None)
        return None if text is None else str(text, "utf-8", "replace")

    def template(self) -> Template | None:
        """The chat template with the texts of the special tokens that the file itself names, or None."""
        if self.chat_template is None:
            return None
        facts, specials = self.metadata(), {}
        for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
            index = facts.get(f"tokenizer.ggml.{key}_token_id", "")
            if index.isdecimal() and int(index) < self.n_vocab:
                text = self._api.llama_vocab_get_text(self._vocab, int(index))
                specials[f"{name}_token"] = str(text, "utf-8", "replace")
        return Template(self.chat_template, specials)

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation: any of EOS, EOT, EOM ... (llama_vocab_is_eog)."""
        return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    def metadata(self) -> dict[str, str]:
        """The file's scalar metadata as text; arrays are left out or abridged, as the engine does."""
        api, model = self._api, self.handle
        found = {}
        for i in range(api.llama_model_meta_count(model)):
            key = _read_string(lambda b, n, i=i: api.llama_model_meta_key_by_index(model, i, b, n))
            value = _read_string(lambda b, n, i=i: api.llama_model_meta_val_str_by_index(model, i, b, n))
            if key is not None and value is not None:
                found[key] = value
        return found

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Ids of `text`, however many. `add_special`: BOS/EOS as the vocabulary says; `parse_special`: `<|im_end|>`
        in the text is that token, not letters. Raises RuntimeFailed for a model without vocabulary."""
        if self._api.llama_vocab_type(self._vocab) == self._api.LLAMA_VOCAB_TYPE_NONE:
            raise RuntimeFailed(f"{self.path.name} has no vocabulary", "use token ids")
        data = encoded(text)
        room = len(data) + 8
        for _ in range(2):
            ids = (ctypes.c_int32 * room)()
            n = self._api.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
            if n >= 0:
                return ids[:n]
            room = -n
        raise RuntimeFailed(f"a text of {len(data)} bytes is too long for the tokenizer", "split it")

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of `tokens`; control tokens are shown only if `special`. Invalid UTF-8 becomes U+FFFD."""
        ids = (ctypes.c_int32 * len(tokens))(*self.checked(tokens))
        room = 16 + 8 * len(tokens)
        for _ in range(2):
            out = ctypes.create_string_buffer(room)
            n = self._api.llama_detokenize(self._vocab, ids, len(tokens), out, room, False, special)
            if n >= 0:
                return out.raw[:n].decode("utf-8", "replace")
            room = -n
        raise RuntimeFailed(f"cannot turn {len(tokens)} tokens into text", "")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes `token` adds to a text; control tokens add none unless `special`."""
        self.checked([token])
        return _read_bytes(lambda b, n: self._api.llama_token_to_piece(self._vocab, token, b, n, 0, special), 64)

    def checked(self, tokens: Sequence[int]) -> Tokens:
        """`tokens` as int32, each within the vocabulary. Raises RuntimeFailed naming the first that is not."""
        return checked(tokens, self.n_vocab, self.path.name)

    def close(self) -> None:
        self._handle = None
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """How a context is made. `n_ctx` 0: what the model was trained with. `outputs`: most rows of logits from one batch,
    0 = as many as fit in 64 MiB. `threads` None: the cores worth using that this process may have. `sequences`: texts
    side by side, each with an equal part of `n_ctx`."""

    n_ctx: int
    threads: int | None = None
    n_batch: int = 512
    n_ubatch: int = 512
    kv: str = "f16"
    kv_values: str | None = None
    flash: Flash = "auto"
    outputs: int = 0
    embeddings: bool = False
    pooling: str | None = None
    sequences: int = 1


class Context:
    """Memory and threads to run a `Model` with. Knows batches; keeps no history.

    `cb_eval`: a ggml_backend_sched_eval_callback that is shown the nodes of every graph; kept as long as the context.
    """

    def __init__(self, model: Model, settings: ContextSettings, *, cb_eval: Any = None) -> None:
        self._api = api = library().api
        self.threads = _threads(settings.threads)
        params = _context_params(model, settings, self.threads)
        if cb_eval is not None:
            self._cb_eval, params.cb_eval = cb_eval, cb_eval
        self.n_batch, self.outputs = int(params.n_batch), int(params.n_outputs_max or params.n_batch)
        library().listen()
        handle = api.llama_init_from_model(model.handle, params)
        if not handle:
            reason = library().log.reason() or "not enough memory"
            raise RuntimeFailed(
                f"{model.path.name}: no context of {settings.n_ctx} tokens with {settings.kv} KV cache: {reason}",
                "try a smaller --ctx-size, or an f16 cache",
            )
        self._handle: int | None = handle
        self.spent = Spent()
        self.n_ctx: int = min(settings.n_ctx or model.n_ctx_train, api.llama_n_ctx(handle))
        pool = new_threadpool(self.threads)
        if pool is not None:
            attach_threadpool(handle, pool)
        self.n_batch = min(self.n_batch, api.llama_n_batch(handle))
        batch = api.llama_batch_init(self.n_batch, 0, 1)
        self._batch = _Batch(batch, self.n_batch, side_by_side=settings.sequences > 1)
        self._finalizer = weakref.finalize(self, _free_context, handle, pool, batch, model)

    @property
    def handle(self) -> int:
        """The `llama_context *`. Raises RuntimeFailed once closed."""
        if self._handle is None:
            raise RuntimeFailed("the session has been closed", "open it again")
        return self._handle

    def decode(self, tokens: Tokens, position: int, first_output: int) -> None:
        """Run at most `n_batch` tokens at positions from `position` on; rows of logits are kept from index
        `first_output` of `tokens` on. Raises RuntimeFailed."""
        positions = np.arange(position, position + len(tokens), dtype=np.int32)
        self._run(tokens, positions, first_output)

    def advance(self, tokens: Tokens, positions: Tokens) -> None:
        """Run one token of every sequence: number i is at `positions[i]` of sequence i, and its logits are row i.

        For contexts of several sequences. Raises RuntimeFailed.
        """
        self._run(tokens, positions, 0)

    def _run(self, tokens: Tokens, positions: Tokens, first_output: int) -> None:
        batch = self._batch.fill(tokens, positions, first_output)
        library().log.clear()
        start = perf_counter()
        status = self._api.llama_decode(self.handle, batch)
        self._api.llama_synchronize(self.handle)
        self.spent.add(len(tokens), perf_counter() - start)
        if status != 0:
            said = library().log.reason()
            why = _DECODE_ERRORS.get(status, f"llama_decode returned {status}")
            at = int(positions[0])
            raise RuntimeFailed(f"{why} at position {at}" + (f": {said}" if said else ""), "try a smaller prompt")

    def append(self, tokens: Sequence[int], step: int) -> None:
        """Run `tokens`, `step` at a time, behind what memory holds; of each batch the last row of logits is kept.

        The loop to measure: nothing is checked or booked. Single tokens are waited for one by one, as a generation
        has to; larger batches at the end. Raises RuntimeFailed.
        """
        api, context = self._api, self.handle
        room = (ctypes.c_int32 * step)()
        batch = api.llama_batch_get_one(room, step)
        for start in range(0, len(tokens), step):
            part: list[Any] = list(tokens[start : start + step])
            room[: len(part)] = part
            batch.n_tokens = len(part)
            status = api.llama_decode(context, batch)
            if status != 0:
                raise RuntimeFailed(_DECODE_ERRORS.get(status, f"llama_decode returned {status}"), "try fewer tokens")
            if step == 1:
                api.llama_synchronize(context)
        api.llama_synchronize(context)

    def likeliest(self, n_vocab: int) -> int:
        """The token with the largest of the last logits."""
        last = self._api.llama_get_logits_ith(self.handle, -1)
        return int(np.ctypeslib.as_array(last, (n_vocab,)).argmax())

    def rows(self, n: int, n_vocab: int) -> Logits:
        """A copy of the `n` rows of logits the last `decode` kept -> float32 (n, n_vocab)."""
        return _copy(self._api.llama_get_logits(self.handle), n * n_vocab).reshape(n, n_vocab)

    def forget(self, position: int = 0) -> bool:
        """Drop everything from `position` on. False: the model's memory cannot be cut there (nothing was dropped)."""
        memory = self._api.llama_get_memory(self.handle)
        if not memory:
            return True
        if position == 0:
            self._api.llama_memory_clear(memory, False)
            return True
        return bool(self._api.llama_memory_seq_rm(memory, 0, position, -1))

    def forget_sequence(self, sequence: int) -> None:
        """Drop everything that one of several sequences holds."""
        self._api.llama_memory_seq_rm(self._api.llama_get_memory(self.handle), sequence, -1, -1)

    def first_kept(self) -> int:
        """The first position still in memory (later than 0 for sliding windows), -1 if there is none."""
        memory = self._api.llama_get_memory(self.handle)
        return int(self._api.llama_memory_seq_pos_min(memory, 0)) if memory else -1

    def close(self) -> None:
        self._handle = None
        self._finalizer()


class LlamaSession(Writer):
    """A `Model` with a `Context`: see `edgekit.runtime.Session`. `with` closes both."""

    def __init__(self, model: Model, settings: ContextSettings) -> None:
        self._api = library().api
        self.model, self._settings = model, settings
        self.context = Context(model, settings)
        self._embeddings = settings.embeddings
        self._fed: list[int] = []
        self._turn = 0
        self.finish_reason = ""
        self.notes = _notes(model, self.context.n_ctx)

    @property
    def n_vocab(self) -> int:
        return self.model.n_vocab

    @property
    def n_ctx(self) -> int:
        return self.context.n_ctx

    @property
    def threads(self) -> int:
        return self.context.threads

    @property
    def bos(self) -> int | None:
        return self.model.bos

    @property
    def add_bos(self) -> bool:
        return self.model.add_bos

    @property
    def chat_template(self) -> str | None:
        return self.model.chat_template

    @property
    def template(self) -> Template | None:
        return self.model.template()

    @property
    def encoder(self) -> bool:
        return self._embeddings

    def metadata(self) -> Mapping[str, str]:
        return self.model.metadata()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        return self.model.tokenize(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return self.model.detokenize(tokens, special=special)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self.model.piece(token, special=special)

    def logits_chunks(self, tokens: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, Logits]]:
        """(position of the first row, float32 (m, n_vocab)) for every position from `first` on; m is bounded so that a
        slab takes at most about 64 MiB. What the session had read before is forgotten. Raises RuntimeFailed."""
        if self._embeddings:
            raise RuntimeFailed("a session opened for embeddings gives no logits", "open it without embeddings")
        ids = self._admitted(tokens)
        return self._run_chunks(ids, first, self._take_turn(forget=True))

    def _run_chunks(self, ids: Tokens, first: int, turn: int) -> Iterator[tuple[int, Logits]]:
        start = 0
        while start < len(ids):
            shown = max(start, first)
            stop = min(start + self.context.n_batch, shown + self.context.outputs, len(ids))
            self._own(turn)
            self.context.decode(ids[start:stop], start, shown - start)
            self._fed.extend(ids[start:stop].tolist())
            if shown < stop:
                yield shown, self.context.rows(stop - shown, self.n_vocab)
            start = stop

    def generate(
        self,
        tokens: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[int]:
        """Continue `tokens` by at most `max_tokens` and at most to the end of the context.

        Temperature 0 takes the likeliest token; otherwise llama.cpp's chain penalty, top-k, top-p, min-p, temperature
        and its seeded generator. Tokens already in memory from the last call are not computed again.
        Raises RuntimeFailed at once if the prompt does not fit.
        """
        ids = self._admitted(tokens)
        if not len(ids):
            raise RuntimeFailed("there is no token to continue from", "give a prompt, or the BOS token")
        chain = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed)
        limit = min(max_tokens, self.n_ctx - len(ids))
        return self._run_generate(ids, limit, chain, TextStream(stop), self._take_turn(forget=False))

    def _run_generate(self, ids: Tokens, limit: int, sampling: Sampling, text: TextStream, turn: int) -> Iterator[int]:
        self.finish_reason = "length"
        if limit <= 0:
            return
        sampler = sampling.build(self._api, self.n_vocab, ids)
        try:
            self.finish_reason = ""
            self._feed(ids[self._reuse(ids) :])
            for left in range(limit, 0, -1):
                self._own(turn)
                token = self._api.llama_sampler_sample(sampler, self.context.handle, -1)
                if not self.model.is_end(token):
                    text.feed(self.piece(token))
                if self.model.is_end(token) or text.stopped:
                    self.finish_reason = "stop"
                    return
                yield token
                if left > 1:
                    self._own(turn)
                    self._feed(np.array([token], np.int32))
            self.finish_reason = "length"
        finally:
            self._api.llama_sampler_free(sampler)

    @cached_property
    def pooling(self) -> Pooling:
        """What the files of sentence-transformers beside the GGUF say; how tokens are pooled is in the GGUF itself."""
        return read_pooling(self.model.path.parent)

    def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> Logits:
        """Pooled vectors -> float32 (len(texts), dim), as sentence-transformers makes them from the files beside.

        Those files say which prompt goes in front, where a text is cut, and whether vectors have length 1 (`normalize`
        None). Where there are none, vectors have length 1 and a text that does not fit is refused. Raises RuntimeFailed
        if not opened for embeddings, UnknownName.
        """
        self._must_be_encoder()
        if self.scoring:
            raise RuntimeFailed(f"{self.model.path.name} is a classifier: it gives no vectors", "call scores")
        pooling, lead = self.pooling, self.pooling.prompt(prompt, prompt_name)
        if lead and not pooling.include_prompt:
            raise RuntimeFailed("llama.cpp pools the prompt with the text; this model must not", "use --format onnx")
        out = np.zeros((len(texts), self._api.llama_model_n_embd_out(self.model.handle)), np.float32)
        for row, text in zip(out, texts, strict=True):
            whole = lead + text
            ids = self._admitted(self._cut(whole.lower() if pooling.lower else whole))
            if not len(ids):
                raise RuntimeFailed("an empty text has no embedding", "leave it out")
            row[:] = self._pooled(ids, len(row))
        return finish(out, pooling, normalize=normalize if pooling.stated or normalize is not None else True)

    def _pooled(self, ids: Tokens, width: int) -> Logits:
        """What `ids`, read alone, become -> float32 (width,)."""
        self._take_turn(forget=True)
        self.context.decode(ids, 0, 0)
        return _copy(self._api.llama_get_embeddings_seq(self.context.handle, 0), width)

    def _must_be_encoder(self) -> None:
        if not self._embeddings:
            raise RuntimeFailed("the session was not opened for embeddings", "open it with embeddings=True")

    @cached_property
    def scoring(self) -> bool:
        """Whether the model ends in a head that scores: a classifier or reranker, which has no vectors to give."""
        return bool(self._api.llama_pooling_type(self.context.handle) == POOLING["rank"])

    @cached_property
    def labels(self) -> Labels:
        """What the columns of `scores` are called, and the function behind the head; a file of another tool's says
        nothing of that: a sigmoid of one label, the logits of several."""
        count = int(self._api.llama_model_n_cls_out(self.model.handle))
        file = open_gguf(self.model.path)
        arch = file.get("general.architecture")
        stated = file.get(f"{arch}.classifier.output_labels")
        known = isinstance(stated, list | tuple) and len(stated) == count
        names = map(str, stated) if known else (f"LABEL_{i}" for i in range(count))
        function = file.get(f"{arch}.classifier.function")
        return Labels(tuple(names), str(function) if function else "sigmoid" if count == 1 else "none")

    def scores(self, texts: Sequence[Text]) -> Logits:
        """Scores of texts, or of pairs read together -> float32 (len(texts), labels); columns are `labels.names`.

        Probabilities as transformers' pipeline gives them, or for a reranker what sentence-transformers' CrossEncoder
        does. What is longer than the context is cut, of a pair the longer text first, which `notes` tells. Raises
        RuntimeFailed.
        """
        self._must_be_encoder()
        if not self.scoring:
            raise RuntimeFailed(f"{self.model.path.name} is no classifier: it gives vectors", "call embed")
        logits = np.empty((len(texts), len(self.labels.names)), np.float32)
        for row, text in zip(logits, texts, strict=True):
            ids = self._cut(text) if isinstance(text, str) else self.pair(*text)
            row[:] = self._pooled(self._admitted(ids), len(row))
        return scored(logits, self.labels)

    def pair(self, first: str, second: str) -> list[int]:
        """Tokens of two texts that are read together, framed as llama.cpp's server frames them: what the vocabulary
        puts around a text, and between two of them the token of `add_sep_token` if it says so."""
        before, behind, between = self.model.pair_frame
        parts = [self.tokenize(text, add_special=False) for text in (first, second)]
        room = self._room() - len(before) - 2 * len(behind) - len(between)
        if sum(map(len, parts)) > room:
            self._note_cut(self._room())
            parts = list(shortened_pair(parts[0], parts[1], room))
        return [*before, *parts[0], *behind, *between, *parts[1], *behind]

    def _cut(self, text: str) -> list[int]:
        """Tokens of `text`, as many as the model's files allow; the special ones around it stay.

        Raises RuntimeFailed beyond the positions that an encoder has: the engine would end the process.
        """
        ids = self.tokenize(text, add_special=True)
        room, cuts = self._room(), self.scoring or self.pooling.stated
        if len(ids) > room and not cuts:
            raise RuntimeFailed(f"{len(ids)} tokens do not fit in a context of {room}", "shorten the text")
        limit = room if self.scoring else min(self.pooling.max_length or room, room)
        if not cuts or len(ids) <= limit:
            return ids
        self._note_cut(limit)
        return shortened(ids, self.tokenize(text, add_special=False), limit)

    def _room(self) -> int:
        return min(self.n_ctx, self.model.n_ctx_train or self.n_ctx)

    def _note_cut(self, limit: int) -> None:
        if not any("are cut" in note for note in self.notes):
            self.notes = (*self.notes, f"texts of more than {limit} tokens are cut to that")

    def timings(self) -> Timings:
        spent = self.context.spent
        return Timings(self.model.load_ms, spent.ms[False], spent.tokens[False], spent.ms[True], spent.tokens[True])

    def reset(self) -> None:
        self._take_turn(forget=True)
        self.context.spent = Spent()

    def with_threads(self, threads: int) -> LlamaSession:
        """Another session of the same model, which closes the model too: close the context of the one not wanted."""
        return LlamaSession(self.model, replace(self._settings, threads=threads))

    def close(self) -> None:
        self.context.close()
        self.model.close()

    def _admitted(self, tokens: Sequence[int]) -> Tokens:
        return room_for(self.model.checked(tokens), self.n_ctx)

    def _take_turn(self, *, forget: bool) -> int:
        """From now on the memory belongs to this call; an iterator of an earlier one can go no further."""
        self._turn += 1
        if forget:
            self._fed.clear()
            self.context.forget()
        return self._turn

    def _own(self, turn: int) -> None:
        if turn != self._turn:
            raise RuntimeFailed("another call has used the session meanwhile", "finish one iteration before the next")

    def _feed(self, ids: Tokens) -> None:
        """Append `ids` to what has been read; logits of the last one are kept."""
        for start in range(0, len(ids), self.context.n_batch):
            part = ids[start : start + self.context.n_batch]
            self.context.decode(part, len(self._fed), len(part) - 1)
            self._fed.extend(part.tolist())

    def _reuse(self, ids: Tokens) -> int:
        """Keep the longest beginning of `ids` that memory holds, drop the rest -> how many need no computing.

        The last token is always computed: its logits are wanted. A sliding window may have lost what a position
        behind it needs, and recurrent memory cannot be cut: then everything is read again.
        """
        keep = same_start(self._fed, ids)
        window = self._api.llama_model_n_swa(self.model.handle)
        lost = window > 0 and self.context.first_kept() > max(0, keep - window)
        if keep == 0 or lost or not self.context.forget(keep):
            keep = 0
            self.context.forget()
        del self._fed[keep:]
        return keep


class Sampling(Draws):
    """How the next token is drawn, by llama.cpp's own chain."""

    __slots__ = ()

    def build(self, api: Any, n_vocab: int, prompt: Tokens) -> int:
        """A `llama_sampler *` chain, in the order of llama.cpp's own tools, that has seen the end of `prompt`.

        The caller frees it.
        """
        chain: int = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        steps = []
        if self.repeat_penalty != 1.0:
            steps.append(api.llama_sampler_init_penalties(n_vocab, PENALTY_WINDOW, self.repeat_penalty, 0.0, 0.0))
        if self.temperature <= 0:
            steps.append(api.llama_sampler_init_greedy())
        else:
            steps += [
                api.llama_sampler_init_top_k(self.top_k),
                api.llama_sampler_init_top_p(self.top_p, 1),
                api.llama_sampler_init_min_p(self.min_p, 1),
                api.llama_sampler_init_temp(self.temperature),
                api.llama_sampler_init_dist(self.seed & 0xFFFFFFFF),
            ]
        for step in steps:
            api.llama_sampler_chain_add(chain, step)
        for token in prompt[-PENALTY_WINDOW:].tolist():
            api.llama_sampler_accept(chain, token)
        return chain


class _Batch:
    """A `llama_batch` of one sequence, or of one token of each sequence; and numpy views of its arrays."""

    def __init__(self, batch: Any, room: int, *, side_by_side: bool) -> None:
        self._batch = batch
        self._tokens = np.ctypeslib.as_array(batch.token, (room,))
        self._positions = np.ctypeslib.as_array(batch.pos, (room,))
        self._wanted = np.ctypeslib.as_array(batch.logits, (room,))
        np.ctypeslib.as_array(batch.n_seq_id, (room,))[:] = 1
        for i in range(room):
            batch.seq_id[i][0] = i if side_by_side else 0

    def fill(self, tokens: Tokens, positions: Tokens, first_output: int) -> Any:
        n = len(tokens)
        self._tokens[:n] = tokens
        self._positions[:n] = positions
        self._wanted[:n] = np.arange(n) >= first_output
        self._batch.n_tokens = n
        return self._batch


def build_facts() -> dict[str, str | int]:
    """Which engine this is, under the names llama-bench uses; `build_number` 0, which the library does not tell."""
    commit, version = build()
    cpus, gpus, backends = devices()
    return {
        "build_commit": commit,
        "build_number": 0,
        "cpu_info": ", ".join(cpus),
        "gpu_info": ", ".join(gpus),
        "backends": ",".join(backends) or "CPU",
        "runtime": f"llama-cpp-python {metadata.version('llama-cpp-python')}, llama.cpp {version}",
    }


def open_model(path: str | Path, *, n_gpu_layers: int | None = None, mmap: bool = True) -> Model:
    """Load a GGUF (or the first of its shards). `n_gpu_layers` None: all, where the build can offload.

    Raises RuntimeFailed with the engine's own reason, CorruptCheckpoint for a damaged file: the engine ends the whole
    process on some of those, so the header is checked before it sees them.
    """
    lib, path = library(), Path(path)
    _must_be_gguf(path)
    open_gguf(path)
    params = lib.api.llama_model_default_params()
    params.n_gpu_layers = -1 if n_gpu_layers is None else n_gpu_layers
    params.load_mode = lib.api.LLAMA_LOAD_MODE_AUTO if mmap else lib.api.LLAMA_LOAD_MODE_NONE
    lib.listen()
    start = perf_counter()
    handle = lib.api.llama_model_load_from_file(os.fsencode(path), params)
    if not handle:
        reason = lib.log.reason() or "no reason given"
        hint = f"edgekit inspect {path} shows what it holds"
        if "unknown model architecture" in reason:
            hint = "llama-cpp-python is older than this family: pip install --upgrade llama-cpp-python"
        raise RuntimeFailed(f"llama.cpp refused {path}: {reason}", hint)
    return Model(path, handle, 1e3 * (perf_counter() - start))


def open_session(
    path: str | Path,
    *,
    n_ctx: int,
    threads: int | None = None,
    n_batch: int = 512,
    n_ubatch: int = 512,
    kv: str = "f16",
    kv_values: str | None = None,
    flash: Flash = "auto",
    mmap: bool = True,
    n_gpu_layers: int | None = None,
    outputs: int = 0,
    embeddings: bool = False,
    pooling: str | None = None,
) -> LlamaSession:
    """Load `path` with room for `n_ctx` tokens (0: what the model was trained with). `kv` is the type of the cached
    keys, `kv_values` of the values (None: the same). Raises RuntimeFailed: no such file, not a GGUF, an unknown
    family, no memory."""
    settings = ContextSettings(
        n_ctx, threads, n_batch, n_ubatch, kv, kv_values, flash, outputs, embeddings, pooling,
    )  # fmt: skip
    model = open_model(path, n_gpu_layers=n_gpu_layers, mmap=mmap)
    try:
        return LlamaSession(model, settings)
    except BaseException:
        model.close()
        raise


def _must_be_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as e:
        raise RuntimeFailed(f"cannot open {path}: {e.strerror}", "give the path of a .gguf file") from None
    if magic != b"GGUF":
        raise RuntimeFailed(f"{path} is not a GGUF file: it begins with {magic!r}", "edgekit convert MODEL makes one")


def _context_params(model: Model, settings: ContextSettings, threads: int) -> Any:
    api = library().api
    params = api.llama_context_default_params()
    params.n_ctx = settings.n_ctx
    params.n_batch, params.n_ubatch = settings.n_batch, settings.n_ubatch
    params.n_seq_max = settings.sequences
    if settings.embeddings:  # encoders see the whole text at once
        params.n_batch = params.n_ubatch = settings.n_ctx or model.n_ctx_train
    most = settings.outputs or max(1, _OUTPUT_BUDGET // (4 * model.n_vocab))
    params.n_outputs_max = 0 if settings.embeddings else min(most, params.n_batch)
    params.n_threads = params.n_threads_batch = threads
    params.type_k = _named(KV_TYPES, settings.kv, "KV cache type")
    params.type_v = _named(KV_TYPES, settings.kv_values or settings.kv, "KV cache type")
    params.flash_attn_type = _named(FLASH, settings.flash, "flash attention setting")
    params.swa_full = False  # a sliding window takes the memory of its window, as planned
    params.embeddings = settings.embeddings
    if settings.embeddings:
        params.pooling_type = _pooling(model, settings.pooling)
    return params


def _pooling(model: Model, wanted: str | None) -> int:
    """The pooling asked for, else the model's own, else the mean (a decoder names none)."""
    if wanted == "rank" and not {"cls.weight", "cls.output.weight"} & open_gguf(model.path).tensors.keys():
        raise RuntimeFailed(f"{model.path.name} has no head that scores", "leave out pooling=")
    if wanted is not None:
        return _named({k: v for k, v in POOLING.items() if k != "none"}, wanted, "pooling")
    facts = model.metadata()
    stated = facts.get(f"{facts.get('general.architecture')}.pooling_type", "0")
    return -1 if stated != "0" else POOLING["mean"]


def _named(table: Mapping[str, int], name: str, what: str) -> int:
    if name not in table:
        raise EdgekitError(f"no {what} called {name!r}", f"known: {', '.join(table)}")
    return table[name]


def _threads(wanted: int | None) -> int:
    if wanted is not None and not 1 <= wanted <= 512:  # GGML_MAX_N_THREADS, ggml.h
        raise EdgekitError(f"{wanted} threads", "between 1 and 512")
    return wanted or detect().threads


def _notes(model: Model, n_ctx: int) -> tuple[str, ...]:
    if 0 < model.n_ctx_train < n_ctx:
        return (f"the context of {n_ctx} tokens is longer than the {model.n_ctx_train} the model was trained with",)
    return ()


def _free_context(handle: int, pool: int | None, batch: Any, _model: Model) -> None:
    """The pool and the model outlive the context that uses them; being an argument here keeps the model alive."""
    api = library().api
    api.llama_free(handle)
    if pool is not None:
        free_threadpool(pool)
    api.llama_batch_free(batch)


def _copy(pointer: Any, n: int) -> Logits:
    """`n` floats from the engine's memory, as an array of our own."""
    if not pointer:
        raise RuntimeFailed("the engine kept no result for the last batch", "this is a bug in edgekit")
    return np.ctypeslib.as_array(pointer, (n,)).copy()


def _token_or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _read_string(call: Any) -> str | None:
    """Text from a `snprintf`-like function (buffer, size) -> length needed, or negative for none."""
    room = 256
    for _ in range(2):
        buffer = ctypes.create_string_buffer(room)
        n = call(buffer, room)
        if n < 0:
            return None
        if n < room:
            return buffer.raw[:n].decode("utf-8", "replace")
        room = n + 1
    return None


def _read_bytes(call: Any, room: int) -> bytes:
    """Bytes from a function (buffer, size) -> length, or minus the length needed."""
    buffer = ctypes.create_string_buffer(room)
    n: int = call(buffer, room)
    if n < 0:
        buffer = ctypes.create_string_buffer(-n)
        n = call(buffer, -n)
    return buffer.raw[: max(n, 0)]
