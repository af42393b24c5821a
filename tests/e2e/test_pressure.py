"""Memory that others take while a conversion runs: its workers step back, it ends, and its bytes are the same."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.cgroup import CgroupError, memory_group
from streamconv import memory
from streamconv.run import pool
from streamconv.run.tile import TileWorker
from tests.crash.world import World, held, snapshot, write_model

MIB = 1 << 20
WORKERS = 4


class Watch:
    """Counts the workers that are at a tile; `seen` holds (worker, how many are at a tile) at the start of each.

    Args:
        began: called by a worker that has begun the n-th tile, with n.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, began: Callable[[int], object]) -> None:
        self.active, self.seen, lock = 0, list[tuple[str, int]](), threading.Lock()
        do = pool.Pool._do

        def watched(held: pool.Pool, *args: object) -> None:
            with lock:
                self.active += 1
                self.seen.append((threading.current_thread().name, self.active))
                number = len(self.seen)
            began(number)
            time.sleep(0.005)
            do(held, *args)  # type: ignore[arg-type]
            with lock:
                self.active -= 1

        monkeypatch.setattr(pool.Pool, "_do", watched)
        monkeypatch.setattr(pool, "_LOOK", 0.0)


def _soon(so: Callable[[], bool]) -> None:
    until = time.monotonic() + 100
    while not so():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_workers_step_back_and_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    short = (10, 30)  # tiles, counted as they are begun

    def free() -> int:
        return pool.FLOOR - 1 if short[0] <= len(watch.seen) < short[1] else pool.FLOOR

    def began(tiles: int) -> None:
        """Before and after the shortage, another worker must come, however late the system lets it."""
        span = slice(0, short[0]) if tiles <= short[0] else slice(short[1], None)
        _soon(lambda: short[0] < tiles <= short[1] or max((active for _, active in watch.seen[span]), default=0) > 1)

    watch = Watch(monkeypatch, began)
    monkeypatch.setattr(memory, "available", free)
    world.run(workers=WORKERS, tile_rows=16)
    assert world.wrong_end() == ""
    assert len(watch.seen) > 40
    while_short = [worker for worker, _ in watch.seen[short[0] : short[1]]]
    # who had looked before may begin one more tile, from then on there is one worker
    assert all(while_short.count(f"tile-{number}") <= 1 for number in range(1, WORKERS)), while_short


def test_memory_short_from_the_first_to_the_last_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    watch = Watch(monkeypatch, lambda tiles: None)
    monkeypatch.setattr(memory, "available", lambda: 0)
    world.run(workers=8, tile_rows=16)
    assert world.wrong_end() == "" and {*watch.seen} == {("tile-0", 1)}


def test_an_error_ends_parked_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)

    def began(tiles: int) -> None:
        if tiles == 12:
            raise RuntimeError("the disk is on fire")

    Watch(monkeypatch, began)
    monkeypatch.setattr(memory, "available", lambda: 0)
    with pytest.raises(RuntimeError, match="on fire"):
        world.run(workers=WORKERS, tile_rows=16)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tile-")]


def test_a_parked_worker_gives_its_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    given = []
    take = pool.Pool._take_tiles

    def watched(held: pool.Pool, number: int, worker: TileWorker) -> None:
        give_back = worker.give_back
        take(held, number, dataclasses.replace(worker, give_back=lambda *where: (given.append(number), give_back(*where))))

    monkeypatch.setattr(pool.Pool, "_take_tiles", watched)
    Watch(monkeypatch, lambda tiles: _soon(lambda: len(given) == WORKERS - 1))
    monkeypatch.setattr(memory, "available", lambda: 0)
    world.run(workers=WORKERS, tile_rows=16)
    assert sorted(given) == [1, 2, 3] and world.wrong_end() == ""


# ---- a real container

_CONVERT = """
import os, sys, threading, time
from streamconv import api, memory
from streamconv.run import pool
from streamconv.options import Resources
from streamconv.targets.trtllm.options import TensorRTLLM

model, out, log, short, enough = sys.argv[1:]
active, lock, do, log = [0], threading.Lock(), pool.Pool._do, open(log, "w", buffering=1)
begun, again = [], threading.Event()

def watched(self, *args):
    with lock:
        active[0] += 1
        print(time.monotonic(), active[0], file=log)
        begun.append(self)
        if active[0] > 1 and os.path.exists(enough):
            again.set()
    while len(begun) > 40 and not os.path.exists(short):  # most are left for the shortage, however late it comes
        time.sleep(0.01)
    if not again.is_set():
        time.sleep(0.02)
    do(self, *args)
    with lock:
        active[0] -= 1

pool.Pool._do = watched
api.convert(model, out, TensorRTLLM(), Resources(memory_budget=160 << 20, workers=4, device="cpu", tile_rows=8))
"""

