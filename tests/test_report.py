"""The HTML page: what it says, that nothing from an artefact becomes markup, and that a browser asks for nothing."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edgekit import artifact, benchmark, pipeline, report
from edgekit.errors import CorruptCheckpoint, EdgekitError, OutputExists
from tests import pico

VOID = {"meta", "link", "br"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '</style><script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>\'"&<svg onload=alert(2)>'


class Page(HTMLParser):
    """Text and elements of a page; fails where a tag is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str, cls: str | None = None) -> int:
        return sum(t == tag and (cls is None or cls in (a.get("class") or "").split()) for t, a in self.elements)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    model = pico.llama(root / "pico", hidden=256, layers=3, dtype="BF16")
    options = pipeline.Options(out=root / "made", quant="Q4_K_M", calibration="none")
    return pipeline.convert(str(model), "rpi5", options).out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "artefact")


def change(folder: Path, **values: Any) -> Path:
    """The manifest with some keys replaced."""
    path = folder / "edgekit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def read(*folders: Path) -> Page:
    return Page(report.page([report.read_facts(f) for f in folders]))


CANDIDATES: list[dict[str, Any]] = [
    {"name": "Q4_0", "kind": "preset", "nbytes": 4_000_000, "kl": 0.02, "kl_stderr": 0.001, "shipped": False},
    {"name": "Q8_0", "kind": "preset", "nbytes": 8_000_000, "kl": 0.0004, "kl_stderr": 0.00001, "shipped": False},
    {"name": "mixed", "kind": "ours", "nbytes": 3_990_000, "kl": 0.008, "kl_stderr": 0.0004, "shipped": True},
    {"name": "dice", "kind": "random", "bytes": 3_990_000, "kl": 0.03, "kl_stderr": 0.002, "shipped": False},
]
FLIPS = {
    "prompts": 3, "changed": 2, "max_tokens": 8,
    "answers": [
        {"prompt": "Why?", "at": 3, "tokens": 8, "reference": "Because of the sea", "candidate": "Because of rain"},
        {"prompt": "Same", "at": None, "tokens": 4, "reference": "yes", "candidate": "yes"},
        {"prompt": "Short", "at": 2, "tokens": 8, "reference": "No more", "candidate": "No"},
    ],
}  # fmt: skip


def test_the_page_says_what_the_manifest_holds(folder: Path) -> None:
    page = read(folder)
    manifest = json.loads((folder / "edgekit.json").read_text())
    for check in manifest["certificate"]["checks"]:
        assert check["detail"] in page.text
    for word in ("pico", "Raspberry Pi 5", "Q4_K_M", "forecast", "llama-cpp-python", manifest["versions"]["numpy"]):
        assert word in page.text, word
    assert "No comparison was made" in page.text
    assert "No answers were compared" in page.text
    assert "Not measured yet" in page.text
    assert page.count("circle", "mark") == 0, "nothing was compared or measured: no point is drawn"


def test_every_matrix_has_its_cell(folder: Path) -> None:
    tensors = json.loads((folder / "edgekit.json").read_text())["plan"]["tensors"]
    inside = [t for t in tensors if len(t["shape"]) > 1 and t["name"].startswith("blk.")]
    page = read(folder)
    heat = [a for t, a in page.elements if t == "rect" and re.fullmatch("h[0-7]", a.get("class") or "")]
    assert len(heat) == len(inside) == 3 * 7
    for t in inside:
        assert f"{t['format']}, " in page.text
    assert "token_embd" in page.text


def test_candidates_are_drawn_and_the_one_shipped_is_ringed(folder: Path) -> None:
    page = read(change(folder, candidates=CANDIDATES, doubt=0.0123))
    assert page.count("circle", "preset") == 2
    assert [a["class"] for t, a in page.elements if t == "path"].count("mark random") == 1
    assert page.count("circle", "shipped") == 1
    assert "1.23%" in page.text
    assert "0.00800 ± 0.00040" in page.text
    points = {a["class"]: (float(a["cx"] or 0), float(a["cy"] or 0)) for t, a in page.elements if t == "circle"}
    assert points["shipped"] == points["mark ours"]


def test_larger_is_to_the_right_and_worse_is_above(folder: Path) -> None:
    two = [c | {"kind": "preset", "shipped": False} for c in CANDIDATES[:2]]
    page = read(change(folder, candidates=two))
    larger, worse = [(float(a["cx"] or 0), float(a["cy"] or 0)) for t, a in page.elements if t == "circle"]
    assert worse[0] < larger[0]
    assert worse[1] < larger[1], "SVG counts downwards"


