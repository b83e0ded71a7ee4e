"""Checkpoints through open_checkpoint: against torch and gguf-py, from a stand-in hub, and files made to hurt."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.errors import CorruptCheckpoint, EdgekitError, UnknownName, UnsupportedModel
from tests.hub_server import COMMIT, TOKEN, Hub, serve

Raw = dict[str, tuple[str, tuple[int, ...], bytes]]
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def pack(tensors: Raw) -> bytes:
    """A safetensors file of raw tensors: (dtype, shape, bytes) by name."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    return frame(json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def frame(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def f32(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


A: Raw = {"a": ("F32", (2, 2), f32(1, 2, 3, 4))}
B: Raw = {"b": ("F32", (3,), f32(5, 6, 7))}


def folder(root: Path, weights: bytes | None = None, config: Any = LLAMA, **files: bytes) -> Path:
    """A model folder; `files` by name with `__` for `.`."""
    root.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (root / "config.json").write_text(json.dumps(config))
    if weights is not None:
        (root / "model.safetensors").write_bytes(weights)
    for name, data in files.items():
        (root / name.replace("__", ".")).write_bytes(data)
    return root


def sharded(root: Path, shards: dict[str, Raw], weight_map: dict[str, str] | None = None) -> Path:
    folder(root)
    for file, tensors in shards.items():
        (root / file).write_bytes(pack(tensors))
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return root


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# --- reading -------------------------------------------------------------------------------------------------------


def test_every_dtype_reads_as_torch_reads_it(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    tensors = {
        "e4m3": codes.view(torch.float8_e4m3fn),
        "e5m2": codes.view(torch.float8_e5m2),
        "bf16": bits.view(torch.bfloat16),
        "f16": bits.view(torch.float16),
        "f32": torch.randn(300, 7),
        "f64": torch.randn(5, dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        **{str(d): torch.tensor([-3, 0, 100]).to(d) for d in (torch.int8, torch.int16, torch.int32, torch.int64)},
        "u8": codes,
        "long": torch.randn(3, 300_000).to(torch.bfloat16),  # more than is converted at a time
    }
    save_file({k: t.clone() for k, t in tensors.items()}, folder(tmp_path / "m") / "model.safetensors")
    opened = open_checkpoint(tmp_path / "m")
    assert opened.tensors.keys() == tensors.keys()
    for name, t in tensors.items():
        ref = opened.tensors[name]
        ours = ref.load()
        assert (ref.shape, ref.nbytes) == (tuple(t.shape), t.numel() * t.element_size())
        assert ours.dtype == np.float32
        assert ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, t.to(torch.float32).numpy())


def test_rows_are_slices_of_the_whole(tmp_path: Path) -> None:
    t = torch.randn(2, 3, 5).to(torch.bfloat16)
    save_file({"t": t, "v": torch.randn(4)}, folder(tmp_path / "m") / "model.safetensors")
    ref = open_checkpoint(tmp_path / "m").tensors["t"]
    whole = t.float().numpy().reshape(-1, 5)
    for start in range(7):
        for stop in range(start, 7):
            np.testing.assert_array_equal(ref.rows(start, stop), whole[start:stop])
    for start, stop in [(-1, 2), (0, 7), (3, 2)]:
        with pytest.raises(IndexError, match="t: rows"):
            ref.rows(start, stop)
    assert open_checkpoint(tmp_path / "m").tensors["v"].rows(0, 1).shape == (1, 4)


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    raw: Raw = {"s": ("F16", (), b"\x00\x3c"), "e": ("F32", (0, 4), b""), "z": ("BF16", (3, 0), b""), "t": A["a"]}
    opened = open_checkpoint(folder(tmp_path / "m", pack(raw)))
    assert opened.tensors["s"].load() == np.float32(1)
    assert opened.tensors["s"].load().shape == ()
    assert opened.tensors["s"].rows(0, 1).shape == (1, 1)
    assert opened.tensors["e"].load().shape == (0, 4)
    assert opened.tensors["z"].load().shape == (3, 0)
    assert opened.parameters == 5


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    """A tensor of 256 GiB in a sparse file: reading more than two rows of it would not end well."""
    shape = (1 << 20, 1 << 17)
    header = json.dumps({"t": {"dtype": "F16", "shape": shape, "data_offsets": [0, 2 << 37]}}).encode()
    path = folder(tmp_path / "m") / "model.safetensors"
    path.write_bytes(frame(header))
    os.truncate(path, 8 + len(header) + (2 << 37))
    opened = open_checkpoint(tmp_path / "m")
    assert opened.parameters == 1 << 37
    assert not opened.tensors["t"].rows(shape[0] - 2, shape[0]).any()


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    opened = open_checkpoint(sharded(tmp_path / "m", {ONE: A, TWO: B}))
    assert list(opened.tensors) == ["a", "b"]
    assert opened.tensors["b"].load().tolist() == [5, 6, 7]
    assert (opened.kind, opened.dtype, opened.parameters, opened.config) == ("safetensors", "F32", 7, LLAMA)


def test_shards_without_an_index(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m", {ONE: A, TWO: B})
    (root / "model.safetensors.index.json").unlink()
    assert list(open_checkpoint(root).tensors) == ["a", "b"]
    (root / TWO).unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{TWO} is missing"):
        open_checkpoint(root)


def test_seventy_billion_parameters_open_by_headers(tmp_path: Path) -> None:
    root = llama_70b(tmp_path / "Llama-70B")
    opened = open_checkpoint(root)
    assert opened.parameters == 70_553_706_496
    assert len(opened.tensors) == 723
    assert opened.dtype == "BF16"
    assert len(opened.digest) == 64


def llama_70b(root: Path, shards: int = 30) -> Path:
    """Headers as of a Llama 3 70B; the files are holes."""
    h, kv, ffn, vocab = 8192, 1024, 28672, 128256
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h)}
    for i in range(80):
        at = f"model.layers.{i}."
        tensors |= {f"{at}self_attn.{x}_proj.weight": (n, h) for x, n in (("q", h), ("k", kv), ("v", kv), ("o", h))}
        tensors |= {f"{at}mlp.{x}_proj.weight": (ffn, h) for x in ("gate", "up")}
        tensors |= {f"{at}mlp.down_proj.weight": (h, ffn)}
        tensors |= {f"{at}{x}_layernorm.weight": (h,) for x in ("input", "post_attention")}
    tensors |= {"model.norm.weight": (h,), "lm_head.weight": (vocab, h)}
    folder(root)
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header, at = {}, 0
        for name in names[shard::shards]:
            size = 2 * int(np.prod(tensors[name]))
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [at, at + size]}
            weight_map[name], at = file, at + size
        raw = frame(json.dumps(header).encode())
        (root / file).write_bytes(raw)
        os.truncate(root / file, len(raw) + at)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return root


