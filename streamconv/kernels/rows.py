"""Pieces shared by kernels: one source row to float32 after the cast to the model dtype, and float32 to two-byte floats.

Everything is integer arithmetic on bit patterns in plain loops over contiguous arrays, which LLVM vectorizes. Types are
numbers here: 0 float32, 1 float16, 2 bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import jit

CODES = {"F32": 0, "F16": 1, "BF16": 2}

_Array = np.ndarray[Any, Any]


@jit
def widen_f16(source: _Array, start: int, count: int, bits: _Array, values: _Array) -> None:
    """float16 bit patterns -> float32 in `values` (`bits` is the same memory as uint32). Infinity and NaN become large."""
    for i in range(count):
        bits[i] = np.uint32(source[start + i] & np.uint16(0x7FFF)) << np.uint32(13)
    scale = np.float32(5.192296858534828e33)  # 2**112: turns a float16 exponent, subnormals too, into a float32 one
    for i in range(count):
        values[i] = values[i] * scale
    for i in range(count):
        h = np.uint32(source[start + i])
        low = bits[i]
        # 0x7c00 and above were infinity or NaN
        if (h & np.uint32(0x7FFF)) >= np.uint32(0x7C00):
            low = np.uint32(0x7F800000) | ((h & np.uint32(0x3FF)) << np.uint32(13))
        bits[i] = low | ((h & np.uint32(0x8000)) << np.uint32(16))


@jit
def widen_bf16(source: _Array, start: int, count: int, bits: _Array) -> None:
    """bfloat16 bit patterns -> float32 bit patterns."""
    for i in range(count):
        bits[i] = np.uint32(source[start + i]) << np.uint32(16)


@jit
def copy_f32(source: _Array, start: int, count: int, bits: _Array) -> None:
    for i in range(count):
        bits[i] = source[start + i]


@jit
def to_bf16(b: np.uint32) -> np.uint32:
    """float32 bits -> bfloat16 bits, nearest even; NaN becomes the quiet NaN that torch writes."""
    if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint32(0x7FC0)
    return (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@jit
def to_f16(b: np.uint32) -> np.uint32:
    """float32 bits -> float16 bits, nearest even, subnormals kept, overflow to infinity."""
    sign = (b >> np.uint32(16)) & np.uint32(0x8000)
    a = b & np.uint32(0x7FFFFFFF)
    if a > np.uint32(0x7F800000):
        return sign | np.uint32(0x7E00)
    if a >= np.uint32(0x477FF000):  # 65520 and above round to infinity
        return sign | np.uint32(0x7C00)
    if a < np.uint32(0x38800000):  # below 2**-14: subnormal, unit 2**-24
        if a < np.uint32(0x33000000):  # below 2**-25 (2**-25 itself is a tie and goes to zero)
            return sign
        shift = np.uint32(126) - (a >> np.uint32(23))
        mantissa = (a & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
        value = mantissa >> shift
        rest = mantissa & ((np.uint32(1) << shift) - np.uint32(1))
        half = np.uint32(1) << (shift - np.uint32(1))
        if rest > half or (rest == half and (value & np.uint32(1)) == np.uint32(1)):
            value += np.uint32(1)
        return sign | value
    r = a + np.uint32(0xFFF) + ((a >> np.uint32(13)) & np.uint32(1))
    return sign | ((r - np.uint32(0x38000000)) >> np.uint32(13))


@jit
def load_row(source: _Array, start: int, count: int, kind: int, bits: _Array, values: _Array) -> None:
    """One row of type `kind` as float32."""
    if kind == 2:
        widen_bf16(source, start, count, bits)
    elif kind == 1:
        widen_f16(source, start, count, bits, values)
    else:
        copy_f32(source, start, count, bits)


@jit
def round_row(count: int, kind: int, half: _Array, bits: _Array, values: _Array) -> None:
    """Round float32 values to type `kind` and widen them again; `half` is uint16 scratch."""
    if kind == 2:
        for i in range(count):
            bits[i] = to_bf16(bits[i]) << np.uint32(16)
    elif kind == 1:
        for i in range(count):
            half[i] = np.uint16(to_f16(bits[i]))
        widen_f16(half, 0, count, bits, values)
