"""How a command ends. SIGINT and SIGTERM end a command in order, within five seconds; a second one ends it at once.

Ending at any moment is safe for the output (see writer.py); ending in order also keeps the last tiles and says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from streamconv.errors import Interrupted

GRACE = 4.5
"""Seconds after which the process ends, whatever it waits for (a disk that hangs)."""


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """Raise Interrupted in the main thread at the first signal; to be used in the main thread."""
    caught = (signal.SIGINT, signal.SIGTERM)
    watchdog: list[threading.Timer] = []

    def stop(signum: int, _: FrameType | None) -> None:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
        watchdog.append(threading.Timer(GRACE, os._exit, (128 + signum,)))
        watchdog[0].daemon = True
        watchdog[0].start()
        raise Interrupted(f"stopped by {signal.Signals(signum).name}", signum=signum)

    # what the parent told us to ignore (nohup, a background job) stays ignored
    before = {number: signal.getsignal(number) for number in caught}
    for number in caught:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        if not watchdog:
            for number in caught:
                signal.signal(number, before[number])


def leave(status: int) -> NoReturn:
    """End the process now: taking an interpreter with a compiler in it apart costs as long as 200 MB of a model."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # None where it was closed from the start
            stream.flush()
    os._exit(status)