def test_real_models(test_data: Path) -> None:
    from safetensors.torch import load_file

    for name, parameters in (("lab-7m", 7_344_384), ("stories260K", 260_032)):
        opened = open_checkpoint(test_data / "models" / name)
        assert opened.parameters == parameters
        assert opened.name == name
        for key, t in load_file(test_data / "models" / name / "model.safetensors").items():
            np.testing.assert_array_equal(opened.tensors[key].load(), t.float().numpy())


# --- damage --------------------------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes: Any) -> bytes:
    return json.dumps({"t": ENTRY | changes}).encode()


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "header needs"),
    "short file": (b"\x01\x00", "header needs"),
    "header beyond the end": (struct.pack("<Q", 999) + b"{}", "header needs 1007 bytes, the file has 10"),
    "header of 2**63": (struct.pack("<Q", 1 << 63) + b"{}", "header needs"),
    "not JSON": (frame(b"{nope"), "not JSON"),
    "not text": (frame(b"\xff\xfe\xff"), "not JSON"),
    "too deep": (frame(b'{"t":' + b"[" * 100_000), "not JSON"),
    "a list": (frame(b"[1]"), "JSON list"),
    "name twice": (frame(b'{"t":1,"u":2,"t":3}'), "'t' twice"),
    "not an entry": (frame(b'{"t":[]}'), "tensor t: the entry"),
    "a key too many": (frame(entry(more=1), bytes(8)), "tensor t: the entry"),
    "negative shape": (frame(entry(shape=[-2]), bytes(8)), "tensor t: shape"),
    "shape of floats": (frame(entry(shape=[2.0]), bytes(8)), "tensor t: shape"),
    "shape of bools": (frame(entry(shape=[True, 2]), bytes(8)), "tensor t: shape"),
    "offsets backwards": (frame(entry(data_offsets=[8, 0]), bytes(8)), "tensor t: .* takes 8 bytes"),
    "three offsets": (frame(entry(data_offsets=[0, 8, 8]), bytes(8)), "tensor t: shape"),
    "wrong length": (frame(entry(shape=[3]), bytes(8)), r"tensor t: \[3\] of F32 takes 12 bytes"),
    "enormous shape": (frame(entry(shape=[2**62, 2**62]), bytes(8)), "tensor t"),
    "truncated": (frame(entry(), bytes(7)), "tensor t ends at byte"),
    "trailing bytes": (frame(entry(), bytes(9)), "1 bytes follow"),
    "gap": (frame(entry(data_offsets=[4, 12]), bytes(12)), "tensor t leaves a gap"),
    "overlap": (
        frame(json.dumps({"t": ENTRY, "u": ENTRY | {"data_offsets": [4, 12]}}).encode(), bytes(12)),
        "tensor u overlaps",
    ),
    "no tensors": (frame(b"{}"), "no tensor"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_safetensors_are_named(tmp_path: Path, case: str) -> None:
    raw, says = HEADERS[case]
    with pytest.raises(CorruptCheckpoint, match=says) as e:
        open_checkpoint(folder(tmp_path / "m", raw))
    assert case == "no tensors" or "model.safetensors" in str(e.value)


def test_oversized_header_is_refused_unread(tmp_path: Path) -> None:
    path = folder(tmp_path / "m") / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 34))
    os.truncate(path, 1 << 35)
    with pytest.raises(CorruptCheckpoint, match="17179869184 bytes"):
        open_checkpoint(tmp_path / "m")


