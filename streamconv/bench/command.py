"""Runs a command in a memory cgroup and measures it: seconds until its data is on the disk, memory of all its processes."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv import memory, process

_EVERY = 0.02
_NAMES = {
    "memory.limit_in_bytes": ("memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes"),
    "memory.max": ("memory.swap.max", "memory.peak"),
}
"""File of the limit -> files of the limit with swap (v2: of swap alone), and of the peak."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A run of a command.

    Attributes:
        status: what it ended with, negative if a signal killed it.
        cpu: seconds of processor time of all its processes, which other programs disturb less.
        peak: largest sum of the resident sets of its processes.
        cgroup_peak: of its cgroup, page cache included; None without one.
        error: the end of what it printed on standard error.
    """

    status: int
    seconds: float
    cpu: float
    peak: int
    cgroup_peak: int | None
    error: str


@dataclass(frozen=True, slots=True)
class Group:
    """Where a command runs.

    Attributes:
        folder: a memory cgroup of this process's making; None without one.
        before: words that put a command into a cgroup of its own, where only systemd may make one.
    """

    folder: Path | None = None
    before: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.folder is not None or bool(self.before)


@contextlib.contextmanager
def group(limit: int | None) -> Iterator[Group]:
    """A memory cgroup of `limit` bytes without swap (None: without a limit), v1 or v2; none where neither we nor systemd can make one."""
    folder = _made(limit)
    if folder is None:
        yield Group(before=_by_systemd(limit))
        return
    try:
        yield Group(folder)
    finally:
        for _ in range(100):
            try:
                folder.rmdir()
                break
            except OSError:  # a process that has ended counts a moment longer
                time.sleep(0.02)


def _made(limit: int | None) -> Path | None:
    for place, top, (name, *_) in memory.cgroups():
        for parent in (place, *(each for each in place.parents if top in (each, *each.parents))):
            folder = parent / f"streamconv-bench-{os.getpid()}-{time.monotonic_ns()}"
            try:
                folder.mkdir()
            except OSError:
                continue
            try:
                if limit is not None:
                    (folder / name).write_text(str(limit))
                    with contextlib.suppress(OSError):  # absent where swap is not counted
                        (folder / _NAMES[name][0]).write_text(str(limit) if "limit" in name else "0")
                if os.path.exists(folder / name):
                    return folder
            except OSError:
                pass
            folder.rmdir()  # v2: the parent does not hand memory on
    return None


def _by_systemd(limit: int | None) -> tuple[str, ...]:
    """`systemd-run --user`, for who is not root; empty where it is not there, or may not limit memory."""
    program = shutil.which("systemd-run")
    if program is None:
        return ()
    top = "infinity" if limit is None else str(limit)
    before = (program, "--user", "--scope", "--quiet", "--collect", "-p", f"MemoryMax={top}", "-p", "MemorySwapMax=0", "--")
    with tempfile.TemporaryDirectory() as folder:
        child = process.start_command((*before, "true"), Path(folder) / "log")
        return before if child.wait() == 0 else ()


def measured(words: Sequence[str], log: Path, place: Group) -> Measured:
    """Run a command and wait for it."""
    began, before = time.monotonic(), _cpu_seconds()
    child = process.start_command((*place.before, *words), log, place.folder / "cgroup.procs" if place.folder is not None else None)
    peak, charged = 0, None
    try:
        while child.poll() is None:
            peak, charged = max(peak, _resident(child.pid)), _charged(place.folder or _scope(child.pid), charged)
            time.sleep(_EVERY)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    os.sync()
    seconds = time.monotonic() - began
    charged = _charged(place.folder, charged)
    text = log.read_text(errors="replace")[-2000:] if os.path.exists(log) else ""
    return Measured(child.returncode, seconds, _cpu_seconds() - before, peak, charged, text)


def _cpu_seconds() -> float:
    """Of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _charged(folder: Path | None, before: int | None) -> int | None:
    """The most that a cgroup has held; what was known before, if it does not say."""
    if folder is None:
        return before
    for _, name in _NAMES.values():
        with contextlib.suppress(OSError, ValueError):
            return int((folder / name).read_text())
    return before


def _scope(pid: int) -> Path | None:
    """The cgroup that systemd made for a process; one that has ended counts as in the root."""
    places = (place for place, _, _ in memory.cgroups(Path(f"/proc/{pid}/cgroup")))
    return next((place for place in places if place.name.startswith("run-") and place.suffix == ".scope"), None)


def _resident(pid: int) -> int:
    """Of a process and all that it started."""
    size = 0
    with contextlib.suppress(OSError):
        size = memory.resident_of(Path(f"/proc/{pid}/status").read_bytes())[0]
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                size += _resident(int(child))
    return size
