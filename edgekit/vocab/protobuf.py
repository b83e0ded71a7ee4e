"""SentencePiece's `tokenizer.model`, read without protobuf. Knows the wire format and the few fields that matter here.

Field numbers: google/sentencepiece `sentencepiece_model.proto`. Encoding: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import CorruptCheckpoint, UnsupportedVocabulary
from edgekit.vocab.files import MAX_MODEL_BYTES, read_bytes

MAX_PIECES = 1 << 21
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""SentencePiece's piece types; llama.cpp's `llama_token_type` uses the same numbers."""
UNIGRAM, BPE = 1, 2


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """What the model file says. `pieces` are (text, score, type) by id."""

    pieces: tuple[tuple[str, float, int], ...]
    model_type: int
    byte_fallback: bool
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    normalizer: str
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    whitespace_as_suffix: bool


def read_sentencepiece(path: Path) -> SentencePiece:
    """Raises CorruptCheckpoint for a damaged file, UnsupportedVocabulary for a tiktoken list of the same name."""
    data = read_bytes(path, MAX_MODEL_BYTES)
    if _is_tiktoken(data):
        raise UnsupportedVocabulary(
            f"{path} is a tiktoken list, not a SentencePiece model", "put the model's tokenizer.json beside it"
        )
    try:
        return _model(data)
    except (ValueError, struct.error, UnicodeDecodeError) as e:
        raise CorruptCheckpoint(f"{path}: not a SentencePiece model ({e})", "download the file again") from None


def _is_tiktoken(data: bytes) -> bool:
    """Lines of `base64 rank`."""
    first = data[:200].split(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].isdigit() and first[0].isascii()


def _model(data: bytes) -> SentencePiece:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
            if len(pieces) > MAX_PIECES:
                raise ValueError(f"more than {MAX_PIECES} pieces")
        elif number == 2:
            trainer |= dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer |= dict(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    return SentencePiece(
        pieces=tuple(pieces),
        model_type=_int(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(_int(trainer.get(35, 0))),
        bos_id=_int(trainer.get(41, 1)),
        eos_id=_int(trainer.get(42, 2)),
        unk_id=_int(trainer.get(40, 0)),
        pad_id=_int(trainer.get(43, (1 << 64) - 1)),
        normalizer=_bytes(normalizer.get(1, b"")).decode(),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(_int(normalizer.get(3, 1))),
        remove_extra_whitespaces=bool(_int(normalizer.get(4, 1))),
        escape_whitespaces=bool(_int(normalizer.get(5, 1))),
        whitespace_as_suffix=bool(_int(trainer.get(24, 0))),
    )


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3:
            kind = _int(value)
    if not NORMAL <= kind <= BYTE:
        raise ValueError(f"piece {text!r} has type {kind}")
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value): varints as unsigned ints, everything else as its raw bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes at byte {at} leaves the file")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"a number is cut off at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"expected bytes, found the number {value}")
    return value


def _int(value: int | bytes) -> int:
    """A varint that stands for an int32 or bool: negative numbers are sent as 64-bit two's complement."""
    if not isinstance(value, int):
        raise ValueError("expected a number, found bytes")
    return value - (1 << 64) if value >= 1 << 63 else value
