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
def widen_f16(source: _Array, bits: _Array, values: _Array) -> None:
    """float16 bit patterns -> float32 in `values` (`bits` is the same memory as uint32)."""
    for i in range(source.size):
        bits[i] = np.uint32(source[i] & np.uint16(0x7FFF)) << np.uint32(13)
    scale = np.float32(5.192296858534828e33)  # 2**112: turns a float16 exponent, subnormals too, into a float32 one
    for i in range(source.size):
        values[i] = values[i] * scale
    for i in range(source.size):
        h = np.uint32(source[i])
        # 0x7c00 and above were infinity or NaN, and came out as 65536 and more
        low = bits[i] | (np.uint32((h & np.uint32(0x7C00)) == np.uint32(0x7C00)) * np.uint32(0x7F800000))
        bits[i] = low | ((h & np.uint32(0x8000)) << np.uint32(16))


@jit
def widen_bf16(source: _Array, bits: _Array) -> None:
    """bfloat16 bit patterns -> float32 bit patterns."""
    for i in range(source.size):
        bits[i] = np.uint32(source[i]) << np.uint32(16)


@jit
def copy_f32(source: _Array, bits: _Array) -> None:
    for i in range(source.size):
        bits[i] = source[i]


@jit
def to_bf16(b: np.uint32) -> np.uint32:
    """float32 bits -> bfloat16 bits, nearest even; NaN becomes the quiet NaN that torch writes."""
    if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint32(0x7FC0)
    return (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@jit
def to_f16(b: np.uint32) -> np.uint32:
    """float32 bits -> float16 bits, nearest even, subnormals kept, overflow to infinity. Selects only, so that it vectorizes."""
    sign = (b >> np.uint32(16)) & np.uint32(0x8000)
    a = b & np.uint32(0x7FFFFFFF)
    normal = (a + np.uint32(0xFFF) + ((a >> np.uint32(13)) & np.uint32(1)) - np.uint32(0x38000000)) >> np.uint32(13)
    # below 2**-14 the unit is 2**-24: shift the mantissa there, round to nearest even
    exponent = a >> np.uint32(23)
    shift = np.uint32(126) - min(max(exponent, np.uint32(101)), np.uint32(113))
    mantissa = (a & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
    bias = (np.uint32(1) << (shift - np.uint32(1))) - np.uint32(1) + ((mantissa >> shift) & np.uint32(1))
    small = (mantissa + bias) >> shift if exponent > np.uint32(100) else np.uint32(0)
    value = small if a < np.uint32(0x38800000) else normal
    value = np.uint32(0x7C00) if a >= np.uint32(0x477FF000) else value  # 65520 and above round to infinity
    value = np.uint32(0x7E00) if a > np.uint32(0x7F800000) else value
    return sign | value


@jit
def load_row(source: _Array, kind: int, bits: _Array, values: _Array) -> None:
    """One row of type `kind` as float32. Rows come as slices: a start added to each index would keep LLVM from vectorizing."""
    if kind == 2:
        widen_bf16(source, bits)
    elif kind == 1:
        widen_f16(source, bits, values)
    else:
        copy_f32(source, bits)


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


@jit
def largest(bits: _Array) -> np.uint32:
    """Bits of the largest magnitude; non-finite values are the largest of all."""
    top = np.uint32(0)
    for i in range(bits.size):
        top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
    return top


@jit
def round_row(kind: int, half: _Array, bits: _Array, values: _Array) -> None:
    """Round float32 values to type `kind` and widen them again; `half` is uint16 scratch."""
    if kind != 0:
        store_row(bits, kind, half)
        load_row(half, kind, bits, values)
