"""What is seen of a run: progress for people and programs, memory over time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from streamconv import memory, memory_trace
from streamconv.calibration.child import calibrate_apart
from streamconv.cli import view
from streamconv.cli.main import main
from streamconv.memory_trace import MemoryTrace
from streamconv.progress import Meter, Progress, unwatched
from tests import tiny

BUDGET = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("seen") / "model")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_conversion_leaves_its_memory_over_time(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    flags = ["--quant", "int8", "--target-sm", "80", "--memory-budget", "1GiB", "--memory-trace", str(trace)]
    assert main(["convert", str(model), str(tmp_path / "out"), "--quiet", *flags]) == 0
    told = lines(trace)
    size = sum(value.nbytes for value in tiny.tensors().values())
    assert [entry["time"] for entry in told] == sorted(entry["time"] for entry in told)
    last = told[-1]
    assert (last["phase"], last["read"], last["budget"]) == ("done", size, BUDGET)
    assert 0 < last["written"] <= (tmp_path / "out" / "rank0.safetensors").stat().st_size
    assert all(0 < entry["resident"] <= entry["peak"] + (8 << 20) for entry in told)
    assert abs(last["peak"] - memory.peak_resident()) < 64 << 20
    assert told[0]["phase"] == "starting" and told[0]["budget"] is None


def test_verify_is_traced(model: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace.jsonl"
    assert main(["convert", str(model), str(out), "--quiet"]) == 0
    assert main(["verify", str(out), "--source", str(model), "--quiet", "--memory-trace", str(trace)]) == 0
    assert lines(trace)[-1]["phase"] == "done" and lines(trace)[-1]["read"] > 0


def test_a_failed_run_leaves_its_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    assert main(["convert", str(tmp_path / "missing"), str(tmp_path / "out"), "--quiet", "--memory-trace", str(trace)]) == 3
    assert lines(trace)


@pytest.mark.parametrize("place", ["out", "out/trace.jsonl", "out/deeper/trace.jsonl"])
def test_no_trace_in_the_output(model: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), str(tmp_path / "out"), "--memory-trace", str(tmp_path / place)]) == 2
    assert "lies in the output" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_trace_in_the_source(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There it would be a side file that changes."""
    assert main(["convert", str(model), str(tmp_path / "out"), "--to", "hf", "--memory-trace", str(model / "trace.jsonl")]) == 2
    assert "lies in the source" in capsys.readouterr().err and not (model / "trace.jsonl").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_trace_replaces_a_trace_and_nothing_else(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, other = tiny.write(tmp_path / "source"), tiny.write(tmp_path / "other")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    trace, wrong = tmp_path / "trace", other / name
    assert main(["convert", str(source), str(tmp_path / "out"), "--memory-trace", str(wrong)]) == 2
    assert f"{name}: the file is no memory trace, and stays" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before and not (tmp_path / "out").exists()
    for out in ("one", "two"):
        assert main(["convert", str(source), str(tmp_path / out), "--quiet", "--memory-trace", str(trace)]) == 0
    assert json.loads(trace.read_text().splitlines()[0])["time"] >= 0


def test_a_trace_that_cannot_be_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not at all: the run does not begin. Later (the disk is full): it goes on, and says so."""
    assert main(["convert", str(model), str(tmp_path / "out"), "--memory-trace", str(tmp_path / "missing" / "t.jsonl")]) == 6
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(model), str(tmp_path / "out"), "--memory-trace", "/dev/full"]) == 0
    assert "warning: --memory-trace /dev/full ends early" in capsys.readouterr().err


def test_what_is_kept_in_memory_is_bounded_and_keeps_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_trace, "_KEPT", 40)
    monkeypatch.setattr(memory_trace, "_resident_of_all", lambda processes: 0)
    sizes = iter([*range(1, 1000), 10_000_000, *range(1, 1000)])
    monkeypatch.setattr(memory, "resident_of", lambda status: (next(sizes), 0))
    trace = MemoryTrace(Meter(unwatched))
    monkeypatch.setattr(memory_trace, "start_thread", lambda *_: None)
    with trace:
        for _ in range(1990):
            trace._add()
    assert 15 < len(trace.samples) <= 42
    assert max(sample.resident for sample in trace.samples) == 10_000_000
    times = [sample.time for sample in trace.samples]
    assert times == sorted(times)


def test_progress_for_programs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON lines on standard error, one object on standard output."""
    assert main(["convert", str(model), str(tmp_path / "out"), "--json", "--progress", "json"]) == 0
    shown = capsys.readouterr()
    records = [json.loads(line) for line in shown.err.splitlines()]
    size = sum(value.nbytes for value in tiny.tensors().values())
    assert [record["phase"] for record in records if record["phase"] != "converting"] == ["syncing", "done"]
    assert records[-1]["done"] == records[-1]["total"] == size and records[-1]["resident"] > 0
    assert json.loads(shown.out)["bytes_read"] == size


@pytest.mark.parametrize("flags", [["--quiet"], ["--progress", "none"], ["--json"]])
def test_no_progress(model: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), str(tmp_path / "out"), *flags]) == 0
    assert not capsys.readouterr().err


