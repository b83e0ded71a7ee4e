"""Does an ONNX artefact do what its source does? The export, the files, the bits, tokens, prompts, numbers, and text.

Knows the order of the checks and what counts as a failure; the measuring is in edgekit.export.onnx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import chat, corpus
from edgekit.embedding import Pooling, read_pooling
from edgekit.errors import EdgekitError, VerificationFailed
from edgekit.export.onnx import _bits, _predictions, _proof, _weights
from edgekit.onnx_file import OnnxFile, open_onnx, require_runnable
from edgekit.onnx_planning import GENERATION, OnnxPlan, Variant
from edgekit.units import Progress, show_bytes, silent
from edgekit.verification import CONVERSATIONS, LEVELS, Certificate, Check
from edgekit.vocab import read_vocabulary
from edgekit.vocab.files import Added, Files, added_tokens, read_files
from edgekit.vocab.reference import Reference, TokenizerJson

if TYPE_CHECKING:
    from edgekit.export.onnx._rewriting import Report

GRAPH, ALL_POSITIONS, ENCODER = "model.onnx", "model_all.onnx", "onnx/model_quantized.onnx"

VECTORS = ("feature-extraction", "sentence-similarity")

EFFORT = {"quick": 1, "full": 4}
GREEDY = {"quick": 16, "full": 64}
SLACK = {"nbits": _proof.SLACK, "dynamic": 2.5, "static": 6.0}
"""How much further off than plain rounding a graph may be: fixed scales of activations are learned from other texts."""
_ENCODER_TOKENS = 512


@dataclass(frozen=True)
class Export:
    """What is known of the float32 graph, what the source predicts, and rows of every matrix: kept while the graph
    itself goes. 256 KiB a matrix, and the logits of 64 positions twice. The last two are of an encoder-decoder: rows of
    the encoder's matrices, and what the float32 graphs wrote."""

    proof: _proof.Proof
    known: _predictions.Predictions
    rows: Mapping[str, _weights.Rows]
    encoder_rows: Mapping[str, _weights.Rows] = field(default_factory=dict)
    written: Sequence[Sequence[int]] = ()


def prove_export(
    graph: Path,
    root: Path,
    task: str,
    decided: OnnxPlan,
    *,
    level: str = "quick",
    threads: int = 1,
    progress: Progress = silent,
) -> Export | None:
    """Hold the float32 `graph` of every position against the checkpoint in `root`. None at level "none".

    One model is in memory at a time. Raises VerificationFailed where they differ by more than arithmetic;
    EdgekitError if transformers cannot run the model.
    """
    known_level(level)
    if level == "none":
        return None
    progress("prove export", 0, 2)
    known = predict(root, task, decided, level=level, threads=threads)
    progress("prove export", 1, 2)
    if task == GENERATION:
        proof = _proof.judge_decoder(graph, known, exact=True, threads=threads)
    else:
        proof = _proof.judge_encoder(graph, known, _pooling(root, task), exact=True, threads=threads)
    progress("prove export", 2, 2)
    return Export(proof, known, _weights.sample(graph))


def predict(
    root: Path, task: str, decided: OnnxPlan, *, level: str = "quick", threads: int = 1
) -> _predictions.Predictions:
    """What the source predicts, as it is and with its weights rounded as `decided` rounds them."""
    rounding = rounding_of(decided.variant)
    if task == GENERATION:
        return _predictions.predict_decoder(
            root,
            context=decided.context,
            parameters=decided.parameters,
            rounding=rounding,
            threads=threads,
            effort=EFFORT[level],
        )
    pooling = _pooling(root, task)
    length = min(_ENCODER_TOKENS, (pooling and pooling.max_length) or _ENCODER_TOKENS, decided.context)
    return _predictions.predict_encoder(root, task, max_length=length, rounding=rounding, threads=threads)


def rounding_of(variant: Variant) -> _predictions.Rounding:
    """The coarsest rounding a variant does: mixed ones keep sensitive matrices finer than this."""
    if variant.kind != "nbits":
        row = (8, 0, 0)  # a scale for each output, activations in 8 bits a tensor
        return {"linear": row, "head": row, "embedding": (8, -1, -1)}
    linear, head, table = variant.linear, variant.head, variant.embedding
    return {
        "linear": (linear.bits, linear.block, linear.block),
        "head": (head.bits, head.block, head.block),
        "embedding": None if table is None else (table.bits, table.block, -1),
    }


