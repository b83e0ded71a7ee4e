"""The encoders against two judges that share no code with them: gguf's numpy quantizers and numpy's own casts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest

from edgekit.errors import EdgekitError, MissingExtra, RuntimeFailed, UnknownName
from edgekit.quant import Format, ggml

REPO = Path(__file__).parents[1]
LATTICE = [n for n in ggml.FORMATS if n.startswith(("IQ1", "IQ2", "IQ3"))]
# relative root-mean-square error on Gaussian rows with an importance vector: a tenth above what the kernels give
BOUNDS = {
    "F32": 0.0, "F16": 3e-4, "BF16": 2e-3, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_K": 0.04, "Q5_1": 0.04, "Q5_0": 0.046,
    "Q4_K": 0.08, "Q4_1": 0.08, "Q4_0": 0.092, "IQ4_NL": 0.085, "IQ4_XS": 0.085, "MXFP4": 0.13, "NVFP4": 0.115,
    "IQ3_S": 0.165, "Q3_K": 0.165, "IQ3_XXS": 0.23, "IQ2_S": 0.3, "Q2_K": 0.31, "IQ2_XS": 0.36, "IQ2_XXS": 0.41,
    "IQ1_M": 0.55, "IQ1_S": 0.58, "Q1_0": 0.67, "Q2_0": 0.8, "TQ1_0": 0.9, "TQ2_0": 0.9,
}  # fmt: skip


def noise(rows: int = 24, cols: int = 512, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32) * np.float32(0.02)


def emphasis(cols: int = 512) -> np.ndarray:
    return np.random.default_rng(9).random(cols, dtype=np.float32) + np.float32(0.05)


def isolated(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run in a fresh interpreter: the library is opened once a process, and an abort must not take the tests along."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", ggml.FORMATS)
def test_the_table_agrees_with_the_gguf_package(name: str) -> None:
    fmt = ggml.FORMATS[name]
    try:
        judged = gguf.GGMLQuantizationType[name]
    except KeyError:
        pytest.skip(f"gguf does not know {name}")
    assert (fmt.code, fmt.block, fmt.size) == (judged.value, *gguf.GGML_QUANT_SIZES[judged])
    assert ggml.by_code(fmt.code) is fmt
    assert ggml.get(name.lower()) is fmt


@pytest.mark.parametrize("name", ggml.FORMATS)
def test_every_format_comes_back_close_and_does_not_depend_on_threads(name: str) -> None:
    rows, weight = noise(), emphasis()
    packed = ggml.encode(rows, name, weight)
    assert packed.shape == (24, ggml.get(name).row_bytes(512))
    for threads in (2, 3, 7):
        assert np.array_equal(packed, ggml.encode(rows, name, weight, threads=threads))
    back = ggml.decode(packed, name, 512)
    assert np.array_equal(back, ggml.decode(packed.tobytes(), name, 512, threads=3))
    assert np.sqrt(np.mean((back - rows) ** 2) / np.mean(rows**2)) <= BOUNDS[name]


@pytest.mark.parametrize("name", [n for n in ggml.FORMATS if n not in {"Q1_0", "Q2_0"}])  # gguf 0.19 lacks these
def test_decoding_agrees_with_the_numpy_decoders_of_gguf(name: str) -> None:
    packed = ggml.encode(noise(), name, emphasis())
    judged = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])
    assert np.allclose(ggml.decode(packed, name, 512), judged, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0"])
def test_encoding_is_bit_identical_to_the_numpy_encoders_of_gguf(name: str) -> None:
    rows = noise()
    assert np.array_equal(ggml.encode(rows, name), gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name]))


def test_half_precision_rounds_as_ieee_does() -> None:
    tricky = np.array([[0.0, -0.0, 6e-8, -6.1e-5, 1.00048828125, 65504.0, 1 / 3, 5.9e-8]], np.float32)
    assert np.array_equal(ggml.encode(tricky, "F16").view(np.float16), tricky.astype(np.float16))


def test_importance_moves_error_away_from_the_columns_that_matter() -> None:
    rows = noise(64)
    weight = np.where(np.arange(512) % 8 == 0, 100.0, 0.01).astype(np.float32)
    plain, guided = (ggml.decode(ggml.encode(rows, "Q3_K", w), "Q3_K", 512) for w in (None, weight))
    heavy = weight > 1
    assert np.mean((guided - rows)[:, heavy] ** 2) < 0.7 * np.mean((plain - rows)[:, heavy] ** 2)


def test_no_rows_are_no_bytes() -> None:
    assert ggml.encode(np.empty((0, 256), np.float32), "Q4_K").shape == (0, 144)
    assert ggml.decode(b"", "Q4_K", 256).shape == (0, 256)


def spoil(value: float) -> np.ndarray:
    rows = noise()
    rows[17, 301] = value
    return rows


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["F32", "F16", "Q4_0", "Q4_K", "IQ3_S"])
def test_a_weight_that_is_no_number_is_named(name: str, value: float, threads: int) -> None:
    with pytest.raises(EdgekitError, match="row 17, column 301 holds"):
        ggml.encode(spoil(value), name, threads=threads)


@pytest.mark.parametrize(("name", "value"), [("F16", 7e4), ("Q4_0", 1e7), ("BF16", 3.4e38), ("IQ3_S", 1e8)])
def test_a_weight_beyond_the_format_is_named(name: str, value: float) -> None:
    with pytest.raises(EdgekitError, match=r"row 17 holds .*" + name):
        ggml.encode(spoil(value), name)


def test_rows_that_do_not_divide_into_blocks_are_refused() -> None:
    with pytest.raises(EdgekitError, match="rows of 288 weights do not divide into Q4_K blocks of 256"):
        ggml.encode(noise(2, 288), "Q4_K")
    with pytest.raises(EdgekitError, match="not whole Q8_0 rows"):
        ggml.decode(bytes(35), "Q8_0", 32)
    with pytest.raises(EdgekitError, match="do not divide"):
        ggml.decode(bytes(34), "Q8_0", 0)


def test_importance_is_checked_before_the_kernel_sees_it() -> None:
    for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"):
        with pytest.raises(EdgekitError, match="needs an importance vector"):
            ggml.encode(noise(), name)
    with pytest.raises(EdgekitError, match="importance of shape"):
        ggml.encode(noise(), "Q4_K", np.ones(256, np.float32))
    for bad in (np.nan, np.inf, -1.0):
        weight = emphasis()
        weight[40] = bad
        with pytest.raises(EdgekitError, match="importance of column 40"):
            ggml.encode(noise(), "IQ2_XS", weight)


def test_unknown_formats_are_named() -> None:
    with pytest.raises(UnknownName) as caught:
        ggml.encode(noise(), "Q4_KM")
    assert "Q4_K" in caught.value.hint
    with pytest.raises(UnknownName, match="ggml_type 31"):
        ggml.by_code(31)


HOSTILE = """
import itertools, sys
import numpy as np
from edgekit.errors import EdgekitError
from edgekit.quant import ggml
rng = np.random.default_rng(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
def power(low, high, shape): return (10.0 ** rng.uniform(low, high, shape)).astype(np.float32)
refused = encoded = 0
for low, high in ((-44, -36), (-20, -12), (-9, -6), (-38, 0), (-3, 6), (-45, 38), (15, 38)):
    rows = power(low, high, (6, 256)) * rng.choice([-1, 0, 1], (6, 256)).astype(np.float32)
    for weight in (None, np.zeros(256), power(-45, -30, 256), power(-45, 38, 256), power(10, 38, 256),
                   np.where(np.arange(256) % 32 < 30, 0, 1e-12), np.ones(256)):
        for name in NAMES:
            if weight is None and ggml.get(name).needs_importance:
                continue
            try:
                ggml.encode(rows, name, None if weight is None else weight.astype(np.float32))
                encoded += 1
            except EdgekitError as error:
                assert "row " in str(error), error
                refused += 1
print(encoded, refused)
"""


@pytest.mark.slow
def test_no_weights_or_importance_make_a_kernel_abort() -> None:
    done = isolated(HOSTILE.replace("NAMES", repr([*LATTICE, "Q2_K", "Q3_K", "IQ4_XS", "MXFP4", "TQ1_0", "Q1_0"])))
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
    encoded, refused = map(int, done.stdout.split())
    assert encoded > 200
    assert refused > 50


def test_the_kernels_load_without_llama_cpp_and_share_its_library() -> None:
    code = """
import sys
import numpy as np
from edgekit.quant import ggml
first = ggml.encode(np.ones((1, 256), np.float32), "Q4_K")
assert "llama_cpp" not in sys.modules
import llama_cpp
assert np.array_equal(first, ggml.encode(np.ones((1, 256), np.float32), "Q4_K"))
if sys.platform == "linux":
    maps = {line.split()[-1] for line in open("/proc/self/maps") if "ggml-base" in line}
    assert len(maps) == 1, maps
"""
    done = isolated(code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_library_of_another_kind_is_refused(tmp_path: Path) -> None:
    wrong = ggml.library_path().with_name(ggml.library_path().name.replace("ggml-base", "ggml"))
    (tmp_path / ggml.library_path().name).symlink_to(wrong)
    code = """
import numpy as np
from edgekit.quant import ggml
try:
    ggml.encode(np.ones((1, 256), np.float32), "Q4_K")
except Exception as error:
    print(type(error).__name__, error, "|", error.hint)
"""
    done = isolated(code, LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert done.stdout.startswith("RuntimeFailed"), done.stdout + done.stderr
    assert "llama-cpp-python 0." in done.stdout
    assert "--force-reinstall" in done.stdout


def test_a_table_that_disagrees_with_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ggml.FORMATS, "Q4_K", Format("Q4_K", 12, 256, 148))
    ggml._library.cache_clear()
    with pytest.raises(RuntimeFailed, match="Q4_K has blocks of 256 weights in 144 bytes"):
        ggml.decode(bytes(34), "Q8_0", 32)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    with pytest.raises(MissingExtra) as caught:
        ggml.library_path()
    assert "pip install" in caught.value.hint
