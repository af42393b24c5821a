"""Memory over time: a thread looks 20 times a second, writes a line of JSON for each look, and keeps what a picture needs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

from streamconv import memory
from streamconv.errors import OutputError, UsageError, printable
from streamconv.process import start_thread
from streamconv.progress import Meter

EVERY = 0.05
"""Seconds between two looks."""
_BEGINS = b'{"time": '
_MOVED = re.compile(rb"rchar: (\d+)\nwchar: (\d+)\n")
_KEPT = 2000
"""Samples that are kept in memory; when there are more, every second one goes and every second look is kept from then on."""


class Sample(NamedTuple):
    """One look; sizes in bytes.

    Attributes:
        time: seconds since the trace began.
        resident: of this process.
        peak: the largest `resident` of this process so far, as the kernel counts it.
        children: resident set of the processes that it started (a calibration inside a conversion), 0 without any.
        cgroup: what its memory cgroup has charged, page cache included; None outside of one.
        budget: the ceiling that the run keeps, None while there is none.
        device: what torch holds on CUDA devices.
        read, written: bytes of the source and of the output since the phase began; where none are counted (calibrating), all bytes
            that this process has read and written since the trace began.
        cpu: seconds of processor time, over all threads, since the trace began.
        phase: see `progress.Progress`.
    """

    time: float
    resident: int
    peak: int
    children: int
    cgroup: int | None
    budget: int | None
    device: int
    read: int
    written: int
    cpu: float
    phase: str


class MemoryTrace:
    """A context in which memory is sampled.

    Args:
        meter: says which phase it is and how far it is.
        file: JSON lines go there; None keeps the samples alone.

    Attributes:
        samples: at most `_KEPT`, over the whole time.
        problem: why the file lacks lines, None if it does not.

    Raises:
        OutputError: the file cannot be written. UsageError: another file has the name.
    """

    def __init__(self, meter: Meter, file: Path | None = None) -> None:
        self._meter, self._path = meter, file
        self.samples: list[Sample] = []
        self.problem: str | None = None
        self._file: IO[bytes] | None = None
        self._end = threading.Event()
        self._looks, self._stride = 0, 1

    def __enter__(self) -> MemoryTrace:
        if self._path is not None:
            self._file = _begin(self._path)
        self._began, self._cpu, self._transferred = time.monotonic(), time.process_time(), _transferred()
        self._cgroup = memory.cgroup_usage()
        self._add()  # the beginning, however late the thread comes
        self._thread = start_thread(self._run, "memory-trace")
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        self._add()  # the end, and the peak
        self._write(None)

    def _run(self) -> None:
        due = self._began + EVERY
        while not self._end.wait(due - time.monotonic()):
            self._add()
            due = max(due + EVERY, time.monotonic())

    def _add(self) -> None:
        now = self._look()
        if self._looks % self._stride == 0 or self._end.is_set():
            self.samples.append(now)
        elif self.samples:
            self.samples[-1] = _worse(self.samples[-1], now)
        self._looks += 1
        if len(self.samples) > _KEPT:
            pairs = zip(self.samples[::2], self.samples[1::2], strict=False)
            self.samples[:] = [_worse(*pair) for pair in pairs] + self.samples[len(self.samples) // 2 * 2 :]
            self._stride *= 2
        self._write(now)

    def _write(self, sample: Sample | None) -> None:
        """A line of the file, or its end. A file that takes no line ends; the run goes on."""
        if self._file is None:
            return
        try:
            if sample is not None:
                line = {key: round(value, 4) if isinstance(value, float) else value for key, value in sample._asdict().items()}
                self._file.write(json.dumps(line).encode("ascii") + b"\n")
            else:
                self._file.close()
        except OSError as error:
            self.problem = f"--memory-trace {printable(self._path)} ends early: {error.strerror}"
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _look(self) -> Sample:
        progress = self._meter.now()
        resident, peak = memory.resident_of(_read("/proc/self/status"))
        read, written = progress.done, progress.written
        if progress.unit != "bytes":
            read, written = (now - then for now, then in zip(_transferred(), self._transferred, strict=True))
        charged = _read(self._cgroup).strip() if self._cgroup is not None else b""
        return Sample(
            time=time.monotonic() - self._began,
            resident=resident,
            peak=peak,
            children=_resident_of_all(_read(f"/proc/self/task/{os.getpid()}/children").split()),
            cgroup=int(charged) if charged.isdigit() else None,  # it may be gone
            budget=progress.memory_budget,
            device=_on_devices(),
            read=read,
            written=written,
            cpu=time.process_time() - self._cpu,
            phase=progress.phase or "starting",
        )


def _begin(path: Path) -> IO[bytes]:
    """Open the file of a trace. Of the files only a trace is written over: a source's or a user's file may have been named by mistake."""
    shown = f"--memory-trace {printable(path)}"
    try:
        if os.path.isfile(path):
            with path.open("rb") as file:
                if file.read(len(_BEGINS)) not in (_BEGINS, b""):
                    raise UsageError(f"{shown}: the file is no memory trace, and stays", hint="choose another name")
        return path.open("wb", buffering=0)  # a process that is killed leaves its lines
    except OSError as error:
        raise OutputError(f"{shown} cannot be written: {error.strerror}") from None


def _read(path: str | Path) -> bytes:
    """The beginning of a file of the kernel's; empty if it cannot be read, or if what it tells of is gone."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(4096)
    except OSError:
        return b""


def _resident_of_all(processes: Iterable[bytes]) -> int:
    """Sum of the resident sets of processes, by their ids."""
    return sum(memory.resident_of(_read(f"/proc/{int(process)}/status"))[0] for process in processes)


def _transferred() -> tuple[int, int]:
    """Bytes that this process has read and written, zeros on a kernel that does not count them."""
    counts = _MOVED.match(_read("/proc/self/io"))
    return (int(counts[1]), int(counts[2])) if counts else (0, 0)


def _on_devices() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_reserved(number) for number in range(torch.cuda.device_count()))


def _worse(one: Sample, other: Sample) -> Sample:
    """Two looks as one: the later, with the larger sizes of both."""
    largest = {name: max(getattr(one, name), getattr(other, name)) for name in ("resident", "peak", "children", "device")}
    return other._replace(cgroup=max(one.cgroup or 0, other.cgroup or 0) or other.cgroup, **largest)
