"""How fast the disks and the kernels are, measured in about a second each."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from streamconv.errors import StreamconvError
from streamconv.lazy import np
from streamconv.run import probe


def disk_rates(file: Path, folder: Path) -> dict[str, float | None]:
    """Bytes a second that are read from a file, out of the page cache's reach where the kernel does that, and written to a folder.

    None of what cannot be measured.
    """
    kinds: dict[str, Callable[[], float]]
    kinds = {"read": lambda: probe.read_rate([file], 1.0, cold=True), "write": lambda: probe.write_rate(folder, 1.0)}
    rates = dict[str, float | None]()
    for name, measure in kinds.items():
        try:
            rates[name] = measure()
        except (OSError, StreamconvError):
            rates[name] = None
    return rates


def kernel_rate(quant: str, seconds: float = 0.5) -> float:
    """Bytes of bfloat16 weights a second that one thread encodes as int8 or int4 for Ampere."""
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
