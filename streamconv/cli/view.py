"""How commands talk: tables for people, JSON for programs, progress while they wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from streamconv.cli import output
from streamconv.errors import visible
from streamconv.memory import peak_resident, resident, show_size
from streamconv.progress import Meter, Progress, unwatched


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] | None = None) -> Iterator[str]:
    """Lines with columns aligned by spaces; every cell is made visible."""
    every = [*([header] if header else []), *rows]
    widths = [max(len(visible(row[i])) for row in every) for i in range(len(every[0]) if every else 0)]
    for number, row in enumerate(every):
        yield "  ".join(visible(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if header and not number:
            yield "  ".join("-" * width for width in widths)


def meter(quiet: bool, every: float = 5.0) -> Meter:
    """Bytes done, rate, time left, memory against budget. A live line on a terminal, a plain line now and then elsewhere."""
    live = output.is_live()

    def show(now: Progress) -> None:
        if now.phase == "converting":
            line = f"{now}  memory {show_size(resident())} of {show_size(now.memory_budget or 0)}"
            if live:
                output.live(f"{line:<100}")
            elif now.done:
                output.note(line)
        elif now.phase != "done" and (live or now.seconds > every):
            if live and now.done:
                output.live("")
            output.note(now.phase)

    return Meter(unwatched if quiet else show, 0.1 if live else every)


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
