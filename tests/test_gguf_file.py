"""The GGUF container against gguf-py (reader and writer), against the runtime, and against files made to hurt."""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgekit.errors import CorruptCheckpoint, EdgekitError, UnsupportedModel
from edgekit.gguf_file import TYPES, MetaValue, Typed, encode_header, open_gguf
from tests.gguf_models import noise_gguf

# name, shape, ggml_type, bytes
TENSORS: list[tuple[str, tuple[int, ...], int, int]] = [
    ("a.weight", (3, 5), 0, 60),
    ("b.weight", (2, 64), 8, 2 * 2 * 34),
    ("c.bias", (7,), 1, 14),
    ("d.experts", (2, 3, 256), 12, 6 * 144),
]
METADATA: dict[str, MetaValue] = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.uint": 4_000_000_000,
    "a.float": 1e-5,
    "a.text": "naïve ☕",
    "a.ints": [1, -2, 3],
    "a.floats": [0.5, -1.0, 2.0],
    "a.bools": [True, False],
    "a.texts": ["", "x", "▁the"],
}
EVERY_KIND: dict[str, MetaValue] = {
    "uint8": Typed("uint8", 255),
    "int8": Typed("int8", -128),
    "uint16": Typed("uint16", 65535),
    "int16": Typed("int16", -32768),
    "int32": Typed("int32", -1),
    "uint64": Typed("uint64", 2**64 - 1),
    "int64": Typed("int64", -(2**63)),
    "float64": Typed("float64", 0.1),
    "bytes": b"\xff\xfe not text",
    "no texts": Typed("array:string", []),
    "uint8s": Typed("array:uint8", [0, 255]),
    "uint32s": Typed("array:uint32", [2**32 - 1]),
    "int64s": Typed("array:int64", [-1, 2**40]),
    "float64s": Typed("array:float64", [0.1]),
    "mixed": ["text", b"\xff"],
}


def write(path: Path, metadata: dict[str, MetaValue] = METADATA, alignment: int = 32) -> dict[str, bytes]:
    """A file of METADATA and TENSORS by encode_header; the bytes of each tensor."""
    header = encode_header(metadata, TENSORS, alignment)
    rng = random.Random(1)
    data = {name: rng.randbytes(nbytes) for name, _, _, nbytes in TENSORS}
    out = bytearray(header.file_size)
    out[: len(header.bytes)] = header.bytes
    for (name, _, _, nbytes), offset in zip(TENSORS, header.offsets, strict=True):
        out[offset : offset + nbytes] = data[name]
    path.write_bytes(out)
    return data


