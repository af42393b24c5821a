"""The compiled part of `scaled`. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.fp8_code import e4m3_row, quotients, to_e4m3
from streamconv.kernels.jit import bits_of, float_of, jit
from streamconv.kernels.nearest import load_bits
from streamconv.kernels.scale_code import divide, scale_from, store_scale

_Array = np.ndarray[Any, Any]


@jit
def load_finite(source: _Array, kind: int, bits: _Array) -> int:
    """A row as float32 bits, NaN as 0, infinity as the largest finite magnitude; gives how many there were of both."""
    if load_bits(source, kind, bits) < np.uint32(0x7F800000):
        return 0
    bad, top = 0, np.uint32(0)
    for i in range(bits.size):
        a = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        if a < np.uint32(0x7F800000):
            top = max(top, a)
    for i in range(bits.size):
        a = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        if a >= np.uint32(0x7F800000):
            bad += 1
            bits[i] = np.uint32(0) if a > np.uint32(0x7F800000) else np.uint32(top | np.uint32(bits[i] & np.uint32(0x80000000)))
    return bad


@jit
def top_of(bits: _Array) -> np.uint32:
    """Largest magnitude."""
    top = np.uint32(0)
    for i in range(bits.size):
        top = max(top, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return top


@jit
def to_int(y: np.float32, low: np.float32, high: np.float32) -> np.int32:
    """RNE(clamp(y, low, high))."""
    y = y if y > low else low
    y = y if y < high else high
    # adding 1.5 * 2**23 leaves the integer, rounded half to even, in the lowest bits
    return np.int32(bits_of(np.float32(y + np.float32(12582912)))) - np.int32(0x4B400000)


@jit
def e4m3_products(bits: _Array, factor: np.float32, out: _Array) -> None:
    """e4m3(value * factor)."""
    for i in range(bits.size):
        out[i] = to_e4m3(np.float32(float_of(bits[i]) * factor))


@jit
def fp8_block_rows(
    source: _Array, start: int, stride: int, rows: int, cols: int, out: _Array, scales: _Array,
    kind: int, scale_kind: int, quotient: int, block: int, zero: np.float32, floor: np.float32, multiply: bool,
) -> int:  # fmt: skip
    """Rows from the start of a tile on -> e4m3 bytes and one scale for each tile; gives how many values were not finite."""
    bits, values = np.empty(cols, np.uint32), np.empty(block, np.float32)
    across = (cols + block - 1) // block
    tops, steps = np.empty(across, np.uint32), np.empty(across, np.float32)
    bad = 0
    for first in range(0, rows, block):
        last = min(first + block, rows)
        tops[:] = np.uint32(0)
        for r in range(first, last):
            load_finite(source[start + r * stride : start + r * stride + cols], kind, bits)
            for t in range(across):
                tops[t] = max(tops[t], top_of(bits[t * block : min((t + 1) * block, cols)]))
        for t in range(across):
            if multiply:
                factor = np.float32(np.float32(np.float32(1) / float_of(tops[t])) * np.float32(448))
                steps[t] = np.float32(1) if tops[t] == 0 else min(factor, np.float32(3.4028234663852886e38))
                stored = np.float32(np.float32(1) / steps[t])
            else:
                stored = steps[t] = scale_from(tops[t], np.float32(448), scale_kind, zero, floor)
            store_scale(scale_kind, stored, scales, first // block * across + t)
        for r in range(first, last):
            bad += load_finite(source[start + r * stride : start + r * stride + cols], kind, bits)
            for t in range(across):
                low, high = t * block, min((t + 1) * block, cols)
                to = out[r * cols + low : r * cols + high]
                if multiply:
                    e4m3_products(bits[low:high], steps[t], to)
                elif quotient == 0:
                    quotients(bits[low:high], steps[t], to)
                else:
                    divide(bits[low:high], steps[t], quotient, values)
                    e4m3_row(values[: high - low], to)
    return bad
