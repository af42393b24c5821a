"""How fast the disks and the kernels are, measured in about a second each."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

_PIECE = 8 << 20


def write_rate(folder: Path, seconds: float = 1.0) -> float | None:
    """Bytes a second that are written to a folder and synced, without a name; None where that cannot be."""
    done, began = 0, time.monotonic()
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            piece = os.urandom(_PIECE)
            while time.monotonic() - began < seconds:
                file.write(piece)
                done += _PIECE
            os.fsync(file.fileno())
    except OSError:
        return None
    return done / (time.monotonic() - began)


def read_rate(file: Path, seconds: float = 1.0) -> float | None:
    """Bytes a second that are read from a file, its pages dropped from the page cache first where the kernel does that."""
    done = 0
    with contextlib.suppress(OSError):
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.monotonic()
            while time.monotonic() - began < seconds and (piece := os.pread(fd, _PIECE, done)):
                done += len(piece)
            return done / max(time.monotonic() - began, 1e-9) if done else None
        finally:
            os.close(fd)
    return None


def kernel_rate(quant: str, seconds: float = 0.5) -> float:
    """Bytes of bfloat16 weights a second that one thread encodes as int8 or int4 for Ampere."""
    import numpy as np

    from streamconv.checkpoint.dtypes import BF16
    from streamconv.quants.weight_only import WeightOnly

    rows, cols = 256, 4096
    encoding = WeightOnly(8 if quant == "int8" else 4, "sm80", BF16)
    kernel = encoding.kernel(BF16)
    assert kernel is not None
    block = (np.random.default_rng(0).standard_normal(rows * cols).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    outs = [np.empty(part.nbytes(rows), np.uint8) for part in encoding.parts(rows, cols)]
    kernel(block, 0, cols, rows, cols, outs)  # compiled
    rounds, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        kernel(block, 0, cols, rows, cols, outs)
        rounds += 1
    return rounds * block.nbytes / (time.monotonic() - began)
