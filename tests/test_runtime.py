"""The llama.cpp session: text, logits, generation, errors; on a model of noise, and on a trained one if it is there."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import CorruptCheckpoint, EdgekitError, RuntimeFailed
from edgekit.runtime import Session
from edgekit.runtime._text import TextStream
from edgekit.runtime.llama_cpp import LlamaSession, open_session
from tests.gguf_models import llama_gguf, noise_gguf

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_gguf(tmp_path_factory.mktemp("noise") / "noise.gguf")


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Path:
    return llama_gguf(test_data / "models" / "stories260K", tmp_path_factory.mktemp("stories") / "stories.gguf")


@pytest.fixture
def session(noise: Path) -> Iterator[LlamaSession]:
    with open_session(noise, n_ctx=256, threads=1) as opened:
        yield opened


def test_what_it_says_of_a_model(session: LlamaSession) -> None:
    kept: Session = session  # mypy: the protocol is implemented
    assert (kept.n_vocab, kept.n_ctx, kept.bos, kept.add_bos) == (265, 256, 1, True)
    assert kept.chat_template == "{{ messages }}"
    assert kept.metadata()["general.name"] == "noise"
    assert kept.notes == ()
    assert session.model.parameters == 265 * 64 * 2 + 64 + 2 * (2 * 64 + 4 * 64 * 64 + 3 * 64 * 128)


@pytest.mark.parametrize("text", ["", " ", "the cat", "é日\x00🙂\n\t", "</s> <s>", "🙂" * 20_000])
def test_tokens_are_the_text(session: LlamaSession, text: str) -> None:
    ids = session.tokenize(text, add_special=False, parse_special=False)
    data = b"".join(session.piece(i) for i in ids)
    assert data.decode() == (" " + text if text else "")  # the vocabulary puts a space before a text
    assert session.detokenize(ids) == text  # ... which is no part of it
    assert session.tokenize(text, add_special=True, parse_special=False) == [1, *ids]


def test_special_tokens_only_on_request(session: LlamaSession) -> None:
    assert session.tokenize("</s>", add_special=False) == [2]
    assert session.piece(2) == b"" and session.piece(2, special=True) == b"</s>"
    assert session.detokenize([2], special=True) == "</s>"
    with pytest.raises(EdgekitError, match="surrogate pair at character 1"):
        session.tokenize("a\ud800", add_special=False)


def test_logits_do_not_depend_on_how_they_are_cut(noise: Path) -> None:
    tokens = [1, *range(40, 140)]
    exact = {"threads": 1, "kv": "f32", "flash": "off"}  # the rest rounds to 16 bits somewhere
    with open_session(noise, n_ctx=256, **exact) as large:  # type: ignore[arg-type]
        whole = large.logits(tokens)
        np.testing.assert_allclose(large.logits(tokens[:30]), whole[:30], atol=1e-4)
    assert whole.dtype == np.float32 and whole.shape == (101, 265)
    assert np.abs(whole).max() > 1
    with open_session(noise, n_ctx=256, n_batch=32, outputs=7, **exact) as small:  # type: ignore[arg-type]
        slabs = list(small.logits_chunks(tokens, first=50))
        assert [at for at, _ in slabs] == list(range(50, 101, 7))
        assert max(len(rows) for _, rows in slabs) == 7
        np.testing.assert_allclose(np.concatenate([rows for _, rows in slabs]), whole[50:], atol=1e-4)
        assert small.logits([]).shape == (0, 265)


def test_greedy_is_the_argmax_of_logits(session: LlamaSession) -> None:
    prompt = session.tokenize("the cat", add_special=True)
    out = list(session.generate(prompt, 12))
    for i, token in enumerate(out):
        assert token == session.logits(prompt + out[:i])[-1].argmax()
    assert len(out) == 12 and session.finish_reason == "length"


def test_seeds_and_filters(session: LlamaSession) -> None:
    def draw(**settings: float) -> list[int]:
        return list(session.generate([1, 50], 20, **settings))  # type: ignore[arg-type]

    greedy = draw()
    assert draw(temperature=1.5, seed=1) == draw(temperature=1.5, seed=1) != draw(temperature=1.5, seed=2)
    assert draw(temperature=1.5, top_k=1) == greedy
    assert draw(temperature=1.5, top_k=0, min_p=1.0) == greedy
    assert draw(temperature=1.5, top_k=0, top_p=0.0, min_p=0.0) == greedy
    assert draw(repeat_penalty=50.0) != greedy


def test_an_end_token_ends_it(session: LlamaSession) -> None:
    runs = [list(session.generate([1, 60], 250, temperature=9.0, top_k=0, top_p=1, min_p=0, seed=s)) for s in range(8)]
    assert all(2 not in run for run in runs)
    ended = [run for run in runs if len(run) < 250]
    assert ended, "none of 2,000 nearly uniform draws from 265 tokens was the end token"
    list(session.generate([1, 60], 250, temperature=9.0, top_k=0, top_p=1, min_p=0, seed=runs.index(ended[0])))
    assert session.finish_reason == "stop"


def test_the_end_of_the_context_ends_it(session: LlamaSession) -> None:
    assert len(list(session.generate([1] * 250, 1000))) <= 6
    assert list(session.generate([1] * 256, 10)) == []
    assert session.finish_reason == "length"
    with pytest.raises(RuntimeFailed, match="257 tokens do not fit in a context of 256"):
        session.generate([1] * 257, 10)
    with pytest.raises(RuntimeFailed, match="token 265 at position 1"):
        session.logits([1, 265])
    with pytest.raises(RuntimeFailed, match="no token to continue"):
        session.generate([], 1)


def test_what_is_in_memory_is_not_read_again(noise: Path, session: LlamaSession) -> None:
    first = [1, *range(30, 90)]
    answer = list(session.generate(first, 5))
    longer = [*first, *answer, 40, 41, 42]
    session_ms_tokens = session.timings().prefill_tokens
    again = list(session.generate(longer, 8))
    assert session.timings().prefill_tokens - session_ms_tokens == len(longer) - len(first) - 4
    branch = [*first[:20], 200, 201, *first[20:]]
    turned = list(session.generate(branch, 8))
    for prompt, got in ((longer, again), (branch, turned)):
        with open_session(noise, n_ctx=256, threads=1) as fresh:
            assert list(fresh.generate(prompt, 8)) == got


def test_one_iteration_at_a_time(session: LlamaSession) -> None:
    slow = session.generate([1, 50], 10)
    next(slow)
    session.logits([1, 2, 3])
    with pytest.raises(RuntimeFailed, match="another call"):
        next(slow)
    session.close()
    with pytest.raises(RuntimeFailed, match="closed"):
        session.logits([1])


def test_reset_forgets(session: LlamaSession) -> None:
    list(session.generate([1, 50, 51], 4))
    spent = session.timings()
    assert spent.prefill_tokens == 3 and spent.decode_tokens == 3
    assert spent.prefill_ms > 0 and spent.decode_ms > 0 and spent.load_ms > 0
    session.reset()
    assert session.timings().prefill_tokens == 0
    assert len(list(session.generate([1, 50, 51], 4))) == 4
    assert session.timings().prefill_tokens == 3


def test_stream_never_splits_a_character_and_stops_exactly(session: LlamaSession) -> None:
    prompt = [1, 50]
    settings = {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 5}
    ids = list(session.generate(prompt, 200, **settings))  # type: ignore[arg-type]
    data = b"".join(map(session.piece, ids))
    parts = list(session.stream(prompt, 200, **settings))  # type: ignore[arg-type]
    assert "".join(parts) == data.decode("utf-8", "replace")
    whole = "".join(parts)
    stop = next(whole[i : i + 2] for i in range(30, len(whole)) if whole[i : i + 2].isascii())
    cut = "".join(session.stream(prompt, 200, stop=["no such text", stop], **settings))  # type: ignore[arg-type]
    assert cut == whole[: whole.index(stop)]
    assert session.finish_reason == "stop"
    fewer = list(session.generate(prompt, 200, stop=[stop], **settings))  # type: ignore[arg-type]
    assert fewer == ids[: len(fewer)] and len(fewer) < len(ids)
    assert stop not in b"".join(map(session.piece, fewer)).decode("utf-8", "replace")


@pytest.mark.parametrize("cuts", list(itertools.combinations(range(1, 9), 2)))
def test_text_stream_at_every_cut(cuts: tuple[int, int]) -> None:
    data = "é日🙂".encode()
    a, b = cuts
    text = TextStream()
    assert "".join([text.feed(data[:a]), text.feed(data[a:b]), text.feed(data[b:]), text.flush()]) == "é日🙂"
    held = TextStream(["日🙂x"])
    assert "".join(map(held.feed, (data[:a], data[a:b], data[b:]))) == "é"
    assert held.flush() == "日🙂" and not held.stopped
    assert TextStream().feed(data[:1]) == ""


def test_longer_context_than_trained_is_noted(noise: Path) -> None:
    with open_session(noise, n_ctx=1024, threads=1) as s:
        assert s.notes == ("the context of 1024 tokens is longer than the 512 the model was trained with",)
    with open_session(noise, n_ctx=0, threads=1) as s:
        assert s.n_ctx == 512 and s.notes == ()


def test_kv_cache_types(tmp_path: Path, noise: Path) -> None:
    model = noise_gguf(tmp_path / "wide.gguf", heads=2)
    tokens = [1, *range(40, 100)]
    seen = {}
    for kv in ("f32", "f16", "q8_0", "q4_0"):
        with open_session(model, n_ctx=256, threads=1, kv=kv, flash="off" if kv == "f32" else "auto") as s:
            seen[kv] = s.logits(tokens)
    error = {kv: np.abs(rows - seen["f32"]).max() for kv, rows in seen.items()}
    assert 0 < error["f16"] < error["q8_0"] < error["q4_0"]
    with pytest.raises(RuntimeFailed, match=r"q8_0.*does not divide n_embd_head_k=16"):
        open_session(noise, n_ctx=256, kv="q8_0")
    with pytest.raises(EdgekitError, match="no KV cache type called 'q9'"):
        open_session(noise, n_ctx=256, kv="q9")
    with pytest.raises(EdgekitError, match="0 threads"):
        open_session(noise, n_ctx=256, threads=0)


@pytest.mark.parametrize("setting", [{"flash": "off"}, {"flash": "on"}, {"mmap": False}, {"n_batch": 16}])
def test_settings_do_not_change_the_numbers(noise: Path, session: LlamaSession, setting: dict[str, object]) -> None:
    tokens = [1, *range(40, 100)]
    with open_session(noise, n_ctx=256, threads=1, **setting) as other:  # type: ignore[arg-type]
        np.testing.assert_allclose(other.logits(tokens), session.logits(tokens), atol=5e-2)


def test_embeddings(noise: Path, session: LlamaSession) -> None:
    texts = ["the cat", "cat the", "the cat", "日" * 30]
    with open_session(noise, n_ctx=128, threads=1, embeddings=True) as s:
        vectors = s.embed(texts)
        assert vectors.shape == (4, 64) and vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
        assert vectors[0] @ vectors[1] < 0.9999
        raw = s.embed(texts[:1], normalize=False)[0]
        np.testing.assert_allclose(raw / np.linalg.norm(raw), vectors[0], atol=1e-5)
        with pytest.raises(RuntimeFailed, match="no logits"):
            s.logits([1])
        with pytest.raises(RuntimeFailed, match="do not fit"):
            s.embed(["日" * 200])
    with open_session(noise, n_ctx=128, threads=1, embeddings=True, pooling="last") as s:
        assert np.abs(s.embed(texts[:1], normalize=False)[0] - raw).max() > 1e-3
    with pytest.raises(RuntimeFailed, match="not opened for embeddings"):
        session.embed(["x"])


def _directory(path: Path) -> None:
    path.mkdir()


def _text(path: Path) -> None:
    path.write_text("<html>404</html>")


def _unknown_family(path: Path) -> None:
    noise_gguf(path, arch="llamma")


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (lambda path: None, "No such file", "path of a .gguf"),
        (_directory, "Is a directory", "path of a .gguf"),
        (_text, "not a GGUF file", "edgekit convert"),
        (_unknown_family, "unknown model architecture: 'llamma'", "upgrade llama-cpp-python"),
    ],
)
def test_refused_files(tmp_path: Path, make: Callable[[Path], None], message: str, hint: str) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    with pytest.raises(RuntimeFailed, match=message) as e:
        open_session(path, n_ctx=64)
    assert hint in e.value.hint and "model.gguf" in str(e.value)


def test_truncated_file(tmp_path: Path, noise: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(noise.read_bytes()[:-5000])
    with pytest.raises(CorruptCheckpoint, match=r"cut\.gguf"):
        open_session(path, n_ctx=64)


def test_the_engine_s_own_reason(tmp_path: Path) -> None:
    path = noise_gguf(tmp_path / "odd.gguf", layers=1)
    data = path.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight")
    path.write_bytes(data)
    with pytest.raises(RuntimeFailed, match=r": tensor 'blk\.0\.attn_q\.weight' not found"):
        open_session(path, n_ctx=64)


def test_its_reason_is_heard_after_others_have_set_the_log(tmp_path: Path, session: LlamaSession) -> None:
    import llama_cpp

    other = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(other, None)
    with pytest.raises(RuntimeFailed, match="unknown model architecture"):
        open_session(noise_gguf(tmp_path / "bad.gguf", arch="llamma"), n_ctx=64)


def test_silent_and_light(noise: Path, tmp_path: Path) -> None:
    """Nothing on stdout or stderr, whatever happens; nothing heavy until a file is opened; a clean exit."""
    bad = noise_gguf(tmp_path / "bad.gguf", arch="llamma")
    script = f"""
