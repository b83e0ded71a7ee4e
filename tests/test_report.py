"""The HTML page: what it says, that nothing from an artefact becomes markup, and that a browser asks for nothing."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
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
    return pipeline.convert(str(model), "rpi5", pipeline.Options(out=root / "made", quant="Q4_K_M")).out


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


CANDIDATES = [
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
    assert page.count("path", "random") == 1
    assert page.count("circle", "shipped") == 1
    assert "1.23%" in page.text
    assert "0.00800 ± 0.00040" in page.text
    points = {a["class"]: (float(a["cx"] or 0), float(a["cy"] or 0)) for t, a in page.elements if t == "circle"}
    assert points["shipped"] == points["mark ours"]


def test_larger_is_to_the_right_and_worse_is_above(folder: Path) -> None:
    two = [c | {"kind": "preset", "shipped": False} for c in CANDIDATES[:2]]
    page = read(change(folder, candidates=two))
    worse, larger = [(float(a["cx"] or 0), float(a["cy"] or 0)) for t, a in page.elements if t == "circle"]
    assert worse[0] < larger[0]
    assert worse[1] < larger[1], "SVG counts downwards"


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
    change(folder, candidates=CANDIDATES, flips=FLIPS)
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
    change(folder, candidates=CANDIDATES, flips=FLIPS)
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
    change(folder, candidates=CANDIDATES, flips=FLIPS)
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
