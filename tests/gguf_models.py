"""GGUF files for tests of the runtime: a tiny one from noise, real trained ones from checkpoints, quantized ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def noise_gguf(
    path: Path,
    *,
    dim: int = 64,
    layers: int = 2,
    heads: int = 4,
    ffn: int = 128,
    context: int = 512,
    seed: int = 7,
    arch: str = "llama",
    template: str | None = "{{ messages }}",
    scale: float = 0.3,
    spread: float = 3.0,
    extra_vocab: int = 0,
    tied: bool = False,
    fmt: str = "F32",
) -> Path:
    """A Llama of random weights whose vocabulary is the 256 bytes, `<unk> <s> </s>` and a few words."""
    rng = np.random.default_rng(seed)
    words = ["▁", "▁the", "▁cat", "cat", "é", "日", *(f"▁x{i}" for i in range(extra_vocab))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    w = gguf.GGUFWriter(path, arch)
    w.add_name("noise")
    _hyper(
        w, layers=layers, dim=dim, ffn=ffn, heads=heads, kv=heads, context=context, head=dim // heads,
        vocab=len(tokens), eps=1e-5, theta=10000.0,
    )  # fmt: skip
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([-float(i) for i in range(len(tokens))])
    w.add_token_types(kinds)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(True)
    if template:
        w.add_chat_template(template)

    def tensor(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, np.float32) * scale
        kind = gguf.GGMLQuantizationType[fmt]
        if len(shape) == 1 or fmt == "F32":
            w.add_tensor(name, np.abs(values) + 1 if len(shape) == 1 else values)
        else:
            w.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    w_rows = [("attn_q", dim, dim), ("attn_k", dim, dim), ("attn_v", dim, dim), ("attn_output", dim, dim),
              ("ffn_up", ffn, dim), ("ffn_gate", ffn, dim), ("ffn_down", dim, ffn)]  # fmt: skip
    tensor("token_embd.weight", len(tokens), dim)
    if not tied:
        w.add_tensor("output.weight", rng.standard_normal((len(tokens), dim), np.float32) * spread / dim**0.5)
    tensor("output_norm.weight", dim)
    for i in range(layers):
        tensor(f"blk.{i}.attn_norm.weight", dim)
        tensor(f"blk.{i}.ffn_norm.weight", dim)
        for name, *shape in w_rows:
            tensor(f"blk.{i}.{name}.weight", *shape)
    return _finish(w, path)


def llama_gguf(folder: Path, path: Path) -> Path:
    """A trained Llama checkpoint (tied embeddings) with its own tokenizer, float32."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    w = gguf.GGUFWriter(path, "llama")
    w.add_name(folder.name)
    _hyper(
        w, layers=config["num_hidden_layers"], dim=config["hidden_size"], ffn=config["intermediate_size"],
        heads=heads, kv=kv_heads, context=config["max_position_embeddings"], head=config["head_dim"],
        vocab=config["vocab_size"], eps=config["rms_norm_eps"], theta=config["rope_theta"],
    )  # fmt: skip
    _vocabulary(w, folder, config)
    for name, stored in _safetensors(folder / "model.safetensors").items():
        head_count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2], 0)
        values = stored
        if head_count:  # ggml rotates neighbouring pairs, the checkpoint halves
            rows = stored.shape[0] // head_count
            values = stored.reshape(head_count, 2, rows // 2, -1).swapaxes(1, 2).reshape(stored.shape)
        w.add_tensor(_ggml_name(name), np.ascontiguousarray(values))
    return _finish(w, path)


def quantize(source: Path, path: Path, ftype: int) -> Path:
    """By llama.cpp itself; `ftype` is a `llama_ftype` (2 Q4_0, 7 Q8_0, 15 Q4_K_M)."""
    from edgekit.runtime._llama_library import library

    api = library().api
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 1
    assert api.llama_model_quantize(str(source).encode(), str(path).encode(), params) == 0
    return path


def _hyper(
    w: Any, *, layers: int, dim: int, ffn: int, heads: int, kv: int, context: int, head: int, vocab: int, eps: float,
    theta: float,
) -> None:  # fmt: skip
    w.add_block_count(layers)
    w.add_context_length(context)
    w.add_embedding_length(dim)
    w.add_feed_forward_length(ffn)
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_rope_dimension_count(head)
    w.add_rope_freq_base(theta)
    w.add_layer_norm_rms_eps(eps)
    w.add_vocab_size(vocab)


def _vocabulary(w: Any, folder: Path, config: dict[str, Any]) -> None:
    model = folder / "tokenizer.model"
    w.add_bos_token_id(config["bos_token_id"])
    w.add_eos_token_id(config["eos_token_id"])
    if model.exists():
        import sentencepiece

        sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
        n = sp.get_piece_size()
        kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(n)]
        w.add_tokenizer_model("llama")
        w.add_token_list([sp.id_to_piece(i) for i in range(n)])
        w.add_token_scores([sp.get_score(i) for i in range(n)])
        w.add_token_types(kinds)
        w.add_add_bos_token(True)
        return
    data = json.loads((folder / "tokenizer.json").read_text())
    ids = data["model"]["vocab"] | {t["content"]: t["id"] for t in data["added_tokens"]}
    control = {t["content"] for t in data["added_tokens"]}
    texts = sorted(ids, key=ids.__getitem__)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(texts)
    w.add_token_types([3 if t in control else 1 for t in texts])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]])
    w.add_add_bos_token(False)
    w.add_chat_template((folder / "chat_template.jinja").read_text())


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + size + at for at in facts["data_offsets"])
        if facts["dtype"] == "BF16":
            values = (np.frombuffer(data[start:stop], np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data[start:stop], np.dtype(facts["dtype"].replace("F", "float").lower()))
        found[name] = values.astype(np.float32).reshape(facts["shape"])
    return found


def _ggml_name(name: str) -> str:
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up", "mlp.gate_proj": "ffn_gate",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{names[rest]}.weight"
    return f"{names[stem]}.weight"


def _finish(w: Any, path: Path) -> Path:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
