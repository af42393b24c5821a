"""What a command prints: the only place that does. It arrives, or the exit status says that it did not, and a terminal shows it as it is.

Every line passes `errors.visible`; the streams themselves do the same for what click and libraries write, and escape what their
encoding lacks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from streamconv.errors import Interrupted, OutputError, RefusedError, StreamconvError, shorten, visible
from streamconv.streams import VisibleStream

CLOSED = 1
"""The status when nobody reads standard output any more (`| head -1`)."""

_PROSE = ("device", "hint", "message", "output_problem", "problem", "problems", "warnings")
"""Keys of JSON whose values are sentences; names are left as they are, JSON escapes them."""


def line(text: str = "") -> None:
    """A line on standard output."""
    print(visible(text))


def block(lines: Iterable[str]) -> None:
    """Lines on standard output; what comes from files was made visible before it was put among them."""
    for each in lines:
        line(each)


def note(text: str) -> None:
    """A line on standard error."""
    print(visible(text), file=sys.stderr, flush=True)


def warn(texts: Iterable[str]) -> None:
    """Warnings, a line on standard error for each."""
    for text in texts:
        note(f"warning: {text}")


def live(lines: Sequence[str], above: int = 0) -> None:
    """Lines on a terminal's standard error that replace those before them; a line end if there are none.

    Args:
        above: the lines before them, but the last one.
    """
    print("\r" + "\x1b[A" * above, end="", file=sys.stderr)  # by itself: see streams.VisibleStream
    print("\n".join(map(visible, lines)), end="" if lines else "\n", file=sys.stderr, flush=True)


def is_live() -> bool:
    """Whether somebody watches standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def dump(content: Mapping[str, Any]) -> None:
    """A JSON object on standard output, in ASCII."""
    print(_object(content))


def dump_long(content: Mapping[str, Any], tensors: Iterable[object], last: Mapping[str, Any]) -> None:
    """As `dump`, with a list "tensors" that is never held whole; `last` comes after it, and is read when the tensors have come."""
    import json

    print(_object(content)[:-1], end=', "tensors": [')
    for number, tensor in enumerate(tensors):
        print(", " if number else "", json.dumps(tensor), sep="", end="")
    print("], " + _object(last)[1:])


def _object(content: Mapping[str, Any]) -> str:
    import json  # `--help` needs none

    return json.dumps({key: _shown(value) if key in _PROSE else value for key, value in content.items()})


def _shown(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [visible(str(each)) for each in value]
    return visible(value) if isinstance(value, str) else value


def fail(error: StreamconvError | Interrupted, as_json: bool) -> int:
    """Print an error the way the command was asked to; gives the exit status."""
    problems = error.problems
    if as_json:
        content = {"error": type(error).__name__, "message": error.message, "hint": error.hint, "status": error.exit_status}
        listed = len(problems) > 1 or isinstance(error, RefusedError)
        dump(content | ({"problems": list(problems)} if listed else {}))
    if len(problems) > 1:
        note(f"error: {len(problems)} problems")
        for problem in shorten(problems):
            note(f"  {problem}")
        if error.hint:
            note(f"  hint: {error.hint}")
    else:
        note(f"error: {error}")
    return error.exit_status


class _Unwritable(Exception):
    """Standard output took nothing. No OSError: those of a disk are somebody else's to explain."""


class _Guarded(VisibleStream):
    """A standard stream whose failures its guard takes: those of standard output end the command, those of standard error are lost."""

    def __init__(self, stream: Any, guard: Callable[[], Any]) -> None:
        super().__init__(stream)
        self._guard = guard

    def write(self, text: Any) -> Any:
        written = len(text)
        with self._guard():
            written = super().write(text)
        return written

    def flush(self) -> None:
        with self._guard():
            super().flush()


@contextlib.contextmanager
def _named() -> Any:
    """A closed pipe stays BrokenPipeError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _Unwritable(os.strerror(error.errno) if error.errno else str(error)) from error


def flush_or_fail(command: Callable[[], int]) -> int:
    """Run a command and see that what it prints arrives.

    Args:
        command: gives its exit status, after errors of its own were shown.

    Returns:
        its status; 6 if standard output cannot be written, told in one line; `CLOSED`, silently, if it is a closed pipe.
    """
    before = sys.stdout, sys.stderr
    # a stream that was closed from the start is None, and print() knows that
    sys.stdout = cast(Any, before[0] and _Guarded(before[0], _named))
    sys.stderr = cast(Any, before[1] and _Guarded(before[1], functools.partial(contextlib.suppress, OSError)))
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
        return fail(OutputError(f"standard output cannot be written: {error}"), False)
    finally:
        sys.stdout, sys.stderr = before


def _forget(stream: Any) -> None:
    """What is still in the buffer would fail again at every flush."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
