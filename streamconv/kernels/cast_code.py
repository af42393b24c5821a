"""The compiled part of `cast`."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import jit
from streamconv.kernels.rows import load_row, to_bf16, to_f16

_Array = np.ndarray[Any, Any]


@jit
def cast_rows(source: _Array, start: int, stride: int, rows: int, cols: int, out: _Array, kind: int, target: int) -> int:
    """Cast rows; gives how many finite values became infinite."""
    values = np.empty(cols, np.float32)
    bits = values.view(np.uint32)
    lost = 0
    for r in range(rows):
        load_row(source, start + r * stride, cols, kind, bits, values)
        at = r * cols
        if target == 0:
            for i in range(cols):
                out[at + i] = bits[i]
        elif target == 1:
            for i in range(cols):
                out[at + i] = to_f16(bits[i])
            gone: Any = 0
            for i in range(cols):
                a = bits[i] & np.uint32(0x7FFFFFFF)
                gone += np.int64(a >= np.uint32(0x477FF000)) - np.int64(a >= np.uint32(0x7F800000))
            lost += gone
        else:
            for i in range(cols):
                out[at + i] = to_bf16(bits[i])
            gone = 0
            for i in range(cols):
                a = bits[i] & np.uint32(0x7FFFFFFF)
                gone += np.int64(a >= np.uint32(0x7F7F8000)) - np.int64(a >= np.uint32(0x7F800000))
            lost += gone
    return lost
