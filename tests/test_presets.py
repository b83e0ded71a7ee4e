"""Presets against the engine of llama-quantize itself: every tensor of every preset must come out byte for byte."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from edgekit.errors import EdgekitError, UnknownName, UnsupportedModel
from edgekit.quant import ggml, presets

F32_PARTS = ("_norm.weight", ".bias", "ffn_gate_inp", "position_embd", "token_types")


@dataclass
class Pico:
    """A model of noise: as many layers and heads as wished, matrices of two rows. Shapes are in numpy order."""

    arch: str = "llama"
    layers: int = 9
    cols: int = 256
    ffn: int = 256
    heads: int = 8
    kv_heads: int = 8
    experts: int = 0
    tied: bool = False
    fused: bool = False
    dtype: str = "F32"
    more: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (3, self.cols), "output_norm.weight": (self.cols,)}
        if not self.tied:
            found["output.weight"] = (3, self.cols)
        for i in range(self.layers):
            parts = ("attn_qkv",) if self.fused else ("attn_q", "attn_k", "attn_v")
            for part in (*parts, "attn_output"):
                found[f"blk.{i}.{part}.weight"] = (2, self.cols)
            found[f"blk.{i}.attn_norm.weight"] = (self.cols,)
            if self.experts:
                found[f"blk.{i}.ffn_gate_inp.weight"] = (self.experts, self.cols)
            lead, suffix = ((self.experts,), "_exps") if self.experts else ((), "")
            found[f"blk.{i}.ffn_down{suffix}.weight"] = (*lead, 2, self.ffn)
            for part in ("ffn_up",) if self.fused else ("ffn_gate", "ffn_up"):
                found[f"blk.{i}.{part}{suffix}.weight"] = (*lead, 2, self.cols)
        return found | self.more

    def write(self, path: Path) -> dict[str, np.ndarray]:
        """Write the GGUF; returns the float32 weights it holds."""
        rng = np.random.default_rng(1)
        writer = gguf.GGUFWriter(path, self.arch)
        writer.add_block_count(self.layers)
        writer.add_context_length(64)
        writer.add_embedding_length(self.cols)
        writer.add_feed_forward_length(self.ffn)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_layer_norm_eps(1e-5)
        writer.add_vocab_size(3)
        if self.experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(2)
        weights = {}
        for name, shape in self.shapes().items():
            code = gguf.GGMLQuantizationType["F32" if kept(name, shape) else self.dtype]
            data = gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1), code)
            weights[name] = gguf.quants.dequantize(data, code).reshape(shape)
            writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=code)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return weights

    def blueprint(self) -> Any:
        source = (SimpleNamespace(dtype=self.dtype),)
        return SimpleNamespace(
            arch=self.arch,
            tensors=tuple(
                SimpleNamespace(name=n, shape=s, keep_f32=kept(n, s), sources=source) for n, s in self.shapes().items()
            ),
            geometry=SimpleNamespace(
                heads=self.heads,
                kv_heads=self.kv_heads,
                experts=self.experts,
                layers=[SimpleNamespace(kv_heads=self.kv_heads)] * self.layers,
            ),
        )


def kept(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or any(part in name for part in F32_PARTS)


def importance_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """What llama-imatrix would give: per column, and per expert, of every matrix but the embedding."""
    rng = np.random.default_rng(2)
    return {
        name: rng.random((shape[0] if len(shape) == 3 else 1, shape[-1]), dtype=np.float32) + np.float32(0.01)
        for name, shape in shapes.items()
        if len(shape) > 1 and name != "token_embd.weight"
    }


def judge(
    source: Path, out: Path, file_type: int, importance: dict[str, np.ndarray]
) -> dict[str, tuple[str, bytes]] | None:
    """The format and bytes of every tensor that llama_model_quantize writes; None where it refuses."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 1
    floats, entry = ctypes.POINTER(ctypes.c_float), llama_cpp.llama_model_imatrix_data
    entries = [entry(n.encode(), v.ctypes.data_as(floats), v.size) for n, v in importance.items()]
    if importance:
        params.imatrix = (entry * (len(entries) + 1))(*entries)  # a last one without a name ends the list
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        return None
    return contents(out)


def contents(path: Path) -> dict[str, tuple[str, bytes]]:
    """Format and bytes of every tensor, read by ggml's own reader (gguf.h): it knows every type it writes."""
    library, address, number = ctypes.CDLL(str(ggml.library_path())), ctypes.c_void_p, ctypes.c_int64

    def call(name: str, result: Any, *arguments: Any) -> Any:
        function = library[f"gguf_{name}"]
        function.restype = result
        return function(*arguments)

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", address))

    handle = address(call("init_from_file", address, str(path).encode(), Params(True, None)))
    assert handle
    data, start, found = path.read_bytes(), call("get_data_offset", ctypes.c_size_t, handle), {}
    for i in range(call("get_n_tensors", number, handle)):
        name = call("get_tensor_name", ctypes.c_char_p, handle, number(i)).decode()
        begin = start + call("get_tensor_offset", ctypes.c_size_t, handle, number(i))
        size = call("get_tensor_size", ctypes.c_size_t, handle, number(i))
        found[name] = (
            ggml.by_code(call("get_tensor_type", ctypes.c_int, handle, number(i))).name,
            data[begin : begin + size],
        )
    call("free", None, handle)
    return found


