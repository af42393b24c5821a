"""Stored codes times scales -> floats, in one pass. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import bits_of, jit
from streamconv.kernels.rows import to_bf16, to_f16

_Array = np.ndarray[Any, Any]


@jit
def decode_rows(
    codes: _Array, nibbles: bool, values: _Array, scales: _Array, first: int, per_row: int, per_col: int,
    rows: int, cols: int, target: int, out: _Array,
) -> None:  # fmt: skip
    """out[r, c] = values[code[r, c]] * scales[(first + r) // per_row, c // per_col], rounded once.

    Args:
        codes: uint8, one row after the other; two columns in a byte if `nibbles`, the even one in the low half.
        values: float32, what each code stands for.
        scales: float32 [groups of rows, groups of columns].
        out: of the storage type of `target`.
    """
    width = cols // 2 if nibbles else cols
    line = np.empty(cols, np.float32)
    for r in range(rows):
        source = codes[r * width : (r + 1) * width]
        if nibbles:
            for i in range(width):
                line[2 * i] = values[source[i] & np.uint8(15)]
                line[2 * i + 1] = values[source[i] >> np.uint8(4)]
        else:
            for i in range(width):
                line[i] = values[source[i]]
        factors = scales[(first + r) // per_row]
        for g in range(factors.size):
            factor = factors[g]
            part = line[g * per_col : min((g + 1) * per_col, cols)]
            for i in range(part.size):
                part[i] = np.float32(part[i] * factor)
        to = out[r * cols : (r + 1) * cols]
        if target == 0:
            for i in range(cols):
                to[i] = bits_of(line[i])
        elif target == 1:
            for i in range(cols):
                to[i] = to_f16(bits_of(line[i]))
        else:
            for i in range(cols):
                to[i] = to_bf16(bits_of(line[i]))
