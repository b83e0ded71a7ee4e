"""Float32 graphs quantised: judged by running source and result in onnxruntime, on graphs built by the genai builder
and by hand, and by the sizes that were known before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.checkpoint import open_checkpoint
from edgekit.errors import CorruptCheckpoint, EdgekitError, OutputExists, RuntimeFailed
from edgekit.export.onnx import _decoder
from edgekit.export.onnx._moments import observe
from edgekit.export.onnx._quantize import Report, Scheme, quantize
from edgekit.quant import nbits
from edgekit.quant.nbits import NBits
from tests.onnx_models import DEMO

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
onnx: Any = pytest.importorskip("onnx")
onnxruntime: Any = pytest.importorskip("onnxruntime")

INT8 = Scheme(NBits(8, 32), NBits(8, 32), NBits(8, 32))
INT4 = Scheme(NBits(4, 32, False), NBits(8, 32), NBits(8, 32))
RNG = np.random.default_rng(7)


def _run(graph: Path, **feeds: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def _logits(graph: Path, ids: np.ndarray) -> np.ndarray:
    """Of a decoder of the demo's shape, all positions."""
    caches = {
        f"past_key_values.{layer}.{side}": np.zeros((len(ids), 2, 0, 64), np.float32)
        for layer in range(5)
        for side in ("key", "value")
    }
    return _run(graph, input_ids=ids, attention_mask=np.ones_like(ids), **caches).astype(np.float64)


