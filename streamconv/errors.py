"""Every error streamconv raises on purpose, and the exit status each one ends a command with.

    StreamconvError
    ├── UsageError            2   a flag is unknown, missing, contradictory or not supported
    ├── CheckpointError       3   the source is not a checkpoint we can read
    │   ├── HeaderError           a safetensors header breaks a rule of the format
    │   ├── SourceChangedError    a source file shrank, vanished or changed while we ran
    │   ├── UnreadableError       a source file cannot be read now; it may be again
    │   └── TensorError           a tensor is missing, unexpected, or of the wrong shape or dtype
    ├── RefusedError          4   the request cannot give a correct checkpoint (all reasons are listed)
    ├── BudgetError           5   the memory budget cannot work; names the smallest one that does
    ├── OutputError           6   the output cannot be written: exists, no space, no permission
    │   ├── LockedError           another run holds the output
    │   └── ResumeError           unfinished work for something else is in the way
    ├── VerifyError           7   a written checkpoint is not what it should be
    ├── DataError             8   weights or ranges hold values that must not be quantized (NaN, infinity, no finite scale)
    └── HubError              9   the Hugging Face Hub did not give what was asked for

    BaseException
    └── Interrupted     130/143   SIGINT or SIGTERM; the work done so far is kept for a resume

Interrupted is no Exception, so that no `except` which judges some work can take a signal for the work's failure.

A message is one line that says what is wrong and where; `hint` says what to do about it. Both are `visible`.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_SHOWN = 20
"""Problems that a message lists."""


def visible(text: str) -> str:
    """`text` with every character escaped that a terminal would act upon or not show, line ends too; nothing else changes.

    These are control and escape characters, direction marks and other format characters, lone surrogates, and code
    points without a meaning. What is visible already stays as it is, so a second call changes nothing.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text)


class _Told(BaseException):
    """What is told to the user: one visible line, or a line for each problem, and what to do about it."""

    exit_status = 1

    def __init__(self, message: str | Sequence[str], *, hint: str | None = None) -> None:
        self.problems = (visible(message),) if isinstance(message, str) else tuple(map(visible, message))
        shown = shorten(self.problems)
        self.message = shown[0] if len(self.problems) == 1 else f"{len(self.problems)} problems: " + "; ".join(shown)
        self.hint = hint
        super().__init__(self.message)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, visible(value) if name in ("message", "hint") and isinstance(value, str) else value)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def kept(self) -> None:
        """Say, once, that the same command resumes where this one stopped."""
        also = "what is finished is kept: run the same command again to resume"
        if also not in (self.hint or ""):
            self.hint = f"{self.hint}; {also}" if self.hint else also

    def about(self, what: str) -> None:
        """Say what it is about, before what is wrong."""
        self.problems = tuple(f"{visible(what)}: {problem}" for problem in self.problems)
        self.message = f"{what}: {self.message}"


class StreamconvError(_Told, Exception):
    """Base of all errors meant for the user.

    Args:
        message: what is wrong, naming the file, tensor or flag; a sequence for several problems, one line each.
        hint: what to do about it, if there is something to do.
    """


class UsageError(StreamconvError):
    """A choice is unknown, missing, contradictory or not supported."""

    exit_status = 2


class CheckpointError(StreamconvError):
    """The source is not a checkpoint that can be read."""

    exit_status = 3


class HeaderError(CheckpointError):
    """A safetensors header that breaks a rule of the format."""


class SourceChangedError(CheckpointError):
    """A source file shrank, vanished or was replaced while it was being read."""


class UnreadableError(CheckpointError):
    """A source file cannot be read at the moment: a stale handle, a disk that fails, no memory. What is finished stays good."""


class TensorError(CheckpointError):
    """A tensor is missing, unexpected, or has the wrong shape or dtype."""


class RefusedError(StreamconvError):
    """The plan found reasons why this request cannot give a correct checkpoint: all of them, not only the first."""

    exit_status = 4


class BudgetError(StreamconvError):
    """The memory budget cannot work; names the smallest one that does."""

    exit_status = 5


class OutputError(StreamconvError):
    """The output cannot be written: it exists, no space, no permission."""

    exit_status = 6


class LockedError(OutputError):
    """Another run is writing to this output."""


class ResumeError(OutputError):
    """Unfinished work is there, begun with other options, another source or another version."""


class VerifyError(StreamconvError):
    """A written checkpoint is not what it should be."""

    exit_status = 7


class DataError(StreamconvError):
    """Weights or ranges hold values that must not be quantized: NaN, infinity, or no finite scale."""

    exit_status = 8


class HubError(StreamconvError):
    """The Hugging Face Hub did not give what was asked for."""

    exit_status = 9


class Interrupted(_Told):
    """Stopped by a signal.

    Args:
        signum: the signal; the exit status is 128 + signum.
    """

    def __init__(self, message: str, *, signum: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signum


def shorten(problems: Sequence[str]) -> list[str]:
    """The first problems of a long list, and a line that counts the others."""
    more = len(problems) - MOST_SHOWN
    return [*problems[:MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])]


def few(names: Sequence[str], most: int) -> str:
    """The first names of a list, and how many more there are: "a, b and 3 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def count(number: int, noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def printable(name: object, limit: int = 200) -> str:
    """`name` with control characters escaped and its middle cut, so that it can be shown on one line."""
    text = str(name).encode("unicode_escape", "backslashreplace").decode("ascii")
    if len(text) > limit:
        keep = (limit - 5) // 2
        text = f"{text[:keep]} ... {text[-keep:]}"
    return text
