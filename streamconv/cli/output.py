"""What a command prints arrives, or its exit status says that it did not."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, cast

from streamconv.errors import OutputError

CLOSED = 1
"""The status when nobody reads standard output any more (`| head -1`)."""


class _Unwritable(Exception):
    """Standard output took nothing. No OSError: those of a disk are somebody else's to explain."""


class _Stdout:
    """Standard output, whose failures can be told from those of other files. A closed pipe stays BrokenPipeError."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: Any) -> Any:
        with _named():
            return self._stream.write(text)

    def flush(self) -> None:
        with _named():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Stderr(_Stdout):
    """Standard error: what it does not take is lost, and the work goes on."""

    def write(self, text: Any) -> Any:
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


@contextlib.contextmanager
def _named() -> Any:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _Unwritable(os.strerror(error.errno) if error.errno else str(error)) from error


def arriving(command: Callable[[], int]) -> int:
    """Run a command and see that what it prints arrives.

    Args:
        command: gives its exit status, after errors of its own were shown.

    Returns:
        its status; 6 if standard output cannot be written, told in one line; `CLOSED`, silently, if it is a closed pipe.
    """
    from streamconv.cli import view

    before = sys.stdout, sys.stderr
    # a stream that was closed from the start is None, and print() knows that
    sys.stdout = cast(Any, before[0] and _Stdout(before[0]))
    sys.stderr = cast(Any, before[1] and _Stderr(before[1]))
    try:
        status = command()
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        _forget(before[0])
        return CLOSED
    except _Unwritable as error:
        _forget(before[0])
        return view.fail(OutputError(f"standard output cannot be written: {error}"), False)
    finally:
        sys.stdout, sys.stderr = before


def _forget(stream: Any) -> None:
    """What is still in the buffer would fail again at every flush."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
