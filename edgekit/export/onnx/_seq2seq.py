"""Encoder-decoders of text as two float32 ONNX graphs, through optimum-onnx in an environment of its own.

Knows which families come out exactly, and how their config.json reads to the older transformers there. Knows nothing of
quantization or of the shipping form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from edgekit.checkpoint._files import read_json
from edgekit.errors import RuntimeFailed, UnsupportedModel
from edgekit.export.onnx import _optimum
from edgekit.onnx_pair_planning import is_t5, scales
from edgekit.units import Progress, silent

ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"

FAMILIES: Mapping[str, str] = {
    "bart": "BartForConditionalGeneration",
    "blenderbot": "BlenderbotForConditionalGeneration",
    "blenderbot-small": "BlenderbotSmallForConditionalGeneration",
    "m2m_100": "M2M100ForConditionalGeneration",
    "marian": "MarianMTModel",
    "mbart": "MBartForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "pegasus": "PegasusForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
}
"""`model_type` -> its class: the families whose logits equal transformers' in the tests."""

_HEAD = "lm_head.weight"


def supported(config: Mapping[str, Any], root: Path, tensors: Collection[str]) -> str | None:
    """None if the encoder-decoder of this config.json in `root` is exported exactly, else one sentence why not.

    `tensors`: the names in its checkpoint.
    """
    family = config.get("model_type")
    if not isinstance(family, str):
        return "config.json names no model_type"
    if not config.get("is_encoder_decoder", family in FAMILIES):
        return f"{family} is no encoder-decoder: its task is another one"
    if family not in FAMILIES:
        return f"encoder-decoders of the family {family} were not proven, only those of {', '.join(FAMILIES)}"
    named = config.get("architectures")
    if named and named != [FAMILIES[family]]:
        return f"{named} is not what writes text of this family ({FAMILIES[family]})"
    if config.get("quantization_config"):
        return f"this {family} is quantized already: export the model that it was made from"
    if not (root / "tokenizer.json").is_file():
        return (
            f"{family} has no tokenizer.json here, only files of an older kind: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER) of transformers writes one where the family has a fast tokenizer"
        )
    if is_t5(config) and not scales(config) and _HEAD not in tensors:
        return (
            f"the head of this {family} is its token table, but not scaled as T5's is: the exporter's transformers has "
            "no such model"
        )
    return None


def older(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json as transformers 4 spells it."""
    found = _optimum.older(config, FAMILIES[config["model_type"]])
    if is_t5(config):
        found.pop("scale_decoder_outputs", None)
        found["tie_word_embeddings"] = scales(config)
    return found


def build(root: Path, folder: Path, *, progress: Progress = silent) -> Path:
    """Write the checkpoint in `root` as two float32 graphs into `folder` (new or empty) -> folder/decoder_model.onnx.

    encoder_model.onnx: `input_ids`, `attention_mask`, int64 (batch, source) -> `last_hidden_state`, float32 (batch,
    source, width). decoder_model.onnx: `input_ids` (batch, target), `encoder_hidden_states`, `encoder_attention_mask`
    and the cache `past_key_values.N.decoder.key` and `.value`, float32 (batch, heads, tokens, width of a head), of any
    length from 0 -> `logits` of every position, the longer cache as `present.N.decoder.*`, and keys and values of the
    encoder's states, computed anew, as `present.N.encoder.*`. Weights lie in NAME.data beside each.
    Raises UnsupportedModel, MissingExtra, RuntimeFailed with the end of what the exporter said.
    """
    config = read_json(root, "config.json")
    if config.get("model_type") not in FAMILIES:
        raise UnsupportedModel(f"{root.name}: encoder-decoders of {config.get('model_type')} were not proven")
    python = _optimum.require()
    _optimum.run("build_pair", python, root, older(config), folder, progress)
    for name in (ENCODER, DECODER):
        if not (folder / name).is_file():
            raise RuntimeFailed(
                f"optimum-onnx ended without writing {folder / name}", "this is a bug; please report it"
            )
    return folder / DECODER
