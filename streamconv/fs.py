"""The only module that creates, writes, renames, syncs or removes a file of the output.

An output folder is built as a hidden sibling (same file system, so the final rename is atomic) and appears under its name
only when it is complete and synced. Files get their final size first: a full disk shows before the work starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from streamconv.errors import OutputError, printable
from streamconv.memory import show_size

_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)


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


def work_folder(out: Path) -> Path:
    """The hidden sibling in which `out` is built."""
    return out.parent / f".{out.name}.streamconv-partial"


def check_output(out: Path, source: Path, force: bool) -> None:
    """Refuse outputs that would destroy something.

    Raises:
        OutputError: out exists (without force), is not a folder, or is the source or inside it, or holds it.
    """
    real, real_source = out.resolve(), source.resolve()
    folder = real_source if real_source.is_dir() else real_source.parent
    if real == folder or folder in real.parents:
        raise OutputError(f"output {printable(str(out))} is the source folder or inside it", hint="choose another folder")
    if real in folder.parents:
        raise OutputError(f"output {printable(str(out))} holds the source folder", hint="choose another folder")
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise OutputError(f"output {printable(str(out))} exists and is not a folder", hint="choose another name")
    with explained(out, "read"):
        if not any(out.iterdir()):
            return
    if not force:
        raise OutputError(f"output {printable(str(out))} exists and is not empty", hint="--force replaces it")


def free_space(path: Path) -> int:
    """Bytes free for us on the file system that holds (or will hold) `path`."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


class OutputFolder:
    """Writes one output folder. Not thread safe except `write`.

    Args:
        out: where the folder will appear.
        force: replace an existing folder.
    """

    def __init__(self, out: Path, force: bool) -> None:
        self.out = out.absolute()
        self.work = work_folder(self.out)
        self.force = force
        self._fds: dict[str, int] = {}
        self._made: list[Path] = []

    def create(self, files: list[tuple[str, int, bytes]]) -> None:
        """Make the hidden folder and every (name, size, header) at its full size."""
        with explained(self.out.parent, "create"):
            self._make_parents(self.out.parent)
        with explained(self.work, "create"):
            if self.work.exists():
                shutil.rmtree(self.work)
            self.work.mkdir()
        for name, size, header in files:
            path = self.work / name
            with explained(path, "write"):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                self._fds[name] = fd
                try:
                    if size:
                        os.posix_fallocate(fd, 0, size)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        need = sum(total for _, total, _ in files)
                        raise OutputError(
                            f"no space for {printable(name)} ({show_size(size)} of {show_size(need)} in all) in"
                            f" {printable(str(self.out.parent))}",
                            hint="free some space or choose another output folder",
                        ) from error
                    if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                        raise
                    os.ftruncate(fd, size)
            self.write(name, 0, header)

    def write(self, name: str, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `offset` and start pushing it to the disk."""
        view = memoryview(data).cast("B")
        fd, start, total = self._fds[name], offset, len(view)
        with explained(self.work / name, "write"):
            while len(view):
                done = os.pwrite(fd, view, offset)
                if done <= 0:
                    raise OSError(errno.EIO, "short write")
                offset += done
                view = view[done:]
        if total >= 1 << 20:
            # best effort: keeps dirty pages from piling up into one stall at the end
            _libc.sync_file_range(ctypes.c_int(fd), ctypes.c_int64(start), ctypes.c_int64(total), _SYNC_FILE_RANGE_WRITE)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes already written."""
        return os.pread(self._fds[name], size, offset)

    def forget_cache(self, name: str, offset: int, size: int) -> None:
        """Give written pages back to the system (only clean ones go)."""
        os.posix_fadvise(self._fds[name], offset, size, os.POSIX_FADV_DONTNEED)

    def publish(self, last: list[tuple[str, bytes]]) -> None:
        """Sync everything, write `last` (config.json and the manifest), and make the folder appear."""
        for name, fd in self._fds.items():
            with explained(self.work / name, "sync"):
                os.fsync(fd)
        for name, data in last:
            path = self.work / name
            with explained(path, "write"):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                self._fds[name] = fd
            self.write(name, 0, data)
            with explained(path, "sync"):
                os.fsync(fd)
        self.close()
        with explained(self.out, "publish"):
            _sync_folder(self.work)
            old = None
            if self.out.is_dir() and any(self.out.iterdir()):
                old = self.out.parent / f".{self.out.name}.streamconv-old"
                if old.exists():
                    shutil.rmtree(old)
                os.rename(self.out, old)
            os.rename(self.work, self.out)
            _sync_folder(self.out.parent)
            if old is not None:
                shutil.rmtree(old)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def discard(self) -> None:
        """Leave nothing behind."""
        self.close()
        shutil.rmtree(self.work, ignore_errors=True)
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _make_parents(self, folder: Path) -> None:
        if folder.exists():
            if not stat.S_ISDIR(folder.stat().st_mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            return
        self._make_parents(folder.parent)
        folder.mkdir(exist_ok=True)
        self._made.append(folder)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
