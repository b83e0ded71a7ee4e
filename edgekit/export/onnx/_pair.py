"""The two graphs of an encoder-decoder, quantized and laid out as transformers.js reads them.

Knows file names and which of the two gets what; the formats are `_storing`'s, the decoder's last form `_branching`'s.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekit.artifact import readable_os_errors
from edgekit.export.onnx import _branching, _layout
from edgekit.export.onnx._child import carry
from edgekit.export.onnx._rewriting import Report
from edgekit.export.onnx._seq2seq import DECODER, ENCODER
from edgekit.export.onnx._storing import store as store_graph
from edgekit.onnx_pair_planning import Pair
from edgekit.onnx_planning import Variant
from edgekit.units import Progress, silent

SHIPPED_ENCODER = "onnx/encoder_model_quantized.onnx"
SHIPPED = "onnx/decoder_model_merged_quantized.onnx"


def store(
    folder: Path, out: Path, variant: Variant, pair: Pair, threads: int = 1, *, progress: Progress = silent
) -> Report:
    """Both float32 graphs in `folder` as `variant` says, into the folder `out` under the same names -> the decoder's
    report, which has the encoder's. Raises what the quantizers raise."""
    parts = ((ENCODER, pair.encoder.layers), (DECODER, pair.decoder.layers))
    done = {
        name: store_graph(folder / name, out / name, variant, layers, None, threads, progress=progress)
        for name, layers in parts
    }
    return replace(done[DECODER], encoder=done[ENCODER])


def ship(root: Path, quantized: Path, stage: Path) -> None:
    """Lay the graph `quantized`, a decoder, and the encoder beside it out in `stage`, with the files of the model in
    `root` that go with them. Weights lie in a file of their own, so that a head and a table can share their bytes.

    Raises CorruptCheckpoint.
    """
    with readable_os_errors(stage):
        (stage / SHIPPED).parent.mkdir(parents=True, exist_ok=True)
        carry(root, stage)
        _layout.write_two_files(quantized.with_name(ENCODER), stage / SHIPPED_ENCODER)
        _layout.write_two_files(quantized, stage / SHIPPED, _branching.branch)
        _layout.announce(stage / "config.json", *(Path(name).name for name in (SHIPPED_ENCODER, SHIPPED)))