def test_unknown_dtype_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="tensor t has dtype 'F4'"):
        open_checkpoint(folder(tmp_path / "m", frame(entry(dtype="F4"), bytes(8))))


@pytest.mark.parametrize(
    ("shards", "weight_map", "says"),
    [
        ({ONE: A, TWO: B}, {"a": ONE, "b": TWO, "c": TWO}, f"{TWO} has no tensor c"),
        ({ONE: A, TWO: B}, {"a": ONE, "b": ONE}, f"{ONE} has no tensor b"),
        ({ONE: A, TWO: B | {"x": A["a"]}}, {"a": ONE, "b": TWO}, f"{TWO}: tensor x is not in the index"),
        ({ONE: A, TWO: B | A}, {"a": ONE, "b": TWO}, f"{TWO}: tensor a is also in {ONE}"),
        ({ONE: A, TWO: B}, {"a": TWO, "b": ONE}, f"tensor a is in {ONE}, the index says {TWO}"),
        ({ONE: A}, {"a": ONE, "b": TWO}, f"{TWO} is missing"),
        ({ONE: A}, {"a": f"../m/{ONE}"}, "points outside"),
        ({ONE: A}, {"a": "/etc/passwd"}, "points outside"),
        ({ONE: A}, {"a": 3}, "weight_map is not"),
        ({ONE: A}, {"a": "x\0y"}, "points outside"),
    ],
)
def test_index_and_shards_that_disagree(
    tmp_path: Path, shards: dict[str, Raw], weight_map: dict[str, str], says: str
) -> None:
    with pytest.raises(CorruptCheckpoint, match=says):
        open_checkpoint(sharded(tmp_path / "m", shards, weight_map))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_links_may_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path / "m", pack(A), README__md=b"---\nlicense: mit\n---\n")
    shutil.move(root / name, tmp_path / "secret")
    (root / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptCheckpoint, match=f"{name} is a link that leads outside"):
        open_checkpoint(root)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--Name-1B"
    source = folder(tmp_path / "m", pack(A))
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    shared = tmp_path / "hub" / "blobs" / "ab"  # a store that the repositories of one cache share
    shared.mkdir(parents=True)
    for i, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(source / name, shared / f"{i}")
        (cache / "blobs" / f"e{i}").symlink_to(Path("../../blobs/ab") / f"{i}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"e{i}")
    opened = open_checkpoint(snapshot)
    assert (opened.name, opened.revision) == ("Name-1B", COMMIT)
    assert opened.tensors["a"].load().tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("change", ["cut", "grow", "gone", "touched"])
def test_a_file_that_changes_after_opening(tmp_path: Path, change: str) -> None:
    root = folder(tmp_path / "m", pack(A))
    ref = open_checkpoint(root).tensors["a"]
    path = root / "model.safetensors"
    size = path.stat().st_size
    if change == "gone":
        path.unlink()
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        os.truncate(path, size - 4 if change == "cut" else size + 4)
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors.*tensor a"):
        ref.load()


def test_a_file_cut_while_it_is_read(tmp_path: Path) -> None:
    """Size and time look right, the bytes do not come: an error, where a mapped file would have killed the process."""
    root = folder(tmp_path / "m", pack(A))
    ref = open_checkpoint(root).tensors["a"]
    os.truncate(root / "model.safetensors", 20)
    stat = (root / "model.safetensors").stat()
    object.__setattr__(ref, "stamp", (20, stat.st_mtime_ns))
    with pytest.raises(CorruptCheckpoint, match="tensor a is not safe to read"):
        ref.load()


@pytest.mark.parametrize(
    ("raw", "says"),
    [(b"{nope", "not JSON"), (b"[]", "JSON list"), (b'{"a":' + b"[" * 100_000, "not JSON"), (b"\xff", "not JSON")],
)
def test_damaged_config(tmp_path: Path, raw: bytes, says: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=rf"config\.json.*{says}"):
        open_checkpoint(folder(tmp_path / "m", pack(A), config=None, config__json=raw))


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    root = folder(tmp_path / "m", pack(A))
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(CorruptCheckpoint, match="not a file"):
        open_checkpoint(tmp_path / "x.gguf")
    (root / "model.safetensors").unlink()
    os.mkfifo(root / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors is missing"):
        open_checkpoint(root)


# --- what is not converted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "says", "hint"),
    [
        ({"config__json": b"{}", "pytorch_model__bin": b""}, "only pickles", "torch.load"),
        ({"consolidated__pth": b""}, "only pickles", "torch.load"),
        ({"model__safetensors": pack(A)}, "no config.json", "transformers"),
        ({"consolidated__safetensors": pack(A), "params__json": b"{}"}, "no config.json", "Mistral"),
        ({"config__json": b"{}"}, "no \\*.safetensors", "finished"),
        (
            {"adapter_config__json": b'{"base_model_name_or_path": "org/Base"}', "adapter_model__safetensors": b""},
            "LoRA adapter",
            "merge it into org/Base",
        ),
        ({"adapter_config__json": b"{}", "adapter_model__bin": b""}, "LoRA adapter", "merge_and_unload"),
        ({"x-Q4_K_M__gguf": b""}, "GGUF files", "x-Q4_K_M.gguf"),
    ],
)
def test_folders_that_are_something_else(tmp_path: Path, files: dict[str, bytes], says: str, hint: str) -> None:
    with pytest.raises(UnsupportedModel, match=says) as e:
        open_checkpoint(folder(tmp_path / "m", config=None, **files))
    assert hint in e.value.hint


@pytest.mark.slow
def test_pickle_hint_makes_a_checkpoint(tmp_path: Path) -> None:
    root = folder(tmp_path / "m")
    shared = torch.randn(4, 3)
    torch.save({"a": shared, "b": shared, "c": shared.T}, root / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel) as e:
        open_checkpoint(root)
    command = e.value.hint[e.value.hint.index("python -c") :].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=root, check=True)
    assert open_checkpoint(root).tensors["c"].load().tolist() == shared.T.tolist()


