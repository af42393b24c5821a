"""What a user sees of resume, locks, signals and pressure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from streamconv import api, memory
from streamconv.errors import DataError, LockedError, ResumeError
from streamconv.options import Resources
from streamconv.run import pool
from streamconv.run.fs import Disk, hidden
from streamconv.run.journal import JournalState, TileRecord, sealed
from streamconv.run.lock import OutputLock
from streamconv.run.place import Place
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.crash.kills import operations, raised
from tests.crash.world import World, held, snapshot, write_model


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def place_of(out: Path, disk: Disk | None = None) -> Place:
    place = Place(out, disk or Disk())
    place.open()
    return place


def read(journal: Path) -> JournalState:
    return place_of(journal.parent / "out").journal().read()


@pytest.fixture
def mask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_resume_skips_what_is_finished(world: World) -> None:
    fresh = world.run()
    world.reset()
    assert raised(world, 90)
    report = world.run()
    assert report.resumed > 5
    assert report.tiles + report.resumed == fresh.tiles
    assert report.bytes_read < fresh.bytes_read
    assert snapshot(world.out) == world.right


def test_a_finished_tile_whose_bytes_changed_is_done_again(world: World) -> None:
    assert raised(world, 90)
    past = read(hidden(world.out, "journal"))
    finished = sum(len(tiles) for tiles in past.tiles.values())
    work = hidden(world.out, "partial") / "rank0.safetensors"
    data = bytearray(work.read_bytes())
    size = int.from_bytes(data[:8], "little") + 8
    for at in range(size, len(data), 5000):
        data[at] ^= 1
    work.write_bytes(data)
    report = world.run()
    assert 0 < report.resumed < finished
    assert snapshot(world.out) == world.right


def test_a_folder_being_worked_on_does_not_look_like_a_checkpoint(world: World) -> None:
    config = hidden(world.out, "partial") / "config.json"
    k = operations(world)
    while not config.exists():  # the last moment before the folder gets its name
        world.reset()
        k -= 1
        assert raised(world, k)
    hidden(world.out, "lock").unlink()
    assert raised(world, 14)  # after the last files were taken back, before they are written again
    assert hidden(world.out, "partial").exists()
    assert not config.exists()
    assert not world.finish()


@pytest.mark.parametrize("what", ["option", "source", "touched"])
def test_changed_work_is_named_and_starts_over_only_with_force(world: World, what: str) -> None:
    assert raised(world, 90)
    shard = world.model / "model.safetensors"
    if what == "option":
        world.options = TensorRTLLM(quant="int8", target_sm=80)
    elif what == "source":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    else:
        os.utime(shard, ns=(1, 1))
    hidden(world.out, "lock").unlink()  # of the killed run; the others stay as they are
    before = snapshot(world.place)
    with pytest.raises(ResumeError, match="quant was none, is int8" if what == "option" else "source file model.safetensors"):
        world.run()
    assert snapshot(world.place) == before
    world.force = True
    assert world.run().resumed == 0
    assert os.listdir(world.place) == ["out"]


def test_starting_over_keeps_no_file_of_the_work_given_up(tmp_path: Path) -> None:
    world = World(tmp_path, tp=2)
    assert raised(world, 90)
    world.options, world.force = TensorRTLLM(), True
    world.run()
    assert sorted(os.listdir(world.out)) == ["config.json", "rank0.safetensors", "streamconv.json"]


def test_another_version_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert raised(world, 90)
    monkeypatch.setattr("streamconv.run.journal.__version__", "99")
    with pytest.raises(ResumeError, match="the version of streamconv"):
        world.run()


def test_bad_weights_leave_nothing_behind(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 3] = np.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "deep" / "er" / "out"
    with pytest.raises(DataError):
        api.convert(model, out, TensorRTLLM(quant="int8", target_sm=80), Resources(memory_budget=4 << 30, workers=2))
    assert not (tmp_path / "deep").exists()


def test_the_second_run_names_the_first(world: World) -> None:
    lock = OutputLock(place_of(world.out))
    lock.acquire()
    try:
        with pytest.raises(LockedError, match=f"process {os.getpid()} on "):
            world.run()
    finally:
        lock.release()
    world.run()
    assert os.listdir(world.place) == ["out"]


def test_a_dead_holders_lock_is_no_obstacle(world: World) -> None:
    hidden(world.out, "lock").write_text("process 1 on elsewhere\n")
    world.run()
    assert os.listdir(world.place) == ["out"]


def test_a_lock_on_a_removed_file_is_none(world: World) -> None:
    first, path = OutputLock(place_of(world.out)), hidden(world.out, "lock")

    class Late(Disk):
        """Between its open and its lock, the holder ends, and another run takes the lock."""

        def lock(self, fd: int) -> None:
            if not first_taken:
                path.unlink()
                first.acquire()
                first_taken.append(True)
            super().lock(fd)

    first_taken: list[bool] = []
    with pytest.raises(LockedError):
        OutputLock(place_of(world.out, Late())).acquire()
    first.release()
    assert not path.exists()


def test_modes_follow_the_umask(world: World, mask: int) -> None:
    world.run()
    assert world.out.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in world.out.iterdir()} == {0o666 & ~mask}


def test_later_lines_replace_those_they_overlap() -> None:
    past = JournalState({})
    for start, stop in ((0, 10), (10, 20), (30, 40), (5, 12), (20, 30)):
        past.add(TileRecord(0, start, stop, ()))
    assert [(done.start, done.stop) for done in past.tiles[0]] == [(5, 12), (20, 30), (30, 40)]


@pytest.mark.parametrize(
    "wrong", [{"errors": None}, {"errors": [[1]]}, {"found": [0]}, {"hash": [""]}, {"tile": [0, 2, 2]}, {"found": [0, True]}]
)
def test_a_line_that_no_run_writes_ends_the_journal(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path, line = hidden(tmp_path / "out", "journal"), {"tile": [0, 0, 2], "hash": [[""]], "found": [0, 0], "errors": [[1.0]]}
    path.write_bytes(sealed({"run": {}}) + sealed(line) + sealed(line | wrong) + sealed(line))
    assert sum(map(len, read(path).tiles.values())) == 1 and read(path).size == len(sealed({"run": {}}) + sealed(line))


def test_a_torn_journal_ends_before_the_tear(world: World) -> None:
    assert raised(world, 90)
    path = hidden(world.out, "journal")
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:-9])
    past = read(path)
    assert sum(len(tiles) for tiles in past.tiles.values()) == 3
    path.write_bytes(lines[0][:30])
    assert not read(path)
    path.unlink()
    assert not read(path)


def _held_run(tmp_path: Path) -> tuple[subprocess.Popen[str], list[str]]:
    model = write_model(tmp_path / "model", hidden=256, layers=4)
    (tmp_path / "place").mkdir()
    arguments = ["convert", str(model), str(tmp_path / "place" / "out"), "--workers", "2", "--memory-budget", "2GiB"]
    return held(arguments, tmp_path / "place" / ".out.streamconv-journal", tile_rows=16), arguments


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_order(tmp_path: Path, number: signal.Signals) -> None:
    child, arguments = _held_run(tmp_path)
    child.send_signal(number)
    _, said = child.communicate(timeout=200)
    assert child.returncode == 128 + number
    assert "run the same command again" in said
    assert said.count("\n") == 1, said
    place = tmp_path / "place"
    assert sorted(os.listdir(place)) == [".out.streamconv-journal", ".out.streamconv-partial"]
    done = subprocess.run([sys.executable, "-m", "streamconv", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of an earlier run were kept" in done.stdout
    assert os.listdir(place) == ["out"]


def test_a_second_signal_kills(tmp_path: Path) -> None:
    child, _ = _held_run(tmp_path)
    child.send_signal(signal.SIGTERM)
    while child.poll() is None and _catches(child.pid, signal.SIGTERM):  # two that come before the first was seen are one
        time.sleep(0.0005)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=200)
    assert child.returncode in (-signal.SIGINT, 128 + signal.SIGTERM)  # killed, or it was already through


def _catches(pid: int, number: signal.Signals) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False  # a zombie's lines, or none


def test_workers_step_back_while_memory_is_short(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    free, active, most = [1 << 20], [0], [0]
    lock, two = threading.Lock(), threading.Event()
    monkeypatch.setattr(memory, "available", lambda: free[0])
    monkeypatch.setattr(pool, "_LOOK", 0.01)
    do = pool.Pool._do

    def watched(self: pool.Pool, *args: object) -> None:
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
            if active[0] > 1:
                two.set()
        two.wait(0.005 if free[0] == 1 << 20 else 100)  # time for another one to come
        do(self, *args)  # type: ignore[arg-type]
        with lock:
            active[0] -= 1

    monkeypatch.setattr(pool.Pool, "_do", watched)
    world.run(workers=4, tile_rows=16)
    assert most[0] == 1
    assert snapshot(world.out) == world.right
    world.reset()
    free[0], most[0] = 1 << 40, 0
    world.run(workers=4, tile_rows=16)
    assert most[0] > 1
