"""How commands talk: tables for people, JSON for programs, progress while they wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from streamconv.cli import output
from streamconv.errors import visible
from streamconv.memory import peak_resident, resident, show_size
from streamconv.planning.memory_plan import Shares
from streamconv.planning.plan import Plan


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] | None = None) -> Iterator[str]:
    """Lines with columns aligned by spaces; every cell is made visible."""
    every = [*([header] if header else []), *rows]
    widths = [max(len(visible(row[i])) for row in every) for i in range(len(every[0]) if every else 0)]
    for number, row in enumerate(every):
        yield "  ".join(visible(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if header and not number:
            yield "  ".join("-" * width for width in widths)


class Progress:
    """Bytes done, rate, time left, memory against budget. A live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, quiet: bool, every: float = 5.0) -> None:
        self.quiet, self.every = quiet, every
        self.live = output.is_live()
        self._lock = threading.Lock()
        self._began = self._shown = time.monotonic()
        self._done = self._total = self._budget = 0

    def start(self, plan: Plan, shares: Shares) -> None:
        self._total = max(plan.bytes_read, 1)
        self._budget = shares.budget
        self._began = self._shown = time.monotonic()

    def tile(self, read: int, written: int) -> None:
        now = time.monotonic()
        with self._lock:
            self._done += read
            due = now - self._shown >= (0.1 if self.live else self.every)
            if self.quiet or not due:
                return
            self._shown = now
            self._print(now)

    def stage(self, name: str) -> None:
        if not self.quiet and (self.live or time.monotonic() - self._began > self.every):
            self._end()
            output.note(name)

    def _print(self, now: float) -> None:
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / max(rate, 1.0)
        line = (
            f"{100 * self._done / self._total:5.1f} %  {show_size(self._done)} of {show_size(self._total)}"
            f"  {show_size(rate)}/s  {left:.0f} s left  memory {show_size(resident())} of {show_size(self._budget)}"
        )
        if self.live:
            output.live(f"{line:<100}")
        else:
            output.note(line)

    def _end(self) -> None:
        if self.live and self._done:
            output.live("")


def peak() -> str:
    return show_size(peak_resident())


def layers(quiet: bool) -> dict[str, Callable[..., None]]:
    """How a calibration talks while it runs: `progress` after each layer, `told` at its end."""

    def progress(done: int, of: int, left: float) -> None:
        if not quiet:
            output.note(f"layer {done} of {of}, {left:.0f} s left")

    def told(line: str) -> None:
        if not quiet:
            output.note(line)

    return {"progress": progress, "told": told}
