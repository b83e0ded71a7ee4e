"""What a config says of quantised weights: FP8 is described, everything else refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.checkpoint._files import read_json
from edgekit.errors import UnsupportedModel

_KNOWN_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "ModelOpt",
    "mlx": "MLX",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
    "bitnet": "BitNet",
    "aqlm": "AQLM",
    "torchao": "torchao",
}


@dataclass(frozen=True, slots=True)
class Float8:
    """What the config says of an FP8 checkpoint: the block one scale is for, None for whole rows or tensors."""

    block: tuple[int, int] | None


def declared_float8(root: Path, config: Mapping[str, Any], card: Mapping[str, Any], where: str) -> Float8 | None:
    """What the config says of FP8; UnsupportedModel for every other kind of quantised weights."""
    settings = _quantisation(root, config)
    if not settings:
        return None
    method = str(settings.get("quant_method") or "unknown").lower()
    if method in {"fp8", "fbgemm_fp8"}:
        return Float8(_block(settings.get("weight_block_size")))
    if method == "compressed-tensors":
        schemes = [
            g.get("weights") or {} for g in (settings.get("config_groups") or {}).values() if isinstance(g, dict)
        ]
        if schemes and all(w.get("type") == "float" and w.get("num_bits") == 8 for w in schemes):
            return Float8(_block(schemes[0].get("block_structure")))
    if method == "modelopt" and settings.get("quant_algo") == "FP8":
        return Float8(None)
    raise quantised(where, _what(method, settings), card)


def _quantisation(root: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantisation settings, wherever the tool that made them puts them; empty where there are none."""
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            found = holder.get(key)
            if isinstance(found, dict) and found.get("quant_method"):
                return found
            if isinstance(found, dict) and "load_in_4bit" in found:  # bitsandbytes before it wrote its name
                loads = found["load_in_4bit"] or found.get("load_in_8bit")
                return {**found, "quant_method": "bitsandbytes"} if loads else {}
    for key in ("quantization", "quantization_config"):  # mlx-lm writes both, without a method
        found = config.get(key)
        if isinstance(found, dict) and found:
            return {**found, "quant_method": "mlx" if "group_size" in found else "unknown"}
    if (root / "hf_quant_config.json").is_file():
        found = read_json(root, "hf_quant_config.json").get("quantization")
        return {**(found if isinstance(found, dict) else {}), "quant_method": "modelopt"}
    return {}


def _block(value: object) -> tuple[int, int] | None:
    """(rows, columns) of `[128, 128]` or `128x128`."""
    parts = value.split("x") if isinstance(value, str) else value
    if not isinstance(parts, list) or len(parts) != 2:
        return None
    rows, cols = (int(v) if str(v).isdecimal() else 0 for v in parts)
    return (rows, cols) if rows and cols else None


def _what(method: str, settings: Mapping[str, Any]) -> str:
    bits = settings.get("bits") or settings.get("w_bit") or ("4" if settings.get("load_in_4bit") else "")
    detail = settings.get("quant_algo") or settings.get("format") or (f"{bits} bits" if bits else "")
    return f"{_KNOWN_METHODS.get(method, method)}{f' ({detail})' if detail else ''}"


def quantised(where: str, what: str, card: Mapping[str, Any]) -> UnsupportedModel:
    base = card.get("base_model")
    original = base[0] if isinstance(base, list) and base else base
    hint = f"edgekit convert {original}" if original else "convert the 16-bit checkpoint that it was made from"
    return UnsupportedModel(f"{where} is already quantised: {what}", hint)
