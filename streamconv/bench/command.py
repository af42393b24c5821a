"""Runs a command in a memory cgroup and measures it: seconds until its data is on the disk, memory of all its processes."""

from __future__ import annotations

import contextlib
import os
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
        peak: largest sum of the resident sets of its processes.
        cgroup_peak: of its cgroup, page cache included; None without one.
        error: the end of what it printed on standard error.
    """

    status: int
    seconds: float
    peak: int
    cgroup_peak: int | None
    error: str


@contextlib.contextmanager
def group(limit: int | None) -> Iterator[Path | None]:
    """A memory cgroup of `limit` bytes without swap, v1 or v2; None where none can be made, or none is wanted."""
    made = _made(limit) if limit is not None else None
    try:
        yield made
    finally:
        if made is not None:
            for _ in range(100):
                try:
                    made.rmdir()
                    break
                except OSError:  # a process that has ended counts a moment longer
                    time.sleep(0.02)


def _made(limit: int) -> Path | None:
    for place, top, (name, *_) in memory.cgroups():
        for parent in (place, *(each for each in place.parents if top in (each, *each.parents))):
            made = parent / f"streamconv-bench-{os.getpid()}-{time.monotonic_ns()}"
            try:
                made.mkdir()
            except OSError:
                continue
            try:
                (made / name).write_text(str(limit))
                with contextlib.suppress(OSError):  # absent where swap is not counted
                    (made / _NAMES[name][0]).write_text(str(limit) if "limit" in name else "0")
                return made
            except OSError:  # v2: the parent does not hand memory on
                made.rmdir()
    return None


def measured(words: Sequence[str], log: Path, place: Path | None) -> Measured:
    """Run a command and wait for it.

    Args:
        log: file for what it prints.
        place: its cgroup.
    """
    began = time.monotonic()
    child = process.start_command(words, log, place / "cgroup.procs" if place is not None else None)
    peak = 0
    try:
        while child.poll() is None:
            peak = max(peak, _resident(child.pid))
            time.sleep(_EVERY)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    os.sync()
    seconds = time.monotonic() - began
    held = None
    for name in (names[1] for names in _NAMES.values()):
        with contextlib.suppress(OSError, ValueError):
            held = int((place / name).read_text()) if place is not None else None
            break
    text = log.read_text(errors="replace")[-2000:] if os.path.exists(log) else ""
    return Measured(child.returncode, seconds, peak, held, text)


def _resident(pid: int) -> int:
    """Of a process and all that it started."""
    size = 0
    with contextlib.suppress(OSError):
        size = memory.resident_of(Path(f"/proc/{pid}/status").read_bytes())[0]
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                size += _resident(int(child))
    return size
