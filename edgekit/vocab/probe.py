"""llama.cpp's own tokenizer on a vocabulary without a model: a file of metadata alone, loaded and asked.

Knows how to ask; judges nothing. Costs what loading the vocabulary costs, about a second for 150,000 tokens.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgekit.errors import RuntimeFailed
from edgekit.gguf_file import MetaValue, encode_header


class Probe:
    """A context manager around llama.cpp's vocabulary. `metadata` are tokenizer.* keys. Raises RuntimeFailed."""

    def __init__(self, metadata: Mapping[str, MetaValue], name: str = "probe") -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        header = encode_header({"general.architecture": "llama", "general.name": name} | dict(metadata), [])
        handle, path = tempfile.mkstemp(prefix="edgekit-", suffix=".gguf")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(header.bytes)
            self._model = self._load(path)
        finally:
            Path(path).unlink()
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def _load(self, path: str) -> Any:
        lib = self._lib
        with _log(lib) as lines:
            lib.llama_backend_init()
            params = lib.llama_model_default_params()
            params.vocab_only = True
            model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            reason = " ".join(line for line in lines if line)[-300:]
            raise RuntimeFailed(f"llama.cpp does not load the vocabulary: {reason}")
        return model

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text` (lone surrogates become U+FFFD)."""
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 16
        with _log(self._lib):
            while True:
                ids = (self._lib.llama_token * room)()
                count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special, parse_special)
                if count >= 0:
                    return list(ids[:count])
                if -count <= room:
                    raise RuntimeFailed(f"llama.cpp does not tokenize {text[:40]!r}")
                room = -count

    def stops(self, token: int) -> bool:
        """Whether generation ends at `token`."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def piece(self, token: int) -> bytes:
        """The bytes that `token` prints, special tokens included."""
        buffer = ctypes.create_string_buffer(4096)
        count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(count, 0)]

    def close(self) -> None:
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@contextmanager
def _log(lib: Any) -> Iterator[list[str]]:
    """Collects llama.cpp's errors and keeps its talk off stderr; the callback of before is put back."""
    lines: list[str] = []

    def collect(level: int, text: bytes, _data: object) -> None:
        if level in (3, 4):
            lines.append(text.decode("utf-8", "replace").strip())

    callback = lib.llama_log_callback(collect)
    before, data = lib.llama_log_callback(), ctypes.c_void_p()
    lib.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    lib.llama_log_set(callback, None)
    try:
        yield lines
    finally:
        lib.llama_log_set(before, data)
