"""Blocks of MatMulNBits, judged by onnxruntime: its own quantizer's bytes, and what its kernels compute from ours."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.quant import gptq, nbits
from edgekit.quant.nbits import NBits, Packed

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

FORMATS = [NBits(bits, block, symmetric) for bits in (4, 8) for block in nbits.BLOCKS for symmetric in (True, False)]


def _name(fmt: NBits) -> str:
    return f"{fmt.bits}b{fmt.block}{'' if fmt.symmetric else 'a'}"


def _weights(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Normal weights, with a block of zeros, a row of ties and an outlier."""
    w = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    w[3, :64], w[5] = 0, np.round(w[5] * 4) / 4
    w[6, 1] = 9
    return w


def _correlated(cols: int, seed: int = 1) -> gptq.Curvature:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((cols, cols)) * np.exp(rng.standard_normal(cols))
    x = rng.standard_normal((4 * cols, cols)) @ mix
    return gptq.prepare((x.T @ x).astype(np.float32))


def _output_error(w: np.ndarray, packed: Packed, curvature: gptq.Curvature) -> np.ndarray:
    """E·H·Eᵀ of each row."""
    error = (w - nbits.decode(packed, w.shape[1])).astype(np.float64)
    return np.einsum("nk,kl,nl->n", error, curvature.hessian.astype(np.float64), error)


