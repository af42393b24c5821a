"""How fast disks are right now, from short samples: a file without a name is written, pieces of files at random places are read.

A sample is one call, so that other threads of this process hardly slow it down; its size grows until it takes long enough to be timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from streamconv.checkpoint.untrusted import open_regular

_PIECE = 1 << 20
_MOST = 32
"""Pieces of a sample; the memory is that of one."""
_LONG = 0.05


def read_rate(files: Sequence[Path], seconds: float, cold: bool = False) -> float:
    """Bytes a second that are read from files, in about `seconds`; from the page cache, what it holds.

    Args:
        cold: drop their pages from the page cache first, where the kernel does that.

    Raises:
        OSError, StreamconvError: they cannot be read.
    """
    from random import choices, randrange

    opened = [open_regular(file) for file in files]
    try:
        sizes, block = [os.fstat(fd).st_size for fd in opened], bytearray(_PIECE)
        for fd in opened if cold else ():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

        def sample(pieces: int) -> int:
            (number,) = choices(range(len(opened)), sizes)
            begin = randrange(max(1, sizes[number] - pieces * _PIECE)) // 4096 * 4096
            return os.preadv(opened[number], [block] * pieces, begin)

        return _rate(sample, seconds)
    finally:
        for fd in opened:
            os.close(fd)


def write_rate(folder: Path, seconds: float) -> float:
    """Bytes a second that are written to a folder and synced, in about `seconds`; no file gets a name there, whatever happens.

    Raises:
        OSError: nothing can be written there, or not without a name.
    """
    fd, block = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600), os.urandom(_PIECE)
    try:

        def sample(pieces: int) -> int:
            written = os.pwritev(fd, [block] * pieces, 0)
            os.fdatasync(fd)
            return written

        return _rate(sample, seconds)
    finally:
        os.close(fd)


def _rate(sample: Callable[[int], int], seconds: float) -> float:
    """The median of the largest samples."""
    pieces, rates, until = 1, list[float](), time.monotonic() + seconds
    while True:
        began = time.monotonic()
        count = sample(pieces)
        now = time.monotonic()
        rates.append(count / max(now - began, 1e-9))
        if not count or now >= until:
            return sorted(rates)[len(rates) // 2]
        if now - began < _LONG and pieces < _MOST:
            pieces, rates = 2 * pieces, []
