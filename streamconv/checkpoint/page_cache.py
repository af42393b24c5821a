"""What of a file is in the page cache, and a file as memory that may be written to without the file ever changing."""

from __future__ import annotations

import ctypes
import mmap
import os

_NORESERVE = 0x4000
"""MAP_NORESERVE of Linux, which the module mmap does not name."""
_libc = ctypes.PyDLL(None)  # which keeps the interpreter's lock: mincore waits for nothing, and giving the lock away takes longer


def private_mapping(fd: int, size: int, offset: int = 0) -> mmap.mmap:
    """Bytes [offset, offset + size) of a file, copied page by page only where somebody writes.

    torch has no read-only tensors, and a write to a read-only mapping would end the process. No memory is set aside for pages
    that might be written: a file larger than the memory can be mapped.

    Raises:
        OSError: the system refuses.
    """
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)


def cached_places(fd: int, begin: int, end: int, places: int, mapping: mmap.mmap | None = None) -> int:
    """How many of some places between two offsets are in the page cache; all of them where the system does not tell.

    mincore asks without touching anything, but tells only a file's owner. A read that may not wait (RWF_NOWAIT), for the others,
    starts to read what is not there, with its neighbours; a quick disk has them before the call is over.

    Args:
        mapping: of the file from its first byte on; making one takes longer than asking.
    """
    if end <= begin:
        return places
    at = [begin + (end - begin) * (2 * place + 1) // (2 * places) for place in range(places)]
    if os.geteuid() in (0, os.fstat(fd).st_uid) and (resident := _resident(fd, at, mapping)) is not None:
        return resident
    here = 0
    for offset in at:
        try:
            here += os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except (OSError, AttributeError):
            return places
    return here


def _resident(fd: int, places: list[int], mapping: mmap.mmap | None) -> int | None:
    """How many of the pages with these offsets are there; None where the system cannot map the file or does not say."""
    try:
        if mapping is None:
            with private_mapping(fd, os.fstat(fd).st_size) as whole:
                return _resident(fd, places, whole)
        base, flag, here = ctypes.c_char.from_buffer(mapping), (ctypes.c_ubyte * 1)(), 0
        first = ctypes.addressof(base)
        del base  # or the mapping could not be closed
        for place in places:
            page = first + place // mmap.PAGESIZE * mmap.PAGESIZE
            if _libc.mincore(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), flag):
                return None
            here += flag[0] & 1
        return here
    except (OSError, ValueError, OverflowError, AttributeError):
        return None
