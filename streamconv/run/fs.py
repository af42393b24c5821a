"""The only module that creates, writes, renames, syncs, locks or removes a file of the output.

`Folder` is a directory that is held open: every operation is on a name in it, so it stays in that directory, whatever is
swapped on the way to it, and no link is followed. What a run did not make, or did not check, it does not touch.

`Disk` is the seam: every change of the file system is one call of one of its methods, so a test can count them, fail
them, stop at any of them, change the folder between any two, or replay what a power cut leaves of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from streamconv import mounts
from streamconv.arguments import path_of
from streamconv.digest import sha256
from streamconv.errors import OutputError, printable
from streamconv.run import syscalls
from streamconv.run.syscalls import UNSUPPORTED

_LONGEST_NAME = 143
"""Bytes of a file name that every file system takes (eCryptfs has the least)."""


class Mark(NamedTuple):
    """What tells one file or folder from another that has its name. Of a folder size and time are 0: they change with its content."""

    device: int
    inode: int
    kind: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Mark:
        kind = stat.S_IFMT(status.st_mode)
        changing = (0, 0) if kind == stat.S_IFDIR else (status.st_size, status.st_mtime_ns)
        return cls(status.st_dev, status.st_ino, kind, *changing)


class Disk:
    """The primitive operations on the file system. Each raises OSError as the system call does."""

    def why_inside(self, out: Path, begun: bool) -> str | None:
        """See `mounts.why_inside`."""
        return mounts.why_inside(out, begun)

    def enter(self, path: Path, folder: Folder | None = None) -> int:
        """A descriptor of a folder: of the name of `path` in `folder` if that is given."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path.name, flags, dir_fd=folder.fd) if folder is not None else os.open(path, flags)

    def open(self, folder: Folder, name: str, flags: int, mode: int = 0o666) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=folder.fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def push(self, fd: int, offset: int, size: int) -> None:
        """Start writing a range to the disk without waiting: dirty pages must not pile up into one stall at the end."""
        syscalls.start_writing(fd, offset, size)

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def sync_data(self, fd: int) -> None:
        os.fdatasync(fd)

    def lock(self, fd: int) -> None:
        """Take the exclusive lock of an open file, or raise BlockingIOError at once; it ends with the process."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def lock_range(self, fd: int, begin: int, end: int) -> None:
        """Lock bytes [begin, end) of a file for this descriptor, or raise BlockingIOError at once; closing the descriptor ends it.

        Servers know these locks, too: one that lets a cut-off client's locks go lets none of its later writes in.
        """
        syscalls.lock_range(fd, begin, end)

    def locked(self, fd: int, begin: int) -> bool:
        """Another descriptor holds a lock on this byte."""
        return syscalls.locked(fd, begin)

    def rename(self, folder: Folder, old: str, new: str, known: Mark) -> None:
        """Give what has this mark another name. Nothing is replaced but an empty folder, by a folder.

        Raises:
            OutputError: something else has the name.
        """
        folder.expect(old, known)
        if known.kind == stat.S_IFDIR or not syscalls.rename_new(folder.fd, old, new):
            os.rename(old, new, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)  # of a folder: it spares files, links, and full folders

    def mkdir(self, folder: Folder, name: str) -> None:
        os.mkdir(name, dir_fd=folder.fd)

    def unlink(self, folder: Folder, name: str, known: Mark) -> None:
        """Remove the file that has this mark. (No system call does both, so the look is right before.)

        Raises:
            OutputError: something else has the name.
        """
        folder.expect(name, known)
        os.unlink(name, dir_fd=folder.fd)

    def rmdir(self, folder: Folder, name: str) -> None:
        os.rmdir(name, dir_fd=folder.fd)


@contextlib.contextmanager
def translate_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError into the OutputError a user can act on."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space or choose another output folder",
            errno.EDQUOT: "the disk quota is used up; free some space or choose another output folder",
            errno.EACCES: "choose a folder you may write to",
            errno.EPERM: "choose a folder you may write to",
            errno.EROFS: "the file system is read-only; choose another output folder",
        }
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OutputError(f"cannot {doing} {printable(path)}: {reason}", hint=hints.get(error.errno or 0)) from error


def write_all(disk: Disk, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """pwrite until everything is written."""
    view = memoryview(data).cast("B")
    while len(view):
        done = disk.pwrite(fd, view, offset)
        if done <= 0:
            raise OSError(errno.EIO, "short write")
        offset += done
        view = view[done:]


def read_fully(fd: int, offset: int, buffer: memoryview) -> int:
    """preadv until `buffer` is full, or the file ends; gives how many bytes."""
    done = 0
    while done < len(buffer) and (got := os.preadv(fd, [buffer[done:]], offset + done)):
        done += got
    return done


class Folder:
    """A directory held open. Names are those of its entries; `path` is where it was when it was opened, for messages.

    Args:
        fd: see `Disk.enter`; closed by `close`.
        lenient: write even where the file system cannot sync a directory.

    Attributes:
        owner: user that new files get here; differs from ours where a server maps users.
    """

    def __init__(self, disk: Disk, path: Path, fd: int, lenient: bool = False) -> None:
        self.disk, self.path, self.fd, self.lenient = disk, path, fd, lenient
        self.owner = os.geteuid()

    @classmethod
    def at(cls, disk: Disk, path: Path, lenient: bool = False) -> Folder:
        return cls(disk, path, disk.enter(path), lenient)

    def enter(self, name: str) -> Folder:
        """A folder in this one, no link followed."""
        inner = Folder(self.disk, self.path / name, self.disk.enter(self.path / name, self), self.lenient)
        inner.owner = self.owner
        return inner

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self.disk.close(fd)

    def mark(self) -> Mark:
        return Mark.of(os.fstat(self.fd))

    def look(self, name: str) -> os.stat_result | None:
        """What has the name, no link followed; None if nothing has."""
        try:
            return os.lstat(name, dir_fd=self.fd)
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        return sorted(os.listdir(self.fd))

    def expect(self, name: str, known: Mark) -> None:
        """Raises OutputError unless `name` is what was looked at."""
        there = self.look(name)
        if there is None or Mark.of(there) != known:
            gone = "is gone" if there is None else "was replaced or changed"
            raise OutputError(f"{printable(self.path / name)} {gone} while the run was at work", hint="nothing of it was touched")

    def made(self, name: str, kind: int = stat.S_IFREG, ours: bool = True) -> os.stat_result | None:
        """As `look`, for what only a run makes.

        Args:
            ours: a run of this user.

        Raises:
            OutputError: it is something else: a link, a pipe, a file with a second name, a thing of another user.
        """
        there = self.look(name)
        if there is not None and (problem := self._problem(there, kind, ours)):
            raise not_ours(self.path / name, problem)
        return there

    def open(self, name: str, make: bool = True, fresh: bool = False, private: bool = False, ours: bool = True) -> int:
        """Open a file that a run made, or make it. Nothing is cut: the content may be looked at first.

        Args:
            make: make it if it is not there.
            fresh: it must not be there.
            private: for nobody but its owner.
            ours: see `made`.

        Raises:
            OutputError: see `made`. FileExistsError: it came up meanwhile.
        """
        new = fresh or (self.made(name, ours=ours) is None and make)
        fd = self.disk.open(self, name, os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else 0), 0o600 if private else 0o666)
        if new:
            self.owner = os.fstat(fd).st_uid
        if problem := self._problem(os.fstat(fd), stat.S_IFREG, ours):
            self.disk.close(fd)
            raise not_ours(self.path / name, problem)
        return fd

    def rename(self, old: str, new: str) -> None:
        there = self.look(old)
        if there is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), old)
        self.disk.rename(self, old, new, Mark.of(there))

    def unlink(self, name: str) -> None:
        """Remove a file that a run made; a missing one is fine, also if it went just now."""
        if (there := self.made(name)) is not None:
            try:
                self.disk.unlink(self, name, Mark.of(there))
            except (FileNotFoundError, OutputError):
                if self.look(name) is not None:
                    raise

    def sync(self) -> None:
        """Make the names in the folder durable."""
        with self._supported("sync a folder"):
            self.disk.sync(self.fd)

    def lock(self, fd: int) -> None:
        """Lock an open file.

        Raises:
            BlockingIOError: another process holds it.
            OutputError: the file system has no locks.
        """
        with self._supported("lock a file"):
            self.disk.lock(fd)

    def lock_range(self, fd: int, begin: int, end: int) -> None:
        """As `lock`, for bytes [begin, end)."""
        with self._supported("lock a file"):
            self.disk.lock_range(fd, begin, end)

    @contextlib.contextmanager
    def _supported(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            if not self.lenient:
                hint = "choose an output on another file system, or use --no-lock, "
                hint += "and see to it yourself that no second run writes there"
                raise OutputError(f"the file system of {printable(self.path)} cannot {what}", hint=hint) from error

    def _problem(self, status: os.stat_result, kind: int, ours: bool) -> str:
        """Why a run cannot have made it; empty if it may have."""
        actual = stat.S_IFMT(status.st_mode)
        if actual != kind:
            names = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a FIFO"}
            return f"is {names.get(actual, 'a device or a socket')}"
        if kind == stat.S_IFREG and status.st_nlink > 1:
            return "has another name too (a hard link)"
        return f"belongs to user {status.st_uid}" if ours and status.st_uid not in (os.geteuid(), self.owner) else ""


def not_ours(path: Path, problem: str) -> OutputError:
    """The error for what no run can have made."""
    return OutputError(
        f"{printable(path)} {problem}: it is not what a run leaves there",
        hint="look at it, then move it away or remove it; it was not touched",
    )


def named(path: str | Path) -> Path:
    """A path that the user gave. Raises UsageError: it is empty, or no path can be so."""
    return Path(path_of(path, "the name of the output"))


def beside(out: Path, before: str, after: str) -> Path:
    """A sibling of `out` that has its name in its own; a long name is cut, and its hash tells it from others."""
    raw, room = os.fsencode(out.name), _LONGEST_NAME - len(before + after)
    if len(raw) > room:
        digest = sha256(raw).hexdigest()[:16]
        raw = raw[: room - 17].decode(errors="ignore").encode() + b"-" + digest.encode()
    return out.parent / f"{before}{os.fsdecode(raw)}{after}"


def hidden(out: Path, what: str) -> Path:
    """The hidden sibling of an output for "lock", "journal", "partial", "old" or "calibrate"."""
    return beside(out, ".", f".streamconv-{what}")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    while not os.path.exists(path):
        path = path.parent
    return path


def free_space(path: Path) -> int | None:
    """Bytes free for us on the file system that holds (or will hold) `path`; None if it does not say (ramfs)."""
    with translate_errors(path, "look at"):
        status = os.statvfs(existing(path.absolute()))
    return status.f_bavail * status.f_frsize if status.f_blocks else None
