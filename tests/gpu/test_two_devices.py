"""Two devices for real: each alone and both in either order give the bytes of the CPU, with fused kernels, whatever ran before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from streamconv.calibration.graphs import Graphs
from streamconv.calibration.run import calibrate
from streamconv.device import triton_launch as fused
from tests.calibrate.test_streamed import model as small
from tests.calibrate.test_streamed import text
from tests.golden import cases
from tests.golden.cases import Case
from tests.golden.test_golden import check_output
from tests.golden.test_golden import convert as convert_case
from tests.gpu.test_trouble import BREAK
from tests.gpu.world import INT8, convert, files, wide
from tests.unit.test_two_devices import WHERE

__all__ = ["small", "text"]

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def right(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("right") / "out"
    convert(model, out, "cpu")
    return files(out)


@pytest.mark.parametrize("where", WHERE)
def test_same_bytes_on_each_and_on_both(model: Path, right: dict[str, str], tmp_path: Path, where: str) -> None:
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_reserved(0)
    report = convert(model, tmp_path / "out", where, tile_rows=256)
    assert report.device == where.replace(",", ", ") and not report.warnings and files(tmp_path / "out") == right
    assert torch.cuda.current_device() == 0
    assert "cuda:0" in where or torch.cuda.max_memory_reserved(0) <= before


@pytest.mark.parametrize("where", ["cuda:1", "cuda:1,cuda:0"])
@pytest.mark.parametrize("case", [case for case in cases.every() if case.model], ids=str)
def test_golden(case: Case, where: str, golden_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden_inputs)
    monkeypatch.setenv("STREAMCONV_TILE_ROWS", "3")
    convert_case(case, tmp_path / "out", "--device", where, "--memory_budget", "3GiB")
    check_output(case, tmp_path / "out")


def test_definitions_on_both(model: Path, right: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "works", lambda device: f"none on {device}")
    report = convert(model, tmp_path / "out", "cuda:0,cuda:1", tile_rows=256)
    assert report.device == "cuda:0, cuda:1" and files(tmp_path / "out") == right
    assert [warning.split(", slower")[0] for warning in report.warnings] == ["no fused kernels on cuda:0", "no fused kernels on cuda:1"]


def test_another_current_device(model: Path, right: dict[str, str], tmp_path: Path) -> None:
    """The caller's current device is nobody's business and stays what it is."""
    with torch.cuda.device(1):
        for where in ("cuda:0", "cuda:0,cuda:1"):
            report = convert(model, tmp_path / where.replace(",", "-"), where, tile_rows=256)
            assert not report.warnings and files(tmp_path / where.replace(",", "-")) == right
            assert torch.cuda.current_device() == 1


@pytest.mark.filterwarnings("ignore")
def test_calibrated_on_either(small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ranges, one after the other in one process; a graph of the second device is no graph of the first."""
    text.write_text("\n\n".join([text.read_text()] * 3))  # shapes come often
    captured = []
    capture = Graphs._capture

    def kept(self: Graphs, *of: Any) -> Any:
        captured.append(self._device)
        return capture(self, *of)

    monkeypatch.setattr(Graphs, "_capture", kept)
    for device in ("cuda:0", "cuda:1"):
        calibrate(small, tmp_path / device, str(text), max_length=16, device=device)
    first, second = (load_file(tmp_path / device) for device in ("cuda:0", "cuda:1"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert {str(device) for device in captured} == {"cuda:0", "cuda:1"}


@pytest.mark.parametrize("where", ["cuda:1", "cuda:0,cuda:1"])
def test_one_that_breaks(model: Path, right: dict[str, str], tmp_path: Path, where: str) -> None:
    """In a process of its own; this one's devices do not notice."""
    command = [sys.executable, "-c", BREAK, str(model), str(tmp_path / "out"), where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path / "out") == right
    assert any(done.stdout.startswith(f"cpu ({name} stopped working") for name in where.split(","))
    assert convert(model, tmp_path / "after", "cuda:0,cuda:1", INT8).device == "cuda:0, cuda:1"
    assert files(tmp_path / "after") == right
