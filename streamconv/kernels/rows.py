"""Float32 bit patterns to two-byte floats.

Integer arithmetic on bit patterns in plain loops over contiguous arrays, which LLVM vectorizes. Rows come as slices: a start
added to each index would keep it from that. Types are numbers here: 0 float32, 1 float16, 2 bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import bits_of, float_of, jit

CODES = {"F32": 0, "F16": 1, "BF16": 2}
BLOCK = 1 << 16
"""Columns that are worked on at a time where nothing depends on the whole row; a row may be longer than the memory budget."""

_Array = np.ndarray[Any, Any]


@jit
def to_bf16(b: np.uint32) -> np.uint32:
    """float32 bits -> bfloat16 bits, nearest even; NaN becomes the quiet NaN that torch writes."""
    if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint32(0x7FC0)
    return (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@jit
def to_f16(b: np.uint32) -> np.uint32:
    """float32 bits -> float16 bits, nearest even, subnormals kept, overflow to infinity. Selects only, so that it vectorizes."""
    sign = np.uint32(np.uint32(b >> np.uint32(16)) & np.uint32(0x8000))
    a = np.uint32(b & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(a >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(a - np.uint32(np.uint32(0x37FFF001) - odd)) >> np.uint32(13))
    # below 2**-14 the unit is 2**-24, that of float32 between 0.5 and 1
    small = np.uint32(bits_of(np.float32(float_of(a) + np.float32(0.5))) - np.uint32(0x3F000000))
    value = small if a < np.uint32(0x38800000) else normal
    value = np.uint32(0x7C00) if a >= np.uint32(0x477FF000) else value  # 65520 and above round to infinity
    value = np.uint32(0x7E00) if a > np.uint32(0x7F800000) else value
    return np.uint32(sign | value)


@jit
def store_row(bits: _Array, target: int, out: _Array) -> None:
    """Round float32 bit patterns to type `target`."""
    if target == 0:
        for i in range(bits.size):
            out[i] = bits[i]
    elif target == 1:
        for i in range(bits.size):
            out[i] = to_f16(bits[i])
    else:
        for i in range(bits.size):
            out[i] = to_bf16(bits[i])
