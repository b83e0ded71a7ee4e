"""The process that runs onnxruntime-genai's model builder: it knows what that builder does wrongly and repairs it.

    python -m edgekit.export.onnx._genai_child MODEL_FOLDER OUTPUT_FOLDER

A process of its own because the builder puts a folder of top-level modules on `sys.path`, prints all the time and keeps
the weights until it ends. Everything it prints belongs to whoever started it; a traceback is the failure report.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

OPTIONS = ("windowed_kv_cache=false", "hf_token=false", "hf_remote=false")

# Families whose transformers code slides every layer's window and whose config has no list of layer types.
SLIDE_EVERY_LAYER = frozenset({"mistral", "phi3"})

# Names of the nodes that compute rotary tables begin with ROTARY; COUNT ends that of the constant with their rows.
ROTARY, COUNT = "/rotary", "positions_count"

# transformers' OlmoLayerNorm has this constant; its config has no setting for it.
OLMO_EPSILON = 1e-5


def main(root: str, folder: str) -> None:
    """Write the float32 graph of the checkpoint in `root`, and genai_config.json beside it, into `folder`."""
    import onnxruntime_genai.models  # noqa: F401  puts the builder's own modules on sys.path
    from onnxruntime_genai.models import builder

    builder.get_hf_details = partial(_repaired_details, builder.get_hf_details)
    request = (None, root, folder, "fp32", "cpu", str(Path(folder, "cache")))
    options = builder.parse_extra_options(*request, list(OPTIONS))
    builder.create_model(*request, **options)


def _repaired_details(get_details: Callable[..., dict[str, Any]], *args: Any, **settings: Any) -> dict[str, Any]:
    """What the builder knows of the checkpoint, its config repaired and its rotary tables exact."""
    from transformers import AutoConfig

    details = get_details(*args, **settings)
    config = details["hf_config"]
    source = AutoConfig.from_pretrained(details["hf_name"])  # one more: the builder writes into its own
    _name_architecture(config)
    _set_epsilon(config)
    _set_windows(config)
    _repair_models()
    if _own_tables(config):
        _neutral_rope(config)
        _exact_tables(source)
    return details


def _name_architecture(config: Any) -> None:
    """A config.json without `architectures` gets its family's causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not config.architectures:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]


def _set_epsilon(config: Any) -> None:
    """The builder knows `rms_norm_eps` alone and takes 1e-6 for a norm with another name for it."""
    if not hasattr(config, "rms_norm_eps"):
        named = getattr(config, "layer_norm_eps", None) or getattr(config, "norm_eps", None)
        config.rms_norm_eps = named or OLMO_EPSILON


def _set_windows(config: Any) -> None:
    """The builder slides what `layer_types` says, transformers slides these families by `sliding_window` alone."""
    if config.model_type in SLIDE_EVERY_LAYER:
        kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        config.layer_types = [kind] * config.num_hidden_layers


def _repair_models() -> None:
    """What is wrong in the builder's classes and not in what they read."""
    base, smollm = import_module("builders.base").Model, import_module("builders.smollm").SmolLM3Model
    gemma, olmo = import_module("builders.gemma").GemmaModel, import_module("builders.olmo").OLMoModel
    plain_make_model, plain_attention = base.make_model, smollm.make_attention

    def make_model(model: Any, input_path: str) -> None:
        if isinstance(model, gemma):  # the builder rounds sqrt(hidden size) to two decimals
            model.embed_attrs["scale"] = float(model.hidden_size) ** 0.5
        if isinstance(model, olmo):  # subtracts the mean; the builder takes it for an RMS norm
            model.layernorm_attrs["simple"] = False
        plain_make_model(model, input_path)

    def attention(model: Any, layer_id: int, *args: Any, **settings: Any) -> None:
        # A layer without rotation is none at all; the builder would rotate outside of the attention operator.
        model.attention_attrs["rope"] = bool(model.no_rope_layers[layer_id])
        plain_attention(model, layer_id, *args, **settings)

    def is_head(model: Any, module: Any) -> bool:
        # The builder takes every linear layer whose width is the vocabulary's for the head.
        return module is model.weights.get_output_embeddings()

    base.make_model, base.has_lm_head = make_model, is_head
    smollm.make_attention = attention


def _own_tables(config: Any) -> bool:
    """Whether rotary tables are ours to make; Hunyuan's scale the base inside its own builder class."""
    parameters = getattr(config, "rope_parameters", None)
    return isinstance(parameters, dict) and "alpha" not in parameters