def test_training_leftovers_do_not_matter(tmp_path: Path) -> None:
    root = folder(tmp_path / "m", pack(A), training_args__bin=b"", optimizer__pt=b"", pytorch_model__bin=b"")
    assert list(open_checkpoint(root).tensors) == ["a"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"GPTQ \(4 bits\)"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes \(4 bits\)"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4}}},
            },
            r"compressed-tensors \(pack-quantized\)",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt"),
        ({"group_size": 64, "bits": 4}, "MLX"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"quant_method": "brand-new"}, "brand-new"),
    ],
)
def test_quantised_by_others(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    card = b"---\nbase_model:\n- org/Original-7B\n---\n"
    config: dict[str, Any] = {"quantization_config": settings}
    for place in (config, {"text_config": config}) if "quant_method" in settings else (config,):
        with pytest.raises(UnsupportedModel, match=f"already quantised: {says}") as e:
            open_checkpoint(folder(tmp_path / "m", pack(A), LLAMA | place, README__md=card))
        assert e.value.hint == "edgekit convert org/Original-7B"


# --- FP8 -----------------------------------------------------------------------------------------------------------

BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 64]}}


def eight(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("shape", "scale_shape", "suffix", "config"),
    [
        ((256, 128), (2, 2), "_scale_inv", BLOCKS),
        ((200, 100), (2, 2), "_scale_inv", BLOCKS),  # the last blocks are cut
        ((3, 200, 100), (3, 2, 2), "_scale_inv", BLOCKS),  # experts in one tensor
        ((200, 100), (), "_scale_inv", {"quantization_config": {"quant_method": "fp8"}}),
        ((200, 100), (1,), "_scale", {}),
        ((200, 100), (200, 1), "_scale", {"quantization_config": {"quant_method": "fbgemm_fp8"}}),
        ((200, 100), (200,), "_scale", {}),
        ((3, 20, 10), (3, 20, 1), "_scale", {}),
        ((3, 20, 10), (3, 1, 1), "_scale", {}),
        (
            (200, 100),
            (200, 1),
            "_scale",
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "float-quantized",
                    "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
                }
            },
        ),
        (
            (200, 100),
            (2, 2),
            "_scale",
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "float-quantized",
                    "config_groups": {
                        "group_0": {"weights": {"type": "float", "num_bits": 8, "block_structure": "128x64"}}
                    },
                }
            },
        ),
    ],
)
def test_fp8_is_multiplied_with_its_scales(
    tmp_path: Path, shape: tuple[int, ...], scale_shape: tuple[int, ...], suffix: str, config: dict[str, Any]
) -> None:
    weight = eight(*shape)
    scale = torch.rand(scale_shape) + 0.5
    tensors = {"w.weight": weight, f"w.weight{suffix}": scale, "w.input_scale": torch.ones(1), "n": torch.ones(3)}
    save_file(tensors, folder(tmp_path / "m", config=LLAMA | config) / "model.safetensors")
    opened = open_checkpoint(tmp_path / "m")
    assert list(opened.tensors) == ["n", "w.weight"] or set(opened.tensors) == {"n", "w.weight"}
    assert opened.parameters == weight.numel() + 3
    assert opened.dtype == "F8_E4M3"
    full = scale
    while full.dim() < weight.dim() and scale.numel() > 1:
        full = full.unsqueeze(-1)
    if scale_shape[-2:] == (2, 2):
        full = full.repeat_interleave(128, -2).repeat_interleave(64, -1)[..., : shape[-2], : shape[-1]]
    expected = (weight.float() * full).numpy()
    np.testing.assert_array_equal(opened.tensors["w.weight"].load(), expected)
    flat = expected.reshape(-1, shape[-1])
    for start, stop in [(0, 1), (7, 21), (19, len(flat)), (5, 5)]:
        np.testing.assert_array_equal(opened.tensors["w.weight"].rows(start, stop), flat[start:stop])


