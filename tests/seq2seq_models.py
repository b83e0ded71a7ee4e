"""Encoder-decoders to test with: picos of noise that transformers saves, and BART's graphs written by hand.

The graphs are what the exporter promises (edgekit.export.onnx._seq2seq.build), made from a checkpoint without it, so
that everything behind it is tested where its environment is not there. transformers judges both.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 512
END = 1
T5 = {
    "vocab_size": VOCAB, "d_model": 128, "d_kv": 32, "d_ff": 192, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "n_positions": 256, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": VOCAB, "d_model": 128, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": END, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
PICOS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", BART),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", BART),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", BART | {"forced_bos_token_id": 7}),
    "marian": ("MarianMTModel", "MarianConfig", BART),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", BART),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART),
}
"""`model_type` -> class, class of its config, settings."""


def make(family: str, root: Path, *, untied: bool = False, **generation: Any) -> Path:
    """A pico of `family` in a folder of `root`, with a tokenizer; `generation` goes into generation_config.json.

    `untied`: a T5 of version 1.1, as transformers 4 saves it: a gated feed-forward, and a head of its own, unscaled.
    """
    import torch
    import transformers

    model_class, config_class, settings = PICOS[family]
    gated = {"feed_forward_proj": "gated-gelu"} if untied else {}
    folder = root / (f"{family}-untied" if untied else family)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings, **gated))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                size = 3.0 if "embed_positions" in name or "relative" in name else 1.2
                p.copy_(size * torch.randn(p.shape, generator=noise) / p.shape[-1] ** 0.5)
            elif "norm" in name and "weight" in name:
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=noise))
            else:
                p.copy_(0.1 * torch.randn(p.shape, generator=noise))
        if family == "t5" and not untied:
            model.shared.weight.mul_(6)  # its head is scaled down
    model.save_pretrained(folder)
    said = json.loads((folder / "generation_config.json").read_text()) | generation
    (folder / "generation_config.json").write_text(json.dumps(said))
    if untied or family == "mt5":
        _give_a_head(folder)
    write_tokenizer(folder)
    return folder


def _give_a_head(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    shape = tensors["shared.weight"].shape
    tensors["lm_head.weight"] = torch.randn(shape, generator=torch.Generator().manual_seed(5)) / shape[-1] ** 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


@cache
def _unigram() -> str:
    """tokenizer.json like T5's: pieces of SentencePiece's kind, and an end behind every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB - 12, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    lines = [line for path in sorted(Path(json.__file__).parent.glob("*.py")) for line in path.read_text().splitlines()]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return str(tokenizer.to_str())


def write_tokenizer(root: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (root / "tokenizer.json").write_text(_unigram(), encoding="utf-8")
    (root / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}), encoding="utf-8")


# --- BART by hand ----------------------------------------------------------------------------------------------------


