"""System calls that Python has no function for: renameat2, sync_file_range, and locks of open file descriptions."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct

_SYNC_FILE_RANGE_WRITE = 2
_RENAME_NOREPLACE = 1
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK = struct.Struct("hhqqi4x")
"""The kernel's struct flock on 64-bit machines: type, whence, start, length, process."""
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What a file system answers that does not offer a call."""
_libc = ctypes.CDLL(None, use_errno=True)


def start_writing(fd: int, offset: int, size: int) -> None:
    """Start writing a range to the disk, and do not wait for it."""
    _libc.sync_file_range(ctypes.c_int(fd), ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


def lock_range(fd: int, begin: int, end: int) -> None:
    """Lock bytes [begin, end) for this descriptor, or raise BlockingIOError at once."""
    fcntl.fcntl(fd, _F_OFD_SETLK, _range(fcntl.F_WRLCK, begin, end))


def locked(fd: int, begin: int) -> bool:
    """Another descriptor holds a lock on this byte."""
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, _range(fcntl.F_WRLCK, begin, begin + 1))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _range(kind: int, begin: int, end: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, begin, end - begin, 0)


def rename_new(fd: int, old: str, new: str) -> bool:
    """Rename without replacing; False if neither the kernel nor the file system offers that, and nothing has the name."""
    renameat2 = getattr(_libc, "renameat2", None)
    if renameat2 is not None:
        if renameat2(fd, os.fsencode(old), fd, os.fsencode(new), _RENAME_NOREPLACE) == 0:
            return True
        code = ctypes.get_errno()
        if code not in UNSUPPORTED:
            raise OSError(code, os.strerror(code), new)
    with contextlib.suppress(FileNotFoundError):
        os.lstat(new, dir_fd=fd)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    return False
