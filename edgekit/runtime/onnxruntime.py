"""ONNX models: decoders through onnxruntime-genai; encoders, encoder-decoders, and decoders without a
genai_config.json, through onnxruntime; text by the model's own tokenizer.

Knows contexts, sampling and notes; knows no recipe and no metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.chat import Template
from edgekit.errors import EdgekitError, RuntimeFailed
from edgekit.host import Host, detect, usable_cores
from edgekit.onnx_file import OnnxFile, open_onnx, require_runnable
from edgekit.ort_library import onnxruntime, wanted
from edgekit.runtime import Logits, Timings
from edgekit.runtime._common import Spent, Tokens, room_for
from edgekit.runtime._ort_batch import Batch
from edgekit.runtime._ort_cache import Cached, takes_cache
from edgekit.runtime._ort_encoder import EncoderSession
from edgekit.runtime._ort_folder import DecoderFacts, Folder, cached_facts, decoder_facts, find
from edgekit.runtime._ort_genai import Decoder, Settings
from edgekit.runtime._ort_pair import takes_states
from edgekit.runtime._ort_seq2seq import Seq2SeqSession
from edgekit.runtime._ort_vocabulary import Vocabulary
from edgekit.runtime._ort_writer import FolderWriter
from edgekit.runtime._sampling import Sampler, Sampling
from edgekit.runtime._text import TextStream

__all__ = [
    "DEFAULT_CONTEXT",
    "DecoderSession",
    "EncoderSession",
    "OrtSession",
    "Seq2SeqSession",
    "open_decoder",
    "open_session",
    "template_of",
]

DEFAULT_CONTEXT = 4096
"""Tokens of context where neither the caller nor genai_config.json chose a number."""


class DecoderSession(FolderWriter):
    """A decoder with a context of `n_ctx` tokens: see `edgekit.runtime.Session`.

    model.onnx generates; model_all.onnx beside it, over the same weights, gives the logits of every position. One of
    the two is loaded at a time: the other is opened when it is asked for.
    """

    encoder = False

    def __init__(self, folder: Folder, facts: DecoderFacts, settings: Settings, *, notes: Sequence[str] = ()) -> None:
        self.folder, self._facts, self._settings = folder, facts, settings
        self._spent = Spent()
        self._notes = tuple(notes)
        self._turn = 0
        self._closed = False
        self.finish_reason = ""
        self._engine: type[Decoder | Cached] = Cached if folder.genai is None else Decoder
        self._decoder: Decoder | Cached | None = self._engine(folder.graph, facts.n_vocab, settings, self._spent)
        self._load_ms = self._decoder.load_ms

    @property
    def n_ctx(self) -> int:
        return self._settings.n_ctx

    @property
    def threads(self) -> int:
        return self._settings.threads

    @property
    def template(self) -> Template | None:
        return self.vocabulary.template()

    @property
    def chat_template(self) -> str | None:
        template = self.template
        return None if template is None else template.text

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes + (self._decoder.notes if self._decoder else ())

    def metadata(self) -> Mapping[str, str]:
        """Scalars of config.json as `config.KEY` and of genai_config.json as `genai.SECTION.KEY`."""
        return _flat(self.folder.config, "config") | _flat(self.folder.genai or {}, "genai")

    def logits_chunks(self, tokens: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, Logits]]:
        """(position of the first row, float32 (m, n_vocab)) for every position from `first` on; m is bounded so that a
        slab takes at most about 64 MiB. What the session had read before is forgotten. Raises RuntimeFailed: too many
        tokens, a folder whose graph gives the last position only."""
        ids = self._admitted(tokens)
        self._turn += 1
        return self._run_chunks(ids, first, self._turn)

    def _run_chunks(self, ids: Tokens, first: int, turn: int) -> Iterator[tuple[int, Logits]]:
        self._own(turn)
        decoder = self._graph(all_positions=True)
        decoder.clear()
        for start in range(0, len(ids), decoder.step):
            part = ids[start : start + decoder.step]
            self._own(turn)
            decoder.append(part)
            skip = max(0, first - start)
            if skip < len(part):
                yield start + skip, decoder.rows(len(part))[skip:]

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

        Temperature 0 takes the likeliest token; otherwise the steps and draws of llama.cpp's chain, so that the same
        logits and seed give the same tokens on both engines. Tokens already read by the last call are not computed
        again. Raises RuntimeFailed at once if the prompt does not fit.
        """
        ids = self._admitted(tokens)
        if not len(ids):
            raise RuntimeFailed("there is no token to continue from", "give a prompt, or the BOS token")
        sampler = Sampler(Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed), ids.tolist())
        limit = min(max_tokens, self.n_ctx - len(ids))
        self._turn += 1
        return self._run_generate(ids, limit, sampler, TextStream(stop), self._turn)

    def _run_generate(self, ids: Tokens, limit: int, sampler: Sampler, text: TextStream, turn: int) -> Iterator[int]:
        self._own(turn)
        self.finish_reason = "length"
        if limit <= 0:
            return
        self.finish_reason = ""
        decoder = self._graph()
        decoder.feed(ids[decoder.keep(ids) :])
        for left in range(limit, 0, -1):
            self._own(turn)
            token = sampler.draw(decoder.last())
            ends = self.vocabulary.is_end(token)
            if not ends:
                text.feed(self.vocabulary.piece(token))
            if ends or text.stopped:
                self.finish_reason = "stop"
                return
            yield token
            if left > 1:
                self._own(turn)
                decoder.append(np.array([token], np.int32))
        self.finish_reason = "length"

    def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> Logits:
        """Raises RuntimeFailed: the graph of a decoder gives logits."""
        raise RuntimeFailed(f"{self._name} writes text and gives no vectors", "convert an embedding model")

    @contextmanager
    def side_by_side(self, length: int) -> Iterator[Batch]:
        """Many sequences of at most `length` tokens at once, with a cache of their own.

        What the session had read is forgotten, and its graph is closed meanwhile: one is in memory at a time. Raises
        RuntimeFailed, UnsupportedModel.
        """
        self._turn += 1
        self._own(self._turn)
        room_for(np.empty(length, np.int32), self.n_ctx)
        graph = self._path(all_positions=True)
        opened = _checked_graph(graph)
        if self._decoder:
            self._decoder.close()
        self._decoder = None
        fused = {node.op for node in opened.nodes} & {"GroupQueryAttention", "MultiHeadAttention"}
        batch = Batch(
            graph, self.n_vocab, self._settings, length, self._facts.head_size,
            in_place=fused == {"GroupQueryAttention"},
        )  # fmt: skip
        try:
            yield batch
        finally:
            batch.close()

    def timings(self) -> Timings:
        spent = self._spent
        return Timings(self._load_ms, spent.ms[False], spent.tokens[False], spent.ms[True], spent.tokens[True])

    def reset(self) -> None:
        self._turn += 1
        self._spent.clear()
        if self._decoder:
            self._decoder.clear()

    def close(self) -> None:
        self._turn += 1
        self._closed = True
        if self._decoder:
            self._decoder.close()
        self._decoder = None

    def _own(self, turn: int) -> None:
        if self._closed:
            raise RuntimeFailed(f"{self._name} has been closed", "open it again")
        if turn != self._turn:
            raise RuntimeFailed("another call has used the session meanwhile", "finish one iteration before the next")

    def _graph(self, *, all_positions: bool = False) -> Decoder | Cached:
        """The graph that generates, or the one that gives every position's logits; the other is closed first."""
        path = self._path(all_positions=all_positions)
        if self._decoder is None or self._decoder.graph != path:
            if path != self.folder.graph:
                _checked_graph(path)
            if self._decoder:
                self._decoder.close()
            self._decoder = self._engine(path, self.n_vocab, self._settings, self._spent)
            self._load_ms += self._decoder.load_ms
        return self._decoder

    def _path(self, *, all_positions: bool) -> Path:
        apart = all_positions and self.folder.all_positions.is_file()
        return self.folder.all_positions if apart else self.folder.graph


