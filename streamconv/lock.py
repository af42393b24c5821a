"""One run per output: a lock on a hidden sibling file, which the system releases however its holder dies."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from streamconv.errors import LockedError, OutputError, printable
from streamconv.fs import Disk, explained, hidden, write_all


class OutputLock:
    """The right to write an output.

    Args:
        out: the output folder, resolved; its parent exists.
    """

    def __init__(self, out: Path, disk: Disk) -> None:
        self.out, self.path, self.disk = out, hidden(out, "lock"), disk
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock or fail at once.

        Raises:
            LockedError: a living run holds it; names its process and host.
            OutputError: the file cannot be made.
        """
        for _ in range(1000):
            with explained(self.path, "lock"):
                fd = self.disk.open(self.path, os.O_RDWR | os.O_CREAT)
                try:
                    self.disk.lock(fd)
                except BlockingIOError:
                    holder = _holder(fd)
                    self._close(fd)
                    if holder is None:
                        continue  # it has finished since
                    raise LockedError(
                        f"{printable(str(self.out))} is being written by {holder}",
                        hint="wait for it, or choose another output folder",
                    ) from None
                except BaseException:
                    self._close(fd)
                    raise
                if not _same(fd, self.path):
                    self._close(fd)  # its last holder removed the file between our open and our lock
                    continue
                self._fd = fd
                try:
                    self.disk.truncate(fd, 0)
                    write_all(self.disk, fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                except OSError:
                    self.release()
                    raise
                return
        raise OutputError(f"{printable(str(self.path))} changes all the time", hint="try again")

    def release(self) -> None:
        """Remove the file and give the lock up. Never fails: a file left behind locks nobody out."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):
            self.disk.unlink(self.path)  # before the lock goes, so that nobody's file is removed but ours
        self._close(fd)

    def _close(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            self.disk.close(fd)


def _same(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev)


def _holder(fd: int) -> str | None:
    """What the holder wrote about itself, None if the file is gone; it writes just after it locks."""
    for _ in range(20):
        text = os.pread(fd, 400, 0).decode(errors="replace").strip()
        if text:
            return printable(text)
        if os.fstat(fd).st_nlink == 0:
            return None
        time.sleep(0.01)
    return "another run"
