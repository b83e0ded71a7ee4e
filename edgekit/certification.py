"""An artefact that is there already, proven again against the model it was made from: files, source, tensors, numbers.

Knows manifests and how a plan is built again from one; the checks themselves are verification's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit import artifact, folding, onnx_planning, pipeline, verification
from edgekit.artifact import Artifact
from edgekit.checkpoint import Checkpoint
from edgekit.errors import CorruptCheckpoint, EdgekitError, VerificationFailed
from edgekit.gguf_file import GgufFile, open_gguf
from edgekit.host import usable_cores
from edgekit.planning import Plan, Planned, with_formats
from edgekit.quant import ggml
from edgekit.quant.nbits import NBits
from edgekit.target import Target
from edgekit.units import Progress, show_bytes, silent
from edgekit.verification import Certificate, Check

if TYPE_CHECKING:
    from edgekit.export.onnx import Report

LEVELS = ("quick", "full")

ONNX_PACKAGES = ("onnxruntime", "onnxruntime-genai", "torch", "transformers")

_PIECE = 1 << 22  # values of a matrix that are compared at once

Row = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Certification:
    """What was proven: `certificate` has the files and the source as its first two checks."""

    artifact: str
    against: str
    format: str
    certificate: Certificate

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the versions that took part. One that failed is never made: it raises."""
        more = ONNX_PACKAGES if self.format == "onnx" else ("llama-cpp-python",)
        return asdict(self) | {"certified": True, "versions": pipeline.versions(more)}


def certify(
    ref: str | Path,
    against: str | Path,
    *,
    level: str = "quick",
    threads: int | None = None,
    progress: Progress = silent,
) -> Certification:
    """Check the artefact folder `ref` against the model `against`, as `convert` did before it sealed the folder.

    Raises VerificationFailed (exit 4) for a file that is not the one that was sealed, for another model, and for the
    first difference that no rounding explains; what opening either raises.
    """
    if level not in LEVELS:
        raise EdgekitError(f"no level called {level!r}", f"known: {', '.join(LEVELS)}")
    if Path(ref).is_file():
        raise EdgekitError(f"{ref} is one file, without a manifest", "give the folder that `edgekit convert` made")
    made = artifact.open_artifact(Path(ref))
    checks = [_sealed(made, progress)]
    kind = str(made.manifest.get("format", "gguf"))
    if kind not in _PROOFS:
        raise CorruptCheckpoint(f"{made.root} is of format {kind!r}", "convert again")
    checkpoint, certificate = _PROOFS[kind](made, against, level, threads, progress)
    checks.append(Check("source", f"{checkpoint.name} has the digest that the manifest names"))
    proven = replace(certificate, checks=(*checks, *certificate.checks))
    return Certification(made.root.resolve().name, checkpoint.name, kind, proven)


def _sealed(made: Artifact, progress: Progress) -> Check:
    """Every file has its sha256. What `inspect --check` calls damage is a failed proof here."""
    try:
        made.verify(progress)
    except CorruptCheckpoint as e:
        raise VerificationFailed(str(e), e.hint) from None
    files = made.manifest["files"]
    total = show_bytes(sum(entry["bytes"] for entry in files.values()))
    return Check("files", f"{len(files)} files, {total}, are those that were sealed (sha256)")


def _require_same_source(made: Artifact, checkpoint: Checkpoint) -> None:
    """The digest of the checkpoint is the manifest's: rounding may hide a fine-tune, the digest does not."""
    source = made.manifest.get("source")
    stated = source.get("digest") if isinstance(source, Mapping) else None
    if not isinstance(stated, str):
        raise CorruptCheckpoint(f"{made.root / artifact.MANIFEST} does not say what it was made from", "convert again")
    if stated != checkpoint.digest:
        raise VerificationFailed(
            f"{made.root.name} was made from a model with the digest {stated[:12]}; {checkpoint.name} has "
            f"{checkpoint.digest[:12]}",
            "give the very files it was made from; edgekit eval says how far it is from another model",
        )


# --- GGUF ------------------------------------------------------------------------------------------------------------