def verify(
    folder: Path,
    root: Path,
    task: str,
    decided: OnnxPlan,
    report: Report | None = None,
    export: Export | None = None,
    *,
    level: str = "quick",
    threads: int = 1,
    progress: Progress = silent,
) -> Certificate:
    """Check the artefact in `folder` against the checkpoint in `root`. Raises VerificationFailed for a difference.

    `report`: what the quantizer did; without it only the plan's formats are asked for. `export`: what
    `prove_export` found, asked for again where it is missing or of another variant.
    """
    known_level(level)
    if level == "none":
        return Certificate(level)
    steps = 5 if task == GENERATION else 4
    progress("verify", 0, steps)
    graph = _graph(folder)
    checks, figures, notes = _check_files(folder, graph, decided, report)
    progress("verify", 1, steps)
    checks.append(check_tokens(folder, root))
    checks.append(check_template(folder, root))
    progress("verify", 2, steps)
    known = export.known if export and export.known.rounding == rounding_of(decided.variant) else None
    known = known or predict(root, task, decided, level=level, threads=threads)
    progress("verify", 3, steps)
    if export is not None:
        checks.insert(0, Check("export", _exact_detail(export.proof.figures)))
        figures["export"] = asdict(export.proof.figures)
        notes += export.proof.warnings
        if decided.variant.kind == "nbits":
            figures["weight_error"] = _check_weights(graph, export, report)
            checks.append(Check("weights", f"rows of {len(export.rows)} matrices decode to the source within rounding"))
    proof = _judge(graph, root, task, decided, known, threads)
    checks.append(Check("numbers", numbers_detail(proof)))
    figures |= {"numbers": asdict(proof.figures), "expected": asdict(proof.expected) if proof.expected else None}
    notes += proof.warnings
    progress("verify", 4, steps)
    if task == GENERATION:
        greedy = _greedy(folder, known, decided, level, proof.figures.relative, threads)
        checks.append(Check("text", _text_detail(greedy)))
        figures["greedy"] = asdict(greedy)
        progress("verify", 5, steps)
    return Certificate(level, tuple(checks), figures, tuple(dict.fromkeys(notes)))


def known_level(level: str) -> None:
    if level not in LEVELS:
        raise EdgekitError(f"no verification level called {level!r}", f"known: {', '.join(LEVELS)}")


def _pooling(root: Path, task: str) -> Pooling | None:
    """How tokens become one vector, for the tasks whose result is that vector."""
    return read_pooling(root) if task in VECTORS else None


def _graph(folder: Path) -> Path:
    """The graph that is proven: of every position where a decoder has one."""
    for name in (ALL_POSITIONS, GRAPH, ENCODER):
        if (folder / name).is_file():
            return folder / name
    raise VerificationFailed(f"{folder} holds none of {ALL_POSITIONS}, {GRAPH}, {ENCODER}", "convert again")


# --- files and bits --------------------------------------------------------------------------------------------------


def _check_files(
    folder: Path, graph: Path, decided: OnnxPlan, report: Report | None
) -> tuple[list[Check], dict[str, Any], list[str]]:
    """Every graph: external data there and long enough, versions that this onnxruntime runs, bits as planned."""
    paths = dict.fromkeys(p for p in (graph, folder / GRAPH) if p.is_file())
    found = _bits.Bits()
    data: dict[Path, int] = {}
    for path in paths:
        file = open_onnx(path)
        file.check()
        require_runnable(file)
        found = check_bits(file, decided, report)
        data |= {p: p.stat().st_size for p in file.external_files().values()}
    where = f"on data of {show_bytes(sum(data.values()))}" if data else "with the weights inside"
    files = Check("files", f"{len(paths)} graph{'s' * (len(paths) > 1)} {where}, which this onnxruntime takes")
    shown = {f"int{bits} b{block}": n for (bits, block), n in sorted(found.matrices.items())}
    bits = Check(
        "bits", ", ".join(f"{n} matrices in {k}" for k, n in shown.items()) or f"{found.integer} int8 matrices"
    )
    tables = {f"int{b} b{k}": n for (b, k), n in found.tables.items()}
    figures = {"bits": {"matrices": shown, "tables": tables, "float32": dict(found.plain), "integer": found.integer}}
    return [files, bits], figures, list(found.warnings)


def check_bits(file: OnnxFile, decided: OnnxPlan, report: Report | None) -> _bits.Bits:
    if decided.variant.kind != "nbits":
        found = _bits.read_bits(file)
        if not found.integer:
            raise VerificationFailed(f"{file.path.name} holds no quantised matrix", "convert again")
        return found
    if report is not None:
        left = {tensor.name for tensor in report.left}
        return _bits.check_bits(file, {n.node: n.fmt for n in report.nodes}, plain=left)
    variant = decided.variant
    formats = (variant.linear, variant.head, *([variant.embedding] if variant.embedding else []))
    found = _bits.check_bits(file)
    for bits, block in (*found.matrices, *found.tables):
        if all((bits, block) != (f.bits, min(block, f.block)) for f in formats):
            raise VerificationFailed(
                f"{file.path.name} holds {bits} bits in blocks of {block}; {variant.name} has no such format",
                "convert again",
            )
    return found


def _check_weights(graph: Path, export: Export, report: Report | None) -> dict[str, float]:
    reported = {n.node: n.error for n in report.nodes if n.error > 0} if report else {}
    return _weights.check(open_onnx(graph), export.rows, reported)


