"""Importance matrix files: llama.cpp's two formats, and damage."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgekit.errors import CorruptCheckpoint, EdgekitError
from edgekit.imatrix_file import Imatrix, open_imatrix, write_imatrix

SUMS = np.array([[1.0, 4.0, 9.0, 16.0]], np.float32)
EXPERTS = np.arange(8, dtype=np.float32).reshape(2, 4)


def example() -> Imatrix:
    return Imatrix(
        {"blk.0.attn_q.weight": SUMS, "blk.0.ffn_up_exps.weight": EXPERTS},
        {
            "blk.0.attn_q.weight": np.array([2.0], np.float32),
            "blk.0.ffn_up_exps.weight": np.array([2.0, 0.0], np.float32),
        },
        ("a.txt",),
        3,
        512,
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", example())
    found = open_imatrix(tmp_path / "i.gguf")
    assert (found.datasets, found.chunks, found.chunk_size) == (("a.txt",), 3, 512)
    importance = found.importance()
    np.testing.assert_array_equal(importance["blk.0.attn_q.weight"], SUMS[0] / 2)
    np.testing.assert_array_equal(importance["blk.0.ffn_up_exps.weight"], [EXPERTS[0] / 2, np.ones(4)])


def test_gguf_py_reads_what_llama_quantize_expects(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", example())
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    tensors = {t.name: t.data.copy() for t in reader.tensors}
    assert set(tensors) == {f"{n}{s}" for n in example().sums for s in (".in_sum2", ".counts")}
    np.testing.assert_array_equal(tensors["blk.0.ffn_up_exps.weight.in_sum2"], EXPERTS)
    assert tensors["blk.0.ffn_up_exps.weight.counts"].shape == (2, 1)
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    del tensors, reader


def dat(
    values: bytes = struct.pack("<4f", 2, 4, 6, 8), name: bytes = b"blk.0.attn_q.weight", entries: int = 1
) -> bytes:
    head = struct.pack("<ii", entries, len(name)) + name + struct.pack("<ii", 2, len(values) // 4)
    return head + values + struct.pack("<ii", 7, 5) + b"b.txt"


def test_the_older_format_is_read(tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(dat())
    found = open_imatrix(tmp_path / "i.dat")
    assert (found.chunks, found.datasets) == (7, ("b.txt",))
    np.testing.assert_array_equal(found.importance()["blk.0.attn_q.weight"], [1, 2, 3, 4])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        dat()[:30],
        dat(entries=2),
        dat(entries=-1),
        dat(entries=1 << 30),
        dat(values=struct.pack("<4f", 1, 2, 3, float("nan"))),
        dat(values=struct.pack("<4f", 1, 2, 3, -1)),
        struct.pack("<ii", 1, 1 << 30),
    ],
)
def test_damage_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"i\.dat"):
        open_imatrix(tmp_path / "i.dat")


def test_a_matrix_of_another_model_is_refused() -> None:
    imatrix = example()
    with pytest.raises(EdgekitError, match=r"ffn_up_exps.*does not have"):
        imatrix.require({"blk.0.attn_q.weight": (1, 4)})
    with pytest.raises(EdgekitError, match=r"attn_q.*4 columns.*8 columns"):
        imatrix.require({"blk.0.attn_q.weight": (1, 8), "blk.0.ffn_up_exps.weight": (2, 4)})
    widths = {"blk.0.attn_q.weight": (1, 4), "blk.0.ffn_up_exps.weight": (2, 4), "blk.0.attn_k.weight": (1, 4)}
    imatrix.require(widths)
    assert imatrix.missing(widths) == ["blk.0.attn_k.weight"]


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.zeros((2, 4), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(EdgekitError, match="no importance matrix"):
        open_imatrix(tmp_path / "m.gguf")
