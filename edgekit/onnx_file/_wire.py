"""Protobuf messages of a file, read where they lie and no further than asked. Knows the wire format; knows no schema.

Encoding: protobuf.dev/programming-guides/encoding. The file may hold gigabytes of weights between the fields: those
are stepped over, never read. Files come from outside, so every length is held against the message around it, and
time and memory against a budget that no real graph comes near.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from edgekit.errors import CorruptCheckpoint

Span = tuple[int, int]
"""Absolute byte offsets, the second one past the end."""

MAX_COST = 8 << 20
"""Fields read of one file, larger things counting more: some seconds. A graph of 100,000 nodes takes half."""
MAX_FIELDS = 1 << 20
"""Fields of one message, and numbers of one list."""
MAX_TEXT_BYTES = 1 << 20
"""One name, path or string attribute."""
MAX_TEXTS_BYTES = 128 << 20

_WINDOW = 1 << 16
_VARINT = 10  # bytes of the longest one
_STEP = 1 << 20
_CUT = "truncated? fetch it again"


class Source:
    """An open file and what may still be spent on it."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self._cost, self._texts = MAX_COST, MAX_TEXTS_BYTES
        self._window, self._at = b"", 0

    def fail(self, message: str, hint: str = "") -> NoReturn:
        raise CorruptCheckpoint(f"{self.path}: {message}", hint)

    def spend(self, cost: int) -> None:
        self._cost -= cost
        if self._cost < 0:
            self.fail("more nodes, names and attributes than any real graph has")

    def message(self, span: Span, what: str) -> Message:
        """The fields of the message at `span`; `what` is its name in an error."""
        at, stop = span
        found: dict[int, list[int | Span]] = {}
        count = 0
        while at < stop:
            tag, at = self._varint(at, stop, what)
            number, kind = tag >> 3, tag & 7
            value: int | Span
            if kind == 0:
                value, at = self._varint(at, stop, what)
            else:
                value = self._payload(kind, at, stop, what)
                at = value[1]
            if not 0 < number < 1 << 29:
                self.fail(f"{what} has a field numbered {number}", "not an ONNX model?")
            found.setdefault(number, []).append(value)
            count += 1
            if count > MAX_FIELDS:
                self.fail(f"{what} has more than {MAX_FIELDS} fields")
        self.spend(count)
        return Message(self, found, what)

    def _payload(self, kind: int, at: int, stop: int, what: str) -> Span:
        if kind == 2:
            size, at = self._varint(at, stop, what)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            self.fail(f"{what} has wire type {kind} at byte {at}", "not an ONNX model?")
        if size > stop - at:
            self.fail(f"{what} ends at byte {stop}, a field of {size} bytes at byte {at} does not", _CUT)
        return at, at + size

    def _varint(self, at: int, stop: int, what: str) -> tuple[int, int]:
        i = at - self._at
        if i < 0 or i + _VARINT > len(self._window):
            self._window, self._at, i = self.read((at, min(at + _WINDOW, self.size)), what), at, 0
        window, limit = self._window, min(len(self._window), i + stop - at)
        value = shift = 0
        while True:
            if i >= limit or shift > 63:
                self.fail(f"{what} holds a number that is cut off or too long at byte {at}", _CUT)
            byte = window[i]
            i += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, self._at + i
            shift += 7

    def read(self, span: Span, what: str) -> bytes:
        """The bytes at `span`. For short ones: whoever calls bounds it."""
        self.file.seek(span[0])
        data = self.file.read(span[1] - span[0])
        if len(data) != span[1] - span[0]:
            self.fail(f"{what} could not be read: the file shrank while it was open", _CUT)
        return data

    def text_bytes(self, span: Span, what: str) -> bytes:
        size = span[1] - span[0]
        self._texts -= size
        if size > MAX_TEXT_BYTES or self._texts < 0:
            self.fail(f"{what}: a text of {size} bytes; no real graph has so much text")
        i = span[0] - self._at
        if i >= 0 and i + size <= len(self._window):
            return self._window[i : i + size]
        return self.read(span, what)

    def varints(self, span: Span, what: str) -> Iterator[int]:
        """Packed varints, as unsigned 64-bit numbers."""
        at, stop = span
        if stop - at > _VARINT * MAX_FIELDS:
            self.fail(f"{what} has more than {MAX_FIELDS} numbers in one list")
        while at < stop:
            self.spend(1)
            value, at = self._varint(at, stop, what)
            yield value

    def count_varints(self, span: Span, what: str) -> int:
        """How many packed varints lie at `span`, without decoding them."""
        count, last = 0, 0
        for at in range(span[0], span[1], _STEP):
            data = np.frombuffer(self.read((at, min(at + _STEP, span[1])), what), np.uint8)
            count += int(np.count_nonzero(data < 0x80))
            last = int(data[-1])
        if last >= 0x80:
            self.fail(f"{what} ends inside a number", _CUT)
        return count


