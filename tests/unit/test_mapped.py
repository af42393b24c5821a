"""Tiles encoded from a mapping: the same bytes, and a file that changes meanwhile is the ordinary error."""

from __future__ import annotations

import json
import mmap
import os
import posix
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamconv import api, mounts
from streamconv.checkpoint import mapping
from streamconv.checkpoint.fault_guard import FaultGuard, known_platform
from streamconv.checkpoint.mapping import Window
from streamconv.checkpoint.shard import Shard
from streamconv.errors import SourceChangedError, UsageError
from streamconv.options import Read, Resources
from streamconv.run import mapped
from streamconv.run.fs import Disk
from streamconv.run.journal import TileRecord
from streamconv.run.recorder import Recorder
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.conformance.recipes import RECIPES
from tests.conformance.sources import RUNS, make
from tests.conformance.test_conformance import FAMILIES
from tests.crash.world import write_model

pytestmark = pytest.mark.skipif(not known_platform(), reason="mappings are not guarded here")
NAME = "model.safetensors"
JOBS = {"int8": TensorRTLLM(quant="int8", target_sm=80), "cast": TensorRTLLM(dtype="bfloat16"), "copied": TensorRTLLM()}


@pytest.fixture
def guard() -> Any:
    from streamconv.kernels.fault import handler

    with FaultGuard(*handler()) as made:
        yield made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Its matrices are large enough to be mapped."""
    return write_model(tmp_path / "model", hidden=512)


def convert(model: Path, read: Read, options: TensorRTLLM = JOBS["int8"], disk: Disk | None = None, **asked: Any) -> api.Report:
    resources = Resources(device="cpu", read=read, **asked)
    return api.convert(model, model.parent / f"out-{read}", options, resources, disk=disk)


def rank(model: Path, read: Read) -> bytes:
    return (model.parent / f"out-{read}" / "rank0.safetensors").read_bytes()


# ---- windows


def test_a_window_is_exact_and_private(model: Path, guard: FaultGuard) -> None:
    data = (model / NAME).read_bytes()
    with Shard(model / NAME) as shard:
        for begin, end in [(0, 8), (4095, 4097), (12345, len(data)), (8192, 16384)]:
            window = mapping.window(shard, begin, end, guard)
            assert window is not None
            with window:
                assert window.data.tobytes() == data[begin:end]
                window.data[:] = 7  # kernels only read; should one write, the file does not notice
                window.check()
        assert (model / NAME).read_bytes() == data
        with pytest.raises(SourceChangedError, match=f"ends at byte {len(data)}, 1 bytes early"):
            mapping.window(shard, 0, len(data) + 1, guard)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_window_leaves_nothing_resident(tmp_path: Path, guard: FaultGuard) -> None:
    (tmp_path / "large").write_bytes(bytes(64 << 20))
    with Shard(tmp_path / "large") as shard:
        before = resident()
        window = mapping.window(shard, 0, 64 << 20, guard)
        assert window is not None
        with window:
            assert resident() > before + (48 << 20)
        assert resident() < before + (16 << 20)


def cut(path: Path) -> None:
    os.truncate(path, 4096)


def cut_and_grow(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 4096)
    os.truncate(path, size)


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(bytes(path.stat().st_size))
    os.replace(path.with_name("new"), path)


def test_cut_while_mapped(model: Path, guard: FaultGuard) -> None:
    with Shard(model / NAME) as shard:
        window = mapping.window(shard, 8192, 200_000, guard)
        assert window is not None
        with pytest.raises(SourceChangedError, match=rf"{NAME} ends at byte 4096, 195904 bytes early"), window:
            cut(model / NAME)
            assert not window.data.any()
            with pytest.raises(SourceChangedError):
                window.check()
            raise ValueError("made of zeros")  # the reason is told instead


# ---- conversions


@pytest.mark.parametrize("job", JOBS)
def test_the_same_bytes(model: Path, job: str) -> None:
    reports = {read: convert(model, read, JOBS[job]) for read in ("pread", "map", "auto")}
    assert rank(model, "map") == rank(model, "pread") == rank(model, "auto")
    assert reports["pread"].bytes_mapped == 0 and reports["map"].bytes_mapped > 0.9 * reports["map"].bytes_read
    # without a kernel to compile the compiler would cost more memory than it saves
    assert (reports["auto"].bytes_mapped > 0) == (job != "copied")


def test_the_budget_holds(tmp_path: Path) -> None:
    """Mapped pages are resident: what is mapped, read and mapped in turns, with more workers than sense."""
    model = write_model(tmp_path / "model", hidden=2048, vocab=16384)  # two tensors of 64 MiB
    told = {}
    for read in ("map", "pread"):
        command = [sys.executable, "-m", "streamconv", "convert", str(model), str(tmp_path / read), "--json", "--memory-budget", "320MiB"]
        flags = ["--quant", "int8", "--target-sm", "80", "--device", "cpu", "--workers", "24", "--read", read]
        done = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        told[read] = json.loads(done.stdout)
        assert told[read]["peak_memory"] <= 320 << 20
    assert told["map"]["bytes_mapped"] == told["map"]["bytes_read"]
    assert told["map"]["bytes_mapped"] > 170 << 20 and told["map"]["peak_memory"] < 240 << 20  # without the mappings it is 100 MiB at least


@pytest.mark.parametrize("quant", sorted(RUNS))
def test_no_format_writes_to_what_it_reads(quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, and each window holds the file's at the end of its tile."""
    recipe, run = next(recipe for recipe in RECIPES if recipe.family == "llama"), RUNS[quant][0]
    source = make(recipe, FAMILIES["llama"], run, tmp_path / "in")
    held = []

    def leave(self: Window, *error: Any) -> None:
        begin = self._end - self.data.size
        with Shard(self._shard.path) as shard, shard.window(begin, self._end) as wanted:
            held.append(self.data.tobytes() == bytes(wanted))
        before(self, *error)

    before = Window.__exit__
    monkeypatch.setattr(Window, "__exit__", leave)
    for read in ("pread", "map"):
        api.convert(source.folder, tmp_path / read, source.options(quant, run), Resources(device="cpu", read=read))  # type: ignore[arg-type]
    for path in (tmp_path / "pread").iterdir():
        assert path.read_bytes() == (tmp_path / "map" / path.name).read_bytes()
    assert held and all(held)


