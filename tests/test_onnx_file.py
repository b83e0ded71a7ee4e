"""The ONNX reader against the `onnx` package on real graphs, and against files made to hurt."""

from __future__ import annotations

import hashlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import CorruptCheckpoint, EdgekitError, UnsupportedModel
from edgekit.onnx_file import DTYPES, Graph, Initializer, open_onnx, require_runnable
from tests.onnx_models import DEMO, everything, genai

onnx = pytest.importorskip("onnx")
from onnx import TensorProto as T  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

# --- the judge -------------------------------------------------------------------------------------------------------


def same_graph(path: Path, ours: Graph, theirs: Any) -> None:
    assert [v.name for v in ours.inputs] == [v.name for v in theirs.input]
    for a, b in zip((*ours.inputs, *ours.outputs), (*theirs.input, *theirs.output), strict=True):
        if b.type.WhichOneof("value") == "tensor_type":
            tensor = b.type.tensor_type
            axes = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
            assert DTYPES[tensor.elem_type][0] == a.dtype
            assert a.shape == (tuple(axes) if tensor.HasField("shape") else None)
    assert len(ours.nodes) == len(theirs.node)
    for a, b in zip(ours.nodes, theirs.node, strict=True):
        assert (a.op, a.domain, a.name, a.inputs, a.outputs) == (
            b.op_type, b.domain, b.name, tuple(b.input), tuple(b.output),
        )  # fmt: skip
        assert a.attributes.keys() == {x.name for x in b.attribute}
        for x in b.attribute:
            same_attribute(path, a.attributes[x.name], helper.get_attribute_value(x))
    assert list(ours.initializers) == [t.name for t in theirs.initializer]
    for a, b in zip(ours.initializers.values(), theirs.initializer, strict=True):
        same_tensor(path, a, b)


def same_attribute(path: Path, ours: Any, theirs: Any) -> None:
    if isinstance(ours, tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same_attribute(path, a, b)
    elif isinstance(ours, Initializer):
        same_tensor(path, ours, theirs)
    elif isinstance(ours, Graph):
        same_graph(path, ours, theirs)
    else:
        assert (ours.encode() if isinstance(ours, str) else ours) == theirs


def same_tensor(path: Path, ours: Initializer, theirs: Any) -> None:
    assert (ours.name, ours.shape, ours.dtype) == (theirs.name, tuple(theirs.dims), DTYPES[theirs.data_type][0])
    if theirs.data_type == T.STRING:
        assert ours.nbytes == sum(len(s) for s in theirs.string_data)
        return
    wanted = numpy_helper.to_array(theirs, base_dir=str(path.parent))
    got = open_onnx(path).values(ours)
    if wanted.dtype.kind not in "fiubc" or wanted.dtype.type.__module__ != "numpy":  # ml_dtypes: compare the bits
        low = 2 ** min(8, {"int4": 4, "int2": 2}.get(ours.dtype, 8)) - 1
        wanted, got = wanted.view(f"u{wanted.itemsize}"), got.view(f"u{got.itemsize}")
        wanted, got = (wanted & low, got & low) if wanted.itemsize == 1 else (wanted, got)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)


def same(path: Path) -> None:
    ours, theirs = open_onnx(path), onnx.load(str(path), load_external_data=False)
    ours.check()
    assert ours.ir_version == theirs.ir_version
    assert ours.opsets == {o.domain or "ai.onnx": o.version for o in theirs.opset_import}
    assert ours.producer == f"{theirs.producer_name} {theirs.producer_version}".strip()
    assert ours.metadata == {p.key: p.value for p in theirs.metadata_props}
    assert list(ours.functions) == [(f.domain, f.name) for f in theirs.functions]
    same_graph(path, ours.graph, theirs.graph)


def test_every_kind_of_field_is_read_as_onnx_reads_it(tmp_path: Path) -> None:
    onnx.save(everything(), str(tmp_path / "m.onnx"))
    same(tmp_path / "m.onnx")
    file = open_onnx(tmp_path / "m.onnx")
    assert [n.op for n in file.every_node()].count("Identity") == 3  # of the two branches, and a list of graphs
    assert file.operators()["com.example:Every"] == 1
    assert file.graph.nodes[1].attributes["s2"] == b"\xff\xfe"
    assert len(file.tensors) > len(file.initializers) + 5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_decoder_is_read_as_onnx_reads_it(tmp_path: Path, precision: str) -> None:
    path = genai(DEMO, tmp_path / "out", precision)
    same(path)
    require_runnable(open_onnx(path))
    bits = {n.attributes["bits"] for n in open_onnx(path).nodes if n.op == "MatMulNBits"}
    assert bits == {"fp32": set(), "int8": {8}, "int4": {4}}[precision]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
