"""--report: one page that says what happened, in any browser, whatever the names are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from streamconv.cli.main import main
from streamconv.memory import show_size
from streamconv.memory_trace import Sample
from streamconv.pages import chart, page, runs, tensors, timeline
from streamconv.verification.verdict import TensorError
from tests import tiny

ODD = "mo<script>alert(1)</script>&\"'x"
"""A folder's name that means something to HTML."""


class Parsed(HTMLParser):
    """Elements, attributes and tables of a page; unclosed elements are a failure."""

    VOID = ("meta", "link", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def cell(self, first: str, column: int) -> str:
        return next(row[column] for row in self.rows if row and row[0] == first)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its conversion and the pages of both commands."""
    top = tmp_path_factory.mktemp("report")
    model = str(tiny.write(top / ODD))
    flags = ["--quiet", "--report"]
    assert main(["convert", model, str(top / "out"), "--quant", "int8", "--target-sm", "80", *flags, str(top / "convert.html")]) == 0
    assert main(["verify", str(top / "out"), "--source", model, *flags, str(top / "verify.html")]) == 0
    return top


@pytest.mark.parametrize("name", ["convert.html", "verify.html"])
def test_a_page_stands_alone_and_its_names_are_text(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    parsed = Parsed(text)
    tags = [tag for tag, _ in parsed.tags]
    assert "script" not in tags and "b" not in tags
    links = [value for _, attrs in parsed.tags for key, value in attrs.items() if key in ("src", "href", "action", "xlink:href")]
    assert links == ["data:,"] and "url(" not in text and "@import" not in text
    assert any(ODD in words for words in parsed.words)
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    figures = text.count("<svg")
    assert figures and len(re.findall(r"</svg>\s*</div>\s*<details>", text)) == figures  # each has its table


def test_a_page_says_what_the_run_did(folder: Path) -> None:
    parsed = Parsed((folder / "convert.html").read_text())
    source = sum(value.nbytes for value in tiny.tensors().values())
    assert parsed.cell("all", 1) == show_size(source)
    weights = {name: value.nbytes for name, value in tiny.tensors().items() if "mlp" in name}
    assert parsed.cell("MLP", 1) == show_size(sum(weights.values()))
    rows = [value.shape[0] for name, value in tiny.tensors().items() if "mlp" in name]
    assert parsed.cell("MLP", 2) == show_size(sum(weights.values()) // 2 + 2 * sum(rows))  # a byte each, and a scale for each row
    assert "never quantized" in parsed.cell("lm_head", 1) and parsed.cell("mlp.fc", 1).startswith("int8 per channel")
    words = "".join(parsed.words)
    assert "streamconv convert" in words and 'quant = "int8"' in words and "no GPU" in words


def test_each_of_several_outputs_has_its_sizes_and_errors(folder: Path, tmp_path: Path) -> None:
    outputs = [f"hf:{tmp_path / 'a'}:quant=fp8_dynamic", f"trtllm:{tmp_path / 'b'}:quant=int8,target_sm=80"]
    page = tmp_path / "page.html"
    assert main(["convert", str(folder / ODD), "--output", outputs[0], "--output", outputs[1], "--quiet", "--report", str(page)]) == 0
    text, mlp = page.read_text(), [value for name, value in tiny.tensors().items() if "mlp" in name]
    parsed = Parsed(text)
    sizes = [row[1:3] for row in parsed.rows if row[0] == "MLP"]
    rows, codes = sum(value.shape[0] for value in mlp), sum(value.size for value in mlp)
    assert sizes == [[show_size(2 * codes), show_size(codes + size * rows)] for size in (4, 2)]  # scales in float32 and float16
    for name, kind in (("a", "fp8_dynamic"), ("b", "int8")):
        assert f"Size by kind of module of {tmp_path / name}" in text and kind in parsed.cell(str(tmp_path / name), 1)
    assert text.count("[[output]]") == 2


def test_the_errors_are_those_of_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder / "out"), "--source", str(folder / ODD), "--json"]) == 0
    errors = json.loads(capsys.readouterr().out)["errors"]
    parsed = Parsed((folder / "verify.html").read_text())
    by_name = {error["name"]: error["snr_db"] for error in errors}
    header = next(row for row in parsed.rows if row[0] == "layer")
    for layer in ("0", "1"):
        row = next(row for row in parsed.rows if row[0] == layer)
        assert row[header.index("mlp.fc")] == f"{by_name[f'transformer.layers.{layer}.mlp.fc.weight']:.1f}"
    worst = min((error for error in errors), key=lambda error: error["snr_db"])
    assert parsed.cell(worst["name"], 3) == f"{worst['snr_db']:.1f}"


def test_nothing_is_replaced_but_a_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes.html"
    notes.write_text("<!doctype html><p>mine")
    assert main(["verify", str(folder / "out"), "--report", str(notes)]) == 2
    assert notes.read_text() == "<!doctype html><p>mine" and "stays" in capsys.readouterr().err
    again = tmp_path / "again.html"
    for _ in range(2):
        assert main(["verify", str(folder / "out"), "--quiet", "--report", str(again)]) == 0
    assert [path.name for path in tmp_path.iterdir()] != [] and not list(tmp_path.glob(".*"))


def test_a_page_that_cannot_be_is_refused_before_the_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = ["convert", str(folder / ODD), str(tmp_path / "out"), "--quiet", "--report"]
    assert main([*convert, str(tmp_path / "missing" / "r.html")]) == 6
    assert main([*convert, str(tmp_path / "out" / "r.html")]) == 2
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    assert main([*convert, str(tmp_path / "r.html")]) == 2
    assert not (tmp_path / "out").exists()


def _sample(time: float, **changes: Any) -> Sample:
    held = dict(resident=100 << 20, peak=1 << 27, children=0, cgroup=None, budget=1 << 29, device=0, read=0, written=0, cpu=0.0, phase="p")
    return Sample(time=time, **(held | changes))


def test_rates_are_differences_of_the_counts() -> None:
    """10 MiB a second are read in the first phase; the second counts anew, 30 MiB a second; one processor is busy."""
    samples = [_sample(t / 10, read=t << 20, cpu=t / 10, phase="a") for t in range(50)]
    samples += [_sample(5 + t / 10, read=3 * t << 20, cpu=5 + t / 10, phase="b") for t in range(50)]
    section = timeline.sections(samples)[1]
    assert section.table is not None
    rows = [row for row in section.table.rows if not 4.5 < float(row[0]) < 5.5]
    assert {(float(row[0]) > 5, row[1]) for row in rows} == {(False, "10.00 MiB/s"), (True, "30.00 MiB/s")}
    assert {row[3] for row in rows} == {"1.00"}
    assert timeline.phases(samples) == [("a", 0.0, 4.9), ("b", 4.9, 9.9)]


@pytest.mark.parametrize(
    ("name", "kind", "layer", "module"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "attention", "12", "self_attn.q_proj"),
        ("transformer.layers.0.mlp.fc.weight", "MLP", "0", "mlp.fc"),
        ("model.layers.3.mlp.experts.17.down_proj.weight_packed", "experts", "3", "mlp.experts.*.down_proj"),
        ("model.layers.3.post_attention_layernorm.weight", "norms", "3", "post_attention_layernorm"),
        ("model.embed_tokens.weight", "embedding", "-", "model.embed_tokens"),
        ("lm_head.weight", "output head", "-", "lm_head"),
        ("language_model.model.layers.1.self_attn.q_norm.weight", "norms", "1", "self_attn.q_norm"),
        ("layers.2.attention.wq.weight", "attention", "2", "attention.wq"),
    ],
)
def test_where_a_tensor_belongs(name: str, kind: str, layer: str, module: str) -> None:
    assert tensors.kind(name) == kind and tensors.place(name) == (layer, module)


def test_what_is_below_the_promise_has_a_frame_and_is_named() -> None:
    found = [TensorError("f", f"layers.{layer}.mlp.fc.weight", 8, 0.1, 0.01, snr) for layer, snr in enumerate((40.0, 12.0, float("inf")))]
    heat, worst = tensors.errors(found, 30.0, "")
    assert heat.figure.count("cell low") == 1 and heat.table is not None and worst.table is not None
    assert [row[1] for row in heat.table.rows] == ["40.0", "12.0", "exact"]
    assert [row[0] for row in worst.table.rows] == ["layers.1.mlp.fc.weight", "layers.0.mlp.fc.weight"]


def test_the_page_of_a_calibration_shows_the_largest_inputs(tmp_path: Path) -> None:
    amax = {f"model.layers.{n}.mlp.{m}": float(10 * n + i) for n in range(2) for i, m in enumerate(("up_proj", "down_proj"), 1)}
    told = {"out": "r", "samples": 4, "tokens": 60, "layers": 2, "tensors": 12, "seconds": 1.5, "device": "cpu", "peak_memory": 1 << 30}
    made = page.render(runs.calibration(ODD, told, amax.items(), "text.txt", [], "streamconv calibrate"))
    parsed = Parsed(made)
    assert ["layer", "mlp.down_proj", "mlp.up_proj"] in parsed.rows and ["1", "12", "11"] in parsed.rows and ["0", "2", "1"] in parsed.rows


@pytest.mark.parametrize("top", [1e-6, 0.07, 1, 3, 999, 5e8, 7e12])
@pytest.mark.parametrize("base", [10.0, 1024.0])
def test_ticks_are_few_and_reach(top: float, base: float) -> None:
    marks = chart.ticks(top, base)
    assert marks[0] == 0 and marks[-1] >= top and 2 <= len(marks) <= 7


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def console(path: Path, profile: Path) -> list[str]:
    """What a browser says on its console about a page."""
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    picture = path.with_suffix(".png")
    done = subprocess.run([CHROMIUM, *flags, f"--screenshot={picture}", path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and picture.stat().st_size > 10_000, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_a_browser_has_nothing_to_say(folder: Path, tmp_path: Path) -> None:
    for name in ("convert.html", "verify.html"):
        assert not console(folder / name, tmp_path / "profile")
    broken = tmp_path / "broken.html"
    broken.write_text(page.MARK + (folder / "verify.html").read_text().replace("</h1>", "</h1><script>undefined_name()</script>"))
    assert console(broken, tmp_path / "profile")  # the look above would have seen it
