"""The only module that creates, writes, renames, syncs, locks or removes a file of the output.

An output folder is built as a hidden sibling (same file system, so the final rename is atomic) and appears under its
name only when it is complete and synced. Free space is compared with the need before the work starts.

    .NAME.streamconv-lock      held while a run is at work
    .NAME.streamconv-journal   which tiles are safely on disk (journal.py)
    .NAME.streamconv-partial   the folder being built
    .NAME.streamconv-old       with --force: the folder being replaced, while the new one takes its name

`Disk` is the seam: every change of the file system is one call of one of its methods, so a test can count them, fail
them, stop at any of them or replay what a power cut leaves of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from streamconv.errors import OutputError, printable
from streamconv.memory import MIB, show_size

_SYNC_FILE_RANGE_WRITE = 2
_OURS = re.compile(r"config\.json|streamconv\.json|rank[0-9]+\.safetensors")
"""What a checkpoint folder holds, NVIDIA's or ours."""
_libc = ctypes.CDLL(None, use_errno=True)


class Disk:
    """The primitive operations on the file system. Each raises OSError as the system call does."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def close(self, fd: int) -> None:
        os.close(fd)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def push(self, fd: int, offset: int, size: int) -> None:
        """Start writing a range to the disk without waiting: dirty pages must not pile up into one stall at the end."""
        _libc.sync_file_range(ctypes.c_int(fd), ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def sync_data(self, fd: int) -> None:
        os.fdatasync(fd)

    def lock(self, fd: int) -> None:
        """Take the exclusive lock of an open file, or raise BlockingIOError at once; it ends with the process."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)


@contextlib.contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
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
        raise OutputError(
            f"cannot {doing} {printable(str(path))}: {reason}", hint=hints.get(error.errno or 0)
        ) from error


def hidden(out: Path, what: str) -> Path:
    """The hidden sibling of an output for "lock", "journal", "partial" or "old"."""
    return out.parent / f".{out.name}.streamconv-{what}"


def write_all(disk: Disk, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """pwrite until everything is written."""
    view = memoryview(data).cast("B")
    while len(view):
        done = disk.pwrite(fd, view, offset)
        if done <= 0:
            raise OSError(errno.EIO, "short write")
        offset += done
        view = view[done:]


def sync_folder(disk: Disk, path: Path) -> None:
    """Make the names in a folder durable."""
    fd = disk.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.sync(fd)
    finally:
        disk.close(fd)


def remove_tree(disk: Disk, path: Path) -> None:
    """Remove a folder and all in it; a missing one is fine."""
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(disk, Path(entry.path))
        else:
            disk.unlink(Path(entry.path))
    disk.rmdir(path)


def check_place(out: Path, source: Path, read: Iterable[Path] = ()) -> None:
    """Refuse places that would destroy something.

    Args:
        source: the model's folder or file; what its links lead to counts too.
        read: other files that are read.

    Raises:
        OutputError: out is not a folder, or is the source or inside it, or holds it or a file that is read.
    """
    real, real_source = out.resolve(), source.resolve()
    if real_source.is_dir() and (real == real_source or real_source in real.parents):
        where = f"output {printable(str(out))}"
        raise OutputError(f"{where} is the source folder or inside it", hint="choose another folder")
    if real in real_source.parents:
        raise OutputError(f"output {printable(str(out))} holds the source", hint="choose another folder")
    with explained(source, "read"):
        links = [path for path in real_source.iterdir() if path.is_symlink()] if real_source.is_dir() else []
    for path in (*links, *read):
        if real in path.resolve().parents:
            where = f"output {printable(str(out))} holds {printable(path.resolve().name)}"
            raise OutputError(f"{where}, which {printable(str(path))} leads to", hint="choose another folder")
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"output {printable(str(out))} exists and is not a folder", hint="choose another name")


