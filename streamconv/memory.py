"""Host memory: what is free where we run, what this process uses, and how sizes are spelled.

Free memory is what the container has free, not what the host reports: cgroup v1 and v2 limits are read, all the way up.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import os
import re
import weakref
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from streamconv.errors import BudgetError, UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "b": 1, "k": KIB, "kib": KIB, "m": MIB, "mib": MIB, "g": GIB, "gib": GIB, "t": 1 << 40, "tib": 1 << 40}
_UNITS |= {"kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4}
_CGROUP = Path("/sys/fs/cgroup")
_Key = TypeVar("_Key", bound=Hashable)
_Made = TypeVar("_Made")
_RESIDENT = re.compile(rb"VmHWM:\s*(\d+) kB\nVmRSS:\s*(\d+) kB")
"""Neighbours in /proc/PID/status."""


def parse_size(text: str) -> int:
    """ "2GiB", "512M", "1500MB" or a plain number of bytes -> bytes. Raises UsageError: not a size."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is not a size", hint="write it as 512MiB or 2GiB")
    return int(float(match[1]) * unit)


def show_size(count: float) -> str:
    """Bytes for people: 1.50 GiB."""
    for unit, size in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{int(count)} B"


def resident() -> int:
    """Resident set of this process in bytes."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """Largest resident set of this process so far in bytes."""
    with open("/proc/self/status", "rb") as file:
        return resident_of(file.read())[1] or resident()


def resident_of(status: bytes) -> tuple[int, int]:
    """Resident set and the largest so far, in bytes, from /proc/PID/status; zeros of a process that has ended."""
    match = _RESIDENT.search(status)
    return (int(match[2]) * KIB, int(match[1]) * KIB) if match else (0, 0)


_ceiling: contextvars.ContextVar[int | None] = contextvars.ContextVar("ceiling", default=None)


@contextlib.contextmanager
def bounded(budget: int | None) -> Iterator[None]:
    """A context in which `check_room` knows the ceiling of the process's resident set; None sets none."""
    token = _ceiling.set(budget)
    try:
        yield
    finally:
        _ceiling.reset(token)


def check_room(more: int, what: str) -> None:
    """Refuse before memory is taken that the budget does not hold; does nothing outside `bounded`.

    Args:
        more: bytes that are about to be taken.
        what: for, in words.

    Raises:
        BudgetError: they would not fit. It has no hint.
    """
    ceiling = _ceiling.get()
    if ceiling is not None and (taken := resident()) + more > ceiling:
        message = f"{show_size(taken)} are in use, and {what} takes {show_size(more)}"
        raise BudgetError(f"--memory-budget {show_size(ceiling)} cannot work: {message}")


def available() -> int:
    """Bytes this process may still take: the least of the host's and every enclosing container's free memory."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *(top - used for top, used in _cgroup_levels())]))


def limit() -> int | None:
    """The tightest memory limit of the enclosing containers, None without one."""
    return min((top for top, _ in _cgroup_levels()), default=None)


def cgroup_usage() -> Path | None:
    """The file that says how many bytes this process's own memory cgroup has charged, page cache included; None without one."""
    for place, _, names in cgroups():
        if os.path.exists(place / names[1]):
            return place / names[1]
    return None


def cgroups(proc: Path = Path("/proc/self/cgroup"), root: Path = _CGROUP) -> Iterator[tuple[Path, Path, tuple[str, str, str]]]:
    """(folder, top, names of limit, usage and reclaimable cache) of the memory cgroups that this process is in, one for each hierarchy."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
            if not os.path.exists(root / "cgroup.controllers") and os.path.exists(root / "unified"):
                top = root / "unified"
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        place = top / path.lstrip("/")
        # inside a container the host's path may not be mounted: what is mounted is then the root
        yield place if os.path.exists(place) else top, top, names


def _cgroup_levels(proc: Path = Path("/proc/self/cgroup"), root: Path = _CGROUP) -> list[tuple[int, int]]:
    """(limit, use that cannot be reclaimed) of each enclosing memory cgroup that has a limit."""
    levels = []
    for place, top, names in cgroups(proc, root):
        while True:
            level = _read_level(place, *names)
            if level:
                levels.append(level)
            if place == top or top not in place.parents:
                break
            place = place.parent
    return levels


def _read_level(place: Path, limit_name: str, used_name: str, cache_name: str) -> tuple[int, int] | None:
    try:
        text = (place / limit_name).read_text().strip()
        if text == "max" or int(text) >= 1 << 60:
            return None
        used = int((place / used_name).read_text())
        counts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        return int(text), max(0, used - int(counts.get(cache_name, 0)))
    except (OSError, ValueError):
        return None


def kept(method: Callable[[_Key], _Made], count: int) -> Callable[[_Key], _Made]:
    """What a method makes of its last `count` arguments, each made once, for an attribute of its object.

    A plain `lru_cache` would know the object that holds it, and a plan in such a cycle stays in memory until Python looks for cycles.
    """
    of = weakref.WeakMethod(method)

    def make(key: _Key) -> _Made:
        bound = of()
        assert bound is not None, "only the object's own attribute calls this"
        return bound(key)

    return lru_cache(count)(make)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """A plan is a million small objects and no cycles: looking for some takes a third of the time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # both together: what was made is old now, and is not looked at again at once
        gc.enable()
