"""CUDA's own backend on two devices (stand-ins for torch.cuda): each launch, event, stream and allocation on the device it belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from streamconv.calibration.graphs import Graphs
from streamconv.device import backend, choice
from streamconv.device import triton_launch as registry
from streamconv.device.backend import Cuda
from streamconv.errors import OutputError, UsageError
from streamconv.run.writer import Writer
from tests import tiny
from tests.two_gpus import GIB, Machine, install
from tests.unit.test_device_ring import JOBS, convert, files

WHERE = ("cuda:0", "cuda:1", "cuda:0,cuda:1", "cuda:1,cuda:0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def right(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("right")
    for name, options in JOBS.items():
        convert(model, root / name, options, device="cpu")
    return {name: files(root / name) for name in JOBS}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine()
    install(monkeypatch.setattr, made)
    monkeypatch.setattr(choice, "visible", lambda: 2)
    monkeypatch.setattr(registry, "_copies", {})
    with made:
        yield made


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("job", JOBS)
def test_same_bytes(job: str, where: str, model: Path, right: Any, machine: Machine, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out", JOBS[job], device=where, tile_rows=64)
    assert files(tmp_path / "out") == right[job]
    assert report.device == where.replace(",", ", ") and not report.warnings
    tried = {int(name[-1]) for name in where.split(",")}
    assert set(machine.launched) == tried
    assert machine.current == 0 and machine.fractions == [1.0, 1.0]


def test_the_report_names_each_device_without_fused_kernels(
    model: Path, right: Any, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.fused, "works", lambda device: "no compiler" if device.index else None)
    report = convert(model, tmp_path / "out", JOBS["int4"], device="cuda:0,cuda:1", tile_rows=64)
    assert files(tmp_path / "out") == right["int4"]
    assert report.warnings == ("no fused kernels on cuda:1, slower: no compiler",)


def test_a_name_is_one_device_however_it_is_spelled() -> None:
    assert choice.parse("cuda,cuda:1") == ("cuda:0", "cuda:1") and choice.parse("cuda:01") == ("cuda:1",)
    for twice in ("cuda,cuda:0", "cuda:1,cuda:01"):
        with pytest.raises(UsageError, match="names a device twice"):
            choice.parse(twice)
    with pytest.raises(UsageError, match="is not known"):
        choice.parse("cuda:²")


def test_what_others_hold_here_is_no_part_of_the_limit(machine: Machine) -> None:
    """torch counts all that this process holds; and a limit that somebody set is there again afterwards."""
    machine.held, machine.fractions = [0, 3 * GIB], [1.0, 0.75]
    cuda = Cuda("cuda:1")
    cuda.limit(GIB)
    assert machine.fractions == [1.0, 0.5]
    cuda.limit(4 * GIB)
    assert machine.fractions == [1.0, 0.75]
    cuda.limit(GIB)
    cuda.limit(None)
    assert machine.fractions == [1.0, 0.75] and machine.current == 0


def test_a_run_that_fails_before_its_first_tile_leaves_no_limit(
    model: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(writer: Writer) -> None:
        assert min(machine.fractions) < 1
        raise OutputError("no space")

    monkeypatch.setattr(Writer, "begin", full)
    with pytest.raises(OutputError, match="no space"):
        convert(model, tmp_path / "out", JOBS["int8 tp2"], device="cuda:0,cuda:1")
    assert machine.fractions == [1.0, 1.0]


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_graphs_are_captured_on_their_own_device(device: str, machine: Machine) -> None:
    with torch.cuda.device("cuda:0"):
        torch.cuda.graph(torch.cuda.CUDAGraph())  # somebody captured on the first device: torch keeps that stream
    with torch.cuda.device(device):
        states = torch.zeros(1, 8, 4, device=device)
        graphs = Graphs(device, Counter({(1, 8): 100}))
        for _ in range(4):
            graphs.run(lambda states: states + 1, states, 0)
    (kept,) = graphs._graphs.values()
    assert kept is not None and kept.graph.replayed == 3  # type: ignore[attr-defined]


def test_a_forward_that_waits_breaks_no_capture(machine: Machine) -> None:
    """torch is told of a capture's end only if CUDA was content with it; else it gives no cached memory back ever after."""

    def forward(states: torch.Tensor) -> torch.Tensor:
        torch.cuda.waited()  # as .item() does
        return states + 1

    states = torch.zeros(1, 8, 4, device="cuda:0")
    graphs = Graphs("cuda:0", Counter({(1, 8): 100}))
    made = [graphs.run(forward, states, 0) for _ in range(4)]
    assert all(bool((values == 1).all()) for values in made) and list(graphs._graphs.values()) == [None]
    assert machine.waits == 0


def test_no_graph_begins_on_a_full_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch ends the process as it drops a graph that found no room to begin."""
    made = []

    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(1))
    states = torch.zeros(1, 8, 4, device="cuda:0")
    graphs = Graphs("cuda:0", Counter({(1, 8): 100}))
    graphs.run(lambda states: states + 1, states, 0)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        graphs.run(lambda states: states + 1, states, 0)
    assert not made