def encoded(choice: presets.Choice[Any], weights: np.ndarray, importance: np.ndarray | None) -> bytes:
    """A tensor as the exporter makes it: every expert with its own importance."""
    stack = weights if weights.ndim == 3 else weights.reshape(1, -1, weights.shape[-1])
    vectors = [None] * len(stack) if importance is None else list(importance)
    return b"".join(ggml.encode(m, choice.format, v).tobytes() for m, v in zip(stack, vectors, strict=True))


MODELS = {
    "llama": Pico(),
    "16 layers, gqa 4, tied": Pico(layers=16, kv_heads=2, tied=True, dtype="F16"),
    "gqa 8": Pico(layers=8, heads=16, kv_heads=2, dtype="BF16"),
    "33 layers": Pico(layers=33, kv_heads=4),
    "llama 70B": Pico(layers=80, kv_heads=1),
    "llama 65B": Pico(layers=80),
    "qwen2 72B": Pico("qwen2", layers=80),
    "rows of 288": Pico(cols=288, ffn=352, kv_heads=2),
    "rows of 172": Pico(cols=172, ffn=64, dtype="BF16"),
    "down rows of 384": Pico(ffn=384, tied=True),
    "eight experts": Pico(layers=16, experts=8, kv_heads=2),
    "four experts": Pico("qwen3moe", experts=4),
    "two experts, tied": Pico("qwen3moe", experts=2, tied=True, kv_heads=1, dtype="F16"),
    "gpt2": Pico("gpt2", layers=12, fused=True, more={"position_embd.weight": (64, 256), "blk.0.ffn_up.bias": (2,)}),
    "phi3": Pico("phi3", layers=32, fused=True, tied=True),
    "falcon": Pico("falcon", layers=32, heads=71, kv_heads=1, fused=True, tied=True),
    "falcon 16": Pico("falcon", layers=17, kv_heads=8, fused=True),
    "qwen3": Pico("qwen3", layers=28, heads=16, tied=True, more={"blk.0.attn_q_norm.weight": (128,)}),
    "gemma3": Pico("gemma3", layers=26, heads=4, kv_heads=1, tied=True),
    "odd tensors": Pico(
        layers=4,
        dtype="BF16",
        more={
            "per_layer_token_embd.weight": (3, 256),
            "per_layer_model_proj.weight": (3, 256),
            "altup_proj.weight": (3, 256),
            "time_mix_w1.weight": (3, 256),
            "blk.0.ffn_down_shexp.weight": (2, 256),
            "blk.1.attn_kv_b.weight": (2, 256),
            "blk.1.laurel_l.weight": (2, 256),
            "blk.2.ssm_conv1d.weight": (2, 256),
            "blk.2.unheard_of.weight": (2, 256),
            "blk.2.unheard_of.scale": (2, 256),
            "blk.3.attn_rel_b.weight": (2, 256),
            "blk.3.single.weight": (2, 1, 256),
        },
    ),
}
QUICK = ("llama", "16 layers, gqa 4, tied", "rows of 288", "eight experts", "falcon 16", "odd tensors")
CASES = [
    pytest.param(model, guided, id=f"{model}{', importance' * guided}", marks=[] if quick else [pytest.mark.slow])
    for model in MODELS
    for guided in (False, True)
    for quick in [model in QUICK or not (guided or model in {"llama 65B", "qwen2 72B"})]
]


@pytest.mark.parametrize(("model", "guided"), CASES)
def test_every_preset_is_byte_identical_to_llama_quantize(model: str, guided: bool, tmp_path: Path) -> None:
    pico = MODELS[model]
    weights = pico.write(tmp_path / "source.gguf")
    importance = importance_of(pico.shapes()) if guided else {}
    compared = 0
    for preset in presets.PRESETS.values():
        judged = judge(tmp_path / "source.gguf", tmp_path / "out.gguf", preset.file_type, importance)
        if judged is None:
            with pytest.raises(EdgekitError):
                presets.choose(preset, pico.blueprint(), importance=importance)
            continue
        for choice in presets.choose(preset, pico.blueprint(), importance=importance):
            name = choice.tensor.name
            form, data = judged[name]
            assert choice.format == form, (preset.name, name, choice)
            assert encoded(choice, weights[name], importance.get(name)) == data, (preset.name, name, choice)
            assert choice.nbytes == len(data)
            compared += 1
    assert compared > 20 * len(pico.shapes())


