"""What the unquantised model teaches: its text, what flows through it, its predictions, what each format costs it.

Knows the order in which that is learned and what of it is known already; chooses no format and writes no file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from edgekit import cache, calibration, chat, effort, flips, reference, sensitivity
from edgekit.arch import Blueprint, Role
from edgekit.calibration import Text
from edgekit.errors import EdgekitError
from edgekit.export import gguf
from edgekit.export.gguf import Slab
from edgekit.planning import Plan
from edgekit.quant import Format, ggml, gptq
from edgekit.reference import CompactReference
from edgekit.runtime.llama_cpp import LlamaSession
from edgekit.runtime.steady import open_steady
from edgekit.sensitivity import Sensitivity
from edgekit.units import MIB, Progress, silent

T = TypeVar("T")
Moments = Mapping[str, Slab]
Opener = Callable[[], AbstractContextManager[Path]]
"""Makes the unquantised model's file, which may go again when the block ends."""

_SMALL = 64 * MIB  # what entries that hold no moments take at most


@dataclass(frozen=True)
class Answers:
    """What the unquantised model answers, greedily: token ids of every prompt and of its answer."""

    prompts: tuple[flips.Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    max_tokens: int


@dataclass(frozen=True)
class Knowledge:
    """What reading the calibration text taught: importance for every matrix, and what the candidates are judged by."""

    importance: gguf.Importance
    moments: Moments
    judge: CompactReference
    sensitivity: Sensitivity
    text: str
    tokens: int
    warnings: tuple[str, ...] = field(default=())
    answers: Answers | None = None


def importance_names(blueprint: Blueprint) -> frozenset[str]:
    """Matrices that get an importance vector when the model reads text: all but those that are only looked up."""
    untied = any(t.role is Role.OUTPUT for t in blueprint.tensors)
    looked_up = {Role.POSITION, Role.TOKEN_TYPE} | ({Role.EMBED} if untied else set())
    matrices = (t for t in blueprint.tensors if len(t.shape) > 1 and not t.keep_f32)
    return frozenset(t.name for t in matrices if t.role not in looked_up)


def learn(
    model: Path | Opener,
    decided: Plan,
    source: str | Path,
    template: chat.Template | None,
    *,
    digest: str,
    effort: str,
    spill: Path,
    threads: int | None = None,
    progress: Progress = silent,
) -> Knowledge:
    """Read text with the unquantised `model`. `source`: a file, or `self`. `spill`: where second moments go that are
    too much for the cache.

    The last part of a file, or texts of another seed, are held out: nothing that is learned comes from them. Each step
    is kept in the cache by what it follows from, `digest` naming the model's content, and of the probes every single
    one: a run that was killed goes on where it was, and another size or target learns nothing anew. The model is opened
    only if something is missing.
    """
    with _Reader(model, decided, template, digest, effort, threads, progress) as reader:
        text, judged = reader.texts(source)
        names = reader.names
        found = calibration.recall(text, digest=digest, moments=names) or calibration.calibrate(
            reader.session, text, digest=digest, moments=names, spill=spill, progress=progress
        )
        judge = reader.judge(judged)
        answers = reader.answers()
        importance = found.imatrix.importance()
        costs = reader.costs(text, importance, found.moments)
    return Knowledge(importance, found.moments, judge, costs, text.name, text.tokens, found.warnings, answers)


@dataclass
class _Reader:
    """The unquantised model, and what it is asked; opened with the first question that the cache does not answer."""

    model: Path | Opener
    decided: Plan
    template: chat.Template | None
    digest: str
    effort: str
    threads: int | None
    progress: Progress
    _stack: ExitStack = field(default_factory=ExitStack)
    _session: LlamaSession | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        learnable = importance_names(self.decided.blueprint)
        return [t.name for t in self.decided.tensors if t.name in learnable]

    @property
    def context(self) -> int:
        return min(calibration.CHUNK, self.decided.geometry.context or calibration.CHUNK)

    @property
    def session(self) -> LlamaSession:
        if self._session is None:
            path = self.model if isinstance(self.model, Path) else self._stack.enter_context(self.model())
            # probing overwrites weights in memory, so they must not be pages of the file
            opened = open_steady(path, n_ctx=self.context, threads=self.threads, mmap=False)
            self._session = self._stack.enter_context(opened)
        return self._session

    def remembered(
        self, kind: str, load: Callable[[Path], T], make: Callable[[], T], save: Callable[[T, Path], None], **facts: Any
    ) -> T:
        """What is kept under `facts` about this model, or else what `make` gives, kept."""
        entry = cache.Entry(kind, cache.key(model=self.digest, engine=calibration.engine(), **facts))
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
        """(to learn from, to judge by), disjoint."""
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
            data = {"name": text.name, "chunks": text.chunks}
            (folder / "text.json").write_text(json.dumps(data), encoding="utf-8")

        return self.remembered("text", load, make, save, **facts)

    # --- what is judged by --------------------------------------------------------------------------------------------

    def judge(self, text: Text) -> CompactReference:
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
            lambda made, folder: _write_json(folder / "answers.json", made),
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

    # --- what formats cost --------------------------------------------------------------------------------------------

    def costs(self, text: Text, importance: gguf.Importance, moments: Moments) -> Sensitivity:
        """The cost of every group in every format, and of two stock presets as a whole to correct the sum with.

        At high effort, and where that takes little time, with the encoder that the file will have, error feedback; else
        with ggml's own, which ranks nearly alike and costs a fraction of the time.
        """
        blueprint = self.decided.blueprint
        groups, formats = sensitivity.choose_probes(sensitivity.parts_of(blueprint), self.effort)
        feedback = self._probes_with_feedback(blueprint)
        facts = {
            "text": text.digest, "effort": self.effort, "feedback": feedback, "formats": formats,
            "groups": [g.name for g in groups], "moments": sorted(moments),
        }  # fmt: skip
        journal = cache.Journal("probes", cache.key(model=self.digest, engine=calibration.engine(), **facts))

        def make() -> Sensitivity:
            return sensitivity.measure(
                self.session,
                groups,
                formats,
                text.chunks,
                importance,
                effort=self.effort,
                considered=[f for f in sensitivity.CONSIDERED if f in gptq.FORMATS],
                combined=sensitivity.combinations(blueprint, importance.keys()),
                encode=_with_feedback(importance, moments, self.session.threads) if feedback else None,
                moments=moments if feedback else None,
                kept=journal,
                progress=self.progress,
            )

        def save(made: Sensitivity, folder: Path) -> None:
            _write_json(folder / "sensitivity.json", made.as_json())

        found = self.remembered("sensitivity", _load_costs, make, save, **facts)
        journal.remove()
        return found

    def _probes_with_feedback(self, blueprint: Blueprint) -> bool:
        """Decided once for a model and machine, whatever else runs here: what is kept must be found again."""
        if self.effort != "normal":
            return self.effort == "high"

        def make() -> bool:
            return effort.with_feedback(blueprint, self.effort, effort.measure_speed(self.threads))

        return self.remembered(
            "choices",
            lambda folder: bool(json.loads((folder / "feedback.json").read_text(encoding="utf-8"))),
            make,
            lambda made, folder: _write_json(folder / "feedback.json", made),
            what="probes with feedback", effort=self.effort,
        )  # fmt: skip


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _load_costs(folder: Path) -> Sensitivity:
    return sensitivity.from_json(json.loads((folder / "sensitivity.json").read_text(encoding="utf-8")))


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


def _with_feedback(importance: gguf.Importance, moments: Moments, threads: int) -> sensitivity.Encode:
    feedback = gguf.Feedback(moments)

    def encode(name: str, expert: int, rows: Slab, fmt: Format) -> sensitivity.Bytes:
        weights = importance.get(name)
        weights = weights[expert] if weights is not None and weights.ndim == 2 else weights
        if name in feedback and fmt.name in gptq.FORMATS:
            curvature = feedback.curvature(name, expert)
            return gptq.encode(rows, fmt, curvature, importance=weights, threads=threads).data
        return ggml.encode(rows, fmt, weights, threads)

    return encode