# --- tokens and prompts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    """What `corpus.parity_strings` asks of a vocabulary."""

    added: Mapping[int, Added]
    lead: str = ""

    @property
    def added_texts(self) -> Sequence[str]:
        return tuple(t.content for t in sorted(self.added.values(), key=lambda t: not t.special))


def check_tokens(folder: Path, root: Path) -> Check:
    """The folder's tokenizer.json gives the ids of the source's own tokenizer for every string of the built-in corpus.

    Raises VerificationFailed naming the first difference.
    """
    reference, added = _reference(root)
    shipped, _ = _reference(folder)
    strings = corpus.parity_strings(_Texts(added))
    for text in strings:
        for special in (True, False):
            wanted, got = (t.encode(text, add_special=special) for t in (reference, shipped))
            if wanted != got:
                raise VerificationFailed(
                    f"tokens differ for {text[:60]!r}: the model's tokenizer gives {wanted[:8]}, tokenizer.json of the "
                    f"artefact {got[:8]}",
                    "edgekit inspect MODEL shows its tokenizer",
                )
    return Check("tokens", f"{len(strings)} strings give the ids of the model's own tokenizer")


def _reference(root: Path) -> tuple[Reference, Mapping[int, Added]]:
    config = _predictions.text_config(root)
    files = read_files(root, config)
    added = added_tokens(files)
    if files.tokenizer is None:
        return read_vocabulary(root, config).reference(), added
    return TokenizerJson(files.tokenizer, added, root / "tokenizer.json"), added


def check_template(folder: Path, root: Path) -> Check:
    """The folder's chat template, with its own special tokens, renders what the source's renders."""
    source, copy = (_template(read_files(p, _predictions.text_config(p))) for p in (root, folder))
    if source is None or copy is None:
        if source is not copy:
            raise VerificationFailed("the chat template did not reach the artefact", "convert again")
        return Check("chat template", "no chat template, in the source and here")
    for messages in CONVERSATIONS:
        wanted, got = _rendered(source, messages), _rendered(copy, messages)
        if wanted != got:
            raise VerificationFailed(f"the chat template renders {got!r}, the source's {wanted!r}", "convert again")
    return Check("chat template", f"{len(CONVERSATIONS)} conversations render the same")


def _template(files: Files) -> chat.Template | None:
    text = files.templates.get("default")
    roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    named = {f"{role}_token": found for role in roles if (found := files.special_text(role))}
    return None if text is None else chat.Template(text, named)


def _rendered(template: chat.Template, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        return template.render(messages)
    except EdgekitError as e:
        return f"error: {e}"


# --- numbers and text ------------------------------------------------------------------------------------------------


def _judge(
    graph: Path, root: Path, task: str, decided: OnnxPlan, known: _predictions.Predictions, threads: int
) -> _proof.Proof:  # fmt: skip
    slack = SLACK[decided.variant.kind]
    if task == GENERATION:
        return _proof.judge_decoder(graph, known, exact=False, threads=threads)
    return _proof.judge_encoder(graph, known, _pooling(root, task), exact=False, slack=slack, threads=threads)


def _exact_detail(found: _proof.Figures) -> str:
    where = f"{found.compared} positions of {found.tokens} tokens"
    if found.cosine is not None:
        where = f"{found.compared} texts, alone and padded"
    return f"the float32 graph is within {found.relative:.1e} of transformers on {where}"


def numbers_detail(proof: _proof.Proof) -> str:
    found, expected = proof.figures, proof.expected
    plain = f"; plain rounding: {expected.relative:.2g}" if expected else ""
    if found.kl is not None:
        return (
            f"{found.relative:.2g} of the logits from transformers{plain}; KL divergence {found.kl:.2g} nats a token, "
            f"top-1 agreement {found.top1:.1%} at {found.compared} positions"
        )
    return f"{found.relative:.2g} of the outputs from transformers{plain}; lowest cosine {found.cosine:.5f}"


def _text_detail(found: _proof.Greedy) -> str:
    ties = f", {found.tokens - found.same} tie with them" if found.same < found.tokens else ""
    return f"{found.same} of {found.tokens} greedy tokens of {GRAPH} are what {ALL_POSITIONS} likes best{ties}"


def _greedy(
    folder: Path, known: _predictions.Predictions, decided: OnnxPlan, level: str, noise: float, threads: int
) -> _proof.Greedy:  # fmt: skip
    """A short prompt, and one that is past the window where there is room for an answer behind it."""
    n, ids = GREEDY[level], known.texts[0]
    room = max(1, decided.context - n)
    prompts = [ids[: min(12, room)], ids[: min(len(ids), room)]]
    judge = folder / ALL_POSITIONS
    unpruned = judge if judge.is_file() else folder / GRAPH
    return _proof.same_greedy(folder, unpruned, prompts, n, noise=noise, threads=threads)
