"""The four functions as a program or a notebook calls them: results, progress, and the usual mistakes."""

from __future__ import annotations

import gc
import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamconv import progress
from streamconv.errors import BudgetError, CheckpointError, OutputError, RefusedError, UsageError, VerifyError
from streamconv.options import Resources
from streamconv.progress import Meter, Progress
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verbs import calibrate, convert, plan, verify
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("source") / "model")


def _alive() -> int:
    """Objects of plans and runs."""
    own = re.compile(r"<class 'streamconv\.(planning|run\.output_state|run\.pool|checkpoint\.index)\.")
    return sum(bool(own.match(str(type(one)))) for one in gc.get_objects())


@pytest.mark.parametrize(
    "target", [TensorRTLLM(), TensorRTLLM(quant="int8", target_sm=90), HuggingFace(quant="nvfp4a16")], ids=lambda target: target.quant
)
def test_a_plan_goes_with_its_last_user(model: Path, tmp_path: Path, target: TensorRTLLM | HuggingFace) -> None:
    """In a cycle it would stay in a program that converts many models: Python looks for cycles among old objects rarely."""

    def use() -> int:
        plan(model, target)
        convert(model, tmp_path / "out", target, force=True)
        assert not verify(tmp_path / "out", model).problems
        return _alive()

    use()  # what modules keep of their own is there
    gc.collect()
    gc.disable()
    try:
        assert use() == use()
    finally:
        gc.enable()


def test_plan_convert_verify(model: Path, tmp_path: Path) -> None:
    target = TensorRTLLM(tp_size=2, quant="int8", target_sm=90)
    made = plan(model, target)
    assert [file.name for file in made.files] == ["rank0.safetensors", "rank1.safetensors"]
    assert made.bytes_read == sum(value.nbytes for value in tiny.tensors().values()) and not made.warnings and made.decisions
    report = convert(str(model), tmp_path / "out", target, resources=Resources(workers=1))
    assert report.bytes_written == made.bytes_written and report.files == 2 and report.workers == 1
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("rank*")) == sum(file.size for file in made.files)
    verdict = verify(tmp_path / "out", model)
    assert not verdict.problems and verdict.encoded == report.tensors


def test_the_least_that_can_be_said(model: Path, tmp_path: Path) -> None:
    assert convert(model, tmp_path / "out").files == 1
    assert not verify(tmp_path / "out").problems
    assert plan(model).bytes_written == sum(file.stat().st_size for file in (tmp_path / "out").iterdir() if file.name != "streamconv.json")


