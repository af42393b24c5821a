"""A source file: opened lazily, read through short mapped windows or into buffers, and watched for change.

Small reads (headers, verify) go through windows: a page-aligned mapping that is populated before it is used, so that a file
that shrank is an ordinary error and not a SIGBUS. Tiles are read into their worker's arena with preadv: a populated page
can still be taken away by a truncation while a kernel reads it, a copied byte cannot; and it measured no slower.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from streamconv.errors import CheckpointError, SourceChangedError, printable

_MADV_POPULATE_READ = 22
_IOV_MAX = 1024
_NETWORK = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "ceph", "gpfs", "beegfs", "afs", "glusterfs")


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells that a file is still the one that was opened."""

    size: int
    mtime_ns: int
    inode: int
    device: int


class Shard:
    """One file of a source. Nothing is opened before it is needed; safe for several threads.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = -1
        self._identity: Identity | None = None
        self._lock = threading.Lock()

    @property
    def fd(self) -> int:
        """Descriptor of the opened file.

        Raises:
            CheckpointError: it cannot be opened, or is not a regular file.
        """
        if self._fd < 0:
            with self._lock:
                if self._fd < 0:
                    self._open()
        return self._fd

    @property
    def identity(self) -> Identity:
        _ = self.fd
        assert self._identity is not None
        return self._identity

    @property
    def size(self) -> int:
        return self.identity.size

    def _open(self) -> None:
        where = printable(str(self.path))
        try:
            # O_NONBLOCK: opening a FIFO must not hang
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot open {where}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"cannot open {where}: {error}") from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise CheckpointError(f"{where} is not a regular file")
        self._identity = _identity(status)
        self._fd = fd

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    @contextmanager
    def window(self, begin: int, end: int) -> Iterator[memoryview]:
        """Bytes [begin, end) of the file, mapped and present; unmapped on exit.

        Raises:
            SourceChangedError: the file does not hold those bytes (any more).
        """
        fd = self.fd
        if begin == end:
            yield memoryview(b"")
            return
        if end > os.fstat(fd).st_size:
            raise self._short()
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        mapped = None
        if not on_network(str(self.path.absolute().parent)):
            mapped = mmap.mmap(fd, end - first, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=first)
            if not self._populate(mapped):
                mapped.close()
                mapped = None
        if mapped is None:
            data = bytearray(end - begin)
            self.read_into(begin, memoryview(data))
            yield memoryview(data)
            return
        view = memoryview(mapped)[begin - first :]
        try:
            yield view
        finally:
            view.release()
            mapped.close()

    def _populate(self, mapped: mmap.mmap) -> bool:
        """Bring the pages in. False where the kernel cannot say whether it worked (before 5.14)."""
        size = len(mapped)
        # an address cannot be taken from a read-only buffer by ctypes; numpy-free way through the buffer protocol
        address = _address(mapped)
        if address is None:
            return False
        if _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_READ) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.EFAULT, errno.EIO, errno.EHWPOISON):
            raise self._short()
        return False

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`.

        Raises:
            SourceChangedError: the file ends earlier or cannot be read.
        """
        fd, at, total = self.fd, 0, len(buffer)
        while at < total:
            try:
                done = os.preadv(fd, [buffer[at:]], offset + at)
            except OSError as error:
                raise SourceChangedError(f"cannot read {printable(str(self.path))}: {error.strerror}") from error
            if done == 0:
                raise self._short()
            at += done

    def read_rows_into(
        self, offset: int, row_stride: int, row_bytes: int, rows: int, buffer: memoryview, buffer_stride: int
    ) -> None:
        """Read `rows` runs of `row_bytes`, `row_stride` apart in the file, to places `buffer_stride` apart in `buffer`.

        Raises:
            SourceChangedError: the file ends earlier or cannot be read.
        """
        if row_stride != row_bytes:
            for row in range(rows):
                self.read_into(offset + row * row_stride, buffer[row * buffer_stride : row * buffer_stride + row_bytes])
            return
        for first in range(0, rows, _IOV_MAX):
            last = min(first + _IOV_MAX, rows)
            places = [buffer[row * buffer_stride : row * buffer_stride + row_bytes] for row in range(first, last)]
            start = offset + first * row_bytes
            try:
                done = os.preadv(self.fd, places, start)
            except OSError as error:
                raise SourceChangedError(f"cannot read {printable(str(self.path))}: {error.strerror}") from error
            # a short read is rare: finish row by row
            for row in range(done // max(row_bytes, 1), last - first):
                self.read_into(start + row * row_bytes, places[row])

    def will_need(self, begin: int, end: int) -> None:
        """Ask the kernel to read ahead."""
        os.posix_fadvise(self.fd, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def drop_cache(self, begin: int, end: int) -> None:
        """Give consumed pages back to the system."""
        os.posix_fadvise(self.fd, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Compare with what was opened.

        Raises:
            SourceChangedError: the file was changed, replaced or removed since.
        """
        if self._identity is None:
            return
        try:
            now = _identity(os.stat(self.path))
        except OSError as error:
            raise SourceChangedError(f"{printable(str(self.path))} vanished while it was read: {error.strerror}") from error
        if now != self._identity or _identity(os.fstat(self.fd)) != self._identity:
            raise SourceChangedError(
                f"{printable(str(self.path))} changed while it was read", hint="nothing was kept; run again"
            )

    def _short(self) -> SourceChangedError:
        size = self._identity.size if self._identity else 0
        return SourceChangedError(
            f"{printable(str(self.path))} is shorter than when it was opened ({size} bytes)",
            hint="is something still writing or deleting it?",
        )


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class _PyBuffer(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _address(mapped: mmap.mmap) -> int | None:
    """Where a read-only mapping lies."""
    buffer = _PyBuffer()
    api = ctypes.pythonapi
    if api.PyObject_GetBuffer(ctypes.py_object(mapped), ctypes.byref(buffer), 0) != 0:
        return None
    address = buffer.buf
    api.PyBuffer_Release(ctypes.byref(buffer))
    return int(address) if address else None


@cache
def on_network(folder: str) -> bool:
    """Whether a folder lies on a network file system, where a mapping may fail long after it was made."""
    best, kind = "", ""
    try:
        with open("/proc/mounts", encoding="utf-8", errors="replace") as file:
            for line in file:
                fields = line.split()
                if len(fields) > 2 and (folder + "/").startswith(fields[1].rstrip("/") + "/") and len(fields[1]) >= len(best):
                    best, kind = fields[1], fields[2]
    except OSError:
        return True
    return kind.startswith(_NETWORK)