_EAT = """
import os, sys, time
from streamconv import memory

floor, held = int(sys.argv[1]), []
def eat():
    while memory.available() > floor:
        held.append(b"x" * (2 << 20))
eat()
print(time.monotonic(), flush=True)
while not os.path.exists(sys.argv[2]):
    eat()
    time.sleep(0.01)
print(time.monotonic(), flush=True)
"""

_JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


def _inside(group: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    command = ["/bin/sh", "-c", _JOIN, str(group), sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _tiles(log: Path) -> list[tuple[float, int]]:
    """(time, workers at a tile) at the start of each so far."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [(float(line.split()[0]), int(line.split()[1])) for line in lines if line.endswith("\n")]


def _until(so: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    while not so():
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)


def test_another_process_eats_the_memory_of_the_container(tmp_path: Path) -> None:
    model, log = write_model(tmp_path / "model", hidden=512, layers=4, vocab=4096), tmp_path / "log"
    subprocess.run([sys.executable, "-m", "streamconv", "convert", str(model), str(tmp_path / "alone"), "--quiet"], check=True)
    try:
        with memory_group(320 * MIB) as (version, group):
            out, short, enough = (tmp_path / name for name in ("out", "short", "enough"))
            convert = _inside(group, _CONVERT, *map(str, (model, out, log, short, enough)))
            _until(lambda: len(_tiles(log)) >= 20 and max(active for _, active in _tiles(log)) > 1, convert)
            eat = _inside(group, _EAT, str(pool.FLOOR // 2), str(enough))
            assert eat.stdout is not None
            began = float(eat.stdout.readline() or "nan")
            short.touch()
            # the others have stepped back, and the eater has what they gave back
            _until(lambda: [active for at, active in _tiles(log) if at > began][-30:] == [1] * 30, convert)
            begin = time.monotonic()
            _until(lambda: sum(at > begin for at, _ in _tiles(log)) > 20, convert)
            enough.touch()
            told, trouble = eat.communicate(timeout=200)
            assert eat.returncode == 0, trouble
            _, trouble = convert.communicate(timeout=200)
            assert convert.returncode == 0, trouble
            killed = (group / ("memory.oom_control" if version == 1 else "memory.events")).read_text()
    except CgroupError as error:
        pytest.skip(str(error))
    assert "oom_kill 0" in killed
    end, seen = float(told), _tiles(log)
    under = [active for at, active in seen if begin < at < end]
    assert len(under) > 10 and max(under) == 1, under
    assert max(active for at, active in seen if at > end) > 1
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "alone")


# ---- a smaller budget for the rest

def test_the_budget_can_be_lowered_for_the_rest(tmp_path: Path) -> None:
    model, place = write_model(tmp_path / "model", hidden=1024, layers=4, vocab=16384), tmp_path / "place"
    place.mkdir()
    convert = ["convert", str(model), "--quant", "int8", "--target-sm", "80"]
    program = [sys.executable, "-m", "streamconv", *convert]
    fresh = subprocess.run([*program, str(tmp_path / "alone"), "--json", "--memory-budget", "2GiB"], capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    journal = place / ".out.streamconv-journal"
    child = held([*convert, str(place / "out"), "--memory-budget", "2GiB", "--workers", "2"], journal)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=200)
    assert child.returncode == 128 + signal.SIGTERM

    again = [*program, str(place / "out"), "--json", "--memory-budget"]
    refused = subprocess.run([*again, "20MiB"], capture_output=True, text=True)
    assert refused.returncode == 5
    assert journal.exists()  # a refusal costs nothing of what is done
    smallest = json.loads(refused.stdout)["hint"].split()[-1]
    # the smallest is measured anew in each run: a little more, so that the test does not hang on a page
    budget = int(smallest.removesuffix("MiB")) + 4
    done = subprocess.run([*again, f"{budget}MiB"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, before = json.loads(done.stdout), json.loads(fresh.stdout)
    assert told["resumed"] > 0
    assert told["peak_memory"] <= told["budget"] == budget * MIB < before["budget"], (told["peak_memory"], before["peak_memory"])
    assert os.listdir(place) == ["out"]
    assert snapshot(place / "out") == snapshot(tmp_path / "alone")
