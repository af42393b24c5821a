"""The compiled part of `fp8`."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import jit
from streamconv.kernels.rows import load_row

_Array = np.ndarray[Any, Any]


@jit
def to_e4m3(b: np.uint32) -> np.uint32:
    """float32 bits of magnitude at most 448 -> e4m3 bits, nearest even, subnormals kept. Selects only: it vectorizes."""
    a = b & np.uint32(0x7FFFFFFF)
    sign = (b >> np.uint32(24)) & np.uint32(0x80)
    normal = (a + np.uint32(0x7FFFF) + ((a >> np.uint32(20)) & np.uint32(1)) - np.uint32(0x3C000000)) >> np.uint32(20)
    # below 2**-6 the unit is 2**-9
    exponent = a >> np.uint32(23)
    shift = np.uint32(141) - min(max(exponent, np.uint32(116)), np.uint32(121))
    mantissa = (a & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
    bias = (np.uint32(1) << (shift - np.uint32(1))) - np.uint32(1) + ((mantissa >> shift) & np.uint32(1))
    small = (mantissa + bias) >> shift if exponent > np.uint32(115) else np.uint32(0)
    return sign | (small if a < np.uint32(0x3C800000) else normal)


@jit
def fp8_rows(
    source: _Array,
    start: int,
    stride: int,
    rows: int,
    cols: int,
    out: _Array,
    scales: _Array,
    kind: int,
    lo: np.float32,
    hi: np.float32,
) -> int:
    """Rows -> e4m3 bytes and float32 scales; gives how many values were NaN or infinite."""
    values = np.empty(cols, np.float32)
    bits = values.view(np.uint32)
    bad = 0
    floor = np.float32(1.0 / (448.0 * 512.0))
    for r in range(rows):
        load_row(source[start + r * stride : start + r * stride + cols], kind, bits, values)
        top = np.uint32(0)
        for i in range(cols):
            top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
        if top >= np.uint32(0x7F800000):
            for i in range(cols):
                a = bits[i] & np.uint32(0x7FFFFFFF)
                if a >= np.uint32(0x7F800000):
                    bad += 1
                    if a > np.uint32(0x7F800000):
                        bits[i] = np.uint32(0)
        largest = np.float32(0)
        for i in range(cols):
            values[i] = min(max(values[i], lo), hi)
            largest = max(largest, abs(values[i]))
        scale = max(np.float32(largest / np.float32(448)), floor)
        scales[r] = scale
        for i in range(cols):
            values[i] = min(max(values[i] / scale, np.float32(-448)), np.float32(448))
        row = out[r * cols : (r + 1) * cols]
        for i in range(cols):
            row[i] = np.uint8(to_e4m3(bits[i]))
    return bad