def test_an_encoder_is_read_as_onnx_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    import transformers

    from tests.pico import make

    model = transformers.AutoModel.from_pretrained(make("bert", tmp_path), local_files_only=True).eval()
    ids = torch.ones((2, 7), dtype=torch.int64)
    shapes = {"input_ids": {0: torch.export.Dim("b"), 1: torch.export.Dim("s")}}
    path = tmp_path / "m.onnx"
    program = torch.onnx.export(model, (ids,), dynamo=True, opset_version=21, dynamic_shapes=shapes, verbose=False)
    program.save(str(path))
    same(path)


# --- files made to hurt ----------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value & 0xFFFF_FFFF_FFFF_FFFF)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def model(graph: bytes = b"", *, ir: int = 10, opset: int = 21, more: bytes = b"") -> bytes:
    return field(1, ir) + field(8, field(2, opset)) + field(7, graph) + more


def tensor(name: str = "w", dims: tuple[int, ...] = (2, 3), code: int = 1, rest: bytes = b"") -> bytes:
    return field(5, b"".join(field(1, d) for d in dims) + field(2, code) + field(8, name) + rest)


def outside(**keys: str) -> bytes:
    return field(14, 1) + b"".join(field(13, field(1, k) + field(2, v)) for k, v in keys.items())


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = field(1, field(4, "If") + field(5, field(1, "g") + field(20, 5) + field(6, graph)))
    return graph


RAW = field(9, bytes(24))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text": (b"<!DOCTYPE html><html>", "wire type|field|number"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "wire type|field|number|ends"),
    "no graph": (field(1, 10), "no graph"),
    "no version": (field(7, b""), "no graph or no version"),
    "two graphs": (model(more=field(7, b"")), "appears 2 times"),
    "graph as a number": (field(1, 10) + field(7, 3), "field 7 is a number"),
    "version as text": (field(1, "x") + field(7, b""), "field 1 is not a number"),
    "cut varint": (field(1, 10) + b"\x3a\x80", "cut off"),
    "endless varint": (field(1, 10) + b"\x08" + b"\xff" * 20, "cut off or too long"),
    "length beyond the file": (field(1, 10) + b"\x3a" + varint(1 << 40), "a field of 1099511627776 bytes"),
    "length of 2**64-1": (field(1, 10) + b"\x3a" + b"\xff" * 9 + b"\x01", "a field of"),
    "length beyond its message": (model(field(1, b"\x0a\x7f") ), "a field of 127 bytes"),
    "group": (field(1, 10) + b"\x0b", "wire type 3"),
    "field 0": (b"\x00\x01", "numbered 0"),
    "two opsets": (model(more=field(8, field(2, 20))), "two opsets"),
    "node without operator": (model(field(1, field(1, "x"))), "no operator"),
    "binary name": (model(field(1, field(4, b"\xff"))), "not UTF-8"),
    "attribute twice": (model(field(1, field(4, "A") + 2 * field(5, field(1, "a") + field(20, 2)))), "appears twice"),
    "attribute type": (model(field(1, field(4, "A") + field(5, field(1, "a") + field(20, 99)))), "attribute type 99"),
    "half a float": (model(field(1, field(4, "A") + field(5, field(1, "a") + field(20, 6) + field(7, b"a")))), "float"),
    "deep graphs": (model(nested(60)), "graphs inside graphs"),
    "tensor twice": (model(tensor(rest=RAW) * 2), "appears twice"),
    "tensor without name": (model(tensor("", rest=RAW)), "has no name"),
    "tensor without data": (model(tensor()), "takes 6 values, its data has 0"),
    "short raw data": (model(tensor(rest=field(9, bytes(23)))), "takes 24 bytes, its data has 23"),
    "long raw data": (model(tensor(rest=field(9, bytes(25)))), "takes 24 bytes, its data has 25"),
    "raw data twice": (model(tensor(rest=RAW * 2)), "appears 2 times"),
    "two kinds of data": (model(tensor(rest=RAW + field(4, bytes(24)))), "raw data and typed data"),
    "data inside and outside": (model(tensor(rest=RAW + outside(location="d"))), "both in the model file and outside"),
    "wrong field": (model(tensor(rest=field(7, bytes(6)))), "does not lie in field 7"),
    "half floats": (model(tensor(rest=field(4, bytes(23)))), "half ones"),
    "cut packed numbers": (model(tensor(code=7, rest=field(7, b"\x01" * 5 + b"\x80"))), "ends inside a number"),
    "few packed numbers": (model(tensor(code=7, rest=field(7, b"\x01" * 5))), "takes 6 values, its data has 5"),
    "negative axis": (model(tensor(dims=(-1, 3), rest=RAW)), "impossible shape"),
    "huge axis": (model(tensor(dims=(2**62,), rest=RAW)), "impossible shape"),
    "overflow": (model(tensor(dims=(2**32, 2**32), rest=RAW)), "bytes of float32"),
    "many axes": (model(tensor(dims=(1,) * 65, rest=RAW)), "impossible shape"),
    "data type 0": (model(tensor(code=0, rest=RAW)), "data type 0"),
    "data type 99": (model(tensor(code=99, rest=RAW)), "data type 99"),
    "segments": (model(tensor(rest=RAW + field(3, b""))), "segments"),
    "texts as raw data": (model(tensor(code=8, rest=field(9, b""))), "texts as raw data"),
    "no location": (model(tensor(rest=outside(offset="0"))), "without a location"),
    "negative offset": (model(tensor(rest=outside(location="d", offset="-1"))), "offset '-1'"),
    "offset in words": (model(tensor(rest=outside(location="d", offset="1e3"))), "offset '1e3'"),
    "huge offset": (model(tensor(rest=outside(location="d", offset="9" * 30))), "offset"),
    "negative length": (model(tensor(rest=outside(location="d", length="-24"))), "length '-24'"),
    "other length": (model(tensor(rest=outside(location="d", length="20"))), "24 bytes, its external data has 20"),
    "unknown key": (model(tensor(rest=outside(location="d", decrypt="x"))), "unknown key 'decrypt'"),
    "key twice": (model(tensor(rest=outside(location="d") + field(13, field(1, "location") + field(2, "e")))), "twice"),
    "type of an input": (model(field(11, field(1, "x") + field(2, field(1, field(1, 77))))), "data type 77"),
    "long name": (model(field(1, field(4, "x" * (2 << 20)))), "a text of"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_file_is_named(tmp_path: Path, case: str) -> None:
    raw, says = HOSTILE[case]
    path = tmp_path / "bad.onnx"
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint, match=says) as e:
        open_onnx(path)
    assert "bad.onnx" in str(e.value)
    assert len(str(e.value)) < 1000


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(CorruptCheckpoint, match="cannot read"):
            open_onnx(path)


