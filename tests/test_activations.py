"""What flows into the matrices of a running model, against numpy, transformers and llama-imatrix."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgekit.errors import EdgekitError, RuntimeFailed
from edgekit.gguf_file import open_gguf
from edgekit.runtime import _ggml_tensor
from edgekit.runtime.activations import collect
from edgekit.runtime.llama_cpp import open_model, open_session
from edgekit.runtime.moments import open_moments
from tests.gguf_models import llama_gguf, noise_gguf

EXPERTS, USED, IDLE = 4, 2, 1


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_gguf(tmp_path_factory.mktemp("noise") / "noise.gguf", tied=True)


@pytest.fixture(scope="module")
def lab(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_gguf(test_data / "models" / "lab-7m", tmp_path_factory.mktemp("lab") / "lab.gguf")


def texts(count: int, length: int, vocabulary: int = 259, seed: int = 1) -> list[list[int]]:
    return np.random.default_rng(seed).integers(3, vocabulary, (count, length)).tolist()


def stored(path: Path, name: str) -> np.ndarray:
    info = open_gguf(path).tensors[name]
    return np.fromfile(path, np.float32, info.nbytes // 4, offset=info.offset).reshape(info.shape)


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def test_input_of_the_first_layer_is_the_normed_embedding(noise: Path) -> None:
    chunks = texts(3, 40)
    found = collect(noise, chunks, moments=["blk.0.attn_q.weight", "blk.0.attn_v.weight"], threads=1)
    x = normed(stored(noise, "token_embd.weight")[np.concatenate(chunks)], stored(noise, "blk.0.attn_norm.weight"))
    assert found.tokens == 120
    assert found.counts["blk.0.attn_q.weight"].tolist() == [120]
    np.testing.assert_allclose(found.sums["blk.0.attn_q.weight"], (x * x).sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.second_moment["blk.0.attn_q.weight"], x.T @ x, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.importance("blk.0.attn_q.weight"), (x * x).mean(axis=0), rtol=1e-5)


def test_every_matrix_is_seen_and_shared_inputs_are_summed_once(noise: Path) -> None:
    names = [name for name, info in open_gguf(noise).tensors.items() if len(info.shape) == 2]
    found = collect(noise, texts(2, 20), moments=names, threads=1)
    assert sorted(found.sums) == sorted(names)  # the tied output as token_embd.weight
    for layer in ("blk.0", "blk.1"):
        q, k, v = (found.second_moment[f"{layer}.attn_{part}.weight"] for part in "qkv")
        gate, up = (found.second_moment[f"{layer}.ffn_{part}.weight"] for part in ("gate", "up"))
        assert q is k is v
        assert gate is up
        assert gate is not q
    for name in names:
        assert found.counts[name].tolist() == [40]
        np.testing.assert_allclose(np.diag(found.second_moment[name]), found.sums[name], rtol=1e-4)


def test_moments_of_some_do_not_change_the_sums_of_the_others(noise: Path) -> None:
    chunks = texts(2, 30)
    plain = collect(noise, chunks, threads=1)
    some = collect(noise, chunks, moments=["blk.1.attn_k.weight", "blk.0.ffn_down.weight"], threads=1)
    assert sorted(some.second_moment) == ["blk.0.ffn_down.weight", "blk.1.attn_k.weight"]
    assert not plain.second_moment
    for name, sums in plain.sums.items():
        np.testing.assert_allclose(some.sums[name], sums, rtol=1e-6)


def test_long_chunks_are_read_in_parts(noise: Path) -> None:
    (chunk,) = texts(1, 1100)
    found = collect(noise, [chunk], threads=1)
    x = normed(stored(noise, "token_embd.weight")[chunk], stored(noise, "blk.0.attn_norm.weight"))
    assert found.counts["token_embd.weight"].tolist() == [1100]
    np.testing.assert_allclose(found.sums["blk.0.attn_k.weight"], (x * x).sum(axis=0), rtol=1e-5)


def test_a_session_keeps_its_own_memory_and_progress_is_told(noise: Path) -> None:
    told: list[tuple[int, int]] = []
    with open_session(noise, n_ctx=64, threads=1) as session:
        before = list(session.generate([1, 50, 60], 5))
        found = collect(session, texts(2, 10), threads=1, progress=lambda _, done, total: told.append((done, total)))
        assert list(session.generate([1, 50, 60], 5)) == before
    assert told == [(10, 20), (20, 20)]
    assert found.tokens == 20


def test_moments_can_lie_in_files(noise: Path, tmp_path: Path) -> None:
    name, chunks = "blk.0.ffn_down.weight", texts(1, 25)
    in_memory = collect(noise, chunks, moments=[name], threads=1).second_moment[name]
    on_disk = collect(noise, chunks, moments=[name], threads=1, spill=tmp_path).second_moment[name]
    assert len(list(tmp_path.glob("*.f32"))) == 1
    np.testing.assert_array_equal(on_disk, in_memory)
    with pytest.raises(ValueError, match="read-only"):
        open_moments(tmp_path)[name][0, 0] = 1
    np.testing.assert_array_equal(open_moments(tmp_path)[name], in_memory)


def expert_gguf(path: Path) -> Path:
    """A Llama with experts (Mixtral's tensors) of noise, one layer; one expert hands on zeros."""
    rng, dim, ffn, vocab = np.random.default_rng(3), 64, 96, 259
    w = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (w.add_block_count, 1), (w.add_context_length, 256), (w.add_embedding_length, dim), (w.add_head_count, 4),
        (w.add_feed_forward_length, ffn), (w.add_head_count_kv, 4), (w.add_rope_dimension_count, 16),
        (w.add_layer_norm_rms_eps, 1e-5), (w.add_vocab_size, vocab), (w.add_expert_count, EXPERTS),
        (w.add_expert_used_count, USED), (w.add_tokenizer_model, "llama"), (w.add_bos_token_id, 1),
        (w.add_eos_token_id, 2), (w.add_unk_token_id, 0),
    ):  # fmt: skip
        add(value)
    w.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])
    w.add_token_scores([0.0] * vocab)
    w.add_token_types([2, 3, 3, *[6] * 256])
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocab, dim), "output": (vocab, dim), "output_norm": (dim,), "blk.0.attn_norm": (dim,),
        "blk.0.ffn_norm": (dim,), "blk.0.attn_q": (dim, dim), "blk.0.attn_k": (dim, dim), "blk.0.attn_v": (dim, dim),
        "blk.0.attn_output": (dim, dim), "blk.0.ffn_gate_inp": (EXPERTS, dim),
        "blk.0.ffn_gate_exps": (EXPERTS, ffn, dim), "blk.0.ffn_up_exps": (EXPERTS, ffn, dim),
        "blk.0.ffn_down_exps": (EXPERTS, dim, ffn),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.2)
        if "up_exps" in name:
            values[IDLE] = 0
        w.add_tensor(f"{name}.weight", np.abs(values) + 1 if len(shape) == 1 else values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_experts_get_sums_of_their_own(tmp_path: Path) -> None:
    path = expert_gguf(tmp_path / "experts.gguf")
    up, down, router = (f"blk.0.ffn_{part}.weight" for part in ("up_exps", "down_exps", "gate_inp"))
    found = collect(path, texts(2, 50), moments=[up, down], threads=1)
    assert found.sums[up].shape == (EXPERTS, 64)
    assert found.sums[down].shape == (EXPERTS, 96)
    assert found.counts[up].sum() == found.counts[down].sum() == 100 * USED
    # each token's input enters `USED` experts
    np.testing.assert_allclose(found.sums[up].sum(axis=0), USED * found.sums[router], rtol=1e-5)
    assert found.counts[down][IDLE] > 0
    assert [bool(sums.any()) for sums in found.sums[down]] == [expert != IDLE for expert in range(EXPERTS)]
    for name in (up, down):
        diagonals = np.diagonal(found.second_moment[name], axis1=1, axis2=2)
        np.testing.assert_allclose(diagonals, found.sums[name], rtol=1e-4)


def imatrix(path: Path, text: str, size: int, folder: Path) -> dict[str, np.ndarray]:
    """What llama-imatrix writes for the first four chunks of `text`."""
    if shutil.which("llama-imatrix") is None:
        pytest.skip("no llama-imatrix on the PATH")
    (folder / "text").write_text(text)
    out = folder / "imatrix.gguf"
    command = ["llama-imatrix", "-m", path, "-f", folder / "text", "-c", size, "-b", size, "--chunks", 4, "-t", 1]
    subprocess.run([*map(str, command), "--no-ppl", "-o", str(out)], check=True, capture_output=True)
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}


