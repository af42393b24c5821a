"""A progress bar for notebooks and scripts: one line on standard error that replaces itself, which Jupyter shows as well."""

from __future__ import annotations

import sys
from typing import Literal

from streamconv.errors import UsageError
from streamconv.progress import Progress, Watch, unwatched

Watching = Watch | Literal["bar"] | None
_WIDTH = 24


def watch_of(asked: Watching) -> Watch:
    """What `watch=` means.

    Raises:
        UsageError: it is neither a callable, "bar" nor None.
    """
    if asked is None:
        return unwatched
    if asked == "bar":
        return show
    if not callable(asked):
        raise UsageError(f"watch={asked!r} is neither a callable nor 'bar'")
    return asked


def show(now: Progress) -> None:
    """Draw the bar; the line ends when all is done."""
    if sys.stderr is None:
        return
    full = _WIDTH * now.done // max(now.total, 1) if now.phase != "done" else _WIDTH
    line = f"\r{now.phase:<11} |{'#' * full:<{_WIDTH}}| {now if now.phase != 'done' else ''}"
    sys.stderr.write(f"{line:<100}" + "\n" * (now.phase == "done"))
    sys.stderr.flush()