LOCATIONS: dict[str, str] = {
    "../secret": "points outside",
    "a/../../secret": "points outside",
    "/etc/passwd": "points outside",
    "..\\secret": "points outside",
    "C:\\secret": "points outside",
    "a\0b": "points outside",
    "*/_ORT_MEM_ADDR_/*": "missing",  # onnxruntime's own mark for a pointer into memory
    "absent": "missing",
    "folder": "missing",
    "link": "leads outside",
    "linked/secret": "leads outside",
    "x" * 5000: "cannot read|missing",
}


@pytest.mark.parametrize("location", LOCATIONS)
def test_external_data_stays_in_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "m"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(99))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "m.onnx").write_bytes(model(tensor(rest=outside(location=location))))
    file = open_onnx(folder / "m.onnx")
    with pytest.raises(CorruptCheckpoint, match=LOCATIONS[location]):
        file.check()
    with pytest.raises(CorruptCheckpoint):
        file.values(file.initializers["w"])


def test_external_data_in_the_folder_is_read(tmp_path: Path) -> None:
    data = np.arange(40, dtype=np.float32)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d").write_bytes(data.tobytes())
    right = hashlib.sha1((tmp_path / "sub" / "d").read_bytes()).hexdigest()
    path = tmp_path / "m.onnx"
    path.write_bytes(model(tensor(rest=outside(location="sub/d", offset="8", length="24", checksum=right))))
    file = open_onnx(path)
    file.check()
    assert file.external_files() == {"sub/d": tmp_path / "sub" / "d"}
    np.testing.assert_array_equal(file.values(file.initializers["w"]), data[2:8].reshape(2, 3))
    path.write_bytes(model(tensor(rest=outside(location="sub/d", checksum="0" * 40))))
    with pytest.raises(CorruptCheckpoint, match="checksum"):
        open_onnx(path).check()
    path.write_bytes(model(tensor(rest=outside(location="sub/d", offset="137"))))
    with pytest.raises(CorruptCheckpoint, match="ends at byte 161 of sub/d, which ends at 160"):
        open_onnx(path).check()
    with pytest.raises(CorruptCheckpoint, match="ends inside tensor 'w'"):
        open_onnx(path).read(open_onnx(path).initializers["w"])


