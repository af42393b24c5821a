"""The ways in which a command ends, and the exit status of each.

SIGINT and SIGTERM end a command in order, within five seconds; a second one ends it at once. Ending at any moment is safe for the output
(see run/writer.py); ending in order also keeps the last tiles and says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import click

from streamconv import process, streams
from streamconv.cli import output
from streamconv.errors import BudgetError, Interrupted, StreamconvError, UsageError, printable

GRACE = 4.5
"""Seconds after which the process ends, whatever it waits for (a disk that hangs)."""

_CAUGHT = (signal.SIGINT, signal.SIGTERM)
_NO_ROOM = (errno.ENOMEM, errno.EAGAIN)


def status_of(command: Callable[[], int], as_json: bool) -> int:
    """Run a command; show why it failed, if it did.

    Args:
        command: gives its exit status.
        as_json: an error is shown as a JSON object, too.

    Returns:
        the exit status. What is no user's mistake and no limit of the system is raised.
    """
    try:
        return command()
    except click.exceptions.NoArgsIsHelpError as error:
        output.block(error.format_message().split("\n"))
        return 0
    except click.ClickException as error:
        return output.fail(UsageError(error.format_message()), as_json)
    except (StreamconvError, Interrupted) as error:
        return output.fail(error, as_json)
    except (KeyboardInterrupt, click.Abort):
        return output.fail(Interrupted("interrupted", signum=2), as_json)
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return output.fail(UsageError(f"this is longer than a name of a file can be: {printable(error.filename)}"), as_json)
        if isinstance(error, FileNotFoundError) and _is_nowhere():
            return output.fail(UsageError("the current folder was removed", hint="go to another one: cd"), as_json)
        if not _lacks_room(error):
            raise
        what = f"the system gives no more memory or threads: {str(error) or type(error).__name__}"
        hint = "raise the limits of address space (ulimit -v), processes (ulimit -u, the pids cgroup) or memory, or use fewer --workers"
        return output.fail(BudgetError(what, hint=hint), as_json)
    except SystemExit as error:  # --help, and click's answer to a closed pipe
        return int(error.code or 0)


def _is_nowhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _lacks_room(error: Exception) -> bool:
    """Whether a limit of the system is behind an error; a library that finds no room for its code raises ImportError."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    message = str(error)
    return isinstance(error, MemoryError) or any(
        text in message for text in ("can't start new thread", "failed to map segment", "annot allocate memory")
    )


def run(command: Callable[[], int]) -> NoReturn:
    """Run a command in this process and end it with the command's exit status; to be used in the main thread.

    The first signal raises Interrupted in the main thread. The status is 128 + signal then, even if something between here
    and there swallowed it.
    """
    streams.open_standard_streams()
    streams.ask_nothing()
    process.raise_file_limit()
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