def _neutral_rope(config: Any) -> None:
    """Tell the builder of unscaled rotation only: the scaling is in the tables (`_exact_tables`)."""
    parameters = dict(config.rope_parameters)
    if "full_attention" in parameters:  # one rotation a layer type: the builder's Gemma3 wants both bases
        config.rope_local_base_freq = parameters["sliding_attention"]["rope_theta"]
        parameters = dict(parameters["full_attention"])
    longrope = parameters["rope_type"] == "longrope"
    if longrope and config.original_max_position_embeddings != config.max_position_embeddings:
        config.rope_parameters = parameters | {"type": "longrope"}  # two tables: the builder must know
        return
    if config.model_type == "phi3":  # one table: the builder decides by these two
        config.original_max_position_embeddings = config.max_position_embeddings
    kept = {k: parameters[k] for k in ("rope_theta", "partial_rotary_factor") if k in parameters}
    config.rope_parameters = kept | {"rope_type": "default"}


def _exact_tables(source: Any) -> None:
    """Have the builder rotate by the frequencies that transformers computes for `source`: one row of them in the graph
    and the nodes that make the tables of it, which onnxruntime computes once, when it loads the graph. Two tables in
    the branches of an If stay tables."""
    base = import_module("builders.base").Model
    in_branches = base.make_rotary_embedding_caches

    def tables(model: Any) -> tuple[Any, Any]:
        """(cos, sin), float32 (positions, rotated dimensions / 2)."""
        import torch

        frequencies, scale = _frequencies(model, source)
        positions = torch.arange(model.rope_attrs["cache_length"]).float()
        angles = torch.outer(positions, frequencies.float())
        return angles.cos() * scale, angles.sin() * scale

    def computed(model: Any, **names: str) -> Any:
        rope = model.rope_attrs
        if not rope["save_caches"]:
            return in_branches(model, **names)
        cos, sin = names.get("cos_cache_name", "cos_cache"), names.get("sin_cache_name", "sin_cache")
        if rope["create_caches"]:
            rope["create_caches"] = False
            _compute_tables(model, cos, sin, *_frequencies(model, source))
        return cos, sin

    base.make_rotary_embedding_caches_from_scratch = tables
    base.make_rotary_embedding_caches = computed


def _compute_tables(model: Any, cos: str, sin: str, frequencies: Any, scale: float) -> None:
    """Nodes that give `cos` and `sin`, float32 (positions, rotated dimensions / 2), from `frequencies`."""
    ir = import_module("onnx_ir")
    types = ir.DataType
    at, wide = ROTARY + cos.removeprefix("cos_cache"), ["positions", frequencies.numel()]
    model.make_initializer(frequencies.float().reshape(1, -1), f"{at}/inv_freq")
    # constants of nodes lie in the graph itself, not in the data file
    for name, value, dtype in ((COUNT, model.rope_attrs["cache_length"], types.INT64), ("scale", scale, types.FLOAT)):
        constant = ir.tensor(value, dtype=dtype, name=f"{at}/{name}")
        model.make_node("Constant", inputs=[], outputs=[f"{at}/{name}"], name=f"{at}/{name}/Constant", value=constant)
        model.make_value(f"{at}/{name}", dtype, shape=[])
    zero, one, axis = (f"/model/constants/INT64/{value}" for value in ("0", "1", "[1]"))
    model.make_range(f"{at}/Range", [zero, f"{at}/{COUNT}", one], types.INT64, wide[:1])
    model.make_cast(f"{at}/Cast", f"{at}/Range/output_0", types.FLOAT, wide[:1])
    model.make_unsqueeze(f"{at}/Unsqueeze", [f"{at}/Cast/output_0", axis], types.FLOAT, ["positions", 1])
    model.make_mul(f"{at}/Mul", [f"{at}/Unsqueeze/output_0", f"{at}/inv_freq"], types.FLOAT, wide)
    for op, table in (("Cos", cos), ("Sin", sin)):
        model.make_node(op, inputs=[f"{at}/Mul/output_0"], outputs=[f"{at}/{op}/output_0"], name=f"{at}/{op}")
        model.make_value(f"{at}/{op}/output_0", types.FLOAT, shape=wide)
        scaled = [f"{at}/{op}/output_0", f"{at}/scale"]
        model.make_node("Mul", inputs=scaled, outputs=[table], name=f"{at}/{op}/Mul")
        model.make_value(table, types.FLOAT, shape=wide)


def _frequencies(model: Any, source: Any) -> tuple[Any, float]:
    """Inverse frequencies of the table that `model` makes now, and the factor on cos and sin."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, where = source.rope_parameters, {}
    if "full_attention" in parameters:  # the builder makes the global table first
        kind = "sliding_attention" if hasattr(model, "cos_cache_local_name") else "full_attention"
        parameters, where = parameters[kind], {"layer_type": kind}
    if parameters["rope_type"] == "default":
        rotated = int(model.head_size * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
        return parameters["rope_theta"] ** -exponents, 1.0
    length = None
    if parameters["rope_type"] == "longrope":
        both = model.rope_attrs.get("multi_cache")
        long = both is not None and model.rope_attrs["rescale_factors"] is both["long_factor"]
        length = source.original_max_position_embeddings + int(long)
    compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    frequencies, scale = compute(source, torch.device("cpu"), seq_len=length, **where)
    return frequencies, float(scale)


if __name__ == "__main__":
    main(*sys.argv[1:])
