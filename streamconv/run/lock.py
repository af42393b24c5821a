"""One run per output: a lock on a hidden sibling file, which the system releases however its holder dies."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from streamconv.errors import LockedError, OutputError, printable
from streamconv.run.fs import Mark, translate_errors, write_all
from streamconv.run.place import Place


class OutputLock:
    """The right to write an output.

    Args:
        place: of the output, opened.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.disk = place, place.disk
        self._fd = -1

    def acquire(self, patience: float = 0.0) -> None:
        """Take the lock.

        Args:
            patience: seconds to wait for one that holds it.

        Raises:
            LockedError: a living run holds it; names its process and host.
            OutputError: the file cannot be made, or something else has its name; or the file system has no locks.
        """
        until = time.monotonic() + patience
        while True:
            try:
                return self._acquire()
            except LockedError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.05)

    @contextlib.contextmanager
    def held(self, patience: float = 0.0) -> Iterator[None]:
        """As `acquire`, then `release`."""
        self.acquire(patience)
        try:
            yield
        finally:
            self.release()

    def _acquire(self) -> None:
        base, name = self.place.base, self.place.hidden("lock")
        for _ in range(1000):
            with translate_errors(base.path / name, "lock"):
                try:
                    fd = base.open(name, ours=False)
                except (FileExistsError, FileNotFoundError):
                    continue  # another run made or removed it between our look and our open
                try:
                    base.lock(fd)
                except BlockingIOError:
                    holder = _holder(fd)
                    self._close(fd)
                    if holder is None:
                        continue  # it has finished since
                    raise LockedError(
                        f"{printable(self.place.out)} is being written by {holder}",
                        hint="wait for it, or choose another output folder",
                    ) from None
                except OutputError:  # no locks here
                    if os.fstat(fd).st_size == 0:
                        self.disk.unlink(base, name, Mark.of(os.fstat(fd)))
                    self._close(fd)
                    raise
                except BaseException:
                    self._close(fd)
                    raise
                there = base.look(name)
                if there is None or Mark.of(there) != Mark.of(os.fstat(fd)):
                    self._close(fd)  # its last holder removed the file between our open and our lock
                    continue
                self._fd = fd
                try:
                    if not _ours(os.pread(fd, 100, 0)):
                        raise OutputError(
                            f"{printable(base.path / name)} holds something else than a lock", hint="move it away; it was not touched"
                        )
                    self.disk.truncate(fd, 0)
                    write_all(self.disk, fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
                except (OSError, OutputError):
                    self.release()
                    raise
                return
        raise OutputError(f"{printable(base.path / name)} changes all the time", hint="try again")

    def release(self) -> None:
        """Remove the file and give the lock up. Never fails: a file left behind locks nobody out."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError, OutputError):
            if _ours(os.pread(fd, 100, 0)):  # before the lock goes, so that nobody's file is removed but ours
                self.disk.unlink(self.place.base, self.place.hidden("lock"), Mark.of(os.fstat(fd)))
        self._close(fd)

    def _close(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            self.disk.close(fd)


def _ours(text: bytes) -> bool:
    """What a lock file begins with; a power cut may leave less of it, or zeros."""
    return not text.strip(b"\0") or b"process "[: len(text)] == text[:8]


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