class Net:
    """Nodes as they are asked for, over the tensors of a BART checkpoint. Values are named by whoever makes them."""

    def __init__(self, root: Path) -> None:
        from safetensors.numpy import load_file

        self.tensors = load_file(root / "model.safetensors")
        self.config = json.loads((root / "config.json").read_text())
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.outputs: list[Any] = []
        self.heads = self.config["decoder_attention_heads"]
        self.width = self.config["d_model"] // self.heads

    def __call__(self, op: str, *inputs: Any, name: str = "", out: str = "", **attributes: Any) -> str:
        from onnx import helper

        name = name or f"/{op}_{len(self.nodes)}"
        given = [self.constant(i) if not isinstance(i, str) else i for i in inputs]
        out = out or f"{name}_output_0"
        self.nodes.append(helper.make_node(op, given, [out], name=name, **attributes))
        return out

    def constant(self, value: Any, name: str = "") -> str:
        from onnx import numpy_helper

        name = name or f"constant_{len(self.constants)}"
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name: str, *, turned: bool = False) -> str:
        value = self.tensors[f"model.{name}"]
        return self.constant(np.ascontiguousarray(value.T if turned else value), f"{name}.T" if turned else name)

    def linear(self, x: str, name: str) -> str:
        product = self(
            "MatMul", x, self.weight(f"{name}.weight", turned=True), name=f"/{name.replace('.l', '/l')}/MatMul"
        )
        return self("Add", product, self.weight(f"{name}.bias"))

    def norm(self, x: str, name: str) -> str:
        scale, shift = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5)

    def split(self, x: str, counted: str, out: str = "") -> str:
        """(batch, tokens, heads * width) -> (batch, heads, tokens, width); the batch is counted in another value."""
        batch = self("Unsqueeze", self("Gather", self("Shape", counted), np.int64(0)), np.array([0]))
        shape = self("Concat", batch, np.array([-1, self.heads, self.width]), axis=0)
        return self("Transpose", self("Reshape", x, shape), perm=[0, 2, 1, 3], out=out)

    def attend(self, x: str, name: str, keys: str, values: str, mask: str) -> str:
        scaled = self("Mul", self.linear(x, f"{name}.q_proj"), np.float32(self.width**-0.5))
        scores = self("MatMul", self.split(scaled, x), self("Transpose", keys, perm=[0, 1, 3, 2]))
        shares = self("Softmax", self("Add", scores, mask), axis=-1)
        mixed = self("Transpose", self("MatMul", shares, values), perm=[0, 2, 1, 3])
        flat = self("Reshape", mixed, np.array([0, 0, self.heads * self.width]))
        return self.norm(self("Add", x, self.linear(flat, f"{name}.out_proj")), f"{name}_layer_norm")

    def feed_forward(self, x: str, layer: str) -> str:
        inner = self("Gelu", self.linear(x, f"{layer}.fc1"))
        return self.norm(self("Add", x, self.linear(inner, f"{layer}.fc2")), f"{layer}.final_layer_norm")

    def embed(self, side: str, first: str) -> str:
        """Tokens and positions; `first`: the position of the first token, int64 ()."""
        length = self("Gather", self("Shape", "input_ids"), np.int64(1))
        where = self("Range", first, self("Add", first, length), np.int64(1))
        rows = self("Gather", self.weight(f"{side}.embed_positions.weight"), self("Add", where, np.int64(2)))
        tokens = self("Gather", self.weight("shared.weight"), "input_ids", name=f"/{side}/embed_tokens/Gather")
        return self.norm(self("Add", tokens, rows), f"{side}.layernorm_embedding")

    def unmasked(self, mask: str) -> str:
        """int64 (batch, tokens) -> float32 (batch, 1, 1, tokens) to add to scores."""
        hidden = self("Sub", np.float32(1), self("Cast", self("Unsqueeze", mask, np.array([1, 2])), to=1))
        return self("Mul", hidden, np.float32(-1e9))

    def output(self, name: str, *shape: str | int) -> None:
        from onnx import helper

        self.outputs.append(helper.make_tensor_value_info(name, 1, shape))

    def model(self, inputs: dict[str, tuple[int, tuple[Any, ...]]]) -> Any:
        from onnx import helper

        given = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        graph = helper.make_graph(self.nodes, "bart", given, self.outputs, list(self.constants.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


SOURCE, TARGET = ("batch_size", "encoder_sequence_length"), ("batch_size", "decoder_sequence_length")


def bart_encoder(root: Path) -> Any:
    net = Net(root)
    x = net.embed("encoder", net.constant(np.int64(0)))
    mask = net.unmasked("attention_mask")
    for i in range(net.config["encoder_layers"]):
        layer = f"encoder.layers.{i}"
        keys, values = (net.split(net.linear(x, f"{layer}.self_attn.{k}_proj"), x) for k in "kv")
        x = net.feed_forward(net.attend(x, f"{layer}.self_attn", keys, values, mask), layer)
    net("Identity", x, out="last_hidden_state")
    net.output("last_hidden_state", *SOURCE, net.config["d_model"])
    return net.model({"input_ids": (7, SOURCE), "attention_mask": (7, SOURCE)})


def bart_decoder(root: Path, *, past: bool = True, states: bool = True) -> Any:
    """The decoder: with an own `past` or as the first step; with the encoder's `states`, or the keys made of them."""
    net = Net(root)
    inputs: dict[str, tuple[int, tuple[Any, ...]]] = {"input_ids": (7, TARGET), "encoder_attention_mask": (7, SOURCE)}
    if states:
        inputs["encoder_hidden_states"] = (1, (*SOURCE, net.config["d_model"]))
    before = net.constant(np.int64(0))
    if past:
        before = net("Gather", net("Shape", "past_key_values.0.decoder.key"), np.int64(2))
    x = net.embed("decoder", before)
    mask, causal = net.unmasked("encoder_attention_mask"), _causal(net, before)
    for i in range(net.config["decoder_layers"]):
        layer = f"decoder.layers.{i}"
        own, cross = [], []
        for k, kind in zip("kv", ("key", "value"), strict=True):
            new = net.linear(x, f"{layer}.self_attn.{k}_proj")
            out = f"present.{i}.decoder.{kind}"
            shape = ("batch_size", net.heads, "past_sequence_length", net.width)
            if past:
                inputs[f"past_key_values.{i}.decoder.{kind}"] = (1, shape)
                own.append(net("Concat", f"past_key_values.{i}.decoder.{kind}", net.split(new, x), axis=2, out=out))
            else:
                own.append(net.split(new, x, out))
            net.output(out, *shape)
        x = net.attend(x, f"{layer}.self_attn", *own, causal)
        for k, kind in zip("kv", ("key", "value"), strict=True):
            shape = ("batch_size", net.heads, SOURCE[1], net.width)
            out = f"present.{i}.encoder.{kind}"
            if states:
                # the first step counts its texts in what it writes, as transformers does
                counted = "encoder_hidden_states" if past else x
                cross.append(
                    net.split(net.linear("encoder_hidden_states", f"{layer}.encoder_attn.{k}_proj"), counted, out)
                )
                net.output(out, *shape)
            else:
                inputs[f"past_key_values.{i}.encoder.{kind}"] = (1, shape)
                cross.append(f"past_key_values.{i}.encoder.{kind}")
        x = net.feed_forward(net.attend(x, f"{layer}.encoder_attn", *cross, mask), layer)
    logits = net("MatMul", x, net.weight("shared.weight", turned=True), name="/lm_head/MatMul")
    net("Add", logits, net.tensors["final_logits_bias"], out="logits")
    net.output("logits", *TARGET, net.config["vocab_size"])
    return net.model(inputs)


def _causal(net: Net, before: str) -> str:
    """float32 (tokens, tokens before and now): minus infinity, nearly, for those behind a token."""
    length = net("Gather", net("Shape", "input_ids"), np.int64(1))
    end = net("Add", before, length)
    rows = net("Unsqueeze", net("Range", before, end, np.int64(1)), np.array([1]))
    columns = net("Unsqueeze", net("Range", np.int64(0), end, np.int64(1)), np.array([0]))
    behind = net("Cast", net("Greater", columns, rows), to=1)
    return net("Mul", behind, np.float32(-1e9))


def build(root: Path, folder: Path, **_: Any) -> Path:
    """What `_seq2seq.build` gives, for a BART."""
    folder.mkdir(parents=True, exist_ok=True)
    save(bart_encoder(root), folder / "encoder_model.onnx")
    save(bart_decoder(root), folder / "decoder_model.onnx")
    return folder / "decoder_model.onnx"


def save(model: Any, path: Path) -> None:
    """With the weights in a file beside it."""
    import onnx

    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
