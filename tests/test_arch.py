"""Every family against transformers: the same logits at every position, from a float32 GGUF in llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.arch import Blueprint, blueprint, file_order, roles_of_name
from edgekit.checkpoint import open_checkpoint
from edgekit.gguf_file import encode_header
from tests import pico

PROMPT = 96  # tokens: more than any pico's window
STEPS = 16
COSINE = 0.9999
CAUSAL = [name for name in pico.FAMILIES if name != "bert"]


# --- the two sides -------------------------------------------------------------------------------------------------


def write_f32(made: Blueprint, path: Path) -> Path:
    """A GGUF of float32 tensors and no vocabulary."""
    metadata = {
        "general.architecture": made.arch,
        **made.metadata,
        "tokenizer.ggml.model": "none",
        "tokenizer.ggml.token_type_count": 2,
    }
    tensors = [(m.name, m.shape, 0, 4 * m.values) for m in made.tensors]
    header = encode_header(metadata, tensors)
    data = bytearray(header.file_size)
    data[: len(header.bytes)] = header.bytes
    for m, at in zip(made.tensors, header.offsets, strict=True):
        data[at : at + 4 * m.values] = m.load().tobytes()
    path.write_bytes(data)
    return path


def engine(path: Path, tokens: list[int], *, embed: bool = False, n_ctx: int = 0) -> np.ndarray:
    """llama.cpp's logits for every position (n, vocab), or its pooled embedding (hidden,)."""
    import llama_cpp as l

    l.llama_log_set(_QUIET, ctypes.c_void_p(0))
    l.llama_backend_init()
    model = l.llama_model_load_from_file(str(path).encode(), l.llama_model_default_params())
    assert model, f"llama.cpp refuses {path}"
    params = l.llama_context_default_params()
    params.n_ctx = n_ctx or max(256, len(tokens))
    params.n_batch = params.n_ubatch = max(256, len(tokens))
    params.n_threads = params.n_threads_batch = 2
    params.type_k = params.type_v = l.GGML_TYPE_F32
    params.flash_attn_type = l.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.embeddings = embed
    context = l.llama_init_from_model(model, params)
    assert context, "no context"
    batch = l.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert l.llama_decode(context, batch) == 0
    if embed:
        out = np.ctypeslib.as_array(l.llama_get_embeddings_seq(context, 0), (l.llama_model_n_embd(model),)).copy()
    else:
        size = l.llama_vocab_n_tokens(l.llama_model_get_vocab(model))
        out = np.ctypeslib.as_array(l.llama_get_logits(context), (len(tokens), size)).copy()
    l.llama_batch_free(batch)
    l.llama_free(context)
    l.llama_model_free(model)
    return out


def _quiet() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


_QUIET = _quiet()


def reference(root: Path, tokens: list[int], steps: int = 0) -> tuple[np.ndarray, list[int]]:
    """transformers' logits (n, vocab) of `tokens` with `steps` greedy ones behind, and that sequence."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(root, attn_implementation="eager", dtype=torch.float32)
    model.eval()
    ids = torch.tensor([tokens])
    with torch.no_grad():
        for _ in range(steps):
            following = model(ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, following.reshape(1, 1)], dim=1)
        logits = model(ids, use_cache=False).logits[0]
    return logits.numpy(), ids[0].tolist()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def prompt(n: int = PROMPT, vocab: int = pico.VOCAB, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, n).tolist()


def same_as_transformers(root: Path, scratch: Path, tokens: list[int] | None = None, **options: Any) -> Blueprint:
    """Assert equal logits and greedy tokens, and that neither is trivial."""
    made = blueprint(open_checkpoint(str(root)))
    tokens = tokens or prompt()
    wanted, sequence = reference(root, tokens, STEPS)
    got = engine(write_f32(made, scratch / "f32.gguf"), sequence, **options)
    assert wanted.std() > 0.5
    assert cosines(got, wanted).min() > COSINE
    greedy = got[len(tokens) - 1 : -1].argmax(-1).tolist()
    assert greedy == sequence[len(tokens) :]
    return made


@pytest.fixture(scope="session")
def picos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Pico checkpoints, each made once."""
    root = tmp_path_factory.mktemp("picos")
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = pico.make(family, root)
        return made[family]

    return get


@pytest.mark.parametrize("family", CAUSAL)
def test_logits_equal_transformers(family: str, picos: Callable[[str], Path], tmp_path: Path) -> None:
    made = same_as_transformers(picos(family), tmp_path)
    assert len(made.geometry.layers) == made.metadata[f"{made.arch}.block_count"]
    assert all(m.role is roles_of_name(m.name) for m in made.tensors)
    assert made.tensors == tuple(sorted(made.tensors, key=lambda m: file_order(m.name)))


def test_longrope_long_factors(picos: Callable[[str], Path], tmp_path: Path) -> None:
    same_as_transformers(picos("phi3"), tmp_path, prompt(280), n_ctx=512)


def test_bert_embedding_equals_mean_of_transformers(picos: Callable[[str], Path], tmp_path: Path) -> None:
    import torch
    import transformers

    root, tokens = picos("bert"), prompt()
    model = transformers.BertModel.from_pretrained(root, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).last_hidden_state[0].mean(0).numpy()
    made = blueprint(open_checkpoint(str(root)))
    got = engine(write_f32(made, tmp_path / "bert.gguf"), tokens, embed=True)
    assert cosines(got, wanted) > COSINE
    assert not made.geometry.causal
    assert made.metadata["bert.pooling_type"] == 1
    assert made.ignored == ("pooler.dense.bias", "pooler.dense.weight")