def test_fp8_without_scales(tmp_path: Path) -> None:
    plain = folder(tmp_path / "plain")
    save_file({"w": eight(4, 4)}, plain / "model.safetensors")
    np.testing.assert_array_equal(open_checkpoint(plain).tensors["w"].load(), eight(4, 4).float().numpy())
    declared = folder(tmp_path / "declared", config=LLAMA | BLOCKS)
    save_file({"w": eight(4, 4)}, declared / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match="tensor w is F8_E4M3 and has no scale"):
        open_checkpoint(declared)


def test_fp8_scales_of_an_unknown_shape(tmp_path: Path) -> None:
    root = folder(tmp_path / "m", config=LLAMA | BLOCKS)
    save_file({"w": eight(256, 128), "w_scale_inv": torch.ones(3, 2)}, root / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"tensor w \(256, 128\) has scales of shape \(3, 2\)"):
        open_checkpoint(root)


def test_scales_of_other_models_are_left_alone(tmp_path: Path) -> None:
    raw: Raw = {"q": A["a"], "q_scale": ("F32", (1,), f32(2)), "k.k_scale": ("F32", (1,), f32(3))}
    assert list(open_checkpoint(folder(tmp_path / "m", pack(raw))).tensors) == list(raw)


# --- GGUF ----------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path, tensors: dict[str, tuple[np.ndarray[Any, Any], Any]], name: str = "", **options: Any
) -> None:
    w = gguf.GGUFWriter(path, "llama", **options)
    if name:
        w.add_name(name)
    w.add_license("mit")
    for key, (values, kind) in tensors.items():
        w.add_tensor(key, values, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_gguf_is_a_checkpoint(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, 32), np.float32)
    bf16 = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
    tensors = {
        "a": (values, None),
        "b": (values.astype(np.float16), None),
        "c": (bf16, gguf.GGMLQuantizationType.BF16),
    }
    write_gguf(tmp_path / "x-F16.gguf", tensors, "Some Model 1.5B: Chat")
    opened = open_checkpoint(tmp_path / "x-F16.gguf")
    assert (opened.kind, opened.name, opened.config) == ("gguf", "Some-Model-1.5B-Chat", {})
    assert opened.gguf is not None
    assert opened.gguf.get("general.architecture") == "llama"
    assert opened.card["license"] == "mit"
    assert opened.parameters == 3 * 6 * 32
    np.testing.assert_array_equal(opened.tensors["a"].load(), values)
    np.testing.assert_array_equal(opened.tensors["b"].load(), values.astype(np.float16).astype(np.float32))
    expected = gguf.quants.dequantize(bf16, gguf.GGMLQuantizationType.BF16)
    np.testing.assert_array_equal(opened.tensors["c"].rows(2, 5), expected[2:5])


