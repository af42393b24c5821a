"""How a run tells a program how far it is: a callable that gets a record now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from streamconv.memory import show_size

_BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        phase: "converting", "syncing", "checking" or "calibrating"; "done" comes last.
        done: how much of `total` is done, in `unit`. A resumed conversion counts what it finds finished at once.
        total: how much there is to do.
        seconds: since the phase's first record.
        unit: "bytes" (of the source for a conversion, of the rank files and the source for verify) or "layers" (calibrate).
        memory_budget: bytes of memory that the run may take, None where it has no ceiling.
    """

    phase: str
    done: int
    total: int
    seconds: float
    unit: str = _BYTES
    memory_budget: int | None = None

    def __str__(self) -> str:
        """ "45.1 %  1.20 GiB of 2.66 GiB  310.00 MiB/s  5 s left" """
        rate = self.done / max(self.seconds, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        share = f"{100 * self.done / max(self.total, 1):5.1f} %"
        if self.unit != _BYTES:
            told = f"{share}  {self.done} of {self.total} {self.unit}"
        else:
            told = f"{share}  {show_size(self.done)} of {show_size(self.total)}  {show_size(rate)}/s"
        return f"{told}  {left:.0f} s left" if self.done else told


Watch = Callable[[Progress], object]
"""Called with a record at most every `every` seconds and at the start and end of a phase, by one thread at a time, not always the same
one. What it raises stops the run and is raised there."""


def unwatched(_: Progress) -> None:
    """Nobody looks."""


class Meter:
    """Counts what workers do and tells a watch of it.

    Args:
        every: seconds between two records of a phase.
    """

    def __init__(self, watch: Watch, every: float = 0.1, clock: Callable[[], float] = time.monotonic) -> None:
        self._watch, self._every, self._clock = watch, every, clock
        self._counting, self._telling = threading.Lock(), threading.Lock()
        self._phase, self._total, self._unit = "", 0, _BYTES
        self._budget: int | None = None
        self._done, self._began, self._told = 0, clock(), 0.0

    def begin(self, phase: str, total: int, *, unit: str = _BYTES, memory_budget: int | None = None) -> None:
        """A phase begins, with nothing of it done."""
        self._phase, self._total, self._unit, self._budget = phase, total, unit, memory_budget
        self._done, self._began = 0, self._clock()
        self._tell()

    def add(self, count: int) -> None:
        """So much more is done; called by any thread."""
        with self._counting:
            self._done = min(self._done + count, self._total)
            due = self._clock() - self._told >= self._every
        if due and self._telling.acquire(blocking=False):  # no worker waits for another's record
            try:
                self._tell()
            finally:
                self._telling.release()

    def tile(self, read: int, written: int) -> None:
        """As `add`, for a tile of which so many source bytes were read."""
        self.add(read)

    def end(self) -> None:
        """All is done."""
        self._phase, self._done = "done", self._total
        self._tell()

    def phase(self, name: str) -> None:
        """What follows needs no counting."""
        self._phase = name
        self._tell()

    def _tell(self) -> None:
        self._told = self._clock()
        record = Progress(self._phase, self._done, self._total, self._told - self._began, self._unit, self._budget)
        self._watch(record)