def _prove_gguf(
    made: Artifact, against: str | Path, level: str, threads: int | None, progress: Progress
) -> tuple[Checkpoint, Certificate]:
    source = pipeline.open_source(against, progress=progress)
    _require_same_source(made, source.checkpoint)
    file = open_gguf(made.model)
    formats, context = _stated_formats(made), _stated_context(made)
    decided = _planned(source, formats, context)
    notes: tuple[str, ...] = ()
    if _is_folded(made):
        norms = recovered_scales(file, decided, norms=True)
        halfway = _planned(_scaled(source, norms), formats, context)
        scales = norms | recovered_scales(file, halfway, norms=False)
        decided = _planned(_scaled(source, scales), formats, context)
        notes = (f"scales are folded at {len(scales)} places; they were read back from the file",)
    found = verification.verify(
        made.model, decided, source.checkpoint, source.vocabulary, level=level, threads=threads, progress=progress
    )
    return source.checkpoint, replace(found, warnings=(*notes, *found.warnings))


def _stated_formats(made: Artifact) -> dict[str, str]:
    """{tensor: format} of the manifest. Raises CorruptCheckpoint for what is no such table."""
    rows = _plan_of(made).get("tensors")
    found: dict[str, str] = {}
    for row in rows if isinstance(rows, list) else ():
        name, kind = (row.get("name"), row.get("format")) if isinstance(row, Mapping) else (None, None)
        if not isinstance(name, str) or kind not in ggml.FORMATS:
            raise _no_plan(made)
        found[name] = str(kind)
    if not found:
        raise _no_plan(made)
    return found


def _stated_context(made: Artifact) -> int:
    context = _plan_of(made).get("context")
    if not isinstance(context, int) or not 0 < context <= 1 << 30:
        raise _no_plan(made)
    return context


def _plan_of(made: Artifact) -> Mapping[str, Any]:
    plan = made.manifest.get("plan")
    if not isinstance(plan, Mapping):
        raise _no_plan(made)
    return plan


def _no_plan(made: Artifact) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{made.root / artifact.MANIFEST} has no plan that can be followed", "convert again")


def _planned(source: pipeline.Source, formats: Mapping[str, str], context: int) -> Plan:
    """The plan of the manifest: any preset, then the format that it states for every tensor."""
    host = Target.load("host")
    plain = pipeline.plan_source(source, host, pipeline.Options(quant="F16", context=context))
    names = {t.name for t in plain.tensors}
    for name in sorted(names ^ formats.keys()):
        where = "the model" if name in names else "the artefact"
        raise VerificationFailed(f"only {where} has a tensor {name}", "is it the model that it was made from?")
    return with_formats(plain, formats, host, "as the manifest says")


def _is_folded(made: Artifact) -> bool:
    rows = made.manifest.get("candidates")
    shipped = [r for r in rows if isinstance(r, Mapping) and r.get("shipped") is True] if isinstance(rows, list) else []
    return any(r.get("kind") == "folded" for r in shipped)


def _scaled(source: pipeline.Source, scales: Mapping[str, Row]) -> pipeline.Source:
    return replace(source, blueprint=folding.apply(source.blueprint, scales))


def recovered_scales(file: GgufFile, decided: Plan, *, norms: bool) -> dict[str, Row]:
    """Scales that were folded in, by place as `folding.apply` takes them, read off what writes each channel.

    A row of the source that was divided by s lies in the file as the same row, smaller and rounded: s by least squares
    over the row. Of a norm (`norms`), whose values are not rounded, it is exact. Matrices that write channels read
    scaled ones themselves: for them `decided` must have the scales of the norms already.
    """
    planned = {t.name: t for t in decided.tensors}
    found: dict[str, Row] = {}
    for place in folding.places(decided.blueprint)[0]:
        writer, first = next(iter(place.writers.items()))
        tensor, info = planned[writer], file.tensors.get(writer)
        if norms != (len(tensor.shape) == 1):
            continue
        if info is None or info.shape != tensor.shape or info.code != tensor.format.code:
            raise VerificationFailed(f"{file.path.name}: tensor {writer} is not what was planned", "convert again")
        rows = tensor.shape[0] if norms else tensor.shape[-2]
        scales = _row_scales(file.path, info.offset, tensor).reshape(-1, rows)
        found[place.name] = np.ascontiguousarray(scales[:, first : first + place.channels].reshape(place.shape))
    return found


