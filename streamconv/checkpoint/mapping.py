"""Source files in memory without a copy: windows that one tile is encoded from, and views of whole files for who asks."""

from __future__ import annotations

import ctypes
import errno
import mmap
from types import TracebackType
from typing import TYPE_CHECKING, Any

from streamconv import mounts
from streamconv.checkpoint.fault_guard import FaultGuard, Slot
from streamconv.checkpoint.page_cache import private_mapping
from streamconv.lazy import np

if TYPE_CHECKING:
    from streamconv.checkpoint.shard import Shard

_LOCAL = {
    "bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "iso9660",
    "jfs", "msdos", "ntfs3", "overlay", "ramfs", "reiserfs", "squashfs", "tmpfs", "udf", "vfat", "xfs", "zfs",
}  # fmt: skip
"""Types of file systems whose files are on this machine. Pages of the others may be gone, or wait for a network, at any touch."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux, which older Pythons have no name for."""
_EHWPOISON = 133
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)  # and not mmap.madvise, which keeps the interpreter's lock


class Window:
    """Bytes [begin, end) of a file, mapped until the end of a `with` block.

    Whoever leaves the block with an error gets the reason instead, if pages were missing.

    Attributes:
        data: uint8. Writing to it would change a private copy of the page, and nothing else.
    """

    def __init__(self, shard: Shard, end: int, mapped: mmap.mmap, data: np.ndarray[Any, Any], guard: FaultGuard, slot: Slot) -> None:
        self.data, self._shard, self._end, self._mapped = data, shard, end, mapped
        self._guard, self._slot, self._at = guard, slot, slot.begin

    def check(self) -> None:
        """To be called before anything made of `data` is believed.

        Raises:
            SourceChangedError: the file became shorter; some of the data was zeros. UnreadableError: the disk did not give a page.
        """
        if self._slot.hit:
            raise self._shard.lost(self._end)

    def __enter__(self) -> Window:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        lost = bool(self._slot.hit) or _is_fault(error)
        _libc.madvise(self._at, len(self._mapped), mmap.MADV_DONTNEED)  # the mapping itself goes with the last array that shows it
        self._guard.release(self._slot)
        if lost and isinstance(error, Exception):
            raise self._shard.lost(self._end) from error


def window(shard: Shard, begin: int, end: int, guard: FaultGuard) -> Window | None:
    """Map a part of a file, its pages in place; None where it cannot be mapped, so that it has to be read.

    Raises:
        SourceChangedError: the file ends before `end`. UnreadableError: a page cannot be read.
    """
    low = begin // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        with shard.descriptor() as fd:
            mapped = private_mapping(fd, end - low, low)  # writable: kernels are compiled for such arrays
    except ValueError:  # says Python, before the system would
        raise shard.lost(end) from None
    except (OSError, OverflowError):
        return None
    whole = np.frombuffer(mapped, np.uint8)
    at = int(whole.__array_interface__["data"][0])
    slot = guard.take(at, at + -(-len(mapped) // mmap.PAGESIZE) * mmap.PAGESIZE)
    if slot is None:
        return None
    if _libc.madvise(at, len(mapped), _POPULATE_READ) and ctypes.get_errno() in (errno.EFAULT, _EHWPOISON):
        guard.release(slot)
        raise shard.lost(end)
    return Window(shard, end, mapped, whole[begin - low :], guard, slot)


def is_local(shard: Shard) -> bool:
    """The file is on a file system of this machine, as far as one can tell."""
    return mounts.kind_of(shard.path) in _LOCAL


def _is_fault(error: BaseException | None) -> bool:
    """The system itself met a missing page, while it was writing what is mapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EFAULT:
            return True
        error = error.__cause__
    return False