class Meddling(Disk):
    """Changes the source before the n-th write of a tile."""

    def __init__(self, change: Callable[[], None], at: int) -> None:
        self.change, self.left = change, at

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self.left -= 1
        if self.left == 0:
            self.change()
        return super().pwrite(fd, data, offset)


@pytest.mark.parametrize("read", ["map", "auto", "pread"])
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("change", [cut, cut_and_grow, replace])
def test_changed_in_the_middle_of_a_run(model: Path, job: str, read: Read, change: Callable[[Path], None]) -> None:
    """Before a write: what is encoded is safe, a tile that is only copied is not, nor is what comes after."""
    at = 8
    with pytest.raises(SourceChangedError, match=rf"{NAME} (ends at|was replaced)"):
        convert(model, read, JOBS[job], Meddling(lambda: change(model / NAME), at), workers=2, tile_rows=128)
    assert not (model.parent / f"out-{read}").exists()


def meddle(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], at: int) -> list[int]:
    """Change the file between the mapping of the n-th window, its pages in place, and its use; gives what was mapped."""
    original, seen = mapping.window, list[int]()

    def window(shard: Shard, begin: int, end: int, guard: FaultGuard) -> Window | None:
        made = original(shard, begin, end, guard)
        seen.append(begin)
        if len(seen) == at:
            change(shard.path)
        return made

    monkeypatch.setattr(mapping, "window", window)
    return seen


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("at", [1, 3, 9])
def test_cut_under_a_kernel(model: Path, job: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages were there: only the guard's zeros keep the process alive. Nothing made of them is in the journal."""
    seen, told = meddle(monkeypatch, cut, at), list[TileRecord]()
    monkeypatch.setattr(Recorder, "add", lambda self, done, files, written: told.append(done))
    with pytest.raises(SourceChangedError, match=rf"{NAME} ends at byte 4096"):
        convert(model, "map", JOBS[job], workers=1, tile_rows=128)
    assert len(seen) == at and len(told) == at - 1
    assert not (model.parent / "out-map").exists()


def test_cut_under_a_reduction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A maximum over zeros must not reach the tiles that wait for it."""
    recipe, run = next(recipe for recipe in RECIPES if recipe.family == "llama"), RUNS["smoothquant"][0]
    source = make(recipe, FAMILIES["llama"], run, tmp_path / "in")
    options = source.options("smoothquant", run)
    index, plan = api.open_and_plan(source.folder, options)
    index.close()
    first = next(number for number, span in enumerate(plan.spans) if span.reduce is not None)
    before = sum(mapped._place(span, span.start, span.stop) is not None for span in plan.spans[:first])
    meddle(monkeypatch, cut, before + 1)
    with pytest.raises(SourceChangedError, match="ends at byte 4096"):
        api.convert(source.folder, tmp_path / "out", options, Resources(device="cpu", read="map", workers=1))


COMMAND = """
import os, sys
from pathlib import Path
from streamconv.checkpoint import fault_guard, mapping
from streamconv.cli.main import main
original = mapping.window
def window(shard, begin, end, guard):
    made = original(shard, begin, end, guard)
    os.truncate(shard.path, 4096)
    return made
mapping.window = window
if sys.argv[2] == "unguarded":
    fault_guard.FaultGuard._install = lambda self: None
sys.exit(main(["convert", sys.argv[1], sys.argv[1] + "-out", "--quant", "int8", "--target-sm", "80", "--device", "cpu", "--read", "map"]))
"""


@pytest.mark.parametrize(("guarded", "status"), [("guarded", 3), ("unguarded", -signal.SIGBUS)])
def test_exit_status(model: Path, guarded: str, status: int) -> None:
    """Without the guard the same change ends the process: what the tests above would show if it did not work."""
    done = subprocess.run([sys.executable, "-c", COMMAND, str(model), guarded], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if status == 3:
        assert "model.safetensors ends at byte 4096" in done.stderr and "Traceback" not in done.stderr


# ---- what is not mapped


def test_network_file_systems_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("nfs4", "cifs", "fuse.sshfs", "9p", "lustre", "ceph", "virtiofs", ""):
        monkeypatch.setattr(mounts, "kind_of", lambda path, kind=kind: kind)
        with Shard(model / NAME) as shard:
            assert not mapping.is_local(shard)
            assert isinstance(shard.view(0, 8).obj, bytearray)
    assert convert(model, "map").bytes_mapped == 0


def test_unknown_platforms_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "known_platform", lambda: False)
    assert convert(model, "auto").bytes_mapped == 0
    with pytest.raises(UsageError, match="--read map: here a mapped file"):
        convert(model, "map")


def test_cold_files_are_read(model: Path) -> None:
    fd = os.open(model / NAME, os.O_RDWR)
    posix.fsync(fd)  # os.fsync does nothing in tests, and dirty pages stay
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if mounts.in_memory(model):
        pytest.skip("this file system keeps its pages")
    assert convert(model, "auto").bytes_mapped == 0


def test_reading_loads_no_compiler(model: Path) -> None:
    code = (
        "import sys; from streamconv import api; from streamconv.options import Resources\n"
        "from streamconv.targets.trtllm.options import TensorRTLLM\n"
        "api.convert(sys.argv[1], sys.argv[1] + '-out', TensorRTLLM(), Resources(device='cpu')); print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# ---- views


def test_a_view_is_the_file_for_as_long_as_it_is_kept(model: Path) -> None:
    data = (model / NAME).read_bytes()
    shard = Shard(model / NAME)
    one, two = shard.view(0, 100), shard.view(100, len(data))
    assert isinstance(one.obj, mmap.mmap) and one.obj is two.obj
    shard.close()
    assert one == data[:100] and two == data[100:]
    assert shard.view(5, 5) == b""
    with pytest.raises(SourceChangedError, match=f"ends at byte {len(data)}"):
        shard.view(0, len(data) + 1)
    del one, two
    shard.close()
    replace(model / NAME)
    with pytest.raises(SourceChangedError, match="was replaced"):
        shard.view(0, 8)