def _multiply(packed: Packed, x: np.ndarray, rows: int, accuracy: int) -> np.ndarray:
    """x·Wᵀ by onnxruntime's MatMulNBits."""
    onnxruntime = pytest.importorskip("onnxruntime")
    helper, numpy_helper = pytest.importorskip("onnx").helper, pytest.importorskip("onnx").numpy_helper
    fmt, cols = packed.fmt, x.shape[1]
    given = {"q": packed.data, "s": packed.scales, "z": packed.zero_points}
    tensors = [numpy_helper.from_array(a, name) for name, a in given.items() if a is not None]
    node = helper.make_node(
        "MatMulNBits",
        ["x", *(t.name for t in tensors)],
        ["y"],
        domain="com.microsoft",
        K=cols,
        N=rows,
        bits=fmt.bits,
        block_size=fmt.block,
        accuracy_level=accuracy,
    )
    sides = [helper.make_tensor_value_info(name, 1, ["m", n]) for name, n in (("x", cols), ("y", rows))]
    graph = helper.make_graph([node], "g", sides[:1], sides[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def _theirs(w: np.ndarray, fmt: NBits) -> dict[str, np.ndarray]:
    """What onnxruntime's own quantizer makes of the same weights."""
    pytest.importorskip("onnxruntime")
    from onnx import helper, numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    rows, cols = w.shape
    sides = [helper.make_tensor_value_info(name, 1, ["m", n]) for name, n in (("x", cols), ("y", rows))]
    weight = numpy_helper.from_array(np.ascontiguousarray(w.T), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "n")], "g", sides[:1], sides[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    quantizer = MatMulNBitsQuantizer(model, bits=fmt.bits, block_size=fmt.block, is_symmetric=fmt.symmetric)
    quantizer.process()
    return {t.name: numpy_helper.to_array(t) for t in quantizer.model.model.graph.initializer}


@pytest.mark.parametrize("fmt", FORMATS, ids=_name)
@pytest.mark.parametrize("cols", [512, 416])
def test_rounding_to_nearest_gives_the_bytes_of_onnxruntime(fmt: NBits, cols: int) -> None:
    w = _weights(33, cols)
    ours, theirs = nbits.encode(w, fmt, search=False), _theirs(w, fmt)
    whole = cols // fmt.block  # what lies behind the last column is nobody's value
    assert np.array_equal(ours.data[:, :whole], theirs[f"w_Q{fmt.bits}"][:, :whole])
    assert np.array_equal(ours.scales, theirs["w_scales"].reshape(ours.scales.shape))
    if ours.zero_points is not None:
        assert np.array_equal(ours.zero_points, theirs["w_zero_points"].reshape(ours.zero_points.shape))


@pytest.mark.parametrize("fmt", FORMATS, ids=_name)
@pytest.mark.parametrize("cols", [512, 352])
def test_the_kernel_computes_with_what_decode_says(fmt: NBits, cols: int) -> None:
    w = _weights(40, cols)
    packed = nbits.encode(w, fmt)
    x = np.random.default_rng(2).standard_normal((5, cols)).astype(np.float32)
    wanted = x @ nbits.decode(packed, cols).T
    assert np.abs(_multiply(packed, x, 40, 0) - wanted).max() < 1e-4
    rough = _multiply(packed, x, 40, 4)  # rounds x to 8 bits
    assert np.linalg.norm(rough - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize("fmt", FORMATS, ids=_name)
@pytest.mark.parametrize("cols", [512, 352, 80])
def test_sizes_are_those_of_the_arrays(fmt: NBits, cols: int) -> None:
    packed = nbits.encode(_weights(9, cols), fmt)
    arrays = [a for a in (packed.data, packed.scales, packed.zero_points) if a is not None]
    assert tuple(a.nbytes for a in arrays) == fmt.sizes(9, cols)
    assert fmt.nbytes(9, cols) == sum(fmt.sizes(9, cols))
    if cols == 512:
        slack = 0.125 if fmt.bits == 4 else 0  # half a byte where a row has an odd number of zero points
        assert fmt.nbytes(9, cols) * 8 / (9 * cols) == pytest.approx(fmt.bpw, abs=slack)


def test_known_bits_per_weight() -> None:
    assert [NBits(8, 32).bpw, NBits(4, 32).bpw, NBits(4, 32, False).bpw, NBits(8, 128).bpw] == [9, 5, 5.125, 8.25]


@pytest.mark.parametrize("fmt", [NBits(4, 32), NBits(4, 128, False), NBits(8, 32), NBits(8, 64, False)], ids=_name)
def test_a_search_and_then_feedback_lower_the_error(fmt: NBits) -> None:
    w, curvature = _weights(64, 352), _correlated(352)
    plain = nbits.encode(w, fmt, search=False)
    searched = nbits.encode(w, fmt)
    weighted = nbits.encode(w, fmt, importance=curvature.diagonal)
    fed = nbits.encode(w, fmt, curvature=curvature)
    assert nbits.relative_error(w, searched) < nbits.relative_error(w, plain)
    errors = [_output_error(w, each, curvature).sum() for each in (plain, searched, weighted, fed)]
    assert errors[2] < 0.95 * errors[0]
    assert errors[3] < 0.65 * errors[2]


def test_feedback_makes_no_row_worse() -> None:
    w, curvature, fmt = _weights(64, 160), _correlated(160), NBits(4, 32)
    rows = _output_error(w, nbits.encode(w, fmt, curvature=curvature), curvature)
    assert (rows <= 1.001 * _output_error(w, nbits.encode(w, fmt, importance=curvature.diagonal), curvature)).all()


@pytest.mark.parametrize("fmt", [NBits(4, 32, False), NBits(8, 64)], ids=_name)
def test_bytes_do_not_depend_on_threads(fmt: NBits) -> None:
    w, curvature = _weights(1100, 96), _correlated(96)
    for more in ({}, {"curvature": curvature}):
        one, three = nbits.encode(w, fmt, **more), nbits.encode(w, fmt, threads=3, **more)
        assert np.array_equal(one.data, three.data) and np.array_equal(one.scales, three.scales)


@pytest.mark.parametrize("fmt", [NBits(4, 32), NBits(4, 32, False), NBits(8, 32), NBits(8, 32, False)], ids=_name)
def test_zeros_stay_zero_and_constants_stay_close(fmt: NBits) -> None:
    w = np.zeros((40, 64), np.float32)
    w[1], w[2], w[4, 5] = 0.25, -3, 1e-30
    for more in ({}, {"search": False}, {"curvature": _correlated(64)}):
        back = nbits.decode(nbits.encode(w, fmt, **more), 64)
        assert not back[[0, 3]].any()
        np.testing.assert_allclose(back[1:3], w[1:3], rtol=2e-2)


def test_columns_that_saw_nothing_keep_their_values() -> None:
    w, importance = _weights(40, 64), np.zeros(64, np.float32)
    assert nbits.relative_error(w, nbits.encode(w, NBits(8, 32), importance=importance)) < 0.01
    importance[0] = 1
    assert nbits.relative_error(w, nbits.encode(w, NBits(8, 32), importance=importance)) < 0.1


@pytest.mark.parametrize(("cols", "block"), [(4096, 128), (960, 64), (352, 32), (80, 16), (100, 128)])
def test_the_largest_block_that_divides_a_row(cols: int, block: int) -> None:
    assert NBits(8, 128).fitted(cols).block == block


@pytest.mark.parametrize(("bits", "block"), [(2, 32), (4, 48), (8, 512), (8, 8)])
def test_formats_that_the_operator_does_not_know(bits: Any, block: int) -> None:
    with pytest.raises(EdgekitError, match="no such format"):
        NBits(bits, block)


def test_what_is_no_matrix_is_refused() -> None:
    w = _weights(9, 64)
    for wrong in (w[0], w[:0]):
        with pytest.raises(EdgekitError, match="no matrix"):
            nbits.encode(wrong, NBits())
    with pytest.raises(EdgekitError, match="importance"):
        nbits.encode(w, NBits(), importance=np.ones(63, np.float32))
    with pytest.raises(EdgekitError, match="second moment"):
        nbits.encode(w, NBits(), curvature=_correlated(32))
    for value in (np.nan, np.inf):
        w[2, 3] = value
        with pytest.raises(EdgekitError, match="not finite"):
            nbits.encode(w, NBits())


def test_a_data_file_is_as_long_as_its_tensors_say() -> None:
    assert nbits.data_bytes([1023, 1024, 1025, 6400]) == 1024 + 1088 + 6400
    assert nbits.tensor_sizes(8, 512, NBits(8, 32)) == (4 * 8 * 512,)  # too few rows
    assert nbits.tensor_sizes(64, 960, NBits(8, 128)) == NBits(8, 64).sizes(64, 960)
    assert nbits.tensor_sizes(64, 960, None) == (4 * 64 * 960,)
