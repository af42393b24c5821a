"""What a command shows of a run while it lasts, and keeps of it: progress and memory over time."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from streamconv.cli import output, view
from streamconv.errors import UsageError, printable
from streamconv.progress import Meter

if TYPE_CHECKING:
    from streamconv.memory_trace import MemoryTrace, Sample


class Watched(NamedTuple):
    """A run that is watched.

    Attributes:
        trace: of its memory, None if nobody asked for it.
        layers: what a calibration calls (`view.layers`).
    """

    meter: Meter
    trace: MemoryTrace | None
    layers: dict[str, Any]

    @property
    def samples(self) -> Sequence[Sample]:
        """Of its memory so far."""
        return self.trace.samples if self.trace is not None else ()


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["streamconv", *(click.get_current_context().find_root().obj or ())])


@contextlib.contextmanager
def watching(
    outs: Sequence[str], model: str | None, quiet: bool, progress: str, memory_trace: str | None, report: str | None
) -> Iterator[Watched]:
    """A context in which a run goes.

    Args:
        outs: the folders or the file that it writes or reads.
        model: the source. What lies in its folder would be taken for a part of it.
        quiet: nothing but warnings, unless --progress says what.
        report: the page that will be written; refused here where that cannot be.

    Raises:
        UsageError: a file that is to be written lies in an output or in the source. OutputError: it cannot be written.
    """
    meter = view.meter(progress, quiet)
    trace: MemoryTrace | None = None
    if report is not None:
        from streamconv.pages import page

        page.check(_beside("--report", report, outs, model))
    if memory_trace is not None or report is not None:
        from streamconv.memory_trace import MemoryTrace

        trace = MemoryTrace(meter, None if memory_trace is None else _beside("--memory-trace", memory_trace, outs, model))
    with trace or contextlib.nullcontext():
        yield Watched(meter, trace, view.layers(meter, quiet))
    if trace is not None and trace.problem:
        output.note(f"warning: {trace.problem}")


def _beside(flag: str, path: str, outs: Sequence[str], model: str | None) -> Path:
    """The path of a file that is none of an output or the source."""
    place = Path(path).resolve()
    for what, name in [*(("output", out) for out in outs), *([("source", model)] if model else [])]:
        folder = Path(name).resolve()
        if place == folder or folder in place.parents:
            raise UsageError(f"{flag} {printable(path)} lies in the {what}", hint=f"write it elsewhere: {flag} {folder.name}{place.suffix}")
    return place
