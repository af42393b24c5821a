"""Files that somebody else may have written: only regular ones are opened, only so much is read, and JSON holds no surprise.

Every file that is read back goes through here: configs, index files, manifests, recipes, journals, headers. The caller names the
error that a bad file is, so that it ends a command with the right status.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from streamconv.checkpoint.limits import check_counts
from streamconv.errors import CheckpointError, StreamconvError, TensorError, UnreadableError, printable
from streamconv.memory import check_room
from streamconv.process import raise_file_limit

DEEPEST = 64
"""Objects and lists inside each other; a deep one makes whoever walks through it overflow the stack."""
LONGEST_INTEGER = 100
"""Digits of an integer, of which some functions take time by the square, and others overflow."""

frees_descriptors: list[Callable[[], bool]] = [raise_file_limit]
"""Asked in turn at the limit of open files: whether it made room for more."""

_JSON_TAKES = 5
"""Bytes of memory that a byte of a long index file takes while it is read."""

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def open_regular(path: Path, error: type[StreamconvError] = CheckpointError, *, hint: str | None = "is the download complete?") -> int:
    """A descriptor of a regular file, for reading. At the limit of open files `frees_descriptors` make room.

    Args:
        hint: what to say of a file that is not there.

    Raises:
        `error`: missing, or no regular file; or the system refuses, for CheckpointError as its kind UnreadableError. Never waits,
            not even for a FIFO. Its cause is the OSError.
    """
    shown = printable(path)
    try:
        # A device is not even opened: that alone may have effects. O_NONBLOCK covers a swap in between.
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            fd = _open(path)
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode):
                return fd
            os.close(fd)
    except FileNotFoundError as cause:
        raise error(f"missing file {shown}", hint=hint) from cause
    except (OSError, ValueError) as cause:
        full = isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE)
        reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(cause)
        refused = UnreadableError if error is CheckpointError else error
        raise refused(f"cannot open {shown}: {reason}", hint="raise the limit of open files (ulimit -n)" if full else None) from cause
    raise error(f"{shown} is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a regular file")


def _open(path: Path) -> int:
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as cause:
            if cause.errno != errno.EMFILE or not any(free() for free in frees_descriptors):
                raise


def names_in(folder: Path) -> list[str]:
    """Names of the files in a folder."""
    try:
        return os.listdir(folder)
    except OSError as error:
        raise CheckpointError(f"cannot list {printable(folder)}: {error.strerror}") from None


def read_file(path: Path, limit: int, error: type[StreamconvError] = CheckpointError) -> bytes:
    """The content of a regular file.

    Raises:
        `error`: it cannot be opened or read, or has more than `limit` bytes.
    """
    shown = printable(path)
    fd = open_regular(path, error)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise error(f"{shown} has {size} bytes; at most {limit} are accepted")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(size)
    except OSError as cause:
        raise error(f"cannot read {shown}: {cause.strerror}") from cause
    finally:
        os.close(fd)


def refuse_lfs_pointer(head: bytes | bytearray | memoryview, shown: str, error: type[StreamconvError] = CheckpointError) -> None:
    """Raise `error` for a small text file that stands where a repository cloned without Git LFS should have its weights."""
    if bytes(head[:23]) == b"version https://git-lfs":
        raise error(f"{shown} is a Git LFS pointer, not the file itself", hint="run git lfs pull, or hf download")


def parse_json(
    data: bytes, shown: str, error: type[StreamconvError] = CheckpointError, *, twice: type[StreamconvError] | None = None
) -> Any:
    """What a JSON text holds. Bound its size, and `count` what it holds, before.

    Args:
        shown: what messages call it.
        twice: what to raise for an object that has a key twice; None keeps the last, as plain JSON reading does.

    Raises:
        `error`: no JSON, nested deeper than DEEPEST, or an integer longer than LONGEST_INTEGER.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if twice is not None and len(value) != len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise twice(f"{shown} lists {printable(double)} twice", hint="remove one of the two entries")
        return value

    def integer(text: str) -> int:
        if len(text) > LONGEST_INTEGER:
            raise error(f"{shown} holds an integer of {len(text)} digits; at most {LONGEST_INTEGER} are accepted")
        return int(text)

    try:
        value = json.loads(data.decode(), object_pairs_hook=once if twice else None, parse_int=integer)
    except RecursionError:
        raise error(f"{shown} is nested too deeply") from None
    except ValueError as cause:
        raise error(f"{shown} is not valid JSON: {printable(cause)}") from None
    if deeper_than(value, DEEPEST):
        raise error(f"{shown} is nested too deeply")
    return value


def read_json(path: Path, limit: int, *, unique: bool = False) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Args:
        unique: refuse an object that has a key twice, where plain JSON reading keeps the last.

    Raises:
        CheckpointError: not readable, larger than limit bytes or than limits.py allows, or no JSON object.
        TensorError: with unique, a key is there twice.
        BudgetError: it does not fit into the memory budget.
    """
    shown = printable(path)
    check_room(_JSON_TAKES * file_size(path), f"reading {shown}")
    raw = read_file(path, limit)
    refuse_lfs_pointer(raw, shown)
    check_counts(raw, shown)
    value = parse_json(raw, shown, twice=TensorError if unique else None)
    if not isinstance(value, dict):
        raise CheckpointError(f"{shown} must hold a JSON object")
    return value


def file_size(path: Path) -> int:
    """Bytes of a file, 0 if that is not known."""
    with contextlib.suppress(OSError, ValueError):
        return os.stat(path).st_size
    return 0


def deeper_than(value: object, most: int) -> bool:
    """Whether objects and lists lie more than `most` deep inside each other. Each is visited once: nothing may be shared."""
    level = [value]
    for _ in range(most + 1):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _held(outer) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _held(value: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def shown_value(value: object) -> str:
    """A value for a message; of large or nested lists and objects only the kind, for they can be of any size and depth."""
    if isinstance(value, dict | list) and (len(value) > 4 or any(isinstance(item, dict | list) for item in _held(value))):
        return "an object" if isinstance(value, dict) else "a list"
    try:
        return printable(repr(value), 60)
    except ValueError:  # Python spells no integer of more than 4300 digits
        return "a number of many digits"
