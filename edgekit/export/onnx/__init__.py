"""ONNX artefacts: built by onnxruntime-genai, torch or optimum-onnx, quantized here, laid out for their runtimes."""

from edgekit.export.onnx._engines import GRAPH, Engine, cut_positions, engine_for
from edgekit.export.onnx._moments import MEMORY, moment_bytes, observe, open_moments
from edgekit.export.onnx._pair import store as store_pair
from edgekit.export.onnx._quantize import Moments
from edgekit.export.onnx._rewriting import Report
from edgekit.export.onnx._static import batches_of
from edgekit.export.onnx._storing import store

__all__ = [
    "GRAPH", "MEMORY", "Engine", "Moments", "Report", "batches_of", "cut_positions", "engine_for", "moment_bytes",
    "observe", "open_moments", "store", "store_pair",
]  # fmt: skip
