"""How commands talk: tables for people, JSON for programs, progress while they wait."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from streamconv.cli import output
from streamconv.errors import UsageError, printable, visible
from streamconv.memory import resident, show_size
from streamconv.progress import Meter, Progress, Watch, unwatched

if TYPE_CHECKING:
    from streamconv.memory_trace import Sample

_EVERY = 10.0
"""Seconds between two lines where nobody watches."""


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] | None = None) -> Iterator[str]:
    """Lines with columns aligned by spaces; every cell is made visible."""
    every = [*([header] if header else []), *rows]
    widths = [max(len(visible(row[i])) for row in every) for i in range(len(every[0]) if every else 0)]
    for number, row in enumerate(every):
        yield "  ".join(visible(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if header and not number:
            yield "  ".join("-" * width for width in widths)


def meter(how: str, quiet: bool) -> Meter:
    """A meter that shows how far a run is, on standard error.

    Args:
        how: "auto", "live" (one line that replaces itself), "lines" (one every 10 s), "json" (one object a second) or "none".
        quiet: "auto" is "none".
    """
    if how == "auto":
        how = "none" if quiet else "live" if output.is_live() and not os.environ.get("CI") else "lines"
    kinds: dict[str, tuple[Watch, float]]
    kinds = {"live": (_Live(), 0.1), "lines": (_lines, _EVERY), "json": (_json, 1.0), "none": (unwatched, 1.0)}
    return Meter(*kinds[how])


def _line(now: Progress) -> str:
    if now.phase == "syncing":
        return now.phase
    if now.unit == "layers":
        left = "" if now.left is None else f", {now.left:.0f} s left"
        return f"layer {now.done + bool(now.detail)} of {now.total}{f', {now.detail}' if now.detail else ''}{left}"
    ceiling = f" of {show_size(now.memory_budget)}" if now.memory_budget else ""
    return f"{now.phase}  {now}  memory {show_size(resident())}{ceiling}"


def _expected(now: Progress) -> None:
    if now.estimate is not None and now.phase == "converting" and now.done == now.resumed:
        output.note(f"{show_size(now.total)} to read: {now.estimate}")


def _lines(now: Progress) -> None:
    _expected(now)
    worth = now.seconds >= _EVERY if now.phase == "syncing" else now.done < now.total or now.unit == "layers"
    if now.phase != "done" and (now.done > now.resumed or now.detail) and worth:
        output.note(_line(now))
        for each in now.outputs:
            output.note(f"  {each}")


def _json(now: Progress) -> None:
    seconds = {"seconds": round(now.seconds, 3), "left": None if now.left is None else round(now.left, 3)}
    seconds["estimate"] = None if now.estimate is None else round(now.estimate.seconds, 3)
    output.note(json.dumps(dataclasses.asdict(now) | seconds | {"resident": resident()}))


class _Live:
    """A line that replaces itself, and one below it for each of several outputs; they end with their phase, and stay."""

    def __init__(self) -> None:
        self._phase, self._widths = "", list[int]()

    def __call__(self, now: Progress) -> None:
        if self._phase not in ("", now.phase):
            output.live(())
            self._widths = []
        if self._phase != now.phase:
            _expected(now)
        self._phase = now.phase if now.phase != "done" else ""
        if self._phase:
            from shutil import get_terminal_size

            room = get_terminal_size().columns - 1
            below = now.outputs if now.phase != "syncing" else ()
            lines = [line[:room] for line in (_line(now), *(f"  {visible(str(each))}" for each in below))]
            widths = self._widths or [0] * len(lines)
            output.live([line.ljust(width) for line, width in zip(lines, widths, strict=True)], max(len(self._widths) - 1, 0))
            self._widths = [len(line) for line in lines]


def layers(meter: Meter, quiet: bool = False) -> dict[str, Callable[..., None]]:
    """How a calibration tells a meter: `progress` after each layer, `sampled` within one, `told` with a line at its end."""

    def begin(done: int, of: int) -> None:
        if meter.now().phase != "calibrating":
            meter.begin("calibrating", of, unit="layers", resumed=done)

    def progress(done: int, of: int, _: float) -> None:
        begin(done - 1, of)
        meter.step()

    def sampled(done: int, of: int, samples: int, every: int) -> None:
        begin(done, of)
        meter.tile(0, 0, f"sample {samples} of {every}")

    def show_line(line: str) -> None:
        if not quiet:
            output.note(line)

    return {"progress": progress, "sampled": sampled, "told": show_line}


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["streamconv", *(click.get_current_context().find_root().obj or ())])


@contextlib.contextmanager
def watching(
    outs: Sequence[str], model: str | None, quiet: bool, progress: str, memory_trace: str | None, report: str | None
) -> Iterator[tuple[Meter, Sequence[Sample]]]:
    """A context in which a run goes, with its meter and samples of its memory so far.

    Args:
        outs: the folders or the file that it writes or reads.
        model: the source. What lies in its folder would be taken for a part of it.
        quiet: nothing but warnings, unless --progress says what.
        report: the page that will be written; refused here where that cannot be.

    Raises:
        UsageError: a file that is to be written lies in an output or in the source. OutputError: it cannot be written.
    """
    shown = meter(progress, quiet)
    if report is not None:
        from streamconv.pages import page

        page.check(_beside("--report", report, outs, model))
    if memory_trace is None and report is None:
        yield shown, ()
        return
    from streamconv.memory_trace import MemoryTrace

    with MemoryTrace(shown, None if memory_trace is None else _beside("--memory-trace", memory_trace, outs, model)) as trace:
        yield shown, trace.samples
    if trace.problem:
        output.note(f"warning: {trace.problem}")


def _beside(flag: str, path: str, outs: Sequence[str], model: str | None) -> Path:
    """The path of a file that is none of an output or the source."""
    place = Path(path).resolve()
    for what, name in [*(("output", out) for out in outs), *([("source", model)] if model else [])]:
        folder = Path(name).resolve()
        if place == folder or folder in place.parents:
            raise UsageError(f"{flag} {printable(path)} lies in the {what}", hint=f"write it elsewhere: {flag} {folder.name}{place.suffix}")
    return place
