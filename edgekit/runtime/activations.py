"""What flows into each matrix of a model while it reads text: sums of squares, and second moments.

Knows graphs and sums; chooses no text, writes no file, quantises nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, RuntimeFailed
from edgekit.runtime import _ggml_tensor as ggml
from edgekit.runtime._llama_library import library
from edgekit.runtime.llama_cpp import Context, ContextSettings, LlamaSession, Model, open_model
from edgekit.runtime.moments import Moment, Moments
from edgekit.units import MIB, Progress, silent

Sums = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_BATCH = 512  # tokens a graph: one graph a call, so that a tensor's address names one value
_OUTPUT_BUDGET = 128 * MIB  # of logits, which every token of a batch has: large vocabularies take smaller batches


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over the tokens each matrix has seen, by tensor name as in the file.

    `sums`: squares of its input columns, (cols,), or (experts, cols) for stacked experts.
    `counts`: rows summed, (1,), or one an expert. For a plain matrix that is the number of tokens.
    `second_moment`: for the names asked for, XᵀX, float32 (cols, cols), or (experts, cols, cols). Matrices that read
    the same input (query, key and value; gate and up) share one array.
    """

    sums: Mapping[str, Sums]
    counts: Mapping[str, Counts]
    second_moment: Mapping[str, Moment]
    tokens: int

    def importance(self, name: str) -> npt.NDArray[np.float32]:
        """Mean squares of the input columns, float32, in the shape of `sums`; 1 where an expert saw nothing."""
        counts = self.counts[name].astype(np.float64)
        sums = self.sums[name]
        seen = counts[:, None] if sums.ndim == 2 else counts
        return np.where(seen > 0, sums / np.maximum(seen, 1), 1.0).astype(np.float32)


