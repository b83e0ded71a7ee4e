"""Encoder-decoders: a text is read whole, then another one is written.

Knows prompts, rules and sampling; the graphs are `_ort_pair`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from edgekit.chat import Template
from edgekit.errors import CorruptCheckpoint, RuntimeFailed
from edgekit.onnx_file import OnnxFile
from edgekit.runtime import Logits, Timings
from edgekit.runtime._common import Spent, Tokens
from edgekit.runtime._ort_folder import Folder, cached_facts, read_object
from edgekit.runtime._ort_pair import Pair, encoder_of
from edgekit.runtime._ort_writer import FolderWriter
from edgekit.runtime._rules import Rules, read_rules
from edgekit.runtime._sampling import Sampler, Sampling
from edgekit.runtime._text import TextStream

TRAINED = 512
"""Tokens of either text where config.json names no number: positions are relative then, and more can be asked for."""


class Seq2SeqSession(FolderWriter):
    """See `edgekit.runtime.Session`. `n_ctx` bounds the text that is read and the one that is written, each.

    `generate` reads its tokens and writes an answer to them: its first token, forced and forbidden ones are those of
    generation_config.json. Beam search is not done.
    """

    encoder = False
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
        self.folder, self.threads = folder, threads
        self._facts = cached_facts(folder, graph, length=TRAINED)
        limit = self._facts.context
        endless = not any(
            key in folder.config for key in ("max_position_embeddings", "max_encoder_position_embeddings")
        )
        self._size = limit if n_ctx is None or n_ctx == 0 else n_ctx if endless else min(n_ctx, limit)
        generation = read_object(folder.root / "generation_config.json") or {}
        rules = read_rules(folder.config, generation, self._facts.n_vocab)
        if rules is None:
            raise CorruptCheckpoint(f"{folder.root} names no decoder_start_token_id", "add it to its config.json")
        self.rules: Rules = rules
        cut = (f"the context is {limit} tokens, not {n_ctx}",) if n_ctx and n_ctx > self._size else ()
        self._spent = Spent()
        self._pair: Pair | None = Pair(
            encoder_of(folder.graph), folder.graph, self._facts.n_vocab, threads, providers, self._spent
        )
        self._notes = (*notes, *cut, *rules.notes, *self._pair.notes)
        self._load_ms = self._pair.load_ms
        self._turn = 0
        self.finish_reason = ""

    @property
    def n_ctx(self) -> int:
        return self._size

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes

    def metadata(self) -> Mapping[str, str]:
        """Scalars of config.json as `config.KEY`."""
        scalars = {k: v for k, v in self.folder.config.items() if isinstance(v, str | int | float | bool)}
        return {f"config.{key}": str(value) for key, value in scalars.items()}

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
        """Read `tokens` and write at most `max_tokens`, at most to the end of the context.

        Temperature 0 takes the likeliest token. Raises RuntimeFailed at once if there is nothing to read or too much.
        """
        ids = self._admitted(tokens)
        if not len(ids):
            raise RuntimeFailed("there is no token to answer", "give a prompt")
        sampler = Sampler(Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed))
        self._turn += 1
        return self._run(ids, min(max_tokens, self.n_ctx - 1), sampler, TextStream(stop), self._turn)

    def _run(self, ids: Tokens, limit: int, sampler: Sampler, text: TextStream, turn: int) -> Iterator[int]:
        pair = self._own(turn)
        self.finish_reason = "length"
        if limit <= 0:
            return
        self.finish_reason = ""
        pair.read(ids)
        written = [self.rules.start]
        for _ in range(limit):
            logits = self._own(turn).append(written[-1:])[-1]
            token = sampler.draw(self.rules.apply(logits, written))
            ends = self.vocabulary.is_end(token)
            if not ends:
                text.feed(self.vocabulary.piece(token))
            if ends or text.stopped:
                self.finish_reason = "stop"
                return
            written.append(token)
            yield token
        self.finish_reason = "length"

    def stream(
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
    ) -> Iterator[str]:
        """As `generate`, as text: a text of its own, without the space that its tokenizer puts in front."""
        pieces = super().stream(
            tokens, max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repeat_penalty=repeat_penalty, seed=seed, stop=stop,
        )  # fmt: skip
        return _begun(pieces) if self.vocabulary.leads else pieces

    def logits_chunks(self, tokens: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, Logits]]:
        self._no("predictions of a text on its own")

    def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> Logits:
        self._no("vectors")

    def timings(self) -> Timings:
        """Prefill is reading, and the first token; decoding is what is written behind it."""
        spent = self._spent
        return Timings(self._load_ms, spent.ms[False], spent.tokens[False], spent.ms[True], spent.tokens[True])

    def reset(self) -> None:
        self._turn += 1
        self._spent.clear()

    def close(self) -> None:
        self._turn += 1
        if self._pair:
            self._pair.close()
        self._pair = None

    def _own(self, turn: int) -> Pair:
        if self._pair is None:
            raise RuntimeFailed(f"{self._name} has been closed", "open it again")
        if turn != self._turn:
            raise RuntimeFailed("another call has used the session meanwhile", "finish one iteration before the next")
        return self._pair

    def _no(self, what: str) -> NoReturn:
        raise RuntimeFailed(
            f"{self._name} reads one text and writes another: it gives no {what}",
            "edgekit certify ARTIFACT --against MODEL measures what its rounding changes",
        )


def _begun(pieces: Iterator[str]) -> Iterator[str]:
    """Without a space in front."""
    begun = False
    for piece in pieces:
        shown = piece if begun else piece.removeprefix(" ")
        begun = True
        if shown:
            yield shown
