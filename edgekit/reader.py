"""An unquantised model that is asked for text, predictions and answers: each is kept by what it follows from.

Knows the cache and what is asked of any engine's session; chooses no format and knows no file format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from edgekit import cache, calibration, chat, effort, flips, reference
from edgekit.calibration import Text
from edgekit.errors import EdgekitError
from edgekit.reference import CompactReference
from edgekit.runtime.llama_cpp import LlamaSession
from edgekit.runtime.onnxruntime import DecoderSession
from edgekit.units import MIB, Progress, silent

T = TypeVar("T")
S = TypeVar("S", LlamaSession, DecoderSession)

_SMALL = 64 * MIB  # what entries that hold no moments take at most


@dataclass(frozen=True)
class Answers:
    """What the unquantised model answers, greedily: token ids of every prompt and of its answer."""

    prompts: tuple[flips.Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    max_tokens: int


@dataclass
class Reader(Generic[S]):
    """The unquantised model, opened with the first question that the cache does not answer.

    `open`: makes its session, of at least `context` tokens. `digest` names the model's content and `engine` what
    computes: both are part of every key.
    """

    open: Callable[[], AbstractContextManager[S]]
    template: chat.Template | None
    context: int
    digest: str
    engine: str
    effort: str
    progress: Progress = silent
    _stack: ExitStack = field(default_factory=ExitStack)
    _session: S | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = None
        self._stack.close()

    @property
    def session(self) -> S:
        if self._session is None:
            self._session = self._stack.enter_context(self.open())
        return self._session

    def entry(self, kind: str, **facts: Any) -> cache.Entry:
        """Where what follows from `facts` about this model is kept."""
        return cache.Entry(kind, cache.key(model=self.digest, engine=self.engine, **facts))

    def remembered(
        self, kind: str, load: Callable[[Path], T], make: Callable[[], T], save: Callable[[T, Path], None], **facts: Any
    ) -> T:
        """What is kept under `facts` about this model, or else what `make` gives, kept."""
        entry = self.entry(kind, **facts)
        folder = entry.find()
        if folder is not None:
            return load(folder)
        made = make()
        if entry.admits(_SMALL):
            with contextlib.suppress(OSError), entry.making() as folder:  # not to be kept makes nothing wrong
                save(made, folder)
        return made

    # --- text ---------------------------------------------------------------------------------------------------------

    def texts(self, source: str | Path) -> tuple[Text, Text]:
        """(to learn from, to judge by), disjoint. `source`: a file, or `self`, which the model then writes."""
        chosen = effort.find(self.effort)
        facts = {"template": self.template.text if self.template else None, "context": self.context}
        if source == "self":
            return self._written(chosen.tokens, 1, facts), _long_enough(
                self._written(chosen.held_out, 1_000_003, facts)
            )
        path, limit = Path(source), chosen.tokens + chosen.held_out
        whole = self._text(
            lambda: calibration.read_text(path, self.session, self.template, limit=limit),
            **facts, name=path.name, content=_content(path), limit=limit,
        )  # fmt: skip
        return split(whole, chosen.held_out / limit)

    def _written(self, tokens: int, seed: int, facts: Mapping[str, Any]) -> Text:
        return self._text(
            lambda: calibration.write_text(self.session, self.template, tokens, seed=seed, progress=self.progress),
            **facts, tokens=tokens, seed=seed,
        )  # fmt: skip

    def _text(self, make: Callable[[], Text], **facts: Any) -> Text:
        def load(folder: Path) -> Text:
            data = json.loads((folder / "text.json").read_text(encoding="utf-8"))
            return Text(data["name"], tuple(map(tuple, data["chunks"])))

        def save(text: Text, folder: Path) -> None:
            write_json(folder / "text.json", {"name": text.name, "chunks": text.chunks})

        return self.remembered("text", load, make, save, **facts)

    # --- what is judged by --------------------------------------------------------------------------------------------

    def judge(self, text: Text) -> CompactReference:
        """Its predictions on `text`."""
        return self.remembered(
            "reference",
            lambda folder: reference.open_reference(folder / "reference.npz"),
            lambda: reference.record(self.session, text.chunks, progress=self.progress),
            lambda made, folder: made.save(folder / "reference.npz"),
            text=text.digest, kept=[reference.TOP, reference.SAMPLES],
        )  # fmt: skip

    def answers(self) -> Answers | None:
        """Greedy answers to the built-in prompts; None where the template takes no plain question."""
        chosen = effort.find(self.effort)
        prompts = flips.builtin_prompts()[: chosen.prompts]

        def make() -> list[list[list[int]]]:
            fit = [(i, ids) for i, prompt in enumerate(prompts) for ids in self._ids(prompt)]
            ids = [found for _, found in fit]
            said = flips.greedy(self.session, ids, chosen.answer_tokens, progress=self.progress)
            return [[[i], found, answer] for (i, found), answer in zip(fit, said, strict=True)]

        rows = self.remembered(
            "answers",
            lambda folder: json.loads((folder / "answers.json").read_text(encoding="utf-8")),
            make,
            lambda made, folder: write_json(folder / "answers.json", made),
            prompts=[p.text for p in prompts], tokens=chosen.answer_tokens, context=self.context,
            template=self.template.text if self.template else None,
        )  # fmt: skip
        if not rows:
            return None
        asked = tuple(prompts[i] for (i,), _, _ in rows)
        return Answers(asked, tuple(tuple(r[1]) for r in rows), tuple(tuple(r[2]) for r in rows), chosen.answer_tokens)

    def _ids(self, prompt: flips.Prompt) -> list[list[int]]:
        """The ids of a prompt; none where it does not fit the context, or the template refuses it."""
        try:
            return flips.prompt_ids(self.session, self.template, [prompt])
        except EdgekitError:
            return []


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise EdgekitError(f"cannot read {path}: {e.strerror}", "--calibration FILE, self or none") from None


def split(whole: Text, share: float) -> tuple[Text, Text]:
    """(to learn from, to judge by): the last `share` of a text is held out. Raises EdgekitError for too little."""
    count = max(1, round(len(whole.chunks) * share))
    if len(whole.chunks) < 2:
        raise EdgekitError(
            f"{whole.name} has {whole.tokens} tokens: too few to learn from one part and judge by another",
            f"give at least {2 * calibration.CHUNK} tokens, or use --calibration self",
        )
    return Text(whole.name, whole.chunks[:-count]), _long_enough(Text(whole.name, whole.chunks[-count:]))


def _long_enough(text: Text) -> Text:
    kept = tuple(c for c in text.chunks if len(c) >= reference.SHORTEST)
    if not kept:
        raise EdgekitError("the held-out text is too short to compare on", "give more calibration text")
    return Text(text.name, kept)
