"""GGUF tensor names: what each is for, in which order files hold them, and which stay float32. Knows no checkpoint."""

from __future__ import annotations

import re

from edgekit.arch._types import Role

_ENDS = {
    "token_embd": Role.EMBED,
    "per_layer_token_embd": Role.EMBED,
    "output": Role.OUTPUT,
    "position_embd": Role.POSITION,
    "token_types": Role.TOKEN_TYPE,
}
_PARTS = {
    "attn_q": Role.ATTN_Q,
    "attn_k": Role.ATTN_K,
    "attn_v": Role.ATTN_V,
    "attn_qkv": Role.ATTN_QKV,
    "attn_output": Role.ATTN_O,
    "ffn_up": Role.FFN_UP,
    "ffn_gate": Role.FFN_GATE,
    "ffn_gate_up": Role.FFN_UP,
    "ffn_down": Role.FFN_DOWN,
    "ffn_gate_inp": Role.ROUTER,
    "ffn_gate_inp_shexp": Role.ROUTER,
}
CLASSIFIER = "cls.output.weight"
_EXPERTS = re.compile(r"(ffn_(?:gate_up|gate|up|down))(?:_exps|_shexp|_chexps)$")
_BLOCK = re.compile(r"(?:\w+\.)?blk\.(\d+)\.")


def role_of(name: str) -> Role:
    """What the tensor called `name` in a GGUF is for; OTHER where the name does not say (ggml `llm_tensor` names)."""
    if name.startswith("rope_f"):
        return Role.ROPE
    stem, _, kind = name.rpartition(".")
    part = stem.rpartition(".")[2]
    if re.search(r"norm(_\w+)?$", part):
        return Role.NORM
    if kind == "bias":
        return Role.BIAS
    if kind != "weight":
        return Role.OTHER
    if stem in _ENDS:
        return _ENDS[stem]
    part = _EXPERTS.sub(r"\1", part)
    return _PARTS.get(part, Role.OTHER) if _BLOCK.match(name) else Role.OTHER


def file_order(name: str) -> tuple[int, bytes]:
    """Sort key: tensors of no layer first, then layer by layer, by name within (llama.cpp `weight_name_comparer`)."""
    block = re.match(r"blk\.(\d+)\.", name)
    return int(block[1]) if block else -1, name.encode()


def stays_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a converted tensor is stored as float32 whatever the preset.

    llama.cpp's conversion (`prepare_tensors`) writes vectors, norms, routers and position and token-type tables as
    F32; llama-quantize then leaves all of them as they are. The last matrix of a classifier, a row a label, stays too:
    every score is one of its products.
    """
    if len(shape) <= 1 or not name.endswith(".weight") or name.endswith("_norm.weight") or name == CLASSIFIER:
        return True
    return role_of(name) in (Role.ROUTER, Role.POSITION, Role.TOKEN_TYPE)


_UNTOUCHED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|time_mix_(?:first|[wva][012]|g[12]|decay_w[12]|lerp_fused)"
    r"\.weight|attn_rel_b\.weight|\.position_embd|sam\.(?:pos_embd|neck\.|net_)|\.rel_pos|\.patch_embd|\.patch_merger"
    r"|a\.rvq\.codebook|mm\.a\.code_embd|^(?:position_embd|token_types)\.weight$"
)
_UNTOUCHED_GLM5 = re.compile(
    r"hc_|indexer\.(?:attn_q_b|attn_k|proj)|indexer_compressor_(?:gate|ape)"
    r"|(?:ssm_(?:f_a|f_b|g_a|g_b|beta)|attn_kv_a_mqa|attn_k_b|attn_v_b)\.weight"
)


def left_alone(name: str, shape: tuple[int, ...], arch: str) -> bool:
    """Whether llama-quantize copies a GGUF's tensor as it is (its `tensor_allows_quantization`)."""
    dims = len(shape)
    while dims > 1 and shape[len(shape) - dims] == 1:  # ggml does not count outer dimensions of one
        dims -= 1
    if dims < 2 or not name.endswith("weight") or _UNTOUCHED.search(name):
        return True
    return arch == "glm5-next" and bool(_UNTOUCHED_GLM5.search(name))