OrtSession = DecoderSession | EncoderSession | Seq2SeqSession


def template_of(path: str | Path) -> Template | None:
    """The chat template of the decoder at `path`; no graph is loaded for that. Raises as `open_session`."""
    folder = find(Path(path))
    return Vocabulary(folder.root, folder.config).template()


def open_decoder(path: str | Path, *, n_ctx: int, threads: int | None = None) -> DecoderSession:
    """As `open_session`, on the CPU. Raises EdgekitError for an encoder."""
    session = open_session(path, n_ctx=n_ctx, threads=threads)
    if isinstance(session, DecoderSession):
        return session
    session.close()
    raise EdgekitError(f"{path} is an encoder: it writes no text", "give a decoder")


def open_session(
    path: str | Path,
    *,
    n_ctx: int | None = None,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    embeddings: bool = False,
) -> OrtSession:
    """Load the graph at `path`: a folder that `edgekit convert` or genai's builder made, or an .onnx file in one.

    `n_ctx`: tokens of context; None: what genai_config.json plans, else at most 4096. `threads` None: the number in
    genai_config.json, else every core this process may use. `providers`: names as in targets (CUDA, CoreML, ...), most
    wanted first; what cannot be had is in `notes`. `embeddings`: refuse a graph that gives no vectors.
    Raises EdgekitError, MissingExtra, CorruptCheckpoint, RuntimeFailed.
    """
    onnxruntime()
    asked = None if providers is None else wanted(providers)
    if threads is not None and not 1 <= threads <= 512:
        raise EdgekitError(f"{threads} threads", "between 1 and 512")
    if n_ctx is not None and n_ctx < 0:
        raise EdgekitError(f"a context of {n_ctx} tokens", "1 or more; 0 is what the model was trained with")
    folder = find(Path(path))
    graph = _checked_graph(folder.graph)
    notes = slow_here(graph, detect())
    cores = threads or usable_cores()
    if folder.genai is None and takes_states(graph) and not embeddings:
        return Seq2SeqSession(folder, graph, n_ctx=n_ctx, threads=cores, providers=asked or (), notes=notes)
    if folder.genai is None and not takes_cache(graph):
        return EncoderSession(folder, graph, n_ctx=n_ctx, threads=cores, providers=asked or (), notes=notes)
    if embeddings:
        raise RuntimeFailed(f"{folder.root.name} writes text and gives no vectors", "convert an embedding model")
    facts = cached_facts(folder, graph) if folder.genai is None else decoder_facts(folder)
    size, shortened = _context(n_ctx, facts)
    used = _no_providers(facts) if asked is None else asked
    settings = Settings(size, threads or _threads(facts), used, windowed=facts.windowed)
    return DecoderSession(folder, facts, settings, notes=(*notes, *shortened))