def _row_scales(path: Path, offset: int, tensor: Planned) -> Row:
    """float32 (rows,): source over file, of every row, or of every value of a vector; 1 where that says nothing."""
    cols = tensor.shape[-1]
    parts, at = [], offset
    for slab in tensor.made.stream(max(cols, _PIECE)):
        size = tensor.format.row_bytes(cols) * (slab.size // cols)
        data = np.fromfile(path, np.uint8, size, offset=at)
        if data.size != size:
            raise VerificationFailed(f"{path.name} ends inside tensor {tensor.name}", "convert again")
        wanted = slab.reshape(-1, cols).astype(np.float64)
        above, below = wanted**2, wanted * ggml.decode(data, tensor.format, cols)
        if len(tensor.shape) > 1:
            above, below = above.sum(axis=1), below.sum(axis=1)
        parts.append(np.divide(above, below, out=np.ones_like(above), where=below > 0).reshape(-1))
        at += size
    found = np.concatenate(parts).astype(np.float32)
    return np.where(np.isfinite(found) & (found > 0), found, np.float32(1))


# --- ONNX ------------------------------------------------------------------------------------------------------------


def _prove_onnx(
    made: Artifact, against: str | Path, level: str, threads: int | None, progress: Progress
) -> tuple[Checkpoint, Certificate]:
    from edgekit import onnx_pair_verification as pair
    from edgekit import onnx_verification as single

    task, variant = made.manifest.get("task"), _plan_of(made).get("preset")
    if not isinstance(task, str) or variant not in onnx_planning.variants(task):
        raise _no_plan(made)
    options = pipeline.Options(format="onnx", quant=str(variant), context=_stated_context(made), task=task)
    source = pipeline.open_onnx(against, options, progress=progress)
    _require_same_source(made, source.checkpoint)
    decided = pipeline.plan_onnx(source, Target.load("host"), options)
    root, report = source.checkpoint.root, _stated_report(made)
    two = task == onnx_planning.TEXT2TEXT
    verify = partial(pair.verify, made.root, root) if two else partial(single.verify, made.root, root, task)
    certificate = verify(decided, report, level=level, threads=threads or usable_cores(), progress=progress)
    return source.checkpoint, certificate


def _stated_report(made: Artifact) -> Report:
    """What the quantizer did to every node, from the manifest. Raises CorruptCheckpoint."""
    encoder = made.manifest.get("encoder")
    report = _stated_part(made, made.manifest)
    return replace(report, encoder=_stated_part(made, encoder)) if isinstance(encoder, Mapping) else report


def _stated_part(made: Artifact, stated: Mapping[str, Any]) -> Report:
    from edgekit.export.onnx._rewriting import Left, Quantised, Report

    try:
        nodes = tuple(
            Quantised(str(n["node"]), str(n["op"]), (int(n["shape"][0]), int(n["shape"][1])), _nbits(n["fmt"]), 0.0)
            for n in stated["nodes"]
        )
        left = tuple(Left(str(t["name"]), int(t["nbytes"]), str(t["reason"])) for t in stated.get("left", ()))
    except (KeyError, IndexError, TypeError, ValueError, EdgekitError):
        raise _no_plan(made) from None
    data = made.model.with_name(f"{made.model.name}.data")
    sizes = [path.stat().st_size if path.is_file() else 0 for path in (data, made.model)]
    return Report(made.model, data, nodes, left, sizes[0], sizes[1])


def _nbits(stated: Mapping[str, Any]) -> NBits:
    return NBits(int(stated["bits"]), int(stated["block"]), symmetric=bool(stated["symmetric"]))


_PROOFS = {"gguf": _prove_gguf, "onnx": _prove_onnx}
