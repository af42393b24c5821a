"""What a command shows of a run while it lasts, and keeps of it: progress and memory over time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.cli import output, view
from streamconv.errors import UsageError, printable
from streamconv.memory_trace import MemoryTrace, Sample
from streamconv.progress import Meter


@dataclass(frozen=True, slots=True)
class Watched:
    """A run that is watched.

    Attributes:
        samples: of its memory so far, none if nobody asked for them.
        layers: what a calibration calls (`view.layers`).
    """

    meter: Meter
    samples: list[Sample]
    layers: dict[str, Any]


@contextlib.contextmanager
def watching(out: str, quiet: bool, progress: str, memory_trace: str | None) -> Iterator[Watched]:
    """A context in which a run goes.

    Args:
        out: the folder or file that it writes or reads.
        quiet: nothing but warnings, unless --progress says what.

    Raises:
        UsageError: a file that is to be written lies in the output. OutputError: it cannot be written.
    """
    meter = view.meter(progress, quiet)
    trace = MemoryTrace(meter, None if memory_trace is None else _beside("--memory-trace", memory_trace, out)) if memory_trace else None
    with trace or contextlib.nullcontext():
        yield Watched(meter, trace.samples if trace else [], view.layers(meter, quiet))
    if trace is not None and trace.problem:
        output.note(f"warning: {trace.problem}")


def _beside(flag: str, path: str, out: str) -> Path:
    """The path of a file that is none of the output."""
    place, folder = Path(path).resolve(), Path(out).resolve()
    if place == folder or folder in place.parents:
        raise UsageError(f"{flag} {printable(path)} lies in the output", hint=f"write it elsewhere: {flag} {folder.name}{place.suffix}")
    return place