import sys
from edgekit.runtime.llama_cpp import open_session
from edgekit.errors import RuntimeFailed
assert not {{"llama_cpp", "psutil", "jinja2"}} & set(sys.modules), sys.modules.keys()
try:
    open_session({str(bad)!r}, n_ctx=64)
except RuntimeFailed:
    pass
left_open = open_session({str(noise)!r}, n_ctx=2048, threads=1)
list(left_open.generate([1, 50], 5))
half_done = left_open.generate([1, 50], 5); next(half_done)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_opening_often_leaks_nothing(noise: Path) -> None:
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()

    def cycle() -> int:
        with open_session(noise, n_ctx=512, threads=1) as s:
            list(s.generate([1, 50], 3, temperature=1.0))
            s.logits([1] * 100)
        return int(process.memory_info().rss)

    for _ in range(5):
        cycle()
    before = cycle()
    after = [cycle() for _ in range(30)][-1]
    assert after - before < 4 << 20, f"{(after - before) / 2**20:.1f} MiB more after 30 sessions"


def test_forgotten_sessions_are_freed_in_order(noise: Path, tmp_path: Path) -> None:
    """The context before its model, also when nobody closed them and the collector finds them in a cycle."""
    odd = tmp_path / "Modèle 1.gguf"
    odd.write_bytes(noise.read_bytes())
    script = f"""
import gc
from edgekit.runtime._llama_library import library
from edgekit.runtime.llama_cpp import open_session
freed, api = [], library().api
def spied(name):
    real = getattr(api, name)
    def call(handle):
        freed.append(name)
        real(handle)
    setattr(api, name, call)
spied("llama_free")
spied("llama_model_free")
class Cycle: pass
for i in range(3):
    session = open_session({str(odd)!r}, n_ctx=64, threads=1)
    list(session.generate([1, 50], 3))
    del session
    gc.collect()
    cycle = Cycle()
    cycle.session = open_session({str(odd)!r}, n_ctx=64, threads=1)
    cycle.session.owner = cycle
    del cycle
    gc.collect()
assert freed == ["llama_free", "llama_model_free"] * 6, freed
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_trained_model_tells_its_story(stories: Path) -> None:
    with open_session(stories, n_ctx=256, threads=1) as s:
        text = "".join(s.stream(s.tokenize(STORY, add_special=True), 40))
    assert text.startswith(", there was a little girl named Lily. She loved to play outside in the park.")
