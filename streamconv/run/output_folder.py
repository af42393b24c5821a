"""The files of one output while they are written."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from streamconv.errors import OutputError, printable
from streamconv.memory import MIB, show_size
from streamconv.planning.plan import OutputFile
from streamconv.run.fs import Mark, free_space, read_fully, translate_errors, write_all
from streamconv.run.place import CONFIG, Entries, Existing, Place


class OutputFolder:
    """Writes one output folder. `write`, `read_into` and `sync` may be called from any thread.

    Args:
        place: where it is built.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.out, self.disk = place, place.out, place.disk
        self._fds: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._paths: dict[str, Path] = {}
        self._turns: dict[str, threading.Lock] = {}

    def create(self, files: Sequence[OutputFile], fresh: bool, made: bool = False) -> None:
        """Make every file at its full size, with its header.

        Args:
            fresh: remove what an earlier run left; otherwise keep the bytes that are there.
            made: all are there; one that is gone is an OutputError, for zeros would take its place.
        """
        with translate_errors(self.place.top / self.place.hidden("partial"), "create"):
            self.place.begin(fresh)
        self._check_room(files)
        for file in files:
            with translate_errors(self._path(file.name), "write"):
                if made:
                    self.adopt(file.name, file.size)
                else:
                    fd = self._hold(file.name, file.size, fresh)
                    if os.fstat(fd).st_size != file.size:
                        self.disk.truncate(fd, file.size)
            self.write(file.name, 0, file.header)
        with translate_errors(self.place.work.folder.path, "sync"):
            # the names are durable before the journal speaks of what is in the files
            self.place.work.folder.sync()
            if self.place.work.folder is not self.place.base:
                self.place.base.sync()

    def _hold(self, name: str, size: int, fresh: bool = False) -> int:
        self._fds[name] = self.place.work.open(name, fresh)
        self._sizes[name], self._turns[name] = size, threading.Lock()
        return self._fds[name]

    def adopt(self, name: str, size: int) -> None:
        """Open a file that another run made.

        Raises:
            OutputError: it has another size. FileNotFoundError: it is gone.
        """
        if self.place.work.look(name) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        self._hold(name, size)
        self._check_size(name)

    def _path(self, name: str) -> Path:
        if name not in self._paths:  # making one takes longer than a small write
            self._paths[name] = self.place.work.path(name)
        return self._paths[name]

    def _check_room(self, files: Sequence[OutputFile]) -> None:
        """A disk that is too full says so before the work starts. (Preallocated extents would be written at three quarters
        of the speed: ext4 converts them one by one.)"""
        missing = 0
        for file in files:
            there = self.place.work.look(file.name)
            missing += file.size - min(file.size, there.st_blocks * 512 if there is not None else 0)
        free = free_space(self.place.top)
        if free is not None and missing > free:
            need = sum(file.size for file in files)
            raise OutputError(
                f"no space for the output in {printable(self.place.top)}: {show_size(missing)} of {show_size(need)}"
                f" are to be written, {show_size(free)} are free",
                hint="free some space or choose another output folder",
            )

    def write(self, name: str, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `offset` and start pushing it to the disk."""
        size = memoryview(data).nbytes
        with translate_errors(self._path(name), "write"), self._turns[name]:  # the kernel lets one in; waiting here costs no spinning
            self._check_size(name)  # each time: writing on would hide a hole that somebody cut
            write_all(self.disk, self._fds[name], data, offset)
        if size >= MIB:
            with contextlib.suppress(OSError):
                self.disk.push(self._fds[name], offset, size)

    def _check_size(self, name: str) -> None:
        size = os.fstat(self._fds[name]).st_size
        if size != self._sizes[name]:
            raise OutputError(
                f"{printable(self._path(name))} was changed to {size} bytes while the run was at work", hint="nothing was published"
            )

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """Read bytes already written; fewer than asked for only where the file ends."""
        with translate_errors(self._path(name), "read"):
            return read_fully(self._fds[name], offset, buffer)

    def sync(self, names: Iterable[str]) -> None:
        """Wait until what was written to these files is on the disk; then its pages need not be kept in memory."""
        for name in names:
            with translate_errors(self._path(name), "sync"):
                self.disk.sync_data(self._fds[name])
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fds[name], 0, 0, os.POSIX_FADV_DONTNEED)

    def remove_last(self, names: Iterable[str]) -> None:
        """Take back what `complete` wrote: a folder being worked on must not look like a checkpoint."""
        with translate_errors(self.place.top / self.place.hidden("partial"), "remove"):
            self.place.begin(fresh=False)
            for name in names:
                self.place.work.unlink(name)

    def complete(self, last: Sequence[tuple[str, Iterable[bytes]]]) -> None:
        """Sync everything, then write and sync `last` (the manifest and config.json), each in pieces.

        Raises:
            OutputError: a file is not what was written; it is not published.
        """
        for name, fd in self._fds.items():
            with translate_errors(self._path(name), "sync"):
                self.disk.sync(fd)
        for name, pieces in last:
            with translate_errors(self._path(name), "write"):
                fd = self._fds[name] = self.place.work.open(name, fresh=True)
                self._sizes[name] = 0
                for piece in pieces:
                    write_all(self.disk, fd, piece, self._sizes[name])
                    self._sizes[name] += len(piece)
                self.disk.sync(fd)
        with translate_errors(self.place.work.folder.path, "sync"):
            self.place.work.folder.sync()

    def names(self) -> list[str]:
        """The files, in the order in which they appear."""
        return sorted(self._fds, key=lambda name: (name == CONFIG, name))

    def _check(self) -> dict[str, tuple[int, int]]:
        """What is about to be published is what this run wrote, and nothing else; gives inode and size of each file."""
        work, written = self.place.work, dict[str, tuple[int, int]]()
        if foreign := [name for name in work.names() if name not in self._fds]:
            raise OutputError(f"{printable(work.path(foreign[0]))} is not of this run", hint="move it away; nothing was published")
        for name, fd in self._fds.items():
            written[name] = os.fstat(fd).st_ino, self._sizes[name]
            if problem := _differs(work, name, written[name]):
                raise OutputError(problem, hint="nothing was published")
        return written

    def publish(self, existing: Existing) -> None:
        """Make the folder appear under its name; what it replaces waits aside until `Place.remove_old`.

        Args:
            existing: what the run has checked under the output's name.
        """
        with translate_errors(self.out, "publish"):
            written, names = self._check(), self.names()
            self.close()  # some servers rename no folder with open files
            try:
                self.place.publish(existing, names)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                raise OutputError(
                    f"something appeared at {printable(self.out)} while the run was at work; nothing in it was touched",
                    hint=f"the finished checkpoint waits in {printable(self._path(''))}: move away what is in its place",
                ) from error
            shown = self.place.shown()
            for name, entry in written.items():  # between the look and the rename, too
                if problem := _differs(shown, name, entry):
                    if not _differs(shown, CONFIG, written[CONFIG]):
                        shown.unlink(CONFIG)
                    raise OutputError(problem, hint=f"{printable(self.out)} is no checkpoint: remove it, then run again")
        self.place.keep_parents()

    def close(self) -> None:
        while self._fds:
            self.disk.close(self._fds.popitem()[1])

    def discard(self) -> None:
        """Remove the work.

        Raises:
            OSError, OutputError: not all of it could be removed.
        """
        marks = {name: Mark.of(os.fstat(fd)) for name, fd in self._fds.items()}
        self.close()
        self.place.discard(marks)


def _differs(part: Entries, name: str, entry: tuple[int, int]) -> str:
    """What has become of a file of this inode and size; empty if it is there as it was written."""
    there = part.look(name)
    if there is not None and (there.st_ino, there.st_size) == entry:
        return ""
    what = "is gone" if there is None else "was replaced" if there.st_ino != entry[0] else f"was changed to {there.st_size} bytes"
    return f"{printable(part.path(name))} {what} while the run was at work"