@pytest.mark.parametrize("alignment", [32, 64])
def test_same_bytes_as_gguf_py(tmp_path: Path, alignment: int) -> None:
    data = write(tmp_path / "ours.gguf", alignment=alignment)
    w = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    w.add_bool("a.bool", True)
    w.add_uint32("a.uint", 4_000_000_000)
    w.add_float32("a.float", 1e-5)
    w.add_string("a.text", "naïve ☕")
    for key in ("a.ints", "a.floats", "a.bools", "a.texts"):
        w.add_array(key, METADATA[key])
    if alignment != 32:
        w.add_custom_alignment(alignment)
    for name, shape, code, _ in TENSORS:
        raw = np.frombuffer(data[name], np.uint8)
        kind = gguf.GGMLQuantizationType(code)
        plain = {0: np.float32, 1: np.float16}.get(code)
        array = raw.view(plain).reshape(shape) if plain else raw.reshape(*shape[:-1], -1)
        w.add_tensor(name, array, raw_dtype=None if plain else kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    data = write(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for key, value in METADATA.items():
        read = reader.fields[key].contents()
        assert read == (pytest.approx(value) if key in {"a.float"} else value)
    for tensor, (name, shape, code, nbytes) in zip(reader.tensors, TENSORS, strict=True):
        assert (tensor.name, tuple(reversed(tensor.shape.tolist())), tensor.tensor_type) == (name, shape, code)
        assert tensor.n_bytes == nbytes
        assert tensor.data.tobytes() == data[name]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    metadata = METADATA | EVERY_KIND
    data = write(tmp_path / "m.gguf", metadata)
    file = open_gguf(tmp_path / "m.gguf")
    assert file.version == 3
    assert file.metadata.pop("a.float") == np.float32(1e-5)
    assert file.metadata == {k: v for k, v in metadata.items() if k != "a.float"}
    assert {type(v) for v in file.metadata["a.bools"]} == {bool}  # type: ignore[union-attr]
    assert file.get("uint64") == 2**64 - 1
    assert file.get("absent", 7) == 7
    raw = (tmp_path / "m.gguf").read_bytes()
    for name, shape, code, nbytes in TENSORS:
        t = file.tensors[name]
        assert (t.shape, t.code, t.nbytes, t.type) == (shape, code, nbytes, TYPES[code][0])
        assert raw[t.offset : t.offset + nbytes] == data[name]
        assert t.offset % 32 == 0


def test_metadata_of_one_file_goes_unchanged_into_another(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", METADATA | EVERY_KIND, alignment=128)
    file = open_gguf(tmp_path / "m.gguf")
    tensors = [(t.name, t.shape, t.code, t.nbytes) for t in file.tensors.values()]
    again = encode_header(file.metadata, tensors)
    raw = (tmp_path / "m.gguf").read_bytes()
    assert file.alignment == 128
    assert raw.startswith(again.bytes)
    assert again.file_size == len(raw)


def test_runtime_loads_a_vocabulary_that_went_through(tmp_path: Path) -> None:
    import llama_cpp

    noise_gguf(tmp_path / "theirs.gguf")
    file = open_gguf(tmp_path / "theirs.gguf")
    header = encode_header(file.metadata, [])
    (tmp_path / "ours.gguf").write_bytes(header.bytes)
    assert header.file_size == len(header.bytes)
    text = b"the cat \xe6\x97\xa5 sat"
    ids = []
    for name in ("theirs.gguf", "ours.gguf"):
        model = llama_cpp.Llama(str(tmp_path / name), vocab_only=True, verbose=False)
        ids.append(model.tokenize(text))
        model.close()
    assert len(ids[0]) > 5
    assert ids[0] == ids[1]


def test_type_table_is_ggmls() -> None:
    import llama_cpp

    ggml = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    for code, (name, block, size) in TYPES.items():
        assert (ggml.ggml_blck_size(code), ggml.ggml_type_size(code)) == (block, size), name
    newer_than_gguf_py = {42}  # Q2_0
    known = {c: n for c, (n, _, _) in TYPES.items() if c not in newer_than_gguf_py}
    assert {q.value: q.name for q in gguf.GGMLQuantizationType if q.value not in newer_than_gguf_py} == known


@pytest.mark.parametrize(
    ("metadata", "tensors", "says"),
    [
        ({"k": -1}, [], "k: -1 does not fit uint32"),
        ({"k": [1, 2**31]}, [], "does not fit array:int32"),
        ({"k": 1e39}, [], "does not fit float32"),
        ({"general.alignment": 24}, [], "power of two"),
        ({}, [("x" * 64, (1,), 0, 4)], "64 bytes"),
        ({}, [("x", (1,), 0, 4), ("x", (1,), 0, 4)], "two tensors"),
        ({}, [("x", (), 0, 4)], "cannot be stored"),
        ({}, [("x", (0, 4), 0, 0)], "cannot be stored"),
        ({}, [("x", (1, 1, 1, 1, 1), 0, 4)], "cannot be stored"),
    ],
)
def test_what_cannot_be_written_is_refused(metadata: dict[str, Any], tensors: list[Any], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        encode_header(metadata, tensors)


# --- files made to hurt --------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def info(name: str, dims: tuple[int, ...], code: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def container(
    pairs: list[bytes] = [],  # noqa: B006
    infos: list[bytes] = [],  # noqa: B006
    *,
    data: int = 4096,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    n_infos, n_pairs = counts or (len(infos), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_infos, n_pairs) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32 + data)


U32 = struct.pack("<I", 1)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the magic ends at byte 4"),
    "another file": (container(magic=b"PK\x03\x04"), "not a GGUF file"),
    "ggjt": (container(magic=b"tjgg"), "not a GGUF file"),
    "many tensors": (container(counts=(2**60, 0)), "cannot lie in"),
    "many keys": (container(counts=(0, 2**63)), "cannot lie in"),
    "empty key": (container([pair("", 4, U32)]), "key 0"),
    "binary key": (container([pair(b"\xff", 4, U32)]), "key 0"),
    "key twice": (container([pair("k", 4, U32), pair("k", 4, U32)]), "key k appears twice"),
    "long key": (container([struct.pack("<Q", 2**40) + b"k"]), "key 0 ends at byte"),
    "key of 2**64-1": (container([struct.pack("<Q", 2**64 - 1) + b"k"]), "key 0 ends at byte"),
    "unknown kind": (container([pair("k", 13, U32)]), "value of k has type 13"),
    "nested array": (container([pair("k", 9, struct.pack("<IQ", 9, 1) + bytes(64))]), "array of arrays"),
    "array of unknown": (container([pair("k", 9, struct.pack("<IQ", 99, 1))]), "value of k has type 99"),
    "endless array": (container([pair("k", 9, struct.pack("<IQ", 5, 2**62))]), "value of k ends"),
    "endless strings": (container([pair("k", 9, struct.pack("<IQ", 8, 2**62))]), "value of k ends"),
    "long string": (container([pair("k", 8, struct.pack("<Q", 1 << 50))]), "value of k ends"),
    "alignment 0": (container([pair("general.alignment", 4, bytes(4))]), "general.alignment"),
    "alignment 48": (container([pair("general.alignment", 4, struct.pack("<I", 48))]), "general.alignment"),
    "alignment as u64": (container([pair("general.alignment", 10, struct.pack("<Q", 32))]), "general.alignment"),
    "tensor twice": (container([], [info("t", (8,), 0, 0), info("t", (8,), 0, 32)]), "tensor t appears twice"),
    "overlap": (container([], [info("t", (16,), 0, 0), info("u", (8,), 0, 32)]), "tensor u lies at 32"),
    "gap": (container([], [info("t", (8,), 0, 0), info("u", (8,), 0, 64)]), "tensor u lies at 64"),
    "beyond the end": (container([], [info("t", (2000,), 0, 0)]), "tensor t ends at byte"),
    "no axes": (container([], [info("t", (), 0, 0)]), "0 axes"),
    "five axes": (container([], [info("t", (1,) * 5, 0, 0)]), "5 axes"),
    "endless axes": (container([], [text("t") + struct.pack("<I", 2**32 - 1)]), "4294967295 axes"),
    "zero axis": (container([], [info("t", (4, 0), 0, 0)]), "impossible shape"),
    "overflow": (container([], [info("t", (2**32, 2**32), 0, 0)]), "impossible shape"),
    "broken block": (container([], [info("t", (33,), 8, 0)]), "do not divide"),
    "long name": (container([], [info("t" * 64, (8,), 0, 0)]), "1 to 63 bytes"),
    "no name": (container([], [info("", (8,), 0, 0)]), "1 to 63 bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_file_is_named(tmp_path: Path, case: str) -> None:
    raw, says = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint, match=says) as e:
        open_gguf(path)
    assert "bad.gguf" in str(e.value)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (container(version=1), "version 1"),
        (container(version=4), "version 4"),
        (container(version=0x03000000), "big-endian"),
        (container([], [info("t", (8,), 4, 0)]), "tensor t has ggml type 4"),
        (container([], [info("t", (8,), 2**32 - 1, 0)]), "tensor t has ggml type"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "new.gguf"
    path.write_bytes(raw)
    with pytest.raises(UnsupportedModel, match=says):
        open_gguf(path)


def test_version_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.gguf").write_bytes(container([pair("k", 4, U32)], [info("t", (4, 2), 0, 0)], version=2))
    file = open_gguf(tmp_path / "old.gguf")
    assert file.version == 2
    assert file.metadata == {"k": 1}
    assert file.tensors["t"].shape == (2, 4)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(CorruptCheckpoint, match="cannot read"):
            open_gguf(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, METADATA | EVERY_KIND)
    last = TENSORS[-1]
    end = open_gguf(path).tensors[last[0]].offset + last[3]
    for size in range(end - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises(CorruptCheckpoint, match=r"m\.gguf"):
            open_gguf(path)


def test_no_flipped_byte_escapes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, METADATA | EVERY_KIND)
    whole = path.read_bytes()
    header = open_gguf(path).data_start
    rng = random.Random(5)
    refused = 0
    with path.open("r+b", buffering=0) as f:
        for _ in range(3000):
            at = rng.randrange(header)
            os.pwrite(f.fileno(), bytes([rng.randrange(256)]), at)
            try:
                file = open_gguf(path)
            except EdgekitError:
                refused += 1
            else:
                assert all(t.offset + t.nbytes <= len(whole) and prod(t.shape) > 0 for t in file.tensors.values())
            os.pwrite(f.fileno(), whole[at : at + 1], at)
    assert refused > 300


def test_strings_across_reads_of_the_file(tmp_path: Path) -> None:
    """Tokens longer and shorter than the reader's steps: each arrives whole."""
    rng = random.Random(3)
    pick: Callable[[], int] = lambda: rng.choice([0, 1, 7, 8, 9, 3000, 270_000])  # noqa: E731
    tokens = ["é" * pick() for _ in range(200)]
    header = encode_header({"tokens": tokens, "after": 1}, [])
    (tmp_path / "v.gguf").write_bytes(header.bytes)
    file = open_gguf(tmp_path / "v.gguf")
    assert file.metadata == {"tokens": tokens, "after": 1}
    for pad in range(64):  # every way in which a length and a string can lie across the reader's first step, 256 KiB
        tokens = ["x" * ((1 << 18) - 150 + pad), *("abcdefghijklm"[:n] for n in range(14)), "y" * 4000]
        (tmp_path / "v.gguf").write_bytes(encode_header({"tokens": tokens}, []).bytes)
        assert open_gguf(tmp_path / "v.gguf").metadata == {"tokens": tokens}
