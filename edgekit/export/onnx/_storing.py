"""A float32 graph in the form that a plan's variant names: blocks of integers, dynamic or static 8-bit arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgekit.export.onnx import _dynamic, _static
from edgekit.export.onnx._quantize import Moments, Scheme, quantize
from edgekit.export.onnx._rewriting import Report
from edgekit.onnx_file import open_onnx
from edgekit.onnx_planning import Variant, is_sensitive
from edgekit.quant.nbits import NBits
from edgekit.units import Progress, silent


def store(
    graph: Path,
    out: Path,
    variant: Variant,
    layers: int,
    moments: Moments | None = None,
    threads: int = 1,
    *,
    feeds: Sequence[_static.Feeds] = (),
    kind: _static.Kind = "uint8",
    progress: Progress = silent,
) -> Report:
    """Write float32 `graph` to `out` as `variant` says, its weights beside it in `<out>.data`.

    `moments`: second moments of the inputs, for error feedback in blocks; `feeds` and `kind`: what a static variant
    learns its ranges from, and how it rounds activations. Raises what the quantizers raise.
    """
    if variant.kind == "nbits":
        scheme = scheme_of(graph, variant, layers)
        return quantize(graph, out, scheme, moments=moments, threads=threads, progress=progress)
    if variant.kind == "dynamic":
        return _dynamic.quantize(graph, out, largest=variant.largest, progress=progress)
    return _static.quantize(graph, out, feeds, kind=kind, largest=variant.largest, threads=threads, progress=progress)


def scheme_of(graph: Path, variant: Variant, layers: int) -> Scheme:
    """The formats of `variant`, with those that a mixed one gives single matrices of this graph."""
    overrides: Mapping[str, NBits] = {}
    if variant.mixed:
        names = (node.name for node in open_onnx(graph).nodes if node.op in ("MatMul", "Gemm"))
        overrides = {name: variant.head for name in names if is_sensitive(name, layers)}
    return Scheme(variant.linear, variant.head, variant.embedding, overrides)
