"""Which versions of ONNX the installed onnxruntime takes: asked, not looked up in a table that falls behind."""

from __future__ import annotations

from pathlib import Path

from edgekit.errors import MissingExtra, UnsupportedModel

_OLD_IR = 8  # of 2021: beside it only the opset can be what is refused


def runnable(path: Path, ir: int, opset: int) -> None:
    """Raise UnsupportedModel if onnxruntime refuses a model of one node in this IR version, or in this opset."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnxruntime is not installed", 'pip install "edgekit[onnx-runtime]"') from None
    for what, version, pair in (("IR version", ir, (ir, 1)), ("opset", opset, (min(ir, _OLD_IR), opset))):
        if _runs(*pair):
            continue
        older = range(min(version - 1, 99), 0, -1)
        known = next((v for v in older if _runs(*((v, 1) if what == "IR version" else (pair[0], v)))), 0)
        raise UnsupportedModel(
            f"{path} is of {what} {version}; onnxruntime {onnxruntime.__version__} runs up to {known}",
            "pip install -U onnxruntime",
        )


def _runs(ir: int, opset: int) -> bool:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(_one_node(ir, opset), options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - the bindings raise a class of their own per status code; any refusal counts
        return False
    return True


def _one_node(ir: int, opset: int) -> bytes:
    """ModelProto: y = Identity(x), both float tensors of one element."""
    value = b"\x12" + _sized(b"\x0a" + _sized(b"\x08\x01\x12" + _sized(b"\x0a" + _sized(b"\x08\x01"))))
    node = b"\x0a\x01x\x12\x01y\x22" + _sized(b"Identity")
    ends = (b"\x5a" + _sized(b"\x0a\x01x" + value)) + (b"\x62" + _sized(b"\x0a\x01y" + value))
    graph = b"\x0a" + _sized(node) + b"\x12\x01g" + ends
    return b"\x08" + _number(ir) + b"\x42" + _sized(b"\x10" + _number(opset)) + b"\x3a" + _sized(graph)


def _sized(data: bytes) -> bytes:
    return _number(len(data)) + data


def _number(value: int) -> bytes:
    out = bytearray()
    value &= 0xFFFF_FFFF_FFFF_FFFF
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
