"""Real checkpoints, a megabyte of noise each: every code path, no download.

`llama` needs numpy alone. `FAMILIES` builds one of each family through transformers' own classes, so that a file's
names, shapes and config are what transformers itself saves.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests import pico_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 512


# --- a tokenizer ---------------------------------------------------------------------------------------------------


@cache
def _bpe(vocab: int) -> str:
    """tokenizer.json of a byte-level BPE with GPT-2's splitting, at most `vocab` tokens, SPECIAL first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pico_tokenizers.prose(), trainer)
    return str(tokenizer.to_str())


@cache
def _wordpiece(vocab: int) -> str:
    """tokenizer.json of an uncased BERT."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(pico_tokenizers.prose(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return str(tokenizer.to_str())


def tokenizer_files(root: Path, vocab: int = VOCAB, *, bert: bool = False) -> None:
    """tokenizer.json and tokenizer_config.json into `root`."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
    if bert:
        config |= {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        config |= {f"{k}_token": f"[{k.upper()}]" for k in ("pad", "unk", "cls", "sep", "mask")}
    else:
        config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE}
    (root / "tokenizer.json").write_text(_wordpiece(vocab) if bert else _bpe(vocab), encoding="utf-8")
    (root / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


# --- without torch -------------------------------------------------------------------------------------------------


def save_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    """Write float32 arrays as `dtype` (F32, F16, BF16): 8 bytes of header length, JSON header, data."""
    blobs = {name: _stored(values, dtype) for name, values in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, blob in blobs.items():
        shape = list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(blob)]}
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs.values()))


def _stored(values: np.ndarray, dtype: str) -> bytes:
    if dtype != "BF16":
        return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # to nearest, ties to even


def llama(
    root: Path,
    *,
    hidden: int = 256,
    layers: int = 2,
    vocab: int = VOCAB,
    heads: int = 8,
    kv_heads: int = 4,
    ffn: int = 512,
    dtype: str = "BF16",
    tied: bool = False,
    seed: int = 0,
    context: int = 256,
    **config: Any,
) -> Path:
    """A Llama without torch, in milliseconds. `config` goes into config.json as it is."""
    rng = np.random.default_rng(seed)
    kv = hidden // heads * kv_heads

    def noise(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, dtype=np.float32) * (1.2 / shape[-1] ** 0.5)).astype(np.float32)

    def gain(n: int) -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(n, dtype=np.float32)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": noise(vocab, hidden) * 8}
    for i in range(layers):
        p = f"model.layers.{i}."
        tensors |= {
            p + "input_layernorm.weight": gain(hidden),
            p + "mlp.down_proj.weight": noise(hidden, ffn),
            p + "mlp.gate_proj.weight": noise(ffn, hidden),
            p + "mlp.up_proj.weight": noise(ffn, hidden),
            p + "post_attention_layernorm.weight": gain(hidden),
            p + "self_attn.k_proj.weight": noise(kv, hidden),
            p + "self_attn.o_proj.weight": noise(hidden, hidden),
            p + "self_attn.q_proj.weight": noise(hidden, hidden),
            p + "self_attn.v_proj.weight": noise(kv, hidden),
        }
    tensors["model.norm.weight"] = gain(hidden)
    if not tied:
        tensors["lm_head.weight"] = noise(vocab, hidden) * 3
    root.mkdir(parents=True, exist_ok=True)
    save_safetensors(root / "model.safetensors", tensors, dtype)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype],
        "eos_token_id": 2,
    }
    (root / "config.json").write_text(json.dumps(settings | config, indent=2), encoding="utf-8")
    tokenizer_files(root, vocab)
    return root


# --- through transformers ------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


def save(root: Path, model_class: str, config_class: str, **settings: Any) -> Path:
    """A model of noise, saved by transformers, float32, with a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    bert = config_class == "BertConfig"
    base = {
        k: v for k, v in SMALL.items() if ("text_config" not in settings and "n_embd" not in settings) or "_id" in k
    }
    config = getattr(transformers, config_class)(**(base | {"vocab_size": VOCAB} | deepcopy(settings)))
    model = getattr(transformers, model_class)(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_noise(name, weight))
    model.save_pretrained(root)
    tokenizer_files(root, bert=bert)
    return root


def _noise(name: str, weight: Any) -> Any:
    """Values under which logits are far from flat and attention far from even."""
    import torch

    noise = torch.randn_like(weight)
    if weight.ndim == 1:
        return 0.2 * noise if name.endswith("bias") else weight + 0.2 * noise
    if "embed" in name or "wte" in name or "wpe" in name:
        return 0.7 * noise
    return noise * 1.4 / weight.shape[-1] ** 0.5


@dataclass(frozen=True)
class Pico:
    """One family's model and config class, and settings beside SMALL's."""

    model: str
    config: str
    settings: dict[str, Any]

    def __call__(self, root: Path) -> Path:
        return save(root, self.model, self.config, **self.settings)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.05 * i for i in range(12)],
    "long_factor": [1.5 + 0.2 * i for i in range(12)],
    "original_max_position_embeddings": 256,
}
PHI3 = {
    "rope_parameters": LONGROPE,
    "original_max_position_embeddings": 256,
    "max_position_embeddings": 1024,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA3 = {
    "num_hidden_layers": 7,
    "head_dim": 48,
    "query_pre_attn_scalar": 48,
    "sliding_window": 32,
    "rope_parameters": GEMMA3_ROPE,
}
GPT2 = {
    "n_embd": 128,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": 192,
}
GRANITE = {
    "attention_multiplier": 0.125,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "attention_bias": True,
}


def _gemma3(root: Path) -> Path:
    """With a vision tower, which conversion leaves out."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    return save(
        root,
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text_config=SMALL | GEMMA3,
        vision_config=vision,
        mm_tokens_per_image=4,
    )