def _kl(wanted: np.ndarray, got: np.ndarray) -> float:
    p, q = (x - x.max(-1, keepdims=True) for x in (wanted, got))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _relative(wanted: np.ndarray, got: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def _text(tokens: int, start: int) -> np.ndarray:
    """Ids of library source that everybody has."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = tokenizer.encode(Path(os.__file__).read_text(encoding="utf-8"), add_special_tokens=False).ids
    return np.array(ids[start : start + tokens], np.int64).reshape(-1, 128)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as float32 graph."""
    pytest.importorskip("onnxruntime_genai")
    return _decoder.build(DEMO, tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def moments(demo: Path) -> dict[str, np.ndarray]:
    return observe(demo, [batch[None] for batch in _text(6144, 0)])


def _graph(
    folder: Path, nodes: Sequence[Any], tensors: dict[str, np.ndarray], inputs: dict[str, Any], outputs: dict[str, Any]
) -> Path:
    """A graph by hand, tensors in a data file. `inputs`, `outputs`: name -> (type, shape)."""
    h = onnx.helper
    sides = [[h.make_tensor_value_info(n, t, s) for n, (t, s) in each.items()] for each in (inputs, outputs)]
    given = [onnx.numpy_helper.from_array(a, name) for name, a in tensors.items()]
    model = h.make_model(h.make_graph(nodes, "g", *sides, given), opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    path = folder / "float.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="float.data", size_threshold=512)
    return path


def _normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def _node(op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(op, inputs, [output], name=f"/{output}/{op}", **attributes)


# --- the builder's decoder ------------------------------------------------------------------------------------------


def test_a_decoder_in_8_bits_says_the_same(demo: Path, tmp_path: Path) -> None:
    report = quantize(demo, tmp_path / "model.onnx", INT8)
    ids = _text(512, 8000)
    wanted, got = _logits(demo, ids), _logits(report.graph, ids)
    assert _kl(wanted, got) < 6e-4
    assert (wanted.argmax(-1) == got.argmax(-1)).mean() > 0.97
    assert {n.fmt.bits for n in report.nodes} == {8} and not report.left
    assert len(report.nodes) == 5 * 5 + 2
    assert all(0.003 < n.error < 0.01 for n in report.nodes)


@pytest.mark.parametrize("fmt", [NBits(8, 32), NBits(8, 128), NBits(4, 32, False), NBits(4, 16)], ids=str)
def test_the_data_file_is_as_long_as_the_checkpoint_said(demo: Path, tmp_path: Path, fmt: NBits) -> None:
    """From shapes alone; queries, keys and values are one matrix of the graph, the embedding is the head's."""
    report = quantize(demo, tmp_path / "model.onnx", Scheme(fmt, NBits(8, 64), NBits(8, 64)), search=False)
    shapes = {name: ref.shape for name, ref in open_checkpoint(DEMO).tensors.items()}
    sizes = [4 * 32]  # frequencies of the rotation
    for name, shape in shapes.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        if "q_proj" in name:
            rows += sum(shapes[name.replace("q_proj", other)][0] for other in ("k_proj", "v_proj"))
        sizes += nbits.tensor_sizes(rows, cols, NBits(8, 64) if "embed" in name else fmt)
    assert nbits.data_bytes(sizes) == report.data_bytes == report.data.stat().st_size
    assert report.graph_bytes == report.graph.stat().st_size < 60_000


def test_head_and_embedding_share_their_bytes(demo: Path, tmp_path: Path) -> None:
    report = quantize(demo, tmp_path / "model.onnx", INT4)
    gather, head = report.nodes[-1], report.nodes[-2]
    assert (gather.op, gather.shares, head.node) == ("GatherBlockQuantized", "/lm_head/MatMul", "/lm_head/MatMul")
    tensors = {t.name: t for t in onnx.load(str(report.graph), load_external_data=False).graph.initializer}
    places = [
        {e.key: e.value for e in tensors[f"lm_head.MatMul.weight_Q8{flat}"].external_data} for flat in ("", "_flat")
    ]
    assert places[0] == places[1] and int(places[0]["length"]) == 4096 * 256
    assert "lm_head.MatMul.weight" not in tensors


def test_every_node_has_the_bits_it_was_promised(demo: Path, tmp_path: Path) -> None:
    names = [f"/model/layers.{i}/mlp/down_proj/MatMul" for i in (1, 3)]
    overrides = {names[0]: NBits(8, 128), names[1]: None, "/no/such/node": NBits(8, 32)}
    report = quantize(demo, tmp_path / "model.onnx", Scheme(INT4.linear, INT4.head, INT4.embedding, overrides))
    nodes = {n.name: n for n in onnx.load(str(report.graph), load_external_data=False).graph.node}
    told = {n.node: (n.fmt.bits, n.fmt.block, *n.shape, 0 if n.op.startswith("Gather") else 4) for n in report.nodes}
    for name, (bits, block, rows, cols, accuracy) in told.items():
        found = {a.name: a.i for a in nodes[name].attribute}
        assert (found["bits"], found["block_size"]) == (bits, block)
        if accuracy:
            assert (found["N"], found["K"], found["accuracy_level"]) == (rows, cols, accuracy)
    assert told[names[0]][:2] == (8, 128) and told["/lm_head/MatMul"][:2] == (8, 32)
    assert nodes[names[1]].op_type == "MatMul"
    assert [(left.name, left.nbytes) for left in report.left] == []  # 768 KiB: below what is reported


def test_error_feedback_halves_the_divergence_of_4_bits(
    demo: Path, moments: dict[str, np.ndarray], tmp_path: Path
) -> None:
    ids = _text(512, 8000)
    wanted = _logits(demo, ids)
    reports: list[Report] = []
    for name, how in (("plain", {}), ("fed", {"moments": moments})):
        reports.append(quantize(demo, tmp_path / f"{name}.onnx", INT4, **how))
    plain, fed = (_kl(wanted, _logits(report.graph, ids)) for report in reports)
    assert fed < 0.6 * plain < 0.03
    assert reports[0].data_bytes == reports[1].data_bytes


def test_an_embedding_may_stay_float32(demo: Path, tmp_path: Path) -> None:
    report = quantize(demo, tmp_path / "model.onnx", Scheme(NBits(8, 32), NBits(8, 32), None))
    assert [(left.name, left.reason) for left in report.left] == [
        ("lm_head.MatMul.weight", "the scheme leaves it float32")
    ]
    ids = _text(128, 8000)
    assert _kl(_logits(demo, ids), _logits(report.graph, ids)) < 6e-4


def test_bytes_do_not_depend_on_threads(demo: Path, tmp_path: Path) -> None:
    one = quantize(demo, tmp_path / "a.onnx", INT4)
    two = quantize(demo, tmp_path / "b.onnx", INT4, threads=2)
    assert one.data.read_bytes() == two.data.read_bytes()


# --- moments --------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_tensors(demo: Path, moments: dict[str, np.ndarray]) -> None:
    assert len(moments) == 5 * 4 + 1
    name = "/model/layers.0/input_layernorm/output_0"
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(demo)).graph.initializer}
    embedding, gain = tensors["lm_head.MatMul.weight"].T, tensors["model.layers.0.input_layernorm.weight"]
    x = embedding[_text(6144, 0).ravel()].astype(np.float64)
    x *= gain / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5)
    wanted = x.T @ x
    np.testing.assert_allclose(moments[name], wanted, rtol=1e-4, atol=1e-5 * np.diag(wanted).mean())


def test_little_memory_means_groups_and_diagonals(demo: Path, tmp_path: Path) -> None:
    batches = [batch[None] for batch in _text(512, 0)]
    steps: list[tuple[int, int]] = []
    whole = observe(demo, batches)
    small = observe(
        demo, batches, memory=2 << 20, spill=tmp_path, progress=lambda _, done, total: steps.append((done, total))
    )
    assert list(small) == list(whole)
    assert steps[-1][0] == steps[-1][1] >= 5 * len(batches)
    for name, moment in small.items():
        full = whole[name]
        assert moment.ndim == (1 if len(full) == 768 else 2)
        wanted = full if moment.ndim == 2 else np.diag(full)
        np.testing.assert_allclose(moment, wanted, rtol=1e-4, atol=1e-5 * np.diag(full).mean())
    assert isinstance(next(iter(small.values())), np.memmap)


def test_masked_tokens_are_not_counted(tmp_path: Path) -> None:
    graph = _encoder(tmp_path)
    ids = RNG.integers(0, 300, (2, 6))
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    found = observe(graph, [{"input_ids": ids, "attention_mask": mask}])
    table = onnx.numpy_helper.to_array(next(t for t in onnx.load(str(graph)).graph.initializer if t.name == "words"))
    x = table[ids][mask == 1]
    np.testing.assert_allclose(found["x"], x.T @ x, rtol=1e-4, atol=1e-3)


def test_what_cannot_be_observed(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match="no text"):
        observe(demo, [])
    with pytest.raises(RuntimeFailed, match="does not run"):
        observe(demo, [np.array([[9999]])])
    odd = _graph(
        tmp_path,
        [_node("Mul", ["x", "what"], "a"), _node("MatMul", ["a", "w"], "y")],
        {"w": _normal(64, 64)},
        {"x": (1, [1, 64]), "what": (1, [1])},
        {"y": (1, [1, 64])},
    )
    with pytest.raises(EdgekitError, match="'x' that nobody here knows"):
        observe(odd, [np.array([[1]])])


# --- graphs by hand -------------------------------------------------------------------------------------------------


def _encoder(folder: Path) -> Path:
    """Table -> MatMul -> Gemm with transposed weight and bias -> MatMul by the transposed table, stored apart."""
    words, turned = _normal(300, 64), _normal(96, 64)
    return _graph(
        folder,
        [
            _node("Gather", ["words", "input_ids"], "x"),
            _node("MatMul", ["x", "w1"], "a"),
            _node("Reshape", ["a", "flat"], "b"),
            _node("Gemm", ["b", "w2", "bias"], "c", transB=1),
            _node("MatMul", ["c", "w3"], "d"),
            _node("MatMul", ["d", "out"], "logits"),
        ],
        {
            "words": words,
            "w1": _normal(64, 64),
            "flat": np.array([-1, 64]),
            "w2": turned,
            "bias": _normal(96),
            "w3": _normal(96, 64),
            "out": np.ascontiguousarray(words.T),
        },
        {"input_ids": (7, ["b", "s"])},
        {"logits": (1, ["n", 300])},
    )


def test_gemm_bias_and_a_head_that_equals_the_table(tmp_path: Path) -> None:
    source = _encoder(tmp_path)
    report = quantize(source, tmp_path / "q.onnx", INT8)
    ids = RNG.integers(0, 300, (2, 9))
    assert _relative(_run(source, input_ids=ids), _run(report.graph, input_ids=ids)) < 0.02
    assert [(n.node, n.shape, n.shares) for n in report.nodes] == [
        ("/a/MatMul", (64, 64), None),
        ("/c/Gemm", (96, 64), None),
        ("/d/MatMul", (64, 96), None),
        ("/logits/MatMul", (300, 64), None),
        ("/x/Gather", (300, 64), "/logits/MatMul"),
    ]
    sizes = [s for n in report.nodes[:-1] for s in nbits.tensor_sizes(*n.shape, NBits(8, 32))]
    assert report.data_bytes == nbits.data_bytes(sizes)  # the bias is small and in the graph


def test_a_table_of_its_own_and_small_matrices(tmp_path: Path) -> None:
    """Positions, a classifier of 3 labels, a transposed constant, a matrix of the table's shape with other numbers."""
    source = _graph(
        tmp_path,
        [
            _node("Gather", ["words", "input_ids"], "x"),
            _node("Gather", ["places", "position_ids"], "p"),
            _node("Add", ["x", "p"], "a"),
            _node("Transpose", ["turned"], "t", perm=[1, 0]),
            _node("MatMul", ["a", "t"], "b"),
            _node("MatMul", ["b", "like"], "c"),
            _node("MatMul", ["c", "labels"], "y"),
        ],
        {
            "words": _normal(300, 96),
            "places": _normal(512, 96),
            "turned": _normal(96, 96),
            "like": _normal(96, 300),
            "labels": _normal(300, 3),
        },
        {"input_ids": (7, ["b", "s"]), "position_ids": (7, ["b", "s"])},
        {"y": (1, ["b", "s", 3])},
    )
    report = quantize(source, tmp_path / "q.onnx", Scheme(NBits(8, 128), NBits(8, 128), NBits(4, 16, False)))
    assert [(n.op, n.shape, n.fmt.bits, n.fmt.block) for n in report.nodes] == [
        ("MatMulNBits", (96, 96), 8, 32),
        ("MatMulNBits", (300, 96), 8, 32),
        ("GatherBlockQuantized", (300, 96), 4, 16),
    ]
    feeds = {"input_ids": RNG.integers(0, 300, (2, 9)), "position_ids": np.tile(np.arange(9), (2, 1))}
    assert _relative(_run(source, **feeds), _run(report.graph, **feeds)) < 0.1
    names = {t.name for t in onnx.load(str(report.graph), load_external_data=False).graph.initializer}
    assert {"places", "labels"} < names and not names & {"words", "turned"}


@pytest.mark.parametrize("cols", [72, 100])
def test_rows_that_do_not_divide_into_blocks(tmp_path: Path, cols: int) -> None:
    source = _graph(
        tmp_path,
        [_node("Gather", ["words", "input_ids"], "x"), _node("MatMul", ["x", "w"], "y")],
        {"words": _normal(4096, cols), "w": _normal(cols, 64)},
        {"input_ids": (7, ["b", "s"])},
        {"y": (1, ["b", "s", 64])},
    )
    report = quantize(source, tmp_path / "q.onnx", INT8)
    assert [n.op for n in report.nodes] == ["MatMulNBits"]  # a look-up needs whole blocks
    assert [left.reason for left in report.left] == [f"rows of {cols} do not divide into blocks"]
    ids = RNG.integers(0, 300, (2, 9))
    assert _relative(_run(source, input_ids=ids), _run(report.graph, input_ids=ids)) < 0.02


def test_weights_of_inner_graphs_and_activations_are_left_alone(tmp_path: Path) -> None:
    h = onnx.helper
    big = onnx.numpy_helper.from_array(_normal(64, 64), "inside")
    inner = h.make_graph(
        [h.make_node("MatMul", ["x", "inside"], ["i"], name="inner")],
        "then",
        [],
        [h.make_tensor_value_info("i", 1, None)],
        [big],
    )
    other = h.make_graph(
        [h.make_node("MatMul", ["x", "w"], ["o"], name="other")], "else", [], [h.make_tensor_value_info("o", 1, None)]
    )
    source = _graph(
        tmp_path,
        [
            h.make_node("If", ["flag"], ["a"], name="if", then_branch=inner, else_branch=other),
            _node("MatMul", ["a", "a"], "b"),
            _node("MatMul", ["b", "w"], "y"),
        ],
        {"w": _normal(64, 64)},
        {"x": (1, [64, 64]), "flag": (9, [])},
        {"y": (1, [64, 64])},
    )
    report = quantize(source, tmp_path / "q.onnx", INT8)
    assert [n.node for n in report.nodes] == ["/y/MatMul"]
    # the other branch still needs the float32 weight
    assert report.data_bytes == nbits.data_bytes([*NBits(8, 32).sizes(64, 64), 4 * 64 * 64, 4 * 64 * 64])
    for flag in (True, False):
        feeds = {"x": _normal(64, 64), "flag": np.array(flag)}
        assert _relative(_run(source, **feeds), _run(report.graph, **feeds)) < 0.02


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path: Path) -> None:
    source = _encoder(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx.data").write_bytes(b"mine")
    with pytest.raises(OutputExists):
        quantize(source, out / "model.onnx", INT8)
    assert (out / "model.onnx.data").read_bytes() == b"mine"
    (out / "model.onnx.data").unlink()
    with pytest.raises(EdgekitError, match="second moment"):
        quantize(source, out / "model.onnx", INT8, moments={"a_never": _normal(3, 3), "c": np.eye(3, dtype=np.float32)})
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("key", "value"), [("location", "../far.data"), ("location", "none.data"), ("offset", "99999999"), ("length", "12")]
)
def test_data_that_is_not_where_it_should_be(tmp_path: Path, key: str, value: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "far.data").write_bytes(bytes(1 << 20))
    source = _encoder(folder)
    model = onnx.load(str(source), load_external_data=False)
    entries = {e.key: e for e in next(t for t in model.graph.initializer if t.name == "w1").external_data}
    entries[key].value = value
    source.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptCheckpoint, match="w1"):
        quantize(source, tmp_path / "q.onnx", INT8)
    assert not (tmp_path / "q.onnx.data").exists()


def test_what_is_no_graph(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="does not exist"):
        quantize(tmp_path / "none.onnx", tmp_path / "q.onnx", INT8)
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(CorruptCheckpoint, match="no ONNX graph"):
        quantize(tmp_path / "bad.onnx", tmp_path / "q.onnx", INT8)
