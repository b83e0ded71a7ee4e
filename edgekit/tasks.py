"""Task accuracy through lm-evaluation-harness, in process: a Session dressed as the harness's language model.

Knows the harness; it is an extra, imported when it is used. Knows no model file.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import shelf
from edgekit.errors import EdgekitError, MissingExtra
from edgekit.quality import log_sum
from edgekit.runtime import Session
from edgekit.units import Progress, silent

LONGEST_ANSWER = 256
"""Tokens of a generated answer where the task names no limit: the harness's own default."""


BOOTSTRAP = 1000
"""Resamples for errors of metrics that are no plain mean."""


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task over `samples` questions. `stderr` None: the harness gives none for this metric."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


def require() -> None:
    """Raise MissingExtra unless lm-evaluation-harness is installed."""
    if find_spec("lm_eval") is None:
        raise MissingExtra("--tasks needs lm-evaluation-harness", "pip install 'edgekit[tasks]'")


def run(
    session: Session,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    progress: Progress = silent,
) -> tuple[Score, ...]:
    """Scores of `tasks`: names that the harness knows, or paths of task files (.yaml); `limit` questions of each.

    A task file may name Python functions, which then run here, and a data set, which is read from disk or fetched.
    Raises MissingExtra, UnknownName (with a near name), EdgekitError for what the harness refuses.
    """
    require()
    with _quiet():
        import datasets
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        # reading the thousands of tasks that come with the harness takes long, and task files need none of them
        manager = TaskManager(include_defaults=not all(map(_is_file, tasks)))
        names = [_known(name, manager.all_tasks) for name in tasks]
        try:
            found = simple_evaluate(
                model=harness_model(session, progress=progress), tasks=names, task_manager=manager, limit=limit,
                bootstrap_iters=BOOTSTRAP, log_samples=False,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as e:
            raise EdgekitError(
                f"lm-evaluation-harness could not run {', '.join(tasks)}: {_reason(e)}",
                "a task file says where its data lies under dataset_kwargs: data_files",
            ) from e
    return tuple(_scores(found or {}))


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else 'no reason given'}"


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _known(name: str, known: Sequence[str]) -> str:
    if _is_file(name):
        if not Path(name).is_file():
            raise EdgekitError(f"there is no task file {name}", "give the path of a .yaml, or the name of a task")
        return str(Path(name).resolve())
    if name not in known:
        raise shelf.unknown("task", name, known, show="lm-eval ls tasks")
    return name


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    """The harness writes `metric,filter` and `metric_stderr,filter`; `none` is the filter that does nothing."""
    for task, row in found.get("results", {}).items():
        counts = found.get("n-samples", {}).get(task, {})
        for key, value in row.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            stderr = row.get(f"{metric}_stderr,{chosen}")
            known = isinstance(stderr, int | float) and math.isfinite(stderr)
            label = metric if chosen == "none" else f"{metric} ({chosen})"
            yield Score(task, label, float(value), float(stderr) if known else None, int(counts.get("effective", 0)))


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness talks a lot, draws bars, and warns of its own dependencies: none of it is about the model."""
    names = ("lm_eval", "datasets", "fsspec", "filelock", "httpx")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    bars = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        if bars is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = bars


# --- the language model ----------------------------------------------------------------------------------------------


def harness_model(session: Session, *, progress: Progress = silent) -> Any:
    """`session` as an `lm_eval.api.model.TemplateLM`, for whoever calls the harness himself. Raises MissingExtra."""
    require()
    with _quiet():
        from lm_eval import utils
        from lm_eval.api.model import TemplateLM

    class SessionLM(TemplateLM):  # type: ignore[misc, unused-ignore]
        """What the harness asks for, out of logits and greedy generation."""

        @property
        def eot_token_id(self) -> int:
            return _end_token(session)

        @property
        def prefix_token_id(self) -> int:
            return session.bos if session.bos is not None else self.eot_token_id

        @property
        def max_length(self) -> int:
            return session.n_ctx

        @property
        def tokenizer_name(self) -> str:
            return "edgekit"

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return _encode(session, string, add_special_tokens)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return _score_all(session, [(list(context), list(text)) for _, context, text in requests], progress)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            found = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, session.n_ctx, context_len=1
                )
                pairs = [utils.make_disjoint_window(w) for w in windows]
                found.append(sum(score for score, _ in _score_all(session, pairs, progress)))
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            answers = []
            for i, request in enumerate(requests):
                answers.append(_generate(session, *request.args[:2]))
                progress("answer tasks", i + 1, len(requests))
            return answers

    return SessionLM()


def _end_token(session: Session) -> int:
    """The end-of-sequence token of the vocabulary, or BOS where the file names none."""
    facts = session.metadata()
    for key in ("tokenizer.ggml.eos_token_id", "config.eos_token_id", "genai.model.eos_token_id"):
        stated = facts.get(key, "")
        if stated.isdigit() and int(stated) < session.n_vocab:
            return int(stated)
    return session.bos if session.bos is not None else 0


def _encode(session: Session, text: str, add_special: bool | None) -> list[int]:
    """Ids, with what the model adds by itself unless told otherwise or already written in the text."""
    if add_special is None and session.bos is not None:
        add_special = not text.startswith(session.piece(session.bos, special=True).decode("utf-8", "replace") or "\0")
    return session.tokenize(text, add_special=add_special is not False)


_Pair = tuple[list[int], list[int]]


def _score_all(session: Session, pairs: Sequence[_Pair], progress: Progress) -> list[tuple[float, bool]]:
    """(log-probability of the continuation, whether greedy decoding would write it) for (context, continuation) ids.

    What does not fit is cut off at the left, as the harness does. Requests with the same input are read once: the
    one-token answers of a question share it.
    """
    work = [_cut(context, text, session.n_ctx) for context, text in pairs]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(work)
    last: list[int] | None = None
    rows = np.empty((0, 0), np.float32)
    for step, i in enumerate(sorted(range(len(work)), key=lambda i: (work[i][0], -len(work[i][1])))):
        ids, text = work[i]
        if text:
            if ids != last or len(rows) < len(text):
                first = len(ids) - len(text)
                rows = np.concatenate([part for _, part in session.logits_chunks(ids, first=first)])
                last = ids
            found[i] = _score(rows[len(rows) - len(text) :], text)
        progress("score tasks", step + 1, len(work))
    return found


def _cut(context: list[int], text: list[int], n_ctx: int) -> _Pair:
    """The ids that are read, the last of which predicts the last of `text`; and `text`."""
    text = text[-n_ctx:]
    whole = context + text
    return whole[-(n_ctx + 1) :][:-1], text


def _score(rows: np.ndarray[Any, np.dtype[np.float32]], text: Sequence[int]) -> tuple[float, bool]:
    picked = rows[np.arange(len(text)), text].astype(np.float64) - log_sum(rows)
    return float(picked.sum()), bool((rows.argmax(axis=1) == text).all())


def _generate(session: Session, context: str, options: Mapping[str, Any]) -> str:
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
    wanted = int(options.get("max_gen_toks", LONGEST_ANSWER))
    longest = max(1, min(wanted, session.n_ctx - 1))
    ids = _encode(session, context, None)[-(session.n_ctx - longest) :]
    temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
    return "".join(session.stream(ids, longest, temperature=temperature, stop=stops))