def ladder(count: int = 9) -> list[dict[str, Any]]:
    """Stock presets whose divergence halves with every further half megabyte."""
    sizes = [2_500_000 + 500_000 * i for i in range(count)]
    return [
        {"name": f"Q{i}_K_M", "kind": "preset", "nbytes": n, "kl": 0.2 / 2**i, "kl_stderr": 0.02 / 2**i}
        for i, n in enumerate(sizes)
    ]


def polyline(page: Page) -> list[tuple[float, float]]:
    (points,) = [a["points"] or "" for t, a in page.elements if t == "polyline"]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]


def test_the_stock_presets_of_other_sizes_make_a_line(folder: Path) -> None:
    worse = {"name": "Q9_0", "kind": "preset", "nbytes": 5_000_000, "kl": 0.05, "kl_stderr": 0.001}
    own = {"name": "mixed", "kind": "mix", "nbytes": 4_250_000, "kl": 0.00625, "kl_stderr": 0.0004, "shipped": True}
    page = read(change(folder, candidates=[own], ladder=[*ladder(), worse]))
    line = polyline(page)
    assert len(line) == 9, "a preset that a smaller one beats is no part of the line"
    assert page.count("circle", "preset") == 10
    steps = {round(b[0] - a[0]) for a, b in pairwise(line)}
    drops = {round(b[1] - a[1]) for a, b in pairwise(line)}
    assert max(steps) - min(steps) <= 1, "sizes are linear"
    assert max(drops) - min(drops) <= 1, "halving the divergence is one step of a logarithmic axis"
    # 4.25 MB is half way between 4.0 (KL 0.025) and 4.5 (0.0125); KL 0.00625 is the preset of 5.0 MB
    assert f"stands at KL {0.025 / 2**0.5:.3g}; what is shipped has {0.00625 / (0.025 / 2**0.5):.2f} of it" in page.text
    assert "On that line this KL takes 4.77 MiB, 18% more." in page.text


def test_a_candidate_stands_for_the_rung_of_its_name(folder: Path) -> None:
    stock = ladder()[4] | {"kl": 0.0123, "shipped": True}
    page = read(change(folder, candidates=[stock], ladder=ladder()))
    assert page.count("circle", "preset") == 9
    assert page.count("circle", "shipped") == 1
    assert "0.0123 ± 0.0013" in page.text
    assert "On that line" not in page.text, "a stock preset was shipped: there is nothing to compare"


def test_a_ladder_alone_is_drawn(folder: Path) -> None:
    page = read(change(folder, ladder=ladder()))
    assert len(polyline(page)) == 9
    assert page.count("span", "ring") == 0, "the legend names what is drawn"


def test_names_are_apart_however_close_the_marks(folder: Path) -> None:
    near = [c | {"nbytes": 4_000_000 + 40_000 * i, "kl": 0.01 + 0.0002 * i} for i, c in enumerate(ladder())]
    page = read(change(folder, candidates=CANDIDATES, ladder=near))
    boxes = []
    for tag, a in page.elements:
        if tag == "text" and "point" in (a.get("class") or "").split():
            boxes.append((float(a["x"] or 0), float(a["y"] or 0), a.get("text-anchor")))
    assert len(boxes) >= 10
    for i, (x, y, anchor) in enumerate(boxes):
        for other in boxes[:i]:
            assert abs(y - other[1]) >= 11 or anchor != other[2] or abs(x - other[0]) > 20


def test_one_model_has_one_line_for_all_its_artefacts(folder: Path, tmp_path: Path) -> None:
    learned = {"tokens": 65536, "held_out": 16384, "text": "self"}
    other = shutil.copytree(folder, tmp_path / "other")
    smaller = [c | {"nbytes": 3_000_000, "name": "tiny"} if c["shipped"] else c for c in CANDIDATES]
    change(folder, candidates=CANDIDATES, ladder=ladder(), calibration=learned)
    change(other, candidates=smaller, ladder=ladder(), calibration=learned)

    def drawn(*folders: Path) -> tuple[int, int]:
        text = report.page([report.read_facts(f) for f in folders])
        page = Page(text[: text.index("<details class=whole>")] + "</main></body></html>")
        return page.count("polyline"), page.count("circle", "ours")

    assert drawn(folder, other) == (1, 2)
    change(other, calibration=learned | {"tokens": 99})
    assert drawn(folder, other) == (0, 2), "divergences on other text have no common line"


