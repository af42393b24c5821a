"""The compiled part of `cast`."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import jit
from streamconv.kernels.rows import largest, load_row, store_row

_Array = np.ndarray[Any, Any]


@jit
def cast_rows(source: _Array, start: int, stride: int, rows: int, cols: int, out: _Array, kind: int, target: int) -> int:
    """Cast rows; gives how many finite values became infinite."""
    values = np.empty(cols, np.float32)
    bits = values.view(np.uint32)
    # the smallest float32 that rounds to infinity in the target
    limit = np.uint32(0x477FF000) if target == 1 else np.uint32(0x7F7F8000)
    lost = 0
    for r in range(rows):
        load_row(source[start + r * stride : start + r * stride + cols], kind, bits, values)
        store_row(bits, target, out[r * cols : (r + 1) * cols])
        if target != 0 and largest(bits) >= limit:
            for i in range(bits.size):
                a = bits[i] & np.uint32(0x7FFFFFFF)
                if limit <= a and a < np.uint32(0x7F800000):
                    lost += 1
    return lost
