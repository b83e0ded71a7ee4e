"""ggml's block formats taken apart and put together: scales, minima and integers of each, bit for bit.

Knows the bytes of ggml-common.h as dequantize_row_* of ggml-quants.c reads them; chooses no value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.quant import Format
from edgekit.quant.ggml import FORMATS

Bytes = npt.NDArray[Any]  # uint8; numpy's types widen every shift and mask
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Integers = npt.NDArray[np.int16]

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The sixteen values of IQ4_NL and IQ4_XS (kvalues_iq4nl of ggml-common.h)."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Weight = d·scale·level[q] + sign·dmin·minimum, with one scale and minimum for each group of a block.

    `d`, `dmin`: float16 (rows, blocks); `scale`, `minimum`: int16 (rows, blocks, groups); `q`: uint8 (rows, blocks,
    weights). `dmin` and `minimum` are None where a format has no minimum, `scale` is all ones where it has one group.
    """

    d: Halves
    dmin: Halves | None
    scale: Integers
    minimum: Integers | None
    q: Bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """What a format can say. `levels`: value of each integer; `scales`, `minima`: range of the stored integers.

    `sign` of the minimum: -1 where it is subtracted (k-quants), +1 where it is added.
    """

    format: Format
    group: int
    levels: Floats
    scales: tuple[int, int]
    minima: tuple[int, int] | None
    sign: int
    take: Callable[[Bytes], Blocks]
    put: Callable[[Blocks, Bytes], None]

    @property
    def groups(self) -> int:
        return self.format.block // self.group

    @property
    def stored_scales(self) -> bool:
        """Whether groups have integers of their own under one half-precision scale (the k-quants' super-blocks)."""
        return self.scales != (1, 1)

    def unpack(self, data: Bytes) -> Blocks:
        """uint8 (rows, row_bytes) -> its blocks."""
        return self.take(data.reshape(len(data), -1, self.format.size))

    def pack(self, blocks: Blocks) -> Bytes:
        """Blocks -> uint8 (rows, row_bytes)."""
        rows, count = blocks.d.shape
        out = np.zeros((rows, count, self.format.size), np.uint8)
        self.put(blocks, out)
        return out.reshape(rows, count * self.format.size)

    def decode(self, blocks: Blocks) -> Floats:
        """Blocks -> float32 (rows, cols), with the roundings of dequantize_row_*, but for fused multiply-add."""
        rows, count, _ = blocks.q.shape
        value = self.levels[blocks.q].reshape(rows, count, self.groups, self.group)
        value *= (blocks.d.astype(np.float32)[..., None] * blocks.scale)[..., None]
        if blocks.dmin is not None and blocks.minimum is not None:
            value += np.float32(self.sign) * (blocks.dmin.astype(np.float32)[..., None] * blocks.minimum)[..., None]
        return value.reshape(rows, -1)


def _half(data: Bytes, at: int) -> Halves:
    """The half-precision number at byte `at` of each block."""
    return np.ascontiguousarray(data[..., at : at + 2]).view(np.float16)[..., 0]


def _set_half(out: Bytes, at: int, value: Halves) -> None:
    out[..., at : at + 2] = np.ascontiguousarray(value[..., None]).view(np.uint8)


def _ones(d: Halves) -> Integers:
    return np.ones((*d.shape, 1), np.int16)


def _nibbles(packed: Bytes, half: int) -> Bytes:
    """Bytes in runs of `half`: low nibbles are `half` weights, high nibbles the next `half`."""
    runs = packed.reshape(*packed.shape[:-1], -1, 1, half)
    return np.concatenate((runs & 15, runs >> 4), axis=-2).reshape(*packed.shape[:-1], -1)


def _to_nibbles(q: Bytes, half: int) -> Bytes:
    runs = q.reshape(*q.shape[:-1], -1, 2, half) & 15
    packed: Bytes = (runs[..., 0, :] | runs[..., 1, :] << 4).reshape(*q.shape[:-1], -1)
    return packed