def test_answers_of_an_evaluation_come_before_those_of_the_conversion(folder: Path) -> None:
    change(folder, flips=FLIPS)
    artifact.keep(folder, artifact.EVALUATION, {"flips": None})
    assert "2 of 3 greedy answers differ" in read(folder).text
    artifact.keep(folder, artifact.EVALUATION, {"flips": {"prompts": 7, "answers": []}})
    assert "0 of 7 greedy answers differ" in read(folder).text


ONNX = (
    "/model/layers.{}/attn/qkv_proj/MatMul", "model.layers.{}.mlp.down_proj.weight", "/encoder/layer.{}/output/MatMul",
    "/transformer/h.{}/attn/c_attn/Gemm", "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
)  # fmt: skip


@pytest.mark.parametrize("pattern", ONNX)
def test_the_map_of_an_onnx_graph(folder: Path, pattern: str) -> None:
    def tensor(name: str, form: str, bits: int, rows: int = 64) -> dict[str, Any]:
        return {"name": name, "shape": [rows, 64], "format": form, "bytes": rows * 64 * bits // 8}

    tensors = [tensor(pattern.format(i), "int8 b32" if i == 1 else "int4 b32", 9 if i == 1 else 5) for i in range(3)]
    tensors.append(tensor("/lm_head/MatMul", "int8 b32", 9, 512))
    plan = json.loads((folder / "edgekit.json").read_text())["plan"]
    page = read(change(folder, format="onnx", plan=plan | {"preset": "int4", "tensors": tensors}))
    heat = [a["class"] for t, a in page.elements if t == "rect" and re.fullmatch("h[0-7]", a.get("class") or "")]
    assert heat == ["h4", "h6", "h4"]
    part = re.sub(r"^.*?\{\}.|[./](MatMul|Gemm|weight)$", "", pattern).replace("/", ".")
    assert f"layer 1 {part}: int8 b32, 4.50 KiB, 9.00 bits per weight" in page.text
    assert "lm_head int8 b32 9.00 36.0 KiB" in page.text


def test_what_an_onnx_artefact_was_verified_by_is_its_quality(folder: Path) -> None:
    numbers = {"compared": 64, "kl": 0.0029, "top1": 0.984375, "cosine": None, "relative": 0.015}
    page = read(change(folder, format="onnx", certificate={"level": "quick", "figures": {"numbers": numbers}}))
    for word in ("0.002900", "98.44", "against transformers in float32, 64 places"):
        assert word in page.text, word
    assert "cosine" not in page.text
    assert "0.0029 nats per token" in page.text
    chosen = [{"name": "int4", "kind": "preset", "nbytes": 9, "kl": 0.0041, "kl_stderr": 0.0001, "shipped": True}]
    page = read(change(folder, candidates=chosen))
    assert "0.0041 nats per token" in page.text, "thousands of places say more than 64"
    change(folder, candidates=[])
    encoder = {"compared": 7, "kl": None, "top1": None, "cosine": 0.99993}
    page = read(change(folder, format="onnx", certificate={"level": "quick", "figures": {"numbers": encoder}}))
    assert "cosine of the vectors, lowest 0.99993" in page.text
    assert "not measured" in page.text


def test_layers_of_two_stacks_do_not_cover_each_other(folder: Path) -> None:
    names = [f"{stack}.block.{i}.layer.0.SelfAttention.q.weight" for stack in ("encoder", "decoder") for i in range(2)]
    tensors = [{"name": n, "shape": [8, 8], "format": "fp32", "bytes": 256} for n in names]
    page = read(change(folder, plan={"tensors": tensors}))
    heat = [a for t, a in page.elements if t == "rect" and re.fullmatch("h[0-7]", a.get("class") or "")]
    assert len(heat) == 4
    assert "decoder.layer.0.SelfAttention.q" in page.words


def test_changed_answers_stand_side_by_side(folder: Path) -> None:
    page = read(change(folder, flips=FLIPS))
    assert "2 of 3 greedy answers differ" in page.text
    assert page.count("details", "pair") == 2
    assert "the sea" in page.text
    assert "(ends here)" in page.text


def test_what_was_kept_is_shown(folder: Path) -> None:
    rows = [
        {"n_prompt": 512, "n_gen": 0, "avg_ts": 101.4, "stddev_ts": 2.0, "cpu_info": "Some CPU", "n_threads": 4},
        {"n_prompt": 0, "n_gen": 128, "avg_ts": 12.34, "stddev_ts": 0.5, "board": "Some Board", "n_threads": 4},
    ]
    artifact.keep(folder, artifact.BENCH, rows)
    comparison = {"tokens": 4096, "kl_mean": 0.00123, "kl_stderr": 0.00004, "top1": 0.95, "top1_stderr": 0.002}
    scores = [{"task": "arc", "metric": "acc", "value": 0.5, "stderr": 0.1}]
    kept = {"comparison": comparison, "text": "held.txt", "reference": "pico", "flips": FLIPS, "tasks": scores}
    artifact.keep(folder, artifact.EVALUATION, kept)
    page = read(folder)
    for word in ("12.3 tok/s", "Some Board, 4 threads", "101 ± 2", "0.001230 ± 0.000040", "held.txt", "95.00 ± 0.20",
                 "2 of 3 greedy"):  # fmt: skip
        assert word in page.text, word
    assert page.count("circle", "ours") == 2
    artifact.open_artifact(folder).verify()


def test_bench_keeps_what_the_page_shows(folder: Path) -> None:
    model = artifact.model_file(folder)
    result = benchmark.bench(model, prompt=8, generate=4, repetitions=2, threads=1, isolate=False)
    benchmark.keep(result, folder)
    speeds = report.read_facts(folder).speeds
    assert [s.name for s in speeds] == ["pp8", "tg4"]
    assert speeds[1].tok_s == pytest.approx(result.tests[1].avg_ts, abs=1e-5)
    assert str(folder) not in (folder / "bench.json").read_text(), "a page does not tell where it was measured"


def test_several_artefacts_are_compared(folder: Path, tmp_path: Path) -> None:
    other = change(shutil.copytree(folder, tmp_path / "other"), candidates=CANDIDATES)
    change(folder, candidates=[c | {"kl": 2 * c["kl"]} for c in CANDIDATES])
    page = read(folder, other)
    assert "2 artefacts side by side" in page.text
    assert page.count("details", "whole") == 2
    first = page.words.index("Comparison")
    assert {"artefact", "other"} <= set(page.words[first : first + 40])


# --- from outside ----------------------------------------------------------------------------------------------------


def poisoned(value: Any) -> Any:
    """Every text of a manifest replaced by markup, except those by which the artefact is opened."""
    if isinstance(value, dict):
        kept = {"files", "model_file", "schema"}
        return {k: v if k in kept else poisoned(v) for k, v in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_no_text_becomes_markup(folder: Path) -> None:
    change(folder, candidates=CANDIDATES, ladder=ladder(), flips=FLIPS)
    manifest = poisoned(json.loads((folder / "edgekit.json").read_text()))
    manifest["versions"] = {HOSTILE: HOSTILE}
    (folder / "edgekit.json").write_text(json.dumps(manifest))
    text = report.page([report.read_facts(folder), report.read_facts(folder)])
    page = Page(text)
    assert HOSTILE in "".join(page.words)
    assert {"script", "img", "iframe", "object", "a", "form"} & {tag for tag, _ in page.elements} == set()
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset")], tag
        assert attributes.get("href", "data:,") == "data:,"
    assert text.count("</style>") == 1
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_whatever_a_manifest_holds_gives_a_page_or_a_refusal(folder: Path) -> None:
    change(folder, candidates=CANDIDATES, ladder=ladder(), flips=FLIPS)
    whole = json.loads((folder / "edgekit.json").read_text())
    whole["plan"]["tensors"] = whole["plan"]["tensors"][:12]
    rng = random.Random(5)
    odd = [None, True, -1, 0, 1e308, 10**400, float("nan"), float("inf"), "", "\ud800", "x" * 9000, [], {}, [[[]]]]

    def damage(value: Any, chance: float) -> Any:
        if rng.random() < chance:
            return rng.choice(odd)
        if isinstance(value, dict):
            return {k: damage(v, chance) for k, v in value.items()}
        return [damage(v, chance) for v in value] if isinstance(value, list) else value

    for chance in (0.01, 0.05, 0.2):
        for _ in range(40):
            broken = damage(whole, chance)
            if not isinstance(broken, dict):
                continue
            sound = {k: whole[k] for k in ("schema", "files", "model_file")}
            (folder / "edgekit.json").write_text(json.dumps(broken | sound))
            for name in (artifact.BENCH, artifact.EVALUATION):
                (folder / name).write_text(json.dumps(damage([whole["plan"], whole["flips"]], chance)))
            text = report.page([report.read_facts(folder)])
            Page(text)
            text.encode("utf-8")
            assert not re.search(r'="-?(nan|inf)', text), "every length drawn is a number"


def test_a_damaged_result_is_named(folder: Path) -> None:
    (folder / "bench.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"bench\.json"):
        report.write([folder])


def test_only_reports_are_replaced(folder: Path, tmp_path: Path) -> None:
    path = report.write([folder])
    assert path == folder / "report.html"
    report.write([folder])
    other = tmp_path / "notes.html"
    other.write_text("mine")
    with pytest.raises(OutputExists, match=r"notes\.html"):
        report.write([folder], other)
    assert other.read_text() == "mine"
    report.write([folder], other, force=True)
    with pytest.raises(EdgekitError, match="is a folder"):
        report.write([folder], tmp_path)
    with pytest.raises(EdgekitError, match=r"edgekit\.json"):
        report.write([tmp_path])
    assert not list(tmp_path.rglob("*.part"))


# --- a real browser --------------------------------------------------------------------------------------------------

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def browse(path: Path, work: Path) -> tuple[str, str, set[str]]:
    """(DOM, what the console said, hosts that the page asked for) in a browser with a fresh profile."""
    work.mkdir()
    log, network = work / "chrome.log", work / "net.json"
    command = [
        str(CHROMIUM), *_FLAGS, f"--user-data-dir={work / 'profile'}", "--enable-logging", f"--log-file={log}",
        f"--log-net-log={network}", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    said = "\n".join(line for line in log.read_text(errors="replace").splitlines() if "CONSOLE" in line)
    hosts = set(re.findall(r'"url":"(?:https?|wss?|ftp)://([^/"]+)', network.read_text(errors="replace")))
    own = re.compile(r"(.+\.)?(google|googleapis|gstatic)\.com(:\d+)?")  # the browser asks for updates of itself
    return done.stdout, said, {host for host in hosts if not own.fullmatch(host)}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_it_without_an_error_or_a_request(folder: Path, tmp_path: Path) -> None:
    change(folder, candidates=CANDIDATES, ladder=ladder(), flips=FLIPS)
    manifest = poisoned(json.loads((folder / "edgekit.json").read_text()))
    (folder / "edgekit.json").write_text(json.dumps(manifest))
    path = report.write([folder, folder], tmp_path / "page.html")
    shown, said, hosts = browse(path, tmp_path / "guarded")
    assert (said, hosts) == ("", set())
    dom = Page(shown)
    assert "2 artefacts side by side" in dom.text
    assert dom.count("script") == 0
    assert dom.count("circle", "shipped") == 2
    # the page needs no policy to be quiet, and the check can see a page that is not
    policy = re.compile(r"<meta http-equiv[^>]+>")
    path.write_text(policy.sub("", path.read_text()))
    assert browse(path, tmp_path / "open")[1:] == ("", set())
    path.write_text(path.read_text().replace("<footer>", '<img src="http://evil.example/a"><footer>'))
    assert browse(path, tmp_path / "loud")[2] == {"evil.example"}


MEASURE = """<script>
const boxes = [...document.querySelector("svg").querySelectorAll("text.point")].map(t => t.getBoundingClientRect());
const hit = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2;
const frame = document.querySelector("svg").getBoundingClientRect();
const outside = boxes.filter(b => b.left < frame.left || b.right > frame.right + 1 || b.top < frame.top).length;
let touching = 0;
boxes.forEach((a, i) => boxes.slice(0, i).forEach(b => { touching += hit(a, b) }));
document.title = `${boxes.length} names, ${touching} touching, ${outside} outside`;
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_names_do_not_touch_as_a_browser_draws_them(folder: Path, tmp_path: Path) -> None:
    near = [c | {"nbytes": c["nbytes"] // 3 + 3_200_000, "kl_stderr": 0.0} for c in ladder(13)]
    text = report.page([report.read_facts(change(folder, candidates=CANDIDATES, ladder=near))])
    path = tmp_path / "measured.html"
    path.write_text(re.sub(r"<meta http-equiv[^>]+>", "", text).replace("</body>", MEASURE + "</body>"))
    shown = browse(path, tmp_path / "browser")[0]
    found = re.search("<title>([^<]+)</title>", shown)
    assert found is not None
    assert found[1] == "17 names, 0 touching, 0 outside"
