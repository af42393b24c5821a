"""How long a conversion should take is told before it, from the rates of the disks, and held against what it took afterwards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamconv import estimate
from streamconv.cli.main import main
from streamconv.hub.shard import HubShard
from streamconv.planning.memory_plan import MemoryPlan
from streamconv.run import probe
from tests import tiny

INT8 = ("--quant", "int8", "--target-sm", "80")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("estimate") / "model")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as large."""
    monkeypatch.setattr(estimate, "SMALLEST", 0)
    monkeypatch.setattr(estimate, "LARGE", 0)


def told(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    assert main([*command, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("same_disk", [True, False])
def test_the_time_is_what_the_rates_make_of_the_bytes(
    model: Path, tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], same_disk: bool
) -> None:
    """A slow disk that both reads and writes needs both times; of two, the slower one counts."""
    monkeypatch.setattr(probe, "read_rate", lambda *_: 1000.0)
    monkeypatch.setattr(probe, "write_rate", lambda *_: 300.0)
    real = os.stat

    def stat(path: Any, *rest: Any, **more: Any) -> Any:
        found = real(path, *rest, **more)
        return os.stat_result((*found[:2], 1 if str(path).startswith(str(model)) else 2, *found[3:])) if not same_disk else found

    monkeypatch.setattr(estimate.os, "stat", stat)
    plan = told(capsys, "plan", str(model), str(tmp_path / "out"), *INT8)
    read, write = plan["bytes_to_read"] / 1000, plan["bytes_to_write"] / 300
    assert plan["time"]["seconds"] == pytest.approx((read + write if same_disk else max(read, write)) + 0.6, abs=0.01)
    assert plan["time"]["bound"] == "the disks" and plan["time"]["unknown"] == []
    assert (plan["time"]["read_rate"], plan["time"]["write_rate"]) == (1000, 300)


def test_a_probe_leaves_nothing_and_needs_no_permission(
    model: Path, tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, real = list[list[str]](), os.fdatasync

    def look(fd: int) -> None:
        seen.append(os.listdir(tmp_path))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", look)
    plan = told(capsys, "plan", str(model), str(tmp_path / "out"), *INT8)
    assert seen and not any(seen) and not list(tmp_path.iterdir())  # not even while it is measured
    assert plan["time"]["seconds"] > 0 and plan["time"]["write_rate"] > 0 and plan["time"]["unknown"] == []
    plan = told(capsys, "plan", str(model), "/proc/self/out", *INT8)
    assert plan["time"]["write_rate"] is None and plan["time"]["unknown"][0].startswith("how fast /proc/self/out is written (")
    assert "no OUT" in told(capsys, "plan", str(model), *INT8)["time"]["unknown"][0]


def test_no_probe_and_small_models_take_no_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("read_rate", "write_rate"):
        monkeypatch.setattr(probe, name, lambda *_: pytest.fail("the disks were looked at"))
    command = ("plan", str(model), str(tmp_path / "out"), *INT8)
    assert told(capsys, *command)["time"] is None
    monkeypatch.setattr(estimate, "SMALLEST", 0)
    monkeypatch.setattr(estimate, "LARGE", 0)
    assert told(capsys, *command, "--no-probe")["time"] is None
    several = ("--output", f"hf:{tmp_path / 'out'}:quant=fp8_dynamic", "--no-probe")
    assert told(capsys, "plan", str(model), *several)["time"] is None


def test_a_run_says_how_far_it_was_off(model: Path, tmp_path: Path, large: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), str(tmp_path / "out"), *INT8]) == 0
    out, err = capsys.readouterr()
    assert " to read: about " in err and "that were estimated" in out
    page = tmp_path / "r.html"
    outputs = ("--output", f"hf:{tmp_path / 'a'}:quant=fp8_dynamic", "--output", f"trtllm:{tmp_path / 'b'}:")
    report = told(capsys, "convert", str(model), *outputs, "--report", str(page))
    assert report["estimate"]["seconds"] > 0 and report["estimate"]["unknown"] == []
    assert "and it took" in page.read_text()
    assert told(capsys, "convert", str(model), str(tmp_path / "c"), "--no-probe")["estimate"] is None


def test_a_download_is_not_foreseen(tmp_path: Path) -> None:
    """Of a Hub model that is not in the cache only the writing is known, and that is said."""
    shard = object.__new__(HubShard)
    shard.path = tmp_path / "not-here.safetensors"
    index, reads = SimpleNamespace(shards=(shard,)), SimpleNamespace(nbytes=1 << 30)
    places = {tmp_path / "out": 1 << 30}
    looking = estimate.look(index, [*places], 2 << 30)  # type: ignore[arg-type]
    assert looking is not None
    found = looking.estimate(reads, places, [], MemoryPlan(1 << 30, 0, 0, 1, 1 << 20), False)
    assert found is not None and found.read_rate is None and found.unknown == ("how fast the model is downloaded",)
    assert str(found).startswith("at least ") and "not known: how fast the model is downloaded" in str(found)