def test_a_single_row_is_no_matrix() -> None:
    tensor = SimpleNamespace(name="blk.0.ffn_up.weight", shape=(1, 256), keep_f32=False, sources=())
    pico = Pico(layers=1).blueprint()
    pico.tensors = (tensor,)
    assert [(c.format, c.reason) for c in presets.choose("Q4_0", pico)] == [("F32", "one row")]


def test_names_are_looked_up_in_any_case_and_through_aliases() -> None:
    assert presets.get("q4_k").name == presets.get("Q4_K_M").name == "Q4_K_M"
    assert presets.get("mxfp4_moe").file_type == 38
    with pytest.raises(UnknownName) as caught:
        presets.get("Q4_KM")
    assert "Q4_K" in caught.value.hint


def test_file_types_are_those_of_gguf() -> None:
    for preset in presets.PRESETS.values():
        if preset.name not in {"Q1_0", "Q2_0"}:  # newer than gguf 0.19
            name = "ALL_F32" if preset.name == "F32" else f"MOSTLY_{preset.name}"
            assert gguf.LlamaFileType[name].value == preset.file_type, preset.name


def test_missing_importance_names_the_tensor_and_what_to_do() -> None:
    blueprint = Pico().blueprint()
    with pytest.raises(
        EdgekitError, match=r"IQ2_XS makes blk\.0\.attn_k\.weight IQ2_XS, which needs importance"
    ) as caught:
        presets.choose("IQ2_XS", blueprint)
    assert "--calibration" in caught.value.hint
    names = {t.name for t in blueprint.tensors} - {"blk.5.ffn_up.weight"}
    with pytest.raises(EdgekitError, match=r"blk\.5\.ffn_up\.weight"):
        presets.choose("IQ2_XS", blueprint, importance=names)


def test_needs_importance_says_what_choose_does() -> None:
    for preset in presets.PRESETS.values():
        for pico in (Pico(), Pico(kv_heads=1, tied=True)):
            try:
                presets.choose(preset, pico.blueprint())
                refused = False
            except EdgekitError:
                refused = True
            assert refused == preset.needs_importance, preset.name


def test_fallbacks_are_visible() -> None:
    choices = {c.tensor.name: c for c in presets.choose("Q4_K_M", Pico(cols=288, ffn=100).blueprint())}
    up, down = choices["blk.2.ffn_up.weight"], choices["blk.2.ffn_down.weight"]
    assert (up.wanted, up.format, up.reason) == ("Q4_K", "Q5_0", "rows of 288 do not divide into Q4_K blocks of 256")
    assert (down.wanted, down.format) == ("Q6_K", "F16") or (down.wanted, down.format) == ("Q4_K", "F16")
    norm = choices["blk.2.attn_norm.weight"]
    assert (norm.wanted, norm.format) == ("F32", "F32")
    with pytest.raises(EdgekitError, match=r"token_embd\.weight has rows of 288 weights, which Q1_0"):
        presets.choose("Q1_0", Pico(cols=288).blueprint())


def test_experts_must_name_their_layer() -> None:
    pico = Pico(layers=2, experts=4)
    pico.more["blk.7.ffn_up_exps.weight"] = (4, 2, 256)
    with pytest.raises(UnsupportedModel, match=r"blk\.7\.ffn_up_exps\.weight belongs to none of the model's 2 layers"):
        presets.choose("Q4_0", pico.blueprint())


def test_choices_come_in_the_order_of_the_blueprint_and_do_not_depend_on_it() -> None:
    blueprint = Pico(layers=12).blueprint()
    straight = presets.choose("Q4_K_M", blueprint)
    assert [c.tensor for c in straight] == list(blueprint.tensors)
    blueprint.tensors = blueprint.tensors[::-1]
    assert presets.choose("Q4_K_M", blueprint)[::-1] == straight


def test_sizes_add_up() -> None:
    choices = presets.choose("Q4_0", Pico(layers=2).blueprint())
    total = presets.describe(choices)
    assert set(total) == {"Q4_0", "Q6_K", "F32"}
    assert sum(total.values()) == sum(c.nbytes for c in choices)
    assert total["F32"] == 3 * 256 * 4
    assert 4.5 < presets.bits_per_weight(choices) < 12
    assert presets.bits_per_weight([]) == 0


@pytest.mark.parametrize(("ladder", "importance"), [(presets.LADDER, True), (presets.PLAIN_LADDER, False)])
def test_each_rung_of_a_ladder_is_smaller_and_possible(ladder: tuple[str, ...], importance: bool) -> None:
    blueprint = Pico(layers=32, kv_heads=2).blueprint()
    names = [t.name for t in blueprint.tensors] if importance else None
    sizes = [sum(c.nbytes for c in presets.choose(rung, blueprint, importance=names)) for rung in ladder]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
