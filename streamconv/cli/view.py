"""How commands talk: tables for people, JSON for programs, progress while they wait."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from streamconv.budget import Shares
from streamconv.errors import StreamconvError
from streamconv.memory import peak_resident, resident, show_size
from streamconv.plan import Plan


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] | None = None) -> Iterator[str]:
    """Lines with columns aligned by spaces."""
    every = [*([header] if header else []), *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]) if every else 0)]
    for number, row in enumerate(every):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if header and not number:
            yield "  ".join("-" * width for width in widths)


def fail(error: StreamconvError, as_json: bool) -> int:
    """Print an error the way the command was asked to; gives the exit status."""
    if as_json:
        content: dict[str, Any] = {"error": type(error).__name__, "message": error.message, "hint": error.hint, "status": error.exit_status}
        if hasattr(error, "problems"):
            content["problems"] = list(error.problems)
        print(json.dumps(content))
    problems = getattr(error, "problems", ())
    if len(problems) > 1:
        print(f"error: {len(problems)} problems", file=sys.stderr)
        for problem in problems:
            print(f"  {problem}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)
    return error.exit_status


class Progress:
    """Bytes done, rate, time left, memory against budget. A live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, quiet: bool, every: float = 5.0) -> None:
        self.quiet, self.every = quiet, every
        self.live = sys.stderr.isatty()
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
            print(name, file=sys.stderr)

    def _print(self, now: float) -> None:
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / max(rate, 1.0)
        line = (
            f"{100 * self._done / self._total:5.1f} %  {show_size(self._done)} of {show_size(self._total)}"
            f"  {show_size(rate)}/s  {left:.0f} s left  memory {show_size(resident())} of {show_size(self._budget)}"
        )
        print(f"\r{line:<100}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def _end(self) -> None:
        if self.live and self._done:
            print(file=sys.stderr)


def peak() -> str:
    return show_size(peak_resident())


def dump(content: Any) -> None:
    print(json.dumps(content))


def layers(quiet: bool) -> dict[str, Callable[..., None]]:
    """How a calibration talks while it runs: `progress` after each layer, `told` at its end."""

    def progress(done: int, of: int, left: float) -> None:
        if not quiet:
            print(f"layer {done} of {of}, {left:.0f} s left", file=sys.stderr, flush=True)

    def told(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    return {"progress": progress, "told": told}