def its_chunks(path: Path, text: str, size: int) -> list[list[int]]:
    """The chunks that llama-imatrix makes of `text`: the first token of each gives way to BOS."""
    with open_model(path) as model:
        ids = model.tokenize(text, add_special=True, parse_special=False)
        chunks = [ids[i : i + size] for i in range(0, 4 * size, size)]
        return [[model.bos, *chunk[1:]] for chunk in chunks] if model.add_bos else chunks  # type: ignore[list-item]


def test_sums_of_experts_are_those_of_llama_imatrix(tmp_path: Path) -> None:
    path, text = expert_gguf(tmp_path / "experts.gguf"), "How many roads must a man walk down? " * 20
    theirs = imatrix(path, text, 64, tmp_path)
    found = collect(path, its_chunks(path, text, 64), threads=1)
    assert len(theirs) == 2 * 8  # all but the output
    for name in found.sums.keys() - {"output.weight"}:
        np.testing.assert_allclose(theirs[f"{name}.in_sum2"].reshape(found.sums[name].shape), found.sums[name], 1e-4)
        assert theirs[f"{name}.counts"].reshape(-1).tolist() == found.counts[name].tolist()


def test_sums_are_those_of_llama_imatrix(lab: Path, test_data: Path, tmp_path: Path) -> None:
    text = (test_data / "text" / "calibration" / "groups_merged.txt").read_text()[:8000]
    theirs = imatrix(lab, text, 256, tmp_path)
    found = collect(lab, its_chunks(lab, text, 256), threads=1)
    assert len(theirs) == 2 * 56  # all but the tied output
    assert len(found.sums) == 57
    for name in found.sums.keys() - {"token_embd.weight"}:
        np.testing.assert_allclose(theirs[f"{name}.in_sum2"].reshape(-1), found.sums[name], rtol=1e-4)
        assert theirs[f"{name}.counts"].reshape(-1).tolist() == found.counts[name].tolist()


