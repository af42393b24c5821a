"""Arithmetic of the ring: sizes from free memory, the estimate of `auto`, and what --device may be."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from streamconv import api, device
from streamconv.checkpoint.dtypes import BF16, F16
from streamconv.checkpoint.rows import NoSource, SourceTensor
from streamconv.device import choice, sizing
from streamconv.device.choice import Work
from streamconv.errors import UsageError
from streamconv.memory import GIB, KIB, MIB
from streamconv.planning.plan import PLAIN_ROWS, Destination, Matrix, RowRange
from streamconv.planning.reads import Reads
from streamconv.quants.smoothing import InputChannelAmax, Smoother
from streamconv.quants.smoothquant import SmoothValue, SmoothWeight
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny

NEEDS = [device.Demand(28, 0.6, 0, 16 * KIB), device.Demand(16, 1, 0, 2), device.Demand(48, 1, 4 * MIB, 64 * KIB), device.Demand()]


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("wanted", [1, 3, 16])
@pytest.mark.parametrize("budget", [None, 256 * MIB, 2 * GIB])
def test_all_of_it_fits_the_room(need: device.Demand, wanted: int, budget: int | None) -> None:
    for free in (512 * MIB, GIB, 16 * GIB, 140 * GIB):
        sizes = device.fit(free, budget, wanted, need)
        lanes = min(sizing.COMPUTE_STREAMS, sizes.slots)
        buffers = sizes.slots * sizing.BUFFERS * sizes.chunk * (1 + need.out)
        assert buffers + lanes * (sizes.chunk * need.work + need.fixed) <= sizes.room
        assert sizes.room <= free - device.reserve(free) and sizes.room <= (budget or 2 * GIB)
        assert 1 <= sizes.slots <= wanted and sizes.chunk >= need.least


def test_less_memory_means_fewer_slots_then_smaller_chunks() -> None:
    sizes = [device.fit(GIB, budget * MIB, 16, NEEDS[0]) for budget in (512, 128, 64, 32, 16)]
    assert sizes[0].slots == 16 and sizes[-1].slots < 16
    for more, less in itertools.pairwise(sizes):
        assert (less.slots, less.slots * less.chunk) <= (more.slots, more.slots * more.chunk)


def test_too_little_names_what_would_do() -> None:
    need = device.Demand(28, 0.6, 0, 4 * MIB)
    with pytest.raises(device.NoRoom) as caught:
        device.fit(16 * GIB, 32 * MIB, 8, need)
    assert caught.value.hint is not None
    enough = int(caught.value.hint.split("MiB")[0].split()[-1])
    assert device.fit(16 * GIB, enough * MIB, 8, need).slots == 1


def test_pinned_memory_is_what_torch_rounds_it_to() -> None:
    assert device.pinned_size(16 * MIB, 1) == 16 * MIB and device.pinned_size(31 * MIB, 5 * MIB) == 16 * MIB
    with pytest.raises(device.NoRoom, match="a tile takes 20 MiB"):
        device.pinned_size(31 * MIB, 20 * MIB)


def test_small_plans_pin_little() -> None:
    assert [device.arena(size * 10**9, 6, 0) // MIB for size in (0, 1, 4, 8, 16, 700)] == [16, 16, 39, 79, 128, 128]
    for size in (4, 8, 12):
        assert 6 * device.arena(size * 10**9, 6, MIB) <= size * 10**9 / 16


@pytest.mark.parametrize("least", [16 * MIB, 16 * MIB + 1, 300 * MIB])
def test_a_large_row_of_a_small_plan_has_its_arena(least: int) -> None:
    assert device.pinned_size(device.arena(10**9, 6, least), least) >= least


def test_slots_leave_every_device_three() -> None:
    assert [device.slots(cores, devices) for cores, devices in ((2, 1), (16, 1), (64, 1), (16, 2), (16, 8))] == [3, 6, 6, 6, 3]


def test_demand_of_a_plan(tmp_path: Path) -> None:
    for quant, out in (("int8", 0.5), ("int4", 0.25), ("fp8_rowwise", 0.5)):
        options = TensorRTLLM(quant=quant, target_sm=None if quant.startswith("fp8") else 80)
        plan = api.open_and_plan(tiny.write(tmp_path / quant), options)[1]
        need = device.demand(plan.spans, plan.matrices)
        assert out <= need.out <= out + 0.05 and need.work >= 12 and need.least >= tiny.HIDDEN * 2
    plan = api.open_and_plan(tmp_path / "int8", TensorRTLLM())[1]
    assert device.demand(plan.spans, plan.matrices) == device.Demand()


def test_smoothquant_of_a_wide_model_fits_two_gib() -> None:
    """A stored smoother comes from a source of 4 bytes; its temporaries are no measure for the rows of a weight."""
    smoother = Smoother("m", "w", None, "x", 0.5, True)  # type: ignore[arg-type]
    weight = SmoothWeight(smoother, F16, None)
    value = SmoothValue(smoother, "smoother", "smoother", (1, 11264), keep=(0, 11264), inputs=11264)
    rows, blank = SourceTensor("w", BF16, (4096, 11264), ()), NoSource("s")
    matrices = tuple(Matrix(0, "w", 1, 1, 1, encoding, ()) for encoding in (weight, value))
    spans = [
        RowRange(rows, 0, 4096, PLAIN_ROWS, (), 64, InputChannelAmax("m")),
        RowRange(rows, 0, 4096, PLAIN_ROWS, (Destination(0, 0, ((0, 11264),)),), 64),
        RowRange(blank, 0, 1, PLAIN_ROWS, (Destination(1, 0, ((0, 1),)),), 1),
    ]
    need = device.demand(spans, matrices)
    assert need.work == 24 and 0.5 < need.out < 0.51 and need.small == 4 * 11264
    assert 96 * 11264 <= need.fixed <= 97 * 11264
    sizes = device.fit(140 * GIB, 2 * GIB, 8, need)
    assert sizes.slots == 8 and sizes.chunk >= 8 * MIB


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cuda:0,cpu", "auto,cuda:0", "", "cuda:0,cuda:0"])
def test_devices_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        choice.parse(text)


def test_auto_counts_the_start_and_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "visible", lambda: 1)
    reads = Reads([api.open_and_plan(tiny.write(tmp_path / "model"), TensorRTLLM(quant="int8", target_sm=80))[1]])
    work = choice.work_of(reads)
    assert work.kernel > 0 and work.torch == 0 and 0 < work.back < work.kernel and work.files > work.kernel
    small = choice.choose("auto", reads, 16, 4 * GIB)
    assert small.devices == () and "using the CPU: about" in small.why and "copies counted" in small.why
    monkeypatch.setattr(choice, "work_of", lambda reads: Work(files=400 * 10**9, kernel=0, torch=200 * 10**9, back=100 * 10**9))
    large = choice.choose("auto", reads, 16, 4 * GIB)
    assert large.devices == ("cuda:0",) and "using the GPU: about" in large.why
    assert choice.choose("auto", reads, 16, 512 * MIB).devices == ()
    with pytest.raises(UsageError, match="memory budget"):
        choice.choose("cuda", reads, 16, 512 * MIB)
    with pytest.raises(UsageError, match="this machine has 1 GPU"):
        choice.choose("cuda:3", reads, 16, 4 * GIB)
    copies = Work(files=10**9, kernel=0, torch=10**9, back=0)
    assert Work(files=10**9, torch=10**9, back=10**13).gpu_seconds(16) > 100 + copies.gpu_seconds(16)


MEASURED = {
    # GB of (files, kernel, torch, back); seconds of whole conversions on the CPU and on the GPU: 4 GB on a node of 16 cores
    "int8": ((6, 4, 0, 2), 1.97, 6.38),
    "int4": ((5, 4, 0, 1), 2.97, 3.80),
    "fp8_rowwise": ((6, 4, 0, 2), 3.16, 5.26),
    "smoothquant": ((10, 8, 0, 2), 4.74, 7.13),
    "bf16 to fp16": ((8, 4, 0, 4), 3.78, 6.77),
    "smoothquant by its definition": ((10, 0, 8, 2), 54.86, 7.13),
}


@pytest.mark.parametrize("job", MEASURED)
def test_auto_takes_the_faster_of_what_was_measured(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, on_cpu, on_gpu = MEASURED[job]
    work = Work(*(size * 10**9 for size in sizes))
    for estimate, measured in ((work.cpu_seconds(16), on_cpu), (work.gpu_seconds(16), on_gpu)):
        assert measured / 1.7 < estimate < measured * 1.7
    monkeypatch.setattr(choice, "visible", lambda: 1)
    monkeypatch.setattr(choice, "work_of", lambda reads: work)
    reads = Reads([api.open_and_plan(tiny.write(tmp_path / "model"), TensorRTLLM())[1]])
    assert bool(choice.choose("auto", reads, 16, 4 * GIB).devices) == (on_gpu < on_cpu)
