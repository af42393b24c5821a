"""Memory that others hold, a device that breaks, budgets, several jobs: for real."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from streamconv import device
from streamconv.calibration.graphs import Graphs
from streamconv.device import triton_launch as fused
from streamconv.device.backend import Cuda
from streamconv.device.triton_launch import Unfused
from streamconv.errors import UsageError
from streamconv.memory import GIB, MIB
from tests.gpu.world import convert, files, somebody, wide


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def right(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("right") / "out"
    convert(model, out, "cpu")
    return files(out)


def test_same_bytes_within_the_device_budget(model: Path, right: dict[str, str], tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()  # pools of the graphs of other tests in this process
    report = convert(model, tmp_path / "out", "cuda", device_memory_budget=512 * MIB)
    assert report.device == "cuda:0" and not report.warnings and files(tmp_path / "out") == right
    assert 0 < torch.cuda.max_memory_reserved() - before <= 512 * MIB


def test_a_busy_device_is_left_its_room(model: Path, right: dict[str, str], tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    with somebody(1 * GIB):
        report = convert(model, tmp_path / "out", "cuda")
        assert files(tmp_path / "out") == right and report.device == "cuda:0"


def test_memory_taken_after_the_sizes_were_worked_out(
    model: Path, right: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    monkeypatch.setattr(Cuda, "free_memory", lambda self: 8 * GIB)
    met = []
    halve = device.DevicePipeline.halve
    monkeypatch.setattr(device.DevicePipeline, "halve", lambda self, size: (met.append(size), halve(self, size))[1])
    with somebody(64 * MIB):
        report = convert(model, tmp_path / "out", "cuda")
    assert files(tmp_path / "out") == right and met
    assert report.device == "cuda:0" or "no memory left" in report.warnings[0]


def test_a_full_device_is_a_clear_error(model: Path, tmp_path: Path) -> None:
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    with somebody(32 * MIB), pytest.raises(UsageError, match="cuda:0 has 0 MiB for us"):
        convert(model, tmp_path / "out", "cuda")
    assert convert(model, tmp_path / "out", "auto").device.startswith("cpu")


BREAK = """
import sys, threading, torch
from pathlib import Path
from streamconv.device import triton_launch as fused
from tests.gpu.world import convert
real, calls = fused.kernel_of, []
def kernel_of(encoding, source):
    launch = real(encoding, source)
    def broken(block, outs, counts):
        calls.append(1)
        if len(calls) == 4:
            torch.zeros(1, device=block.device)[torch.full((1,), 99, device=block.device)].sum().item()  # an assertion in a kernel: sticky
        launch(block, outs, counts)
    return launch and broken
fused.kernel_of = kernel_of
report = convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
print(report.device, report.warnings[0])
"""


def test_a_device_that_breaks(model: Path, right: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", BREAK, str(model), str(tmp_path / "out"), "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path / "out") == right
    assert done.stdout.startswith("cpu (cuda:0 stopped working")


def test_the_arena_is_pinned_and_exact() -> None:
    backend = Cuda("cuda:0")
    pinned = backend.alloc_pinned(4 * MIB)
    assert pinned.is_pinned() and pinned[100:200].is_pinned() and pinned.numel() == 4 * MIB


def test_a_kernel_that_does_not_compile(model: Path, right: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch definitions take over, and the report says so once."""

    def refused(block: torch.Tensor, outs: object, counts: object) -> None:
        raise Unfused("weight_only: no compiler")

    monkeypatch.setattr(fused, "kernel_of", lambda encoding, source: refused)
    report = convert(model, tmp_path / "out", "cuda")
    assert files(tmp_path / "out") == right and report.device == "cuda:0"
    assert report.warnings == ("no fused kernels on cuda:0, slower: weight_only: no compiler",)


def test_a_capture_that_fails_keeps_no_memory_from_what_comes_later(
    model: Path, right: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration tries graphs; a broken capture once left torch's allocator, in this process, unable to give cached memory back."""
    graphs = Graphs("cuda:0", Counter({(1, 8): 100}))
    for number in range(4):
        graphs.run(lambda states: states * states.sum().item(), torch.full((1, 8, 4), float(number), device="cuda:0"), 0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    large = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda:0")
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before
    with monkeypatch.context() as patch:  # the torch definitions take much memory, on streams of their own each time
        patch.setattr(fused, "works", lambda device: "")
        for number in range(3):
            assert convert(model, tmp_path / str(number), "cuda", device_memory_budget=512 * MIB).device == "cuda:0"
    report = convert(model, tmp_path / "out", "cuda", device_memory_budget=512 * MIB)
    assert report.device == "cuda:0" and not report.warnings and files(tmp_path / "out") == right


def test_what_others_hold_in_this_process_is_no_part_of_the_budget(model: Path, right: dict[str, str], tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.75)
    try:
        held = torch.empty(1 * GIB, dtype=torch.uint8, device="cuda:0")
        report = convert(model, tmp_path / "out", "cuda", device_memory_budget=512 * MIB)
        assert report.device == "cuda:0" and not report.warnings and files(tmp_path / "out") == right
        del held
        if hasattr(torch.cuda, "get_per_process_memory_fraction"):
            assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(0.75)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_device_that_is_not_here(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this machine has"):
        convert(model, tmp_path / "out", "cuda:99")
