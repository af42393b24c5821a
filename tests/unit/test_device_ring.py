"""The ring over a stand-in for a device: the bytes of the CPU whatever is slow, full or lost; and each row copied in once."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamconv import api, device, execution, memory
from streamconv.cli.main import main
from streamconv.device import choice
from streamconv.errors import UsageError
from streamconv.memory import MIB
from streamconv.options import Resources
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny
from tests.stand_in import StandIn

JOBS = {
    "int8 tp2": TensorRTLLM(quant="int8", target_sm=80, tp_size=2),
    "int4": TensorRTLLM(quant="int4", target_sm=90, target_version="0.16"),
    "bf16": TensorRTLLM(dtype="bfloat16", tp_size=2),
    "fp8": TensorRTLLM(quant="fp8_rowwise"),
    "none": TensorRTLLM(),
}
DELAYS: dict[str, Callable[[int], float]] = {
    "no": lambda n: 0.0,
    "copies": lambda n: 0.002 * (n % 3),
    "later": lambda n: 0.004 / (n + 1),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, StandIn]]:
    """What `--device cuda:N` opens; put a StandIn under its name."""
    made: dict[str, StandIn] = {}
    monkeypatch.setattr(choice, "visible", lambda: 2)
    monkeypatch.setattr(device, "Cuda", lambda name: made.setdefault(name, StandIn(name=name)))
    yield made


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != "streamconv.json"}


def convert(model: Path, out: Path, options: TensorRTLLM, **resources: Any) -> api.Report:
    budget = memory.resident() + 1024 * MIB  # this process has run other tests
    return api.convert(model, out, options, Resources(memory_budget=budget, **resources))


@pytest.fixture(scope="module")
def right(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("right")
    for name, options in JOBS.items():
        convert(model, root / name, options, device="cpu")
    return {name: files(root / name) for name in JOBS}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("rows", [None, 64])
def test_same_bytes(
    job: str, delay: str, rows: int | None, model: Path, right: Any, devices: dict[str, StandIn], tmp_path: Path
) -> None:
    stand_in = devices["cuda:0"] = StandIn(delay=DELAYS[delay])
    report = convert(model, tmp_path / "out", JOBS[job], device="cuda", tile_rows=rows)
    assert files(tmp_path / "out") == right[job] and report.device == "cuda:0"
    assert (stand_in.kernels > 0) == (job != "none")


@pytest.mark.parametrize("dies", [None, 9])
def test_several_outputs_from_one_read(dies: int | None, model: Path, right: Any, devices: dict[str, StandIn], tmp_path: Path) -> None:
    """On the device, and finished on the CPU where it is lost in the middle."""
    devices["cuda:0"] = StandIn(dies=dies)
    resources = Resources(memory_budget=memory.resident() + 1024 * MIB, device="cuda", tile_rows=64, workers=3)
    report = api.convert_all(model, [options.to(tmp_path / name) for name, options in JOBS.items()], resources)
    assert {name: files(tmp_path / name) for name in JOBS} == right
    assert (report.device == "cuda:0") == (dies is None) and devices["cuda:0"].kernels > 0


def test_two_devices_share_the_tiles(model: Path, right: Any, devices: dict[str, StandIn], tmp_path: Path) -> None:
    met = threading.Barrier(2, timeout=100)  # the first copies, then the first kernels, however late a worker comes
    for name in ("cuda:0", "cuda:1"):
        devices[name] = StandIn(delay=lambda n: 0.0 if n else 0.0 * met.wait(), name=name)
    convert(model, tmp_path / "out", JOBS["int8 tp2"], device="cuda:0,cuda:1", tile_rows=64)
    assert files(tmp_path / "out") == right["int8 tp2"]
    assert devices["cuda:0"].kernels > 0 < devices["cuda:1"].kernels


def test_memory_that_runs_out_for_a_while(model: Path, right: Any, devices: dict[str, StandIn], tmp_path: Path) -> None:
    stand_in = devices["cuda:0"] = StandIn(full=lambda n: n % 3 == 0 and n < 30)
    report = convert(model, tmp_path / "out", JOBS["int8 tp2"], device="cuda")
    assert files(tmp_path / "out") == right["int8 tp2"] and stand_in.relieved > 3
    assert report.device == "cuda:0" and not report.warnings


@pytest.mark.parametrize("after", [0, 7])
def test_a_lost_device_leaves_the_rest_to_the_cpu(
    after: int, model: Path, right: Any, devices: dict[str, StandIn], tmp_path: Path
) -> None:
    devices["cuda:0"] = StandIn(dies=after, name="cuda:0")
    report = convert(model, tmp_path / "out", JOBS["int8 tp2"], device="cuda", tile_rows=64, workers=3)
    assert files(tmp_path / "out") == right["int8 tp2"]
    assert report.device == "cpu (cuda:0 stopped working: unspecified launch failure)"
    assert report.warnings[0] == "cuda:0 stopped working: unspecified launch failure; the rest was done on the CPU"


def test_a_device_without_memory_leaves_the_rest_to_the_cpu(
    model: Path, right: Any, devices: dict[str, StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = devices["cuda:0"] = StandIn(full=lambda n: n >= 5)
    held = []
    monkeypatch.setattr(execution, "load_kernels", lambda plan: held.append(stand_in.taken))  # the CPU begins
    report = convert(model, tmp_path / "out", JOBS["fp8"], device="cuda", tile_rows=64)
    assert files(tmp_path / "out") == right["fp8"]
    assert "no memory left for the smallest tile" in report.warnings[0] and "no memory left" in report.device
    assert held == [0]  # nothing lies there any more


def test_a_device_among_two_that_dies(model: Path, right: Any, devices: dict[str, StandIn], tmp_path: Path) -> None:
    """torch asks every device before it frees pinned memory: that of the other ring must stay as well."""
    devices["cuda:0"] = StandIn(delay=lambda n: 0.01, name="cuda:0")
    devices["cuda:1"] = StandIn(dies=3, name="cuda:1")
    kept: list[Any] = []
    pinned = [devices[name].alloc_pinned for name in devices]

    def alloc(real: Callable[[int], Any], size: int) -> Any:
        made = real(size)
        kept.append(weakref.ref(made))
        return made

    for name, real in zip(devices, pinned, strict=True):
        devices[name].alloc_pinned = functools.partial(alloc, real)  # type: ignore[method-assign]
    report = convert(model, tmp_path / "out", JOBS["int8 tp2"], device="cuda:0,cuda:1", tile_rows=16, workers=4)
    assert files(tmp_path / "out") == right["int8 tp2"]
    assert report.device == "cpu (cuda:1 stopped working: unspecified launch failure)"
    gc.collect()
    assert len(kept) >= 4 and all(ref() is not None for ref in kept)


def test_nothing_stays_pinned_after_a_run(model: Path, devices: dict[str, StandIn], tmp_path: Path) -> None:
    stand_in = devices["cuda:0"] = StandIn()
    kept: list[Any] = []
    real = stand_in.alloc_pinned

    def alloc(size: int) -> Any:
        made = real(size)
        kept.append(weakref.ref(made))
        return made

    stand_in.alloc_pinned = alloc  # type: ignore[method-assign]
    gc.disable()  # cycles are looked for now and then, and a plan's objects count as old
    try:
        convert(model, tmp_path / "out", JOBS["int8 tp2"], device="cuda")
        assert kept and all(ref() is None for ref in kept)
    finally:
        gc.enable()


def test_a_lost_device_stops_resumably_if_asked(model: Path, right: Any, devices: dict[str, StandIn], tmp_path: Path) -> None:
    devices["cuda:0"] = StandIn(dies=9)
    with pytest.raises(device.DeviceLost) as caught:
        convert(model, tmp_path / "out", JOBS["int8 tp2"], device="cuda", tile_rows=16, on_device_loss="stop", workers=3)
    assert "run the same command again" in str(caught.value) and not (tmp_path / "out").exists()
    devices["cuda:0"] = StandIn()
    report = convert(model, tmp_path / "out", JOBS["int8 tp2"], device="cuda", tile_rows=16)
    assert report.resumed > 0 and files(tmp_path / "out") == right["int8 tp2"]


def test_other_errors_stay_what_they_are(model: Path, devices: dict[str, StandIn], tmp_path: Path) -> None:
    def broken(n: int) -> float:
        raise ZeroDivisionError

    devices["cuda:0"] = StandIn(delay=broken)
    with pytest.raises(ZeroDivisionError):
        convert(model, tmp_path / "out", JOBS["fp8"], device="cuda")


def test_nothing_is_taken_beyond_the_room(model: Path, right: Any, devices: dict[str, StandIn], tmp_path: Path) -> None:
    stand_in = devices["cuda:0"] = StandIn(memory=4 << 30)
    report = convert(model, tmp_path / "out", JOBS["int8 tp2"], device="cuda", device_memory_budget=48 * MIB, workers=8)
    assert stand_in.rooms == [48 * MIB, None] and 0 < stand_in.most <= 48 * MIB and files(tmp_path / "out") == right["int8 tp2"]
    assert stand_in.pinned <= report.budget


def test_a_device_that_is_too_small(model: Path, devices: dict[str, StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices["cuda:0"] = StandIn(memory=64 * MIB, name="cuda:0")  # all of it is left to others
    with pytest.raises(UsageError, match="cuda:0 has 0 MiB for us"):
        convert(model, tmp_path / "out", JOBS["fp8"], device="cuda")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(execution, "choose_device", lambda plan, r: choice.Choice(("cuda:0",) if r.device == "auto" else (), "told"))
    told = convert(model, tmp_path / "out", JOBS["fp8"], device="auto").device
    assert told.startswith("cpu (cuda:0 has 0 MiB for us")


def _ring(memory: int, chunk: int, **how: Any) -> tuple[device.DevicePipeline, StandIn]:
    stand_in = StandIn(memory=memory, **how)
    return device.DevicePipeline(stand_in, device.Sizes(memory, 1, chunk)), stand_in


def _tile(job_count: int, rows: int, cols: int) -> Any:
    import torch

    from streamconv.checkpoint.dtypes import BF16, F16
    from streamconv.checkpoint.rows import SourceTensor
    from streamconv.planning.plan import PLAIN_ROWS, RowRange
    from streamconv.planning.tasks import EncodeTask
    from streamconv.quants.fp8_rowwise import Fp8Rowwise
    from streamconv.quants.plain import Plain
    from streamconv.quants.weight_only import WeightOnly

    source = SourceTensor("w", BF16, (rows, cols), ())
    span = RowRange(source, 0, rows, PLAIN_ROWS, (), 64)
    block = torch.randn(rows, cols, generator=torch.Generator().manual_seed(2)).bfloat16()
    encodings = (Plain(F16), Fp8Rowwise(), WeightOnly(8, "sm80", F16))[:job_count]
    return span, block, [device.Job(EncodeTask(((0, cols),), encoding, BF16, cols)) for encoding in encodings]


@pytest.mark.parametrize("chunk", [1 << 20, 64 * 256 * 2, 3 * 64 * 256 * 2])
@pytest.mark.parametrize("full", [lambda n: False, lambda n: n in (0, 1, 3)], ids=["", "full"])
def test_rows_are_copied_in_once(chunk: int, full: Callable[[int], bool]) -> None:
    import torch

    from streamconv.quants.base import EncodeStats

    span, block, jobs = _tile(3, 512, 256)
    ring, stand_in = _ring(1 << 24, chunk, full=full if chunk > 64 * 256 * 2 else lambda n: False)
    slot = ring.slot(4 << 20)
    data = block.reshape(-1).view(torch.uint8).numpy()
    slot.arena[: data.size] = data
    slot.encode(jobs, span, 512, slot.arena[: data.size], slot.arena[data.size :])
    for job in jobs:
        wanted = [part.numpy().tobytes() for part in job.task.codec.encode(block, EncodeStats())]
        assert [part.tobytes() for part in job.parts] == wanted
    assert ring.uploaded == data.size and ring.halvings == (3 if stand_in.full(0) else 0)


def test_copies_and_kernels_overlap() -> None:
    import torch

    span, block, jobs = _tile(1, 512, 256)
    ring, stand_in = _ring(1 << 24, 64 * 256 * 2, delay=lambda n: 0.01)
    slot = ring.slot(1 << 20)
    data = block.reshape(-1).view(torch.uint8).numpy()
    slot.arena[: data.size] = data
    slot.encode(jobs, span, 512, slot.arena[: data.size], slot.arena[data.size :])
    kernels = [entry for entry in stand_in.seen if entry[0] == "kernel"]
    copies = [entry for entry in stand_in.seen if entry[0] == "copy"]
    assert len(kernels) == 8 and len(copies) == 16
    assert sum(k[1] < c[2] and c[1] < k[2] for k in kernels for c in copies) >= 6


def test_full_device_buffers_are_made_smaller() -> None:
    import torch

    span, block, jobs = _tile(2, 512, 256)
    ring, stand_in = _ring(100_000, 1 << 20)  # somebody took the rest since the sizes were worked out
    slot = ring.slot(2 << 20)
    data = block.reshape(-1).view(torch.uint8).numpy()
    slot.arena[: data.size] = data
    slot.encode(jobs, span, 512, slot.arena[: data.size], slot.arena[data.size :])
    assert 0 < stand_in.most <= 100_000 and ring.halvings > 0 and ring.uploaded == data.size


def test_arenas_outlive_a_lost_device() -> None:
    """torch asks the device when it frees pinned memory; one that is gone must not be asked."""
    for dies in (None, 0):
        span, _, jobs = _tile(1, 64, 256)
        ring, _ = _ring(1 << 24, 1 << 20, dies=dies)
        slots = [ring.slot(1 << 20), ring.slot(1 << 20)]
        alive = [weakref.ref(slot._pinned) for slot in slots]
        with contextlib.suppress(device.DeviceLost):
            slots[0].encode(jobs, span, 64, slots[0].arena[: 64 * 512], slots[0].arena[64 * 512 :])
        del slots, ring, jobs
        gc.collect()
        assert [ref() is not None for ref in alive] == [dies is not None] * 2


def test_steps_grow_again() -> None:
    ring, _ = _ring(1 << 24, 1 << 18)
    ring.halve(1 << 18)
    assert ring.step == 1 << 17
    for _ in range(64):
        ring.good()
    assert ring.step == 1 << 18
    ring.halve(100)  # a tiny tile: no measure for others
    assert ring.step == 1 << 16


def test_cuda_without_a_gpu_is_a_clear_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "visible", lambda: 0)
    assert main(["convert", str(model), str(tmp_path / "out"), "--device", "cuda"]) == 2
    told = capsys.readouterr().err
    assert "--device cuda: no GPU is here" in told and "Traceback" not in told and not list(tmp_path.iterdir())
    assert main(["plan", str(model)]) == 0
    assert "no GPU, using the CPU" in capsys.readouterr().out


@pytest.mark.parametrize("fails", [False, True], ids=["", "does not compile"])
@pytest.mark.parametrize("full", [lambda n: False, lambda n: n in (0, 1, 3)], ids=["", "full"])
def test_findings_of_fused_kernels(fails: bool, full: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted on the device, once for each row however often a step is done again; launch errors leave the definitions."""
    import torch

    from streamconv.device import triton_launch as fused
    from streamconv.quants.base import Codec, EncodeStats

    span, block, jobs = _tile(3, 512, 256)
    block[5, 7], block[300, 3], block[301] = float("nan"), float("inf"), 1e30
    launched = []

    def kernel_of(encoding: Codec, source: Any) -> Any:
        def launch(rows: torch.Tensor, outs: Any, counts: torch.Tensor) -> None:
            launched.append(len(rows))
            if fails and len(launched) == 5:
                raise fused.Unfused("no compiler")
            found = EncodeStats()
            for out, made in zip(outs, encoding.encode(rows, found), strict=True):
                out.copy_(made)
            counts += torch.tensor([found.nonfinite, found.overflow], dtype=torch.int32)

        return launch if encoding.name != "FP8 per channel" else None

    monkeypatch.setattr(fused, "kernel_of", kernel_of)
    ring, _ = _ring(1 << 24, 3 * 64 * 256 * 2, full=full, unfused=None)
    slot = ring.slot(4 << 20)
    data = block.reshape(-1).view(torch.uint8).numpy()
    slot.arena[: data.size] = data
    for turn in range(2):  # counts start at zero every time
        for job in jobs:
            job.parts.clear()
        slot.encode(jobs, span, 512, slot.arena[: data.size], slot.arena[data.size :])
        for job in jobs:
            found = EncodeStats()
            wanted = [part.numpy().tobytes() for part in job.task.codec.encode(block, found)]
            assert [part.tobytes() for part in job.parts] == wanted and job.stats == found, turn
    assert jobs[0].stats.overflow == 256 and jobs[2].stats.nonfinite == 258
    assert ring.unfused == ("no compiler" if fails else None) and len(launched) >= (5 if fails else 8)


def test_fused_fp8_is_for_the_rules_that_it_knows() -> None:
    from streamconv.checkpoint.dtypes import BF16, F16
    from streamconv.device.triton_launch import has_kernel
    from streamconv.quants.fp8_rowwise import Fp8Rowwise

    assert has_kernel(Fp8Rowwise(), BF16) and has_kernel(Fp8Rowwise(-5.0, 5.0, F16), BF16)
    others = (Fp8Rowwise(floor=0.0), Fp8Rowwise(zero=1.0), Fp8Rowwise(scale=BF16), Fp8Rowwise(quotient=BF16))
    assert not any(has_kernel(other, BF16) for other in others)