def test_a_plan_knows_what_is_in_the_way(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert any("convert would refuse this output" in line for line in plan(model, out=tmp_path / "out").warnings)
    assert plan(model, out=tmp_path / "new").warnings == ()
    with pytest.raises(OutputError):
        convert(model, tmp_path / "out")


def records(model: Path, out: Path, **more: Any) -> list[Progress]:
    seen: list[Progress] = []
    convert(model, out, TensorRTLLM(), resources=Resources(tile_rows=16, workers=2), watch=seen.append, **more)
    return seen


def test_progress_of_a_conversion(model: Path, tmp_path: Path) -> None:
    size = sum(value.nbytes for value in tiny.tensors().values())
    seen = records(model, tmp_path / "out")
    phases = list(dict.fromkeys(now.phase for now in seen))
    assert phases == ["converting", "syncing", "done"]
    assert (seen[0].done, seen[-1].done) == (0, size) and {now.total for now in seen} == {size}
    assert {now.unit for now in seen} == {"bytes"} and all((now.memory_budget or 0) > 0 for now in seen)
    with pytest.raises(AttributeError):
        seen[0].done = 3  # type: ignore[misc]
    assert len(records(model, tmp_path / "out", force=True)) >= 3


def test_progress_of_verify(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out")
    seen: list[Progress] = []
    verify(tmp_path / "out", model, watch=seen.append)
    totals = {now.phase: now.total for now in seen}
    assert list(totals) == ["checking", "comparing", "done"]
    assert totals["checking"] == (tmp_path / "out" / "rank0.safetensors").stat().st_size
    assert totals["comparing"] == plan(model).bytes_read


def test_a_watch_that_raises_stops_the_run_and_the_next_one_goes_on(model: Path, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(now: Progress) -> None:
        if now.phase == "syncing":
            raise Enough

    with pytest.raises(Enough):
        convert(model, tmp_path / "out", watch=stop)
    assert not (tmp_path / "out").exists()
    assert convert(model, tmp_path / "out").resumed > 0


def test_records_grow_and_come_one_at_a_time() -> None:
    """From many threads, whatever the watch does meanwhile."""
    seen, inside = list[int](), threading.Lock()

    def watch(now: Progress) -> None:
        assert inside.acquire(blocking=False)
        seen.append(now.done)
        inside.release()

    meter = Meter(watch, every=0)
    meter.begin("converting", 4000)

    def work() -> None:
        for _ in range(1000):
            meter.add(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meter.add(5)  # more than was said
    meter.end()
    assert seen == sorted(seen) and seen[0] == 0 and seen[-2:] == [4000, 4000]


def test_records_are_no_closer_than_asked() -> None:
    now, seen = [0.0], list[Progress]()
    meter = Meter(seen.append, every=1.0, clock=lambda: now[0])
    meter.begin("converting", 100)
    for _ in range(10):
        now[0] += 0.3
        meter.add(10)
    assert [(round(one.seconds, 1), one.done) for one in seen] == [(0.0, 0), (1.2, 40), (2.4, 80)]
    assert str(seen[1]) == " 40.0 %  40 B of 100 B  33 B/s  2 s left"


def test_bar(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    convert(model, tmp_path / "out", watch="bar")
    lines = stream.getvalue().split("\r")[1:]
    assert re.match(r"converting  \| {24}\|   0\.0 %", lines[0]) and lines[-1].startswith("done        |" + "#" * 24)
    assert lines[-1].endswith("\n") and "\n" not in "".join(lines[:-1])
    monkeypatch.setattr("sys.stderr", None)  # pythonw, a daemon
    progress.show_bar(Progress("converting", 1, 2, 1.0))


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"target": "int8"}, r"target is a value of type str.*streamconv\.TensorRTLLM"),
    ({"target": Resources()}, r"target is a value of type Resources"),
    ({"target": TensorRTLLM}, r"target is a value of type type"),
    ({"target": TensorRTLLM(quant="int5")}, r"int5"),
    ({"target": TensorRTLLM(tp_size=0)}, r"at least 1"),
    ({"resources": TensorRTLLM()}, r"resources is a value of type"),
    ({"resources": Resources(memory_budget="2GiB")}, r"memory_budget='2GiB'.*memory_budget=2147483648, in bytes"),  # type: ignore[arg-type]
    ({"resources": Resources(memory_budget="much")}, r"memory_budget='much'\) is not int or None"),  # type: ignore[arg-type]
    ({"resources": Resources(device="gpu")}, r"gpu"),
    ({"out": None}, r"out is None, not a path"),
    ({"out": ""}, r"out is empty"),
    ({"source": 7}, r"source is a value of type int, not a path"),
    ({"watch": "line"}, r"watch='line' is neither a callable nor 'bar'"),
    ({"watch": True}, r"watch=True is neither"),
]


ILL_TYPED: list[tuple[dict[str, Any], str]] = [
    ({"tp_size": "2"}, r"TensorRTLLM\(tp_size='2'\) is not int"),
    ({"tp_size": 2.0}, r"TensorRTLLM\(tp_size=2\.0\) is not int"),
    ({"tp_size": True}, r"tp_size=True\) is not int"),
    ({"tp_size": np.int64(2)}, r"tp_size=.*\) is not int"),
    ({"target_sm": "90"}, r"target_sm='90'\) is not int or None"),
    ({"rope_tables": 1}, r"rope_tables=1\) is not bool"),
    ({"target_version": 1.1}, r"not one of '0\.16', '1\.0', '1\.2'"),
    ({"quant": None}, r"quant=None\) is not str"),
]


@pytest.mark.parametrize(("options", "told"), ILL_TYPED, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_an_option_of_another_type_is_refused_when_the_target_is_made(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        TensorRTLLM(**options)


@pytest.mark.parametrize(("given", "told"), MISTAKES, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_mistakes_are_named_before_anything_is_written(model: Path, tmp_path: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        convert(**{"source": model, "out": tmp_path / "out"} | given)
    assert not list(tmp_path.iterdir())


def test_what_is_meant_is_taken(model: Path, tmp_path: Path) -> None:
    """An int for a float and a path object for a string give the bytes that the declared type gives."""
    convert(model, tmp_path / "one", TensorRTLLM(smoothquant=1))
    convert(model, tmp_path / "two", TensorRTLLM(smoothquant=1.0))
    assert (tmp_path / "one" / "streamconv.json").read_bytes() == (tmp_path / "two" / "streamconv.json").read_bytes()
    with pytest.raises(UsageError, match="nowhere"):
        plan(model, TensorRTLLM(quant="fp8", activation_ranges=tmp_path / "nowhere"))  # type: ignore[arg-type]


def test_other_errors(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        plan(tmp_path / "nowhere")
    with pytest.raises(BudgetError):
        convert(model, tmp_path / "out", resources=Resources(memory_budget=1 << 20))
    with pytest.raises(RefusedError):
        plan(model, TensorRTLLM(tp_size=3))
    with pytest.raises(VerifyError):
        verify(model.parent / "nowhere")
    with pytest.raises(UsageError, match="out is None"):
        verify(None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not a number of bytes"):
        calibrate(model, tmp_path / "ranges", "text.txt", memory_budget="2GiB")  # type: ignore[arg-type]
    assert json.loads((model / "config.json").read_text())["hidden_size"] == tiny.HIDDEN and not list(tmp_path.iterdir())