def test_a_link_into_the_blobs_of_a_hub_cache_is_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "1"
    for folder in (snapshot, repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "blobs" / "f00d").write_bytes(bytes(24))
    (snapshot / "d").symlink_to("../../blobs/f00d")
    (snapshot / "m.onnx").write_bytes(model(tensor(rest=outside(location="d"))))
    open_onnx(snapshot / "m.onnx").check()


def test_weights_inside_the_file_are_stepped_over(tmp_path: Path) -> None:
    """A sparse file of 6 GiB: reading it would take its time, and mapping it its memory."""
    path = tmp_path / "m.onnx"
    size = 6 << 30
    head = field(1, size // 4) + field(2, 1) + field(8, "big") + varint(9 << 3 | 2) + varint(size)
    start = varint(5 << 3 | 2) + varint(len(head) + size)
    outer = field(1, 10) + varint(7 << 3 | 2) + varint(len(start) + len(head) + size)
    with path.open("wb") as f:
        f.write(outer + start + head)
        f.truncate(len(outer + start + head) + size)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    file = open_onnx(path)
    assert time.monotonic() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert file.initializers["big"].nbytes == size
    os.truncate(path, size)
    with pytest.raises(CorruptCheckpoint, match="a field of"):
        open_onnx(path)


BOMBS: dict[str, Callable[[], bytes]] = {
    "nodes": lambda: field(1, field(4, "A")) * 2_000_000,
    "empty nodes": lambda: b"\x0a\x00" * 3_000_000,
    "numbers": lambda: field(1, field(4, "A") + field(5, field(1, "a") + field(20, 7) + field(8, b"\1" * 40_000_000))),
    "unknown fields": lambda: b"\x78\x01" * 10_000_000,
    "axes": lambda: field(5, field(1, b"\1" * 30_000_000) + field(2, 1) + field(8, "w")),
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_time_and_memory_are_bounded(tmp_path: Path, bomb: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model(BOMBS[bomb]()))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CorruptCheckpoint, match=r"real graph|more than|too many"):
        open_onnx(path)
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "m.onnx"
    onnx.save(everything(), str(path))
    return path


def test_every_cut_is_noticed(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    path = tmp_path / "cut.onnx"
    graph_ends = len(data) - 200  # behind the graph come functions and properties: a cut between two may go unseen
    for size in range(0, graph_ends, 7):
        path.write_bytes(data[:size])
        with pytest.raises(CorruptCheckpoint, match=r"cut\.onnx"):
            open_onnx(path)


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("fuzz") / "m.onnx"


@settings(max_examples=1500, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_mutation_escapes(whole: Path, scratch: Path, data: st.DataObject) -> None:
    raw = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "drop", "insert", "copy"]))
        if how == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del raw[at + 1 :]
        elif how == "drop":
            del raw[at : at + data.draw(st.integers(1, 9))]
        elif how == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=12))
        else:
            raw[at:at] = raw[at : at + data.draw(st.integers(1, 300))]
        raw = raw or bytearray(b"\0")
    scratch.write_bytes(raw)
    try:
        file = open_onnx(scratch)
        file.check()
        for t in file.tensors:
            if t.dtype not in ("string", "float6e2m3", "float6e3m2"):
                assert file.values(t).shape == t.shape
    except CorruptCheckpoint as e:
        assert "m.onnx" in str(e)


# --- what the runtime takes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ir", "opset", "says"), [(10, 99, "of opset 99"), (77, 21, "of IR version 77")])
def test_a_model_too_new_is_named(tmp_path: Path, ir: int, opset: int, says: str) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "new.onnx"
    path.write_bytes(model(ir=ir, opset=opset))
    with pytest.raises(UnsupportedModel, match=says) as e:
        require_runnable(open_onnx(path))
    assert "pip install -U onnxruntime" in e.value.hint
    assert isinstance(e.value, EdgekitError)
    path.write_bytes(model(ir=10, opset=21))
    require_runnable(open_onnx(path))


def test_the_type_table_is_onnxs() -> None:
    known = {n: T.DataType.Name(n).lower() for n in T.DataType.values() if n}
    ours = {n: {"float32": "float", "float64": "double"}.get(name, name) for n, (name, _) in DTYPES.items()}
    assert ours == known
    for number, (name, bits) in DTYPES.items():
        if bits >= 8:
            assert helper.tensor_dtype_to_np_dtype(number).itemsize * 8 == bits, name