def test_gguf_without_a_name_is_called_after_its_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "Tiny Model-bf16.gguf", {"a": (np.ones(4, np.float32), None)})
    assert open_checkpoint(tmp_path / "Tiny Model-bf16.gguf").name == "Tiny-Model"


def test_quantised_gguf_is_refused_as_a_source(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    data = gguf.quants.quantize(np.ones((2, 32), np.float32), kind)
    write_gguf(tmp_path / "x.gguf", {"norm": (np.ones(4, np.float32), None), "w": (data, kind)})
    with pytest.raises(UnsupportedModel, match="already quantised: tensor w is Q8_0"):
        open_checkpoint(tmp_path / "x.gguf")
    write_gguf(tmp_path / "vocab.gguf", {})
    with pytest.raises(UnsupportedModel, match="no tensors"):
        open_checkpoint(tmp_path / "vocab.gguf")


def test_split_gguf_is_read_as_one(tmp_path: Path) -> None:
    values = {f"t{i}": (np.full(4, i, np.float32), None) for i in range(5)}
    write_gguf(tmp_path / "m.gguf", values, "M", split_max_tensors=2)
    parts = sorted(tmp_path.glob("m-*-of-00003.gguf"))
    assert len(parts) == 3
    for part in parts:
        opened = open_checkpoint(part)
        assert sorted(opened.tensors) == sorted(values)
        assert opened.tensors["t4"].load().tolist() == [4] * 4
        assert opened.name == "M"
        assert opened.gguf is not None
        assert not [k for k in opened.gguf.metadata if k.startswith("split.")]
    shutil.copy(parts[0], tmp_path / "swap")
    shutil.copy(parts[1], parts[0])
    with pytest.raises(CorruptCheckpoint, match="part 0 of 3, its metadata 1 of 3"):
        open_checkpoint(parts[0])
    shutil.move(tmp_path / "swap", parts[0])
    parts[1].unlink()
    with pytest.raises(CorruptCheckpoint, match=r"00002-of-00003\.gguf is missing"):
        open_checkpoint(parts[0])


# --- names, card, digest -------------------------------------------------------------------------------------------


def test_names_are_safe_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "My Model (v1.2)", pack(A))
    assert open_checkpoint(root).name == "My-Model-v1.2"
    monkeypatch.chdir(root)
    assert open_checkpoint(".").name == "My-Model-v1.2"
    assert open_checkpoint(f"{root}/").name == "My-Model-v1.2"


def test_card_front_matter(tmp_path: Path) -> None:
    card = """---
license: apache-2.0 # free
license_link: "https://example.org/a: b"
language: [en, 'de']
base_model:
  - org/Base-1B
  - https://example.org/other
tags:
- chat
datasets: []
model-index:
- name: nested
  results: 3
empty:
---
# Title
not: read
"""
    opened = open_checkpoint(folder(tmp_path / "m", pack(A), README__md=card.encode()))
    assert opened.card["license"] == "apache-2.0"
    assert opened.card["license_link"] == "https://example.org/a: b"
    assert opened.card["language"] == ["en", "de"]
    assert opened.card["base_model"] == ["org/Base-1B", "https://example.org/other"]
    assert opened.card["tags"] == ["chat"]
    assert "not" not in opened.card


@pytest.mark.parametrize("readme", [b"# no front matter\nlicense: mit", b"---\nlicense: mit\n", b"\xff---\n", b""])
def test_card_without_front_matter_is_empty(tmp_path: Path, readme: bytes) -> None:
    assert open_checkpoint(folder(tmp_path / "m", pack(A), README__md=readme)).card == {}