@pytest.mark.slow
def test_moments_are_those_of_transformers(lab: Path, test_data: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        test_data / "models" / "lab-7m", dtype=torch.float32, attn_implementation="eager"
    )
    names = {
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj",
        "blk.3.attn_output.weight": "model.layers.3.self_attn.o_proj",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj",
        "blk.5.ffn_up.weight": "model.layers.5.mlp.up_proj",
        "token_embd.weight": "lm_head",
    }
    seen: dict[str, np.ndarray] = {}

    def hook(name: str) -> Any:
        def keep(_module: Any, inputs: Any) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double().numpy()
            seen[name] = seen.get(name, 0) + x.T @ x

        return keep

    for ours, theirs in names.items():
        model.get_submodule(theirs).register_forward_pre_hook(hook(ours))
    text = (test_data / "text" / "calibration" / "groups_merged.txt").read_text()[:20000]
    with open_model(lab) as engine:
        ids = engine.tokenize(text, add_special=False)
        chunks = [ids[i : i + 300] for i in (0, 300)]
        found = collect(engine, chunks, moments=list(names), threads=1)
    with torch.no_grad():
        for chunk in chunks:
            model(torch.tensor([chunk]))
    for name in names:
        error = np.linalg.norm(found.second_moment[name] - seen[name]) / np.linalg.norm(seen[name])
        assert error < 1e-3, name  # the engine keeps keys and values in half precision


def test_what_cannot_be_calibrated_is_said(noise: Path) -> None:
    with pytest.raises(EdgekitError, match=r"blk\.9\.attn_q\.weight"):
        collect(noise, texts(1, 8), moments=["blk.9.attn_q.weight"], threads=1)
    for chunks in ([], [[]]):
        with pytest.raises(EdgekitError, match="no text"):
            collect(noise, chunks, threads=1)
    with pytest.raises(RuntimeFailed, match="not in the vocabulary"):
        collect(noise, [[1, 2, 999_999]], threads=1)


def test_an_infinite_activation_names_the_matrix(tmp_path: Path) -> None:
    path = noise_gguf(tmp_path / "damaged.gguf", layers=1)
    info = open_gguf(path).tensors["blk.0.attn_norm.weight"]
    with path.open("r+b") as file:
        file.seek(info.offset)
        file.write(np.full(4, np.inf, np.float32).tobytes())
    with pytest.raises(RuntimeFailed, match=r"blk\.0\.attn_q\.weight is not finite"):
        collect(path, texts(1, 20), threads=1)


def test_another_layout_of_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ctypes.Structure):
        _fields_ = (*_ggml_tensor.Tensor._fields_[:5], ("more", ctypes.c_int32 * 2), *_ggml_tensor.Tensor._fields_[5:])

    raw = _ggml_tensor.functions()
    monkeypatch.setattr(_ggml_tensor, "Tensor", Shifted)
    with pytest.raises(RuntimeFailed, match="not where expected: src, view, data, name"):
        _ggml_tensor._prove(raw)