def _planes(packed: Bytes, bits: int, run: int) -> Bytes:
    """Bytes in runs of `run`: the lowest `bits` bits are `run` weights, the next `bits` the next `run`, and so on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(*packed.shape[:-1], -1, 1, run)
    q: Bytes = (runs >> shifts & (2**bits - 1)).reshape(*packed.shape[:-1], -1)
    return q


def _to_planes(q: Bytes, bits: int, run: int) -> Bytes:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = (q & (2**bits - 1)).reshape(*q.shape[:-1], -1, 8 // bits, run)
    packed: Bytes = np.bitwise_or.reduce(runs << shifts, axis=-2).reshape(*q.shape[:-1], -1)
    return packed


def _legacy(bits: int, has_minimum: bool) -> tuple[Callable[[Bytes], Blocks], Callable[[Blocks, Bytes], None]]:
    """Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL: d, maybe m, the fifth bits of all 32 weights, then nibbles of both halves."""
    high = 4 if has_minimum else 2
    low = high + (4 if bits == 5 else 0)

    def take(data: Bytes) -> Blocks:
        d = _half(data, 0)
        q = _nibbles(data[..., low:], 16)
        if bits == 5:
            q |= np.unpackbits(data[..., high:low], axis=-1, bitorder="little") << 4
        return Blocks(d, _half(data, 2) if has_minimum else None, _ones(d), _ones(d) if has_minimum else None, q)

    def put(blocks: Blocks, out: Bytes) -> None:
        _set_half(out, 0, blocks.d)
        if blocks.dmin is not None:
            _set_half(out, 2, blocks.dmin)
        out[..., low:] = _to_nibbles(blocks.q, 16)
        if bits == 5:
            out[..., high:low] = np.packbits(blocks.q >> 4, axis=-1, bitorder="little")

    return take, put


def _take_q8_0(data: Bytes) -> Blocks:
    d = _half(data, 0)
    return Blocks(d, None, _ones(d), None, data[..., 2:] ^ 128)


def _put_q8_0(blocks: Blocks, out: Bytes) -> None:
    _set_half(out, 0, blocks.d)
    out[..., 2:] = blocks.q ^ 128


def _take_q2_k(data: Bytes) -> Blocks:
    scales = data[..., :16].astype(np.int16)
    return Blocks(_half(data, 80), _half(data, 82), scales & 15, scales >> 4, _planes(data[..., 16:80], 2, 32))


def _put_q2_k(blocks: Blocks, out: Bytes) -> None:
    assert blocks.minimum is not None and blocks.dmin is not None
    out[..., :16] = blocks.scale | blocks.minimum << 4
    out[..., 16:80] = _to_planes(blocks.q, 2, 32)
    _set_half(out, 80, blocks.d)
    _set_half(out, 82, blocks.dmin)


def _take_q3_k(data: Bytes) -> Blocks:
    q = _planes(data[..., 32:96], 2, 32) | _planes(data[..., :32], 1, 32) << 2
    stored = data[..., 96:108]
    scales = _nibbles(stored[..., :8], 8) | _planes(stored[..., 8:], 2, 4) << 4
    return Blocks(_half(data, 108), None, scales.astype(np.int16) - 32, None, q)


def _put_q3_k(blocks: Blocks, out: Bytes) -> None:
    out[..., :32] = _to_planes(blocks.q >> 2, 1, 32)
    out[..., 32:96] = _to_planes(blocks.q, 2, 32)
    scales = (blocks.scale + 32).astype(np.uint8)
    out[..., 96:104] = _to_nibbles(scales, 8)
    out[..., 104:108] = _to_planes(scales >> 4, 2, 4)
    _set_half(out, 108, blocks.d)


def _k_scales(stored: Bytes) -> tuple[Integers, Integers]:
    """Eight 6-bit scales and minima from 12 bytes (get_scale_min_k4 of ggml-quants.c)."""
    first, second, last = stored[..., :4], stored[..., 4:8], stored[..., 8:]
    scale = np.concatenate((first & 63, last & 15 | first >> 6 << 4), axis=-1)
    minimum = np.concatenate((second & 63, last >> 4 | second >> 6 << 4), axis=-1)
    return scale.astype(np.int16), minimum.astype(np.int16)


def _to_k_scales(blocks: Blocks) -> Bytes:
    assert blocks.minimum is not None
    scale, minimum = blocks.scale.astype(np.uint8), blocks.minimum.astype(np.uint8)
    first = scale[..., :4] | scale[..., 4:] >> 4 << 6
    second = minimum[..., :4] | minimum[..., 4:] >> 4 << 6
    return np.concatenate((first, second, scale[..., 4:] & 15 | minimum[..., 4:] << 4), axis=-1)


def _take_q4_k(data: Bytes) -> Blocks:
    return Blocks(_half(data, 0), _half(data, 2), *_k_scales(data[..., 4:16]), _nibbles(data[..., 16:], 32))


def _put_q4_k(blocks: Blocks, out: Bytes) -> None:
    assert blocks.dmin is not None
    _set_half(out, 0, blocks.d)
    _set_half(out, 2, blocks.dmin)
    out[..., 4:16] = _to_k_scales(blocks)
    out[..., 16:] = _to_nibbles(blocks.q, 32)


def _take_q5_k(data: Bytes) -> Blocks:
    q = _nibbles(data[..., 48:], 32) | _planes(data[..., 16:48], 1, 32) << 4
    return Blocks(_half(data, 0), _half(data, 2), *_k_scales(data[..., 4:16]), q)


def _put_q5_k(blocks: Blocks, out: Bytes) -> None:
    assert blocks.dmin is not None
    _set_half(out, 0, blocks.d)
    _set_half(out, 2, blocks.dmin)
    out[..., 4:16] = _to_k_scales(blocks)
    out[..., 16:48] = _to_planes(blocks.q >> 4, 1, 32)
    out[..., 48:] = _to_nibbles(blocks.q, 32)


def _take_q6_k(data: Bytes) -> Blocks:
    q = _nibbles(data[..., :128], 64) | _planes(data[..., 128:192], 2, 32) << 4
    scales = np.ascontiguousarray(data[..., 192:208]).view(np.int8).astype(np.int16)
    return Blocks(_half(data, 208), None, scales, None, q)


def _put_q6_k(blocks: Blocks, out: Bytes) -> None:
    out[..., :128] = _to_nibbles(blocks.q, 64)
    out[..., 128:192] = _to_planes(blocks.q >> 4, 2, 32)
    out[..., 192:208] = blocks.scale.astype(np.int8).view(np.uint8)
    _set_half(out, 208, blocks.d)


def _take_iq4_xs(data: Bytes) -> Blocks:
    low = np.stack((data[..., 4:8] & 15, data[..., 4:8] >> 4), axis=-1).reshape(*data.shape[:-1], 8)
    high = _planes(data[..., 2:4], 2, 1)
    scales = (low | high << 4).astype(np.int16) - 32
    return Blocks(_half(data, 0), None, scales, None, _nibbles(data[..., 8:], 16))


def _put_iq4_xs(blocks: Blocks, out: Bytes) -> None:
    scales = (blocks.scale + 32).astype(np.uint8)
    _set_half(out, 0, blocks.d)
    out[..., 2:4] = _to_planes(scales >> 4, 2, 1)
    out[..., 4:8] = scales[..., 0::2] & 15 | scales[..., 1::2] << 4
    out[..., 8:] = _to_nibbles(blocks.q, 16)


def _ramp(count: int, zero: int) -> Floats:
    return np.arange(count, dtype=np.float32) - np.float32(zero)


_IQ4 = np.array(IQ4, np.float32)
_SCALE = (1, 1)  # one group: the half-precision scale is the group's
_ROWS = (
    ("Q4_0", 32, _ramp(16, 8), _SCALE, None, 1, *_legacy(4, False)),
    ("Q4_1", 32, _ramp(16, 0), _SCALE, (1, 1), 1, *_legacy(4, True)),
    ("Q5_0", 32, _ramp(32, 16), _SCALE, None, 1, *_legacy(5, False)),
    ("Q5_1", 32, _ramp(32, 0), _SCALE, (1, 1), 1, *_legacy(5, True)),
    ("Q8_0", 32, _ramp(256, 128), _SCALE, None, 1, _take_q8_0, _put_q8_0),
    ("IQ4_NL", 32, _IQ4, _SCALE, None, 1, *_legacy(4, False)),
    ("Q2_K", 16, _ramp(4, 0), (0, 15), (0, 15), -1, _take_q2_k, _put_q2_k),
    ("Q3_K", 16, _ramp(8, 4), (-32, 31), None, 1, _take_q3_k, _put_q3_k),
    ("Q4_K", 32, _ramp(16, 0), (0, 63), (0, 63), -1, _take_q4_k, _put_q4_k),
    ("Q5_K", 32, _ramp(32, 0), (0, 63), (0, 63), -1, _take_q5_k, _put_q5_k),
    ("Q6_K", 16, _ramp(64, 32), (-128, 127), None, 1, _take_q6_k, _put_q6_k),
    ("IQ4_XS", 32, _IQ4, (-32, 31), None, 1, _take_iq4_xs, _put_iq4_xs),
)

LAYOUTS: dict[str, Layout] = {name: Layout(FORMATS[name], *rest) for name, *rest in _ROWS}  # type: ignore[arg-type]
"""The formats that can be taken apart, by name."""