def check_free(out: Path, force: bool) -> None:
    """Refuse to replace a folder that holds something, unless forced; and one that holds more than a checkpoint in any case.

    Raises:
        OutputError: it does.
    """
    with explained(out, "read"):
        if not holds_something(out):
            return
        foreign = sorted(path.name for path in out.iterdir() if not _OURS.fullmatch(path.name) or path.is_dir())
        if foreign:
            names = ", ".join(printable(name) for name in foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise OutputError(
                f"output {printable(str(out))} exists and is not empty, and is no checkpoint folder: it holds {names}",
                hint="choose another folder, or empty it yourself: --force replaces nothing but a checkpoint",
            )
        if not force:
            raise OutputError(f"output {printable(str(out))} exists and is not empty", hint="--force replaces it")


def holds_something(folder: Path) -> bool:
    """A folder is there, and not empty."""
    return folder.is_dir() and any(folder.iterdir())


def free_space(path: Path) -> int:
    """Bytes free for us on the file system that holds (or will hold) `path`."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


class OutputFolder:
    """Writes one output folder. `write`, `read` and `sync` may be called from any thread.

    Args:
        out: where the folder will appear.
        disk: the operations to use (tests).
    """

    def __init__(self, out: Path, disk: Disk | None = None) -> None:
        self.out = Path(os.path.realpath(out))
        self.work = hidden(self.out, "partial")
        self.old = hidden(self.out, "old")
        self.disk = disk or Disk()
        self._fds: dict[str, int] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._made: list[Path] = []

    def make_parents(self) -> None:
        """Make the folders above the output; `remove_parents` takes back those that were made."""
        with explained(self.out.parent, "create"):
            self._make(self.out.parent)

    def remove_parents(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                self.disk.rmdir(folder)
        self._made.clear()

    def restore(self) -> None:
        """Give a replaced folder its name back, if a run was stopped before it could publish the new one."""
        if not os.path.lexists(self.old) or holds_something(self.out):
            return
        with explained(self.old, "restore"):
            self.disk.rename(self.old, self.out)  # an empty folder of that name goes
            sync_folder(self.disk, self.out.parent)

    def create(self, files: list[tuple[str, int, bytes]], fresh: bool) -> None:
        """Make the hidden folder and every (name, size, header) at its full size.

        Args:
            fresh: remove what an earlier run left; otherwise keep the bytes that are there.
        """
        with explained(self.work, "create"):
            if fresh:
                remove_tree(self.disk, self.work)
            if not self.work.is_dir():
                self.disk.mkdir(self.work)
        self._check_room(files)
        for name, size, header in files:
            with explained(self.work / name, "write"):
                fd = self._fds[name] = self.disk.open(self.work / name, os.O_RDWR | os.O_CREAT)
                if os.fstat(fd).st_size != size:
                    self.disk.truncate(fd, size)
            self._turns[name] = threading.Lock()
            self.write(name, 0, header)
        with explained(self.work, "sync"):
            # the names are durable before the journal speaks of what is in the files
            sync_folder(self.disk, self.work)
            sync_folder(self.disk, self.out.parent)

    def _check_room(self, files: list[tuple[str, int, bytes]]) -> None:
        """A disk that is too full says so before the work starts. (Preallocated extents would be written at three quarters
        of the speed: ext4 converts them one by one.)"""
        missing = 0
        for name, size, _ in files:
            with contextlib.suppress(FileNotFoundError):
                size -= min(size, os.stat(self.work / name).st_blocks * 512)
            missing += size
        if missing > free_space(self.work):
            need = sum(size for _, size, _ in files)
            raise OutputError(
                f"no space for the output in {printable(str(self.out.parent))}: {show_size(missing)} of {show_size(need)}"
                f" are to be written, {show_size(free_space(self.work))} are free",
                hint="free some space or choose another output folder",
            )

    def write(self, name: str, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `offset` and start pushing it to the disk."""
        size = memoryview(data).nbytes
        with explained(self.work / name, "write"), self._turns[name]:  # the kernel lets one in; waiting here costs no spinning
            write_all(self.disk, self._fds[name], data, offset)
        if size >= MIB:
            with contextlib.suppress(OSError):
                self.disk.push(self._fds[name], offset, size)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """Read bytes already written; fewer than asked for only where the file ends."""
        done = 0
        with explained(self.work / name, "read"):
            while done < len(buffer):
                got = os.preadv(self._fds[name], [buffer[done:]], offset + done)
                if got == 0:
                    break
                done += got
        return done

    def sync(self, names: Iterable[str]) -> None:
        """Wait until what was written to these files is on the disk; then its pages need not be kept in memory."""
        for name in names:
            with explained(self.work / name, "sync"):
                self.disk.sync_data(self._fds[name])
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fds[name], 0, 0, os.POSIX_FADV_DONTNEED)

    def remove_last(self, names: Iterable[str]) -> None:
        """Take back what `complete` wrote: a folder being worked on must not look like a checkpoint."""
        for name in names:
            with explained(self.work / name, "remove"), contextlib.suppress(FileNotFoundError):
                self.disk.unlink(self.work / name)

    def complete(self, last: Sequence[tuple[str, Iterable[bytes]]]) -> None:
        """Sync everything, then write and sync `last` (the manifest and config.json), each in pieces."""
        for name, fd in self._fds.items():
            with explained(self.work / name, "sync"):
                self.disk.sync(fd)
        for name, pieces in last:
            with explained(self.work / name, "write"):
                fd = self._fds[name] = self.disk.open(self.work / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                at = 0
                for piece in pieces:
                    write_all(self.disk, fd, piece, at)
                    at += len(piece)
                self.disk.sync(fd)
        with explained(self.work, "sync"):
            sync_folder(self.disk, self.work)

    def publish(self) -> None:
        """Make the folder appear under its name; what it replaces waits aside until `remove_old`."""
        with explained(self.out, "publish"):
            self.close()
            if holds_something(self.out):
                self.disk.rename(self.out, self.old)
                sync_folder(self.disk, self.out.parent)
            self.disk.rename(self.work, self.out)
            sync_folder(self.disk, self.out.parent)
        self._made.clear()

    def remove_old(self) -> None:
        """After a publication: the folder that was replaced goes."""
        if os.path.lexists(self.old):
            with explained(self.old, "remove"):
                remove_tree(self.disk, self.old)
                sync_folder(self.disk, self.out.parent)

    def close(self) -> None:
        while self._fds:
            self.disk.close(self._fds.popitem()[1])

    def discard(self) -> None:
        """Remove the hidden folder."""
        with contextlib.suppress(OSError):
            self.close()
            remove_tree(self.disk, self.work)

    def _make(self, folder: Path) -> None:
        if folder.exists():
            if not stat.S_ISDIR(folder.stat().st_mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            return
        self._make(folder.parent)
        with contextlib.suppress(FileExistsError):
            self.disk.mkdir(folder)
            self._made.append(folder)
            sync_folder(self.disk, folder.parent)
