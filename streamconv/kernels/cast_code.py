"""The compiled part of `cast`."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import jit
from streamconv.kernels.nearest import load_bits, round_bits
from streamconv.kernels.rows import store_row

_Array = np.ndarray[Any, Any]


@jit
def cast_rows(source: _Array, start: int, stride: int, rows: int, cols: int, out: _Array, kind: int, target: int, via: int) -> int:
    """Cast rows, rounding to type `via` before if it is not 0; gives how many finite values became infinite."""
    bits = np.empty(cols, np.uint32)
    # the smallest float32 that rounds to infinity in the target; float16 is the narrowest
    limit = np.uint32(0x477FF000) if target == 1 or via == 1 else np.uint32(0x7F7F8000)
    lost = 0
    for r in range(rows):
        top = load_bits(source[start + r * stride : start + r * stride + cols], kind, bits)
        if (target != 0 or via != 0) and top >= limit:
            for i in range(bits.size):
                a = bits[i] & np.uint32(0x7FFFFFFF)
                if limit <= a and a < np.uint32(0x7F800000):
                    lost += 1
        if via != 0:
            round_bits(via, bits)
        store_row(bits, target, out[r * cols : (r + 1) * cols])
    return lost