def test_lines_come_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    meter = view.meter("lines", False)
    meter._clock = lambda: now[0]
    meter.begin("converting", 1000, memory_budget=BUDGET)
    for _ in range(25):
        now[0] += 1
        meter.tile(10, 5)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and re.fullmatch(r"converting +1\d\.0 %  \d+ B of 1000 B  \d+ B/s  \d+ s left  memory .* of 1\.00 GiB", told[0])


def test_a_terminal_shows_one_line_and_ci_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view.output, "is_live", lambda: True)
    monkeypatch.delenv("CI", raising=False)
    for ci, marks in ((None, True), ("true", False)):
        if ci:
            monkeypatch.setenv("CI", ci)
        meter = view.meter("auto", False)
        meter.begin("converting", 100)
        meter.add(50)
        meter.phase("syncing")
        meter.end()
        shown = capsys.readouterr().err
        assert (shown.count("\r") >= 2 and shown.endswith("\n")) if marks else not shown  # it took no 10 s
        assert all(len(part) < 81 for part in re.split(r"[\r\n]", shown))


def test_each_of_several_outputs_tells_how_far_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import streamconv

    told = list[Progress]()
    targets = streamconv.TensorRTLLM(tp_size=2), streamconv.HuggingFace(quant="fp8_dynamic")
    streamconv.convert(model, targets[1].to(tmp_path / "b"))
    asked = [target.to(tmp_path / name) for target, name in zip(targets, "ab", strict=True)]
    streamconv.convert(model, *asked, watch=told.append)
    files = [list((tmp_path / name).glob("*.safetensors")) for name in "ab"]
    one, two = (sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in held) for held in files)
    assert [(each.done, each.total, each.finished) for each in told[-1].outputs] == [(one, one, False), (two, two, True)]
    assert told[0].outputs[0].done == 0 and str(told[0].outputs[1]) == f"already finished: {tmp_path / 'b'}"
    streamconv.convert(model, *asked, watch=told.append)
    assert all(each.finished for each in told[-1].outputs)

    monkeypatch.setattr(view.output, "is_live", lambda: True)
    monkeypatch.delenv("CI", raising=False)
    flags = [f"--output=trtllm:{tmp_path / 'c'}", f"--output=hf:{tmp_path / 'b'}:quant=fp8_dynamic"]
    assert main(["convert", str(model), *flags]) == 0
    assert re.search(r"\n +0\.0 %  0 B of .*\n  already finished: /", capsys.readouterr().err)
    assert main(["convert", str(model), *flags, "--force", "--progress", "json"]) == 0
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert [(each["out"], each["done"] == each["total"]) for each in last["outputs"]] == [(str(tmp_path / name), True) for name in "cb"]


def test_a_calibration_counts_layers_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    meter = view.meter("json", False)
    meter._every = 0
    calls = view.layers(meter)
    calls["sampled"](1, 3, 40, 512)
    calls["progress"](2, 3, 1.0)
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(entry["done"], entry["resumed"], entry["detail"]) for entry in told] == [(1, 1, ""), (1, 1, "sample 40 of 512"), (2, 1, "")]
    assert view._line(Progress("calibrating", 1, 3, 4.0, "layers", detail="sample 40 of 512")) == "layer 2 of 3, sample 40 of 512, 8 s left"
    assert view._line(Progress("calibrating", 2, 3, 4.0, "layers", resumed=1)) == "layer 2 of 3, 4 s left"


def test_the_child_tells_of_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Child:
        returncode = 0
        stdin = (tmp_path / "in").open("w")
        stdout = ('{"sampled": [0, 2, 3, 8]}', '{"progress": [1, 2, 0.5]}', '{"told": {"samples": 8}}')

        def __enter__(self) -> Child:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def poll(self) -> int:
            return 0

    monkeypatch.setattr("streamconv.calibration.child.process.start_interpreter", lambda *_: Child())
    seen: list[tuple[float, ...]] = []
    arguments = {"model": "m", "out": str(tmp_path / "r")}
    assert calibrate_apart(arguments, lambda *all: seen.append(all), (), lambda *all: seen.append(all)) == {"samples": 8}
    assert seen == [(0, 2, 3, 8), (1, 2, 0.5)]
