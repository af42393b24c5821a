"""A file as memory that may be written to without the file ever changing."""

from __future__ import annotations

import mmap

_NORESERVE = 0x4000
"""MAP_NORESERVE of Linux, which the module mmap does not name."""


def private_mapping(fd: int, size: int) -> mmap.mmap:
    """The first `size` bytes of a file, copied page by page only where somebody writes.

    torch has no read-only tensors, and a write to a read-only mapping would end the process. No memory is set aside for pages
    that might be written: a file larger than the memory can be mapped.

    Raises:
        OSError: the system refuses.
    """
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