def test_digest_names_the_content(tmp_path: Path) -> None:
    base = open_checkpoint(folder(tmp_path / "m", pack(A), tokenizer__json=b"{}")).digest
    same = folder(tmp_path / "elsewhere", pack(A), tokenizer__json=b"{}", README__md=b"other words")
    assert open_checkpoint(same).digest == base
    others = [
        folder(tmp_path / "1", pack({"a": ("F32", (2, 2), f32(1, 2, 3, 5))}), tokenizer__json=b"{}"),
        folder(tmp_path / "2", pack({"b": A["a"]}), tokenizer__json=b"{}"),
        folder(tmp_path / "3", pack(A), tokenizer__json=b"[]"),
        folder(tmp_path / "4", pack(A), LLAMA | {"rope_theta": 1}, tokenizer__json=b"{}"),
        folder(tmp_path / "5", pack(A)),
        folder(tmp_path / "6", pack(A), tokenizer__json=b"{}"),
    ]
    folder(others[-1] / "additional_chat_templates", config=None, tool__jinja=b"x")
    assert len({base, *(open_checkpoint(o).digest for o in others)}) == 7


# --- references ----------------------------------------------------------------------------------------------------


def test_what_is_not_there(tmp_path: Path) -> None:
    folder(tmp_path / "SmolLM2-135M", pack(A))
    with pytest.raises(UnknownName, match="no file or folder") as e:
        open_checkpoint(tmp_path / "SmolLM2-135m")
    assert "SmolLM2-135M" in e.value.hint
    for ref in ("a/b/c", "./gone", "gone.gguf", "~/gone", "x" * 5000, "bad\0name", ""):
        with pytest.raises(EdgekitError):
            open_checkpoint(ref)
    with pytest.raises(UnknownName) as e:
        open_checkpoint("org/name/model-F16.gguf")
    assert "hf download org/name model-F16.gguf" in e.value.hint
    with pytest.raises(UnknownName, match="no revision 'v2'"):
        open_checkpoint(tmp_path / "SmolLM2-135M", revision="v2")


@pytest.mark.parametrize(
    ("name", "says"), [("model.bin", "pickle"), ("model.safetensors", "by itself"), ("notes.txt", "by itself")]
)
def test_files_that_are_no_model(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=says):
        open_checkpoint(tmp_path / name)


def test_demo_is_the_shipped_model_unless_a_folder_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "demo", pack(A))
    assert open_checkpoint("demo").name == "demo"
    shutil.rmtree(tmp_path / "demo")
    assert open_checkpoint("demo").name == "edgekit-demo"


# --- the hub -------------------------------------------------------------------------------------------------------

FETCH = """
import json, os, sys
from edgekit.checkpoint import open_checkpoint
from edgekit.errors import EdgekitError
for ref, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    seen = []
    try:
        c = open_checkpoint(ref, progress=lambda *a: seen.append(a))
        out = {"name": c.name, "revision": c.revision, "tensors": list(c.tensors), "card": dict(c.card),
               "sum": float(sum(t.load().sum() for t in c.tensors.values()))}
    except EdgekitError as e:
        out = {"error": type(e).__name__, "message": str(e), "hint": e.hint}
    print(json.dumps(out | {"seen": seen}))
"""

MODEL = {
    "config.json": json.dumps(LLAMA).encode(),
    "tokenizer.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n",
    "model.safetensors": pack({"w": ("F32", (300_000,), f32(*[1.0] * 300_000))}),
    "pytorch_model.bin": b"pickle" * 1000,
    "onnx/model.onnx": b"x" * 1000,
    "original/consolidated.00.pth": b"x" * 1000,
    "logo.png": b"x" * 1000,
}


