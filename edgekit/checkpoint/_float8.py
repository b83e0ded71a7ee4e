"""Pairs FP8 weights with their scales, by name and shape."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from edgekit.checkpoint._quantised import Float8
from edgekit.checkpoint._tensor import Scale, TensorRef
from edgekit.errors import CorruptCheckpoint, UnsupportedModel

_ACTIVATION_SCALES = (
    ".input_scale",
    ".input_scale_ub",
    ".output_scale",
    "activation_scale",
    ".qscale_act",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
)


def fold_scales(found: dict[str, TensorRef], declared: Float8 | None) -> dict[str, TensorRef]:
    """FP8 tensors with their scale inside; scale tensors gone. Other checkpoints come back as they are.

    Scales are factors whatever they are called: `weight_scale_inv` (DeepSeek, Qwen FP8) is multiplied with, as
    `weight_scale` (compressed-tensors, fbgemm, ModelOpt) and `qscale_weight` (Mistral) are.
    """
    out = dict(found)
    eights = [ref for ref in found.values() if ref.dtype.startswith("F8")]
    for ref in eights:
        stem = ref.name.removesuffix("weight")
        scale = next(
            (s for s in (f"{ref.name}_scale_inv", f"{ref.name}_scale", f"{stem}qscale_weight") if s in out), ""
        )
        if scale:
            out[ref.name] = replace(ref, scale=_scale(ref, out.pop(scale), declared))
        elif declared:
            raise CorruptCheckpoint(f"{ref.file}: tensor {ref.name} is {ref.dtype} and has no scale beside it")
    if eights:
        for name in [n for n in out if n.endswith(_ACTIVATION_SCALES)]:
            del out[name]  # for activations and the KV cache: the runtime computes those in its own formats
    return out


def _scale(ref: TensorRef, scale: TensorRef, declared: Float8 | None) -> Scale:
    rows, cols = ref.matrix
    height = ref.shape[-2] if len(ref.shape) > 1 else 1
    shape = scale.shape
    if scale.values == 1:
        return Scale(scale, (1, 1, 1), (max(rows, 1), cols), max(rows, 1))
    if len(shape) == len(ref.shape) - 1:
        shape = (*shape, 1)  # a factor a row
    if len(shape) == len(ref.shape) > 1 and shape[:-2] == ref.shape[:-2]:
        grid = (prod(shape[:-2]), shape[-2], shape[-1])
        for block in (declared.block if declared else None, (1, cols), (height, cols)):
            if block and grid[1:] == (-(-height // block[0]), -(-cols // block[1])):
                return Scale(scale, grid, block, height)
    stated = f", blocks of {declared.block}" if declared and declared.block else ""
    raise UnsupportedModel(f"{ref.file}: tensor {ref.name} {ref.shape} has scales of shape {scale.shape}{stated}")