def _checked_graph(path: Path) -> OnnxFile:
    """The graph, read and its weights found, before an engine that says less sees it."""
    graph = open_onnx(path)
    graph.check(checksums=False)
    require_runnable(graph)
    return graph


def _threads(facts: DecoderFacts) -> int:
    """What the file plans, on a machine that has as many cores."""
    cores = usable_cores()
    return min(facts.threads, cores) if facts.threads else cores


def _no_providers(facts: DecoderFacts) -> tuple[str, ...] | None:
    """() where the file asks for none: then there is nothing that could be missing."""
    return None if facts.providers else ()


def _context(asked: int | None, facts: DecoderFacts) -> tuple[int, tuple[str, ...]]:
    if asked is None:
        return facts.planned or min(DEFAULT_CONTEXT, facts.context), ()
    if asked > facts.context:
        said = f"the context is {facts.context} tokens, not {asked}: the graph has positions for no more"
        return facts.context, (said,)
    return asked or facts.context, ()


def slow_here(graph: OnnxFile, host: Host) -> tuple[str, ...]:
    """A note where `host` has no fast path for the blocks of MatMulNBits, which need dot products of 8-bit integers."""
    if not any(node.op == "MatMulNBits" for node in graph.nodes):
        return ()
    arm = host.machine.lower() in ("aarch64", "arm64")
    needed = "dotprod" if arm else "avx2"
    if not host.isa or needed in host.isa:
        return ()
    return (
        f"this CPU has no {needed}: weights of 4 and 8 bits are unpacked to floats for every token. A GGUF "
        "(edgekit convert --format gguf) or an encoder with --prefer speed (dynamic int8) is faster here",
    )


def _flat(value: Mapping[str, Any], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, inner in value.items():
        name = f"{prefix}.{key}"
        if isinstance(inner, dict):
            found |= _flat(inner, name)
        elif isinstance(inner, str | int | float | bool):
            found[name] = str(inner)
    return found
