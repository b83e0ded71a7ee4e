"""Does an encoder-decoder's artefact do what its source does? As edgekit.onnx_verification, for two graphs.

Knows the order of the checks and what counts as a failure; the measuring is in edgekit.export.onnx.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import onnx_verification as single
from edgekit.errors import VerificationFailed
from edgekit.export.onnx import _pair_proof, _weights
from edgekit.export.onnx._pair import SHIPPED, SHIPPED_ENCODER
from edgekit.export.onnx._pair_proof import PairProof
from edgekit.export.onnx._predictions import Predictions, predict_pair
from edgekit.export.onnx._proof import Greedy
from edgekit.export.onnx._seq2seq import ENCODER
from edgekit.onnx_file import open_onnx, require_runnable
from edgekit.onnx_planning import OnnxPlan
from edgekit.onnx_verification import Export
from edgekit.units import Progress, show_bytes, silent
from edgekit.verification import Certificate, Check

if TYPE_CHECKING:
    from edgekit.export.onnx._rewriting import Report

_SLACK = single.SLACK | {"dynamic": 8.0}
"""As for one graph; but x86 CPUs that have AVX2 and no VNNI cut sums of two 8-bit products off at 16 bits (in
onnxruntime's kernel of unsigned by signed integers). There, 5.4 was seen of a BART of noise, and 1.0 where the same
graph is computed exactly. A permuted matrix is far beyond that."""


def prove_export(
    graph: Path,
    root: Path,
    decided: OnnxPlan,
    *,
    level: str = "quick",
    threads: int = 1,
    progress: Progress = silent,
) -> Export | None:
    """Hold the float32 decoder `graph` and the encoder beside it against the checkpoint in `root`. None at "none".

    The decoder reads all tokens at once, and one after another with its cache. Raises VerificationFailed where they
    differ by more than arithmetic; EdgekitError if transformers cannot run the model.
    """
    single.known_level(level)
    if level == "none":
        return None
    progress("prove export", 0, 2)
    known = _predict(root, decided, level, threads)
    progress("prove export", 1, 2)
    encoder = graph.with_name(ENCODER)
    proof = _pair_proof.judge(encoder, graph, known, exact=True, slack=1.0, threads=threads)
    n = min(single.GREEDY[level], decided.context - 1)
    written = _pair_proof.write_greedily(encoder, graph, known, n, threads)
    progress("prove export", 2, 2)
    return Export(proof.logits, known, _weights.sample(graph), _weights.sample(encoder), written)


def _predict(root: Path, decided: OnnxPlan, level: str, threads: int) -> Predictions:
    rounding = single.rounding_of(decided.variant)
    return predict_pair(root, context=decided.context, rounding=rounding, threads=threads, effort=single.EFFORT[level])


def verify(
    folder: Path,
    root: Path,
    decided: OnnxPlan,
    report: Report | None = None,
    export: Export | None = None,
    *,
    level: str = "quick",
    threads: int = 1,
    progress: Progress = silent,
) -> Certificate:
    """Check the artefact in `folder` against the checkpoint in `root`. Raises VerificationFailed for a difference.

    `report` and `export` as in `onnx_verification.verify`; without an export nothing is said of the float32 graphs.
    """
    single.known_level(level)
    if level == "none":
        return Certificate(level)
    progress("verify", 0, 4)
    encoder, decoder = folder / SHIPPED_ENCODER, folder / SHIPPED
    checks, figures, notes = _check_files((encoder, decoder), decided, report)
    progress("verify", 1, 4)
    checks.append(single.check_tokens(folder, root))
    progress("verify", 2, 4)
    known = export.known if export and export.known.rounding == single.rounding_of(decided.variant) else None
    known = known or _predict(root, decided, level, threads)
    progress("verify", 3, 4)
    if export is not None:
        checks.insert(0, Check("export", _exact_detail(export)))
        figures["export"] = asdict(export.proof.figures)
        if decided.variant.kind == "nbits":
            figures["weight_error"] = _check_weights(encoder, decoder, export, report)
            count = len(export.rows) + len(export.encoder_rows)
            checks.append(Check("weights", f"rows of {count} matrices decode to the source within rounding"))
    slack = _SLACK[decided.variant.kind]
    proof = _pair_proof.judge(encoder, decoder, known, exact=False, slack=slack, threads=threads)
    checks.append(Check("states", _states_detail(proof)))
    checks.append(Check("numbers", single.numbers_detail(proof.logits)))
    figures |= {"states": asdict(proof.states), "numbers": asdict(proof.logits.figures)}
    figures["expected"] = asdict(proof.logits.expected) if proof.logits.expected else None
    notes += [*proof.logits.warnings, *_cut_off(proof, decided)]
    if export is not None:
        noise = proof.logits.figures.relative
        greedy = _pair_proof.same_greedy(encoder, decoder, known, export.written, noise, threads)
        checks.append(Check("text", _text_detail(greedy)))
        figures["greedy"] = asdict(greedy)
    progress("verify", 4, 4)
    return Certificate(level, tuple(checks), figures, tuple(dict.fromkeys(notes)))


def _check_files(
    paths: tuple[Path, Path], decided: OnnxPlan, report: Report | None
) -> tuple[list[Check], dict[str, Any], list[str]]:
    """Both graphs: weights there and long enough, versions that this onnxruntime runs, bits as planned."""
    reports = _parts(report)
    shown: dict[str, dict[str, Any]] = {}
    words: list[str] = []
    notes: list[str] = []
    data = 0
    for path, part in zip(paths, reports, strict=True):
        if not path.is_file():
            raise VerificationFailed(f"{path} is missing", "convert again")
        file = open_onnx(path)
        file.check()
        require_runnable(file)
        found = single.check_bits(file, decided, part)
        data += sum(p.stat().st_size for p in file.external_files().values())
        matrices = {f"int{bits} b{block}": n for (bits, block), n in sorted(found.matrices.items())}
        tables = {f"int{b} b{k}": n for (b, k), n in found.tables.items()}
        side = path.name.partition("_")[0]
        shown[side] = {"matrices": matrices, "tables": tables, "float32": dict(found.plain), "integer": found.integer}
        said = ", ".join(f"{n} matrices in {k}" for k, n in matrices.items())
        words.append(f"{side}: {said or f'{found.integer} int8 matrices'}")
        notes += found.warnings
    files = Check("files", f"2 graphs on data of {show_bytes(data)}, which this onnxruntime takes")
    return [files, Check("bits", "; ".join(words))], {"bits": shown}, notes


def _parts(report: Report | None) -> tuple[Report | None, Report | None]:
    """Of the encoder, of the decoder."""
    return (None, None) if report is None else (report.encoder, report)


def _check_weights(encoder: Path, decoder: Path, export: Export, report: Report | None) -> dict[str, float]:
    worst: dict[str, float] = {}
    sides = ((encoder, export.encoder_rows), (decoder, export.rows))
    for (path, rows), part in zip(sides, _parts(report), strict=True):
        reported = {n.node: n.error for n in part.nodes if n.error > 0} if part else {}
        for name, error in _weights.check(open_onnx(path), rows, reported).items():
            worst[name] = max(error, worst.get(name, 0.0))
    return worst


def _exact_detail(export: Export) -> str:
    found = export.proof.figures
    return (
        f"the float32 graphs are within {found.relative:.1e} of transformers at {found.compared} positions, all at "
        "once and one after another"
    )


def _states_detail(proof: PairProof) -> str:
    found, expected = proof.states.figures, proof.states.expected
    plain = f"; plain rounding: {expected.relative:.2g}" if expected else ""
    return f"the encoder's states of {found.tokens} tokens are within {found.relative:.2g} of transformers{plain}"


def _cut_off(proof: PairProof, decided: OnnxPlan) -> tuple[str, ...]:
    found, expected = proof.logits.figures, proof.logits.expected
    times = found.relative / max(expected.relative, 1e-9) if expected else 0.0
    if decided.variant.kind != "dynamic" or times <= single.SLACK["dynamic"]:
        return ()
    return (
        f"on this CPU {decided.variant.name} is {times:.1f} times as far from the source as its rounding is: x86 "
        "without VNNI cuts sums of products off at 16 bits, ARM does not. int8 has no such loss",
    )


def _text_detail(found: Greedy) -> str:
    return f"{found.same} of {found.tokens} tokens that the float32 graphs write are what these graphs like best"
