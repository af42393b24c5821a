"""Real processes: killed at random moments, racing for one output, on a disk that is really full."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from streamconv import api
from streamconv.errors import LockedError, OutputError
from streamconv.options import Resources
from streamconv.run import recorder
from streamconv.run.fs import Disk, Folder, Mark
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.crash.disks import Counting, Killing
from tests.crash.kills import Count
from tests.crash.world import no_thread, snapshot, write_model

TILE_ROWS = (64, 96, 256)


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child: exit status 0, 3 if the output is locked, 4 if it is there, 1 for anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads that have ended still count for Python's warning about fork
        pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except LockedError:
        os._exit(3)
    except OutputError as error:
        os._exit(4 if "exists and is not empty" in str(error) else 1)
    except BaseException:
        os._exit(1)


def _die_within(seconds: float) -> None:
    """SIGKILL while the run's other threads go on; the operation that waits here is never done, so the run cannot end before."""
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


class Runs:
    """Conversions of one model by real workers and the journal's thread, in children.

    Attributes:
        operations: of the disk that one makes, at least: with the largest tiles and one batch of the journal.
    """

    def __init__(self, root: Path, quant: str = "none", megabytes: int = 64) -> None:
        self.root, self.options = root, TensorRTLLM(quant=quant, target_sm=80)
        self.place, self.out = root / "place", root / "place" / "out"
        self.place.mkdir(parents=True)
        hidden = 512
        self.model = write_model(root / "model", hidden=hidden, vocab=256, layers=max(1, megabytes * 1000 // 2900))
        self.convert(self.out, 4)
        self.right = snapshot(self.out)
        shutil.rmtree(self.out)
        counting = Counting()
        with no_thread(1 << 40):
            self.convert(self.out, 1, disk=counting, tile_rows=TILE_ROWS[-1])
        self.operations = counting.count
        shutil.rmtree(self.out)

    def convert(self, out: Path, workers: int, disk: Disk | None = None, tile_rows: int | None = None) -> None:
        before, recorder.BATCH_SECONDS = recorder.BATCH_SECONDS, 0.005
        try:
            asked = Resources(memory_budget=4 << 30, workers=workers, device="cpu", tile_rows=tile_rows or random.choice(TILE_ROWS))
            api.convert(self.model, out, self.options, asked, disk=disk)
        finally:
            recorder.BATCH_SECONDS = before


def random_kills(runs: Runs, rounds: int, seed: int = 1) -> Count:
    """Killed at random moments, once to four times in a row, then a run to the end; workers and tiles vary."""
    rng, count = random.Random(seed), Count(facts={"killed": 0, "journals": 0})
    journal_file = runs.place / ".out.streamconv-journal"
    for number in range(rounds):
        for _ in range(rng.randint(1, 4)):
            workers, seconds = rng.randint(1, 6), rng.uniform(0, 0.003)
            disk = Killing(rng.randrange(runs.operations), lambda seconds=seconds: _die_within(seconds))  # type: ignore[misc]
            pid = fork(lambda workers=workers, disk=disk: runs.convert(runs.out, workers, disk))  # type: ignore[misc]
            _, status = os.waitpid(pid, 0)
            count.facts["killed"] += os.WIFSIGNALED(status)
            count.facts["journals"] += journal_file.exists() and journal_file.stat().st_size > 2000
            if (runs.out / "config.json").exists() and snapshot(runs.out) != runs.right:
                count.wrong.append(f"round {number}: half an output under its name")
        with contextlib.suppress(OutputError):
            runs.convert(runs.out, rng.randint(1, 6))
        left = set(os.listdir(runs.place)) - {"out"}
        problem = f"left behind: {sorted(left)}" if left else ""
        count.note(f"round {number}", problem or ("" if snapshot(runs.out) == runs.right else "other bytes"))
        shutil.rmtree(runs.out, ignore_errors=True)
    return count


class Slow(Disk):
    """At work until the others have come (the pipe `through` is closed), and a witness that nobody else is."""

    def __init__(self, marker: Path, through: int) -> None:
        self.marker, self.through, self.inside = marker, through, False

    def truncate(self, fd: int, size: int) -> None:
        if not self.inside:  # this one is of the lock's file
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))  # fails if another run is at work
            self.inside = True
        else:
            os.read(self.through, 1)
        super().truncate(fd, size)

    def rename(self, folder: Folder, old: str, new: str, known: Mark) -> None:
        os.unlink(self.marker)
        super().rename(folder, old, new, known)


