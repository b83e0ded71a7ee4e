"""A float32 graph in the form that a plan's variant names: blocks of integers, dynamic or static 8-bit arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgekit.export.onnx._quantize import Moments, Report, Scheme, quantize
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
    progress: Progress = silent,
) -> Report:
    """Write float32 `graph` to `out` as `variant` says, its weights beside it in `<out>.data`. `moments`: second
    moments of the inputs, for error feedback. Raises what the quantizers raise."""
    if variant.kind == "nbits":
        return quantize(
            graph, out, scheme_of(graph, variant, layers), moments=moments, threads=threads, progress=progress
        )
    raise NotImplementedError(variant.kind)


def scheme_of(graph: Path, variant: Variant, layers: int) -> Scheme:
    """The formats of `variant`, with those that a mixed one gives single matrices of this graph."""
    overrides: Mapping[str, NBits] = {}
    if variant.mixed:
        finer = replace(variant.linear, bits=8)
        names = (node.name for node in open_onnx(graph).nodes if node.op == "MatMul")
        overrides = {name: finer for name in names if is_sensitive(name, layers)}
    return Scheme(variant.linear, variant.head, variant.embedding, overrides)
