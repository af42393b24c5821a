"""How a run tells a program how far it is: a callable that gets a record now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from streamconv.errors import UsageError
from streamconv.memory import show_size
from streamconv.reports import Estimate

_BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class OutputProgress:
    """How far one of several outputs is: bytes of its tensors, those of an earlier run too.

    Attributes:
        finished: by an earlier run, and skipped.
    """

    out: str
    done: int
    total: int
    finished: bool = False

    def __str__(self) -> str:
        """ " 45.1 %  1.20 GiB of 2.66 GiB written to OUT" """
        if self.finished:
            return f"already finished: {self.out}"
        return f"{100 * self.done / max(self.total, 1):5.1f} %  {show_size(self.done)} of {show_size(self.total)} written to {self.out}"


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
        written: bytes of the output so far, 0 where nothing is written.
        resumed: how much of `done` an earlier run did; the rate is that of the rest.
        detail: what is under way inside the step that is counted, e.g. "sample 40 of 512"; empty if there is nothing to say.
        outputs: each of several outputs; none where a run has one.
        estimate: how long the whole run should take, None if that is not known.
    """

    phase: str
    done: int
    total: int
    seconds: float
    unit: str = _BYTES
    memory_budget: int | None = None
    written: int = 0
    resumed: int = 0
    detail: str = ""
    outputs: tuple[OutputProgress, ...] = ()
    estimate: Estimate | None = None

    @property
    def left(self) -> float | None:
        """Seconds until all is done at the rate so far; before anything is, as estimated, or None."""
        new = self.done - self.resumed
        if new <= 0 and self.estimate is not None:
            return self.estimate.seconds
        return (self.total - self.done) * self.seconds / new if new > 0 else None

    def __str__(self) -> str:
        """ "45.1 %  1.20 GiB of 2.66 GiB  310.00 MiB/s  5 s left" """
        rate = (self.done - self.resumed) / max(self.seconds, 1e-9)
        share = f"{100 * self.done / max(self.total, 1):5.1f} %"
        if self.unit != _BYTES:
            text = f"{share}  {self.done} of {self.total} {self.unit}" + (f", {self.detail}" if self.detail else "")
        else:
            text = f"{share}  {show_size(self.done)} of {show_size(self.total)}  {show_size(rate)}/s"
        return text if self.left is None else f"{text}  {self.left:.0f} s left"


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
        self._progress, self._began, self._told = Progress("", 0, 0, 0.0), clock(), 0.0
        self._done, self._written, self._detail = 0, 0, ""
        self._outputs: Callable[[], Sequence[OutputProgress]] = tuple

    def begin(
        self,
        phase: str,
        total: int,
        *,
        unit: str = _BYTES,
        memory_budget: int | None = None,
        resumed: int = 0,
        outputs: Callable[[], Sequence[OutputProgress]] = tuple,
        estimate: Estimate | None = None,
    ) -> None:
        """A phase begins, of which an earlier run did `resumed`.

        Args:
            outputs: tells of each of several outputs, called by any thread.
        """
        self._outputs, self._began = outputs, self._clock()
        self._done, self._written, self._detail = resumed, 0, ""
        self._progress = Progress(phase, resumed, total, 0.0, unit, memory_budget, resumed=resumed, estimate=estimate)
        self._tell()

    def now(self) -> Progress:
        """The record of this moment."""
        progress = replace(self._progress, done=self._done, written=self._written, detail=self._detail)
        return replace(progress, seconds=self._clock() - self._began, outputs=tuple(self._outputs()))

    def add(self, count: int) -> None:
        """So much more is done; called by any thread."""
        self.tile(count, 0)

    def tile(self, read: int, written: int, detail: str = "") -> None:
        """As `add`, for work in which so many source bytes were read and so many bytes of the output written.

        Args:
            detail: see `Progress`.
        """
        self._count(read, written, detail)
        due = self._clock() - self._told >= self._every
        if due and self._telling.acquire(blocking=False):  # no worker waits for another's record
            try:
                self._tell()
            finally:
                self._telling.release()

    def step(self) -> None:
        """One more is done, and told of however soon it comes."""
        self._count(1, 0, "")
        with self._telling:
            self._tell()

    def _count(self, read: int, written: int, detail: str) -> None:
        with self._counting:
            self._done, self._written, self._detail = min(self._done + read, self._progress.total), self._written + written, detail

    def end(self) -> None:
        """All is done."""
        self._progress, self._done = replace(self._progress, phase="done"), self._progress.total
        self._tell()

    def phase(self, name: str) -> None:
        """What follows needs no counting."""
        self._progress = replace(self._progress, phase=name)
        self._tell()

    def _tell(self) -> None:
        self._told = self._clock()
        self._watch(self.now())


Watching = Watch | Literal["bar"] | None
"""What `watch=` of the public functions takes."""
_WIDTH = 24


def watch_of(asked: Watching) -> Watch:
    """What `watch=` means.

    Raises:
        UsageError: it is neither a callable, "bar" nor None.
    """
    if asked is None:
        return unwatched
    if asked == "bar":
        return show_bar
    if not callable(asked):
        raise UsageError(f"watch={asked!r} is neither a callable nor 'bar'")
    return asked


def show_bar(now: Progress) -> None:
    """Draw a bar for notebooks and scripts: one line on standard error that replaces itself, which Jupyter shows as well."""
    if sys.stderr is None:
        return
    full = _WIDTH * now.done // max(now.total, 1) if now.phase != "done" else _WIDTH
    line = f"\r{now.phase:<11} |{'#' * full:<{_WIDTH}}| {now if now.phase != 'done' else ''}"
    sys.stderr.write(f"{line:<100}" + "\n" * (now.phase == "done"))
    sys.stderr.flush()