class Message:
    """The fields of one message by number. Every accessor refuses a field of another wire type."""

    __slots__ = ("_fields", "source", "what")

    def __init__(self, source: Source, fields: dict[int, list[int | Span]], what: str) -> None:
        self.source, self._fields, self.what = source, fields, what

    def fail(self, message: str, hint: str = "") -> NoReturn:
        self.source.fail(f"{self.what}: {message}", hint)

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def numbers(self) -> list[int]:
        return sorted(self._fields)

    def _one(self, number: int) -> int | Span | None:
        """A field that may come once. Protobuf lets the last win or merges them: two readers would see two models."""
        values = self._fields.get(number)
        if values is None:
            return None
        if len(values) > 1:
            self.fail(f"field {number} appears {len(values)} times")
        return values[0]

    def span(self, number: int) -> Span | None:
        value = self._one(number)
        if isinstance(value, int):
            self.fail(f"field {number} is a number")
        return value

    def spans(self, number: int) -> list[Span]:
        values = self._fields.get(number, [])
        spans = [v for v in values if not isinstance(v, int)]
        if len(spans) != len(values):
            self.fail(f"field {number} is a number")
        return spans

    def values(self, number: int) -> list[int | Span]:
        """What there is of a repeated number: single ones, and spans of packed ones."""
        return self._fields.get(number, [])

    def unsigned(self, number: int, default: int = 0) -> int:
        value = self._one(number)
        if value is None:
            return default
        if not isinstance(value, int):
            self.fail(f"field {number} is not a number")
        return value

    def integer(self, number: int, default: int = 0) -> int:
        """int32, int64 or enum: negative ones are sent as 64-bit two's complement."""
        return signed(self.unsigned(number, default & 0xFFFF_FFFF_FFFF_FFFF))

    def integers(self, number: int) -> list[int]:
        """A repeated int64, packed or not."""
        out = []
        for value in self._fields.get(number, []):
            if isinstance(value, int):
                out.append(signed(value))
            else:
                out += [signed(v) for v in self.source.varints(value, self.what)]
        return out

    def floats(self, number: int) -> list[float]:
        """A float or repeated float, packed or not."""
        out: list[float] = []
        for span in self.spans(number):
            size = span[1] - span[0]
            if size % 4:
                self.fail(f"field {number} is not made of floats")
            self.source.spend(size // 4)
            out += np.frombuffer(self.source.read(span, self.what), "<f4").tolist()
        return out

    def text(self, number: int, default: str = "") -> str:
        span = self.span(number)
        return default if span is None else self._decoded(span)

    def texts(self, number: int) -> list[str]:
        return [self._decoded(span) for span in self.spans(number)]

    def _decoded(self, span: Span) -> str:
        data = self.source.text_bytes(span, self.what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(f"{data[:40]!r} is not UTF-8")

    def message(self, number: int, what: str) -> Message | None:
        span = self.span(number)
        return None if span is None else self.source.message(span, what)

    def messages(self, number: int, what: str) -> Iterator[Message]:
        for span in self.spans(number):
            yield self.source.message(span, what)


def signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
