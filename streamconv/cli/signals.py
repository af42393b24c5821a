"""How a command ends. SIGINT and SIGTERM end a command in order, within five seconds; a second one ends it at once.

Ending at any moment is safe for the output (see writer.py); ending in order also keeps the last tiles and says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from streamconv import process, streams
from streamconv.cli import output
from streamconv.errors import Interrupted

GRACE = 4.5
"""Seconds after which the process ends, whatever it waits for (a disk that hangs)."""

_CAUGHT = (signal.SIGINT, signal.SIGTERM)


def run(command: Callable[[], int]) -> NoReturn:
    """Run a command in this process and end it with the command's exit status; to be used in the main thread.

    The first signal raises Interrupted in the main thread. The status is 128 + signal then, even if something between here
    and there swallowed it.
    """
    streams.open_standard_streams()
    streams.ask_nothing()
    process.raise_file_limit()
    sys.path[:] = process.import_path()
    came: list[int] = []

    def stop(signum: int, _: FrameType | None) -> None:
        for number in _CAUGHT:
            signal.signal(number, signal.SIG_DFL)
        came.append(signum)
        if process.start_thread(_end_later, "watchdog", 128 + signum) is None:
            signal.alarm(int(GRACE) + 1)
        raise Interrupted(f"stopped by {signal.Signals(signum).name}", signum=signum)

    status = 1
    try:
        for number in _CAUGHT:
            if signal.getsignal(number) is not signal.SIG_IGN:  # what the parent told us to ignore (nohup) stays ignored
                signal.signal(number, stop)
        status = command()
    except Interrupted as error:  # before or after the command's own care
        interrupted = error
        output.flush_or_fail(lambda: output.fail(interrupted, False))
    _leave(128 + came[0] if came else status)


def _end_later(status: int) -> None:
    time.sleep(GRACE)
    os._exit(status)


def _leave(status: int) -> NoReturn:
    """End the process now: taking an interpreter with a compiler in it apart costs as long as 200 MB of a model."""
    try:
        for number in _CAUGHT:
            signal.signal(number, signal.SIG_IGN)  # the command has ended
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    finally:
        os._exit(status)