Fetch = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    """Open hub ids, or (id, token), in a process of its own: the hub library reads its settings when imported."""

    def run(hub: Hub | None, *refs: str | tuple[str, str], cwd: Path = tmp_path, **env: str) -> list[dict[str, Any]]:
        settings = {
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "NO_PROXY": "*",
        }
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        done = subprocess.run(
            [sys.executable, "-c", FETCH, json.dumps([r if isinstance(r, tuple) else (r, "") for r in refs])],
            cwd=cwd,
            env=clean | settings | env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_hub_download_takes_what_is_needed_and_reports_bytes(fetch: Fetch) -> None:
    with serve(Hub({"org/Name-1B": MODEL})) as hub:
        got, again = fetch(hub, "org/Name-1B", "org/Name-1B@v1")
        assert (got["name"], got["revision"], got["tensors"], got["sum"]) == ("Name-1B", COMMIT, ["w"], 300_000)
        assert got["card"] == {"license": "mit"}
        wanted = {"config.json", "tokenizer.json", "README.md", "model.safetensors"}
        assert hub.asked == dict.fromkeys(wanted, 1)  # the second time from the cache
        assert again["revision"] == COMMIT
    total = sum(len(MODEL[n]) for n in wanted)
    assert {(task, all_) for task, _, all_ in got["seen"]} == {("download org/Name-1B", total)}
    done = [d for _, d, _ in got["seen"]]
    assert done == sorted(done)
    assert done[-1] == total
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        by_name, by_tag, absent = fetch(None, "org/Name-1B", "org/Name-1B@v1", "org/other", **env)
        assert by_name["sum"] == by_tag["sum"] == 300_000
        assert ("HF_HUB_OFFLINE is set" if env else "cannot fetch org/other") in absent["message"]


def test_hub_shards_by_index(fetch: Fetch) -> None:
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": ONE, "b": TWO}}).encode(),
        ONE: pack(A),
        TWO: pack(B),
        "consolidated.safetensors": pack(A | B),
    }
    short = files | {"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'}
    with serve(Hub({"org/m": files, "org/short": short})) as hub:
        got, refused = fetch(hub, "hf://org/m", "org/short")
        assert got["tensors"] == ["a", "b"]
        assert "consolidated.safetensors" not in hub.asked
        assert refused["error"] == "CorruptCheckpoint"
        assert "gone.safetensors" in refused["message"]


def test_hub_dropped_connection_is_resumed(fetch: Fetch) -> None:
    big = pack({"w": ("F32", (6_000_000,), bytes(24_000_000))})  # the hub library takes steps of 10 MiB
    files = MODEL | {"model.safetensors": big}
    with serve(Hub({"org/m": files}, drop_after={"model.safetensors": 21_500_000})) as hub:
        (got,) = fetch(hub, "org/m")
        assert got["tensors"] == ["w"]
        assert hub.ranges == [f"bytes={20 << 20}-"]
        assert hub.sent["model.safetensors"] < 1.1 * len(big)
        assert got["seen"][-1][1] == got["seen"][-1][2]


def test_hub_gates(fetch: Fetch) -> None:
    with serve(Hub({"org/gated": MODEL, "org/private": MODEL}, gated={"org/gated"}, private={"org/private"})) as hub:
        no_token, wrong, hidden, right, shown = fetch(
            hub, "org/gated", ("org/gated", "hf_other"), "org/private", ("org/gated", TOKEN), ("org/private", TOKEN)
        )
    for got in (no_token, wrong):
        assert got["error"] == "DownloadFailed"
        assert f"accept the licence at {hub.url}/org/gated" in got["hint"]
        assert "export HF_TOKEN" in got["hint"]
    assert "no model 'org/private'" in hidden["message"]
    assert right["sum"] == shown["sum"] == 300_000


def test_hub_failures_are_named(fetch: Fetch, tmp_path: Path) -> None:
    folder(tmp_path / "here" / "org" / "Named-1B", pack(A))
    with serve(Hub({"org/m": MODEL}, broken={"org/sick": 503, "org/forbidden": 403})) as hub:
        refs = ("org/Name-1B", "org/m@v9", "org/sick", "org/forbidden", "org/x--y")
        absent, revision, sick, forbidden, invalid = fetch(hub, *refs, cwd=tmp_path / "here")
    assert absent["error"] == "DownloadFailed"
    assert "no model 'org/Name-1B'" in absent["message"]
    assert "org/Named-1B" in absent["hint"]
    assert "org/m has no revision 'v9'" in revision["message"]
    assert "answered 503" in sick["message"]
    assert "refused access to org/forbidden" in forbidden["message"]
    assert "not a hub id" in invalid["message"]


def test_hub_refuses_before_the_weights(fetch: Fetch) -> None:
    gptq = MODEL | {"config.json": b'{"quantization_config": {"quant_method": "gptq", "bits": 4}}'}
    pickles = {k: v for k, v in MODEL.items() if k != "model.safetensors"}
    ggufs = {"README.md": b"", "m-Q4_K_M.gguf": b"x"}
    says = {"gptq": "GPTQ", "pickles": "only pickles", "ggufs": "GGUF files"}
    with serve(Hub({"org/gptq": gptq, "org/pickles": pickles, "org/ggufs": ggufs})) as hub:
        for repo, got in zip(says, fetch(hub, *(f"org/{r}" for r in says)), strict=True):
            assert got["error"] == "UnsupportedModel"
            assert says[repo] in got["message"]
            assert f"org/{repo}" in got["message"]
        assert "model.safetensors" not in hub.asked
        assert "pytorch_model.bin" not in hub.asked


def test_checkpoint_says_little_of_itself(tmp_path: Path) -> None:
    opened: Checkpoint = open_checkpoint(folder(tmp_path / "m", pack(A)))
    assert len(repr(opened)) < 400