def _bert(root: Path) -> Path:
    """Mean pooling, as sentence-transformers writes it down."""
    return pooled(save(root, "BertModel", "BertConfig", num_key_value_heads=None), "mean")


def pooled(root: Path, kind: str) -> Path:
    """Adds modules.json and 1_Pooling: `mean` or `cls`, then length 1."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"}
        for i, (p, k) in enumerate(kinds.items())
    ]
    (root / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (root / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 128}
    pooling |= {"pooling_mode_mean_tokens": kind == "mean", "pooling_mode_cls_token": kind == "cls"}
    (root / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return root


FAIRSEQ = {
    "num_key_value_heads": None,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 258,
}
MODERN = {
    "num_key_value_heads": None,
    "num_hidden_layers": 5,
    "local_attention": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}


def roberta(root: Path, model: str = "RobertaModel", **settings: Any) -> Path:
    """A model class of RoBERTa's with its kind of tokenizer."""
    save(root, model, "RobertaConfig", **FAIRSEQ | settings)
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    pico_tokenizers.write(root, pico_tokenizers.roberta(VOCAB), names, tokenizer_class="RobertaTokenizer")
    return root


def xlm_roberta(root: Path, model: str = "XLMRobertaModel", **settings: Any) -> Path:
    """A model class of XLM-RoBERTa's with its kind of tokenizer."""
    save(root, model, "XLMRobertaConfig", **FAIRSEQ | {"type_vocab_size": 1} | settings)
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    pico_tokenizers.write(root, pico_tokenizers.unigram(VOCAB), names, tokenizer_class="XLMRobertaTokenizer")
    return root


def modernbert(root: Path, model: str = "ModernBertModel", **settings: Any) -> Path:
    """A model class of ModernBERT's with its kind of tokenizer."""
    save(root, model, "ModernBertConfig", **MODERN | settings)
    pico_tokenizers.write(root, pico_tokenizers.modernbert(VOCAB), ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"))
    return root


def nomic_bert(root: Path) -> Path:
    """Nomic's model with BERT's tokenizer, saved by transformers under the names of the model's own code."""
    save(root, "NomicBertModel", "NomicBertConfig", num_key_value_heads=None)
    tokenizer_files(root, bert=True)
    return root


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "bert": _bert,
    "gemma": Pico("GemmaForCausalLM", "GemmaConfig", {"head_dim": 48}),
    "gemma2": Pico(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"head_dim": 48, "query_pre_attn_scalar": 48, "sliding_window": 32, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": _gemma3,
    "gemma3_text": Pico("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3),
    "gpt2": Pico("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": Pico(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
            "num_key_value_heads": None,
        },
    ),
    "granite": Pico("GraniteForCausalLM", "GraniteConfig", GRANITE),
    "llama": Pico(
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": LLAMA3, "head_dim": 64, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": Pico("MistralForCausalLM", "MistralConfig", {"head_dim": 64, "sliding_window": 128}),
    "mixtral": Pico(
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "modernbert": lambda root: pooled(modernbert(root), "cls"),
    "nomic_bert": lambda root: pooled(nomic_bert(root), "mean"),
    "olmo2": Pico("Olmo2ForCausalLM", "Olmo2Config", {}),
    "phi3": Pico("Phi3ForCausalLM", "Phi3Config", PHI3),
    "qwen2": Pico("Qwen2ForCausalLM", "Qwen2Config", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen2_moe": Pico("Qwen2MoeForCausalLM", "Qwen2MoeConfig", MOE | {"shared_expert_intermediate_size": 160}),
    "qwen3": Pico("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen3_moe": Pico("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE | {"head_dim": 64, "norm_topk_prob": True}),
    "roberta": lambda root: pooled(roberta(root), "mean"),
    "smollm3": Pico("SmolLM3ForCausalLM", "SmolLM3Config", {"num_hidden_layers": 5}),
    "stablelm": Pico(
        "StableLmForCausalLM",
        "StableLmConfig",
        {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    "starcoder2": Pico("Starcoder2ForCausalLM", "Starcoder2Config", {"tie_word_embeddings": True}),
    "xlm_roberta": lambda root: pooled(xlm_roberta(root), "cls"),
}
ENCODERS = ("bert", "modernbert", "nomic_bert", "roberta", "xlm_roberta")
"""Those of FAMILIES that make vectors."""


def make(family: str, root: Path) -> Path:
    """The pico checkpoint of `family` in a folder of that name under `root`."""
    return FAMILIES[family](root / family)