def collect(
    source: LlamaSession | Model | str | Path,
    chunks: Sequence[Sequence[int]],
    *,
    moments: Collection[str] | None = None,
    threads: int | None = None,
    spill: Path | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Read each chunk of token ids as a text of its own and sum what enters every matrix.

    The file should be unquantised (F32, F16, BF16) or Q8_0; the figures are those of the running model. All rows of
    the last layer and of the output matrix are included; the latter appears as `token_embd.weight` when it is tied.
    Unlike llama-imatrix, fewer than 16 tokens are summed too. `moments` names the matrices whose full second moment is
    wanted; they take 4 cols² bytes for each distinct input, in memory or, with `spill`, in files of that folder, of
    which only one is held in memory at a time where all of them would be too much (see edgekit.runtime.moments).
    `threads` None: as many as the session has. The memory of a session is not touched. Raises RuntimeFailed (an unknown
    engine, a value that is not finite), EdgekitError for empty chunks or names in `moments` that met no matrix.
    """
    wanted = frozenset(moments or ())
    total, longest = _measure(chunks)
    with _opened(source) as model:
        collector = _Collector(model.path.name, wanted, Moments(spill))
        if threads is None and isinstance(source, LlamaSession):
            threads = source.threads
        context = _context(model, longest, threads, collector)
        try:
            done = 0
            for chunk in chunks:
                _read(model, context, collector, chunk)
                done += len(chunk)
                progress("calibrate", done, total)
        finally:
            context.close()
        collector.moments.finish()
    if missing := sorted(wanted - collector.moments.keys()):
        raise EdgekitError(
            f"no matrix named {missing[0]} was used by {model.path.name}"
            + (f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""),
            f"edgekit inspect {model.path} lists its tensors",
        )
    return Statistics(collector.sums, collector.counts, collector.moments, total)


def _measure(chunks: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(tokens in all, in the longest chunk). Raises EdgekitError when there is none."""
    lengths = [len(chunk) for chunk in chunks]
    if not lengths or min(lengths) == 0:
        raise EdgekitError("there is no text to calibrate with", "give a longer --calibration FILE")
    return sum(lengths), max(lengths)


@contextmanager
def _opened(source: LlamaSession | Model | str | Path) -> Iterator[Model]:
    """The model behind `source`, closed afterwards only if it was opened here."""
    if isinstance(source, (LlamaSession, Model)):
        yield source.model if isinstance(source, LlamaSession) else source
        return
    with open_model(source) as model:
        yield model


def _context(model: Model, longest: int, threads: int | None, collector: _Collector) -> Context:
    batch = min(_BATCH, longest, max(64, _OUTPUT_BUDGET // (4 * model.n_vocab)))
    # every row is wanted from the last layer on, so every row must be an output
    settings = ContextSettings(longest, threads, batch, batch, outputs=batch)
    ggml.functions()
    callback = library().api.ggml_backend_sched_eval_callback(collector)
    return Context(model, settings, cb_eval=callback)


def _read(model: Model, context: Context, collector: _Collector, chunk: Sequence[int]) -> None:
    """One chunk, from an empty memory. Raises what went wrong in the callback, which C cannot pass on."""
    ids = model.checked(chunk)
    context.forget()
    for start in range(0, len(ids), context.n_batch):
        collector.begin()
        context.decode(ids[start : start + context.n_batch], start, 0)
        if collector.failure is not None:
            raise collector.failure


@dataclass
class _Collector:
    """The callback of ggml's scheduler: asked before each node whether its inputs are wanted, then called with them.

    A graph holds one tensor for one value, so matrices whose input has the same address share it: the first of them,
    the leader, is measured, and the others get its arrays.
    """

    file: str
    wanted: frozenset[str]
    moments: Moments
    sums: dict[str, Sums] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    failure: EdgekitError | None = None
    _leaders: dict[str, str] = field(default_factory=dict)
    _inputs: dict[tuple[int, ...], str] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget the addresses of the last graph."""
        self._inputs.clear()

    def __call__(self, address: int, ask: bool, _user: int | None) -> bool:
        if self.failure is not None:
            return not ask
        try:
            node = ggml.read(address)
            return self._is_wanted(node) if ask else self._measure(node)
        except EdgekitError as error:
            self.failure = error
        except (ValueError, MemoryError, OSError) as error:  # would vanish in C
            self.failure = RuntimeFailed(f"{self.file}: cannot read the activations: {error}")
        return not ask

    def _is_wanted(self, node: ggml.Tensor) -> bool:
        """Whether `node` multiplies a weight with an input that no earlier node of this graph has had."""
        operations = ggml.operations()
        if node.op not in (operations["MUL_MAT"], operations["MUL_MAT_ID"]):
            return False
        weight = ggml.read(node.src[0])
        name = _plain_name(weight.name)
        # weights are leaves; what attention multiplies is the result of some operation
        if weight.op != operations["NONE"] or not name.endswith(".weight") or ggml.read(node.src[1]).type != ggml.F32:
            return False
        key = (node.src[1], node.src[2] or 0, weight.ne[2], int(name in self.wanted))
        leader = self._inputs.setdefault(key, name)
        if self._leaders.setdefault(name, leader) != leader:
            raise RuntimeFailed(f"{self.file}: {name} changed its input between two graphs", "report this model")
        if leader != name:  # measured already: the scheduler asks on only after it has called for a wanted node
            self._share(name, leader)
        return leader == name

    def _share(self, name: str, leader: str) -> None:
        if leader in self.sums:
            self.sums[name], self.counts[name] = self.sums[leader], self.counts[leader]
        if leader in self.moments and name not in self.moments:
            self.moments.share(name, leader)

    def _measure(self, node: ggml.Tensor) -> bool:
        weight = ggml.read(node.src[0])
        name, (_, _, outer, last) = _plain_name(weight.name), weight.ne
        x = ggml.values(node.src[1], np.float32)
        if node.op == ggml.operations()["MUL_MAT_ID"]:
            self._add_routed(name, outer, x[0], ggml.values(node.src[2], np.int32)[0, 0])
        elif outer * last == 1:
            self._add(name, 0, x.reshape(-1, x.shape[-1]), (1, 1))
        else:  # a stack of matrices, each with the part of the input whose outer index it divides (ggml_can_repeat)
            for i3, slab in enumerate(x):
                for i2, rows in enumerate(slab):
                    self._add(name, i3 % last * outer + i2 % outer, rows, (outer * last, 1))
        if not np.isfinite(self.sums[name]).all():
            raise RuntimeFailed(
                f"{self.file}: what flows into {name} is not finite", "the checkpoint is damaged, or overflows 16 bits"
            )
        return True

    def _add_routed(self, name: str, experts: int, x: npt.NDArray[np.float32], ids: npt.NDArray[np.int32]) -> None:
        """`x`: (tokens, 1 or slots, cols); `ids`: (tokens, slots), the expert that each slot of a token goes to."""
        if ids.size and not 0 <= ids.min() <= ids.max() < experts:
            raise RuntimeFailed(f"{self.file}: {name} was given expert {ids.max()} of {experts}", "report this model")
        self._add(name, 0, np.empty((0, x.shape[-1]), np.float32), (experts, experts))
        for expert in np.unique(ids):
            tokens, slots = np.nonzero(ids == expert)
            self._add(name, int(expert), x[tokens, slots % x.shape[1]], (experts, experts))

    def _add(self, name: str, part: int, rows: npt.NDArray[np.float32], parts: tuple[int, int]) -> None:
        """Add `rows` (n, cols) to matrix `part`; `parts`: how many matrices are stacked, and how many are counted."""
        cols = rows.shape[1]
        if name not in self.sums:
            self.sums[name] = np.zeros(cols if parts[0] == 1 else (parts[0], cols))
            self.counts[name] = np.zeros(parts[1], np.int64)
            if name in self.wanted:
                self.moments.begin(name, (cols, cols) if parts[0] == 1 else (parts[0], cols, cols))
        self.sums[name].reshape(-1, cols)[part] += np.square(rows).sum(axis=0, dtype=np.float64)
        if parts[1] > 1 or part == 0:
            self.counts[name][part] += len(rows)
        if name in self.wanted:
            self.moments.add(name, part, rows)


def _plain_name(name: bytes) -> str:
    """A tensor's name without what the scheduler adds to copies for a device: `CUDA0#blk.0.attn_k.weight#0`."""
    parts = name.decode("utf-8", "replace").split("#")
    return parts[1] if len(parts) > 1 else parts[0]