def lock_races(runs: Runs, rounds: int, crowd: int = 5, seed: int = 1) -> Count:
    """Processes released together for one output: one works, no other starts; in every second round it is killed."""
    rng, count = random.Random(seed), Count(facts={"locked out": 0, "holders killed": 0})
    marker = runs.root / "at-work"
    for number in range(rounds):
        (gate_out, gate_in), (through_out, through_in) = os.pipe(), os.pipe()

        def wait_and_run(gate: tuple[int, int] = (gate_out, gate_in), through: tuple[int, int] = (through_out, through_in)) -> None:
            os.close(gate[1])
            os.close(through[1])
            os.read(gate[0], 1)
            runs.convert(runs.out, 2, disk=Slow(marker, through[0]))

        pids = {fork(wait_and_run) for _ in range(crowd)}
        for end in (gate_out, gate_in, through_out):
            os.close(end)
        victim = None
        if number % 2:
            lock = runs.place / ".out.streamconv-lock"
            while victim not in pids:
                with contextlib.suppress(OSError, ValueError, IndexError):
                    victim = int(lock.read_text().split()[1])
            time.sleep(rng.uniform(0, 0.02))
            os.kill(victim, signal.SIGKILL)
        ends, waiting = list[str | int](), True
        while pids:
            if waiting and (len(pids) == 1 or victim is not None):  # after a kill, another one may be at work
                os.close(through_in)
                waiting = False
            for pid in [*pids]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    pids.remove(pid)
                    ends.append("killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
            time.sleep(0.002)
        marker.unlink(missing_ok=True)
        count.facts["locked out"] += ends.count(3)
        count.facts["holders killed"] += ends.count("killed")
        # a killed witness leaves its marker, so after a kill others may fail at it: only "two at once" counts then
        problem = "" if victim is not None or sorted(map(str, ends)) == ["0", *["3"] * (crowd - 1)] else f"ended with {ends}"
        with contextlib.suppress(OutputError):
            runs.convert(runs.out, 2)  # at once, whoever was killed
        left = set(os.listdir(runs.place)) - {"out"}
        problem = problem or (f"left behind: {sorted(left)}" if left else "")
        count.note(f"round {number}", problem or ("" if snapshot(runs.out) == runs.right else "other bytes"))
        shutil.rmtree(runs.out, ignore_errors=True)
    return count


def full_disk(runs: Runs, sizes: int) -> Count:
    """A small file system of 5 to 95 % of the need: refused, nothing left; then it grows, and the same run gets through.

    Needs the right to mount a tmpfs.
    """
    count = Count()
    need = sum(len(data or b"") for data in runs.right.values())
    place = runs.root / "small"
    place.mkdir()
    for number in range(sizes):
        share = 5 + 90 * number / max(1, sizes - 1)
        size = int(need * share / 100) // 4096 * 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
        try:
            problem = "it fitted"
            try:
                runs.convert(place / "out", 3)
            except OutputError as error:
                problem = "" if "space" in str(error) else str(error)
            left = os.listdir(place)
            problem = problem or (f"left behind: {left}" if left else "")
            subprocess.run(["mount", "-o", f"remount,size={3 * need}", str(place)], check=True)
            runs.convert(place / "out", 3)
            problem = problem or ("" if snapshot(place / "out") == runs.right else "other bytes")
            count.note(f"{share:.0f} %", problem)
        finally:
            subprocess.run(["umount", str(place)], check=True)
    return count
