"""Rounding float32 bit patterns to the nearest value of a smaller type, as float32 again: without branches, one loop a row.

Everything works on uint32 (numba would widen each sum to 64 bits, which halves the vectors), so the casts are written out.
"""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit


@jit
def f16_value(b: np.uint32) -> np.uint32:
    """Nearest float16, ties to even, subnormals kept, overflow to infinity; NaN becomes the quiet one."""
    a = np.uint32(b & np.uint32(0x7FFFFFFF))
    odd = np.uint32((a >> np.uint32(13)) & np.uint32(1))
    near = np.uint32(np.uint32(a + np.uint32(np.uint32(0xFFF) + odd)) & np.uint32(0xFFFFE000))
    near = near if near < np.uint32(0x47800000) else np.uint32(0x7F800000)
    # float32 has float16's smallest unit, 2**-24, between 0.5 and 1
    small = bits_of(np.float32(np.float32(float_of(a) + np.float32(0.5)) - np.float32(0.5)))
    near = small if a < np.uint32(0x38800000) else near
    near = near if a <= np.uint32(0x7F800000) else np.uint32(0x7FC00000)
    return np.uint32(near | np.uint32(b & np.uint32(0x80000000)))


@jit
def bf16_value(b: np.uint32) -> np.uint32:
    """Nearest bfloat16, ties to even; NaN becomes the quiet one."""
    odd = np.uint32((b >> np.uint32(16)) & np.uint32(1))
    near = np.uint32(np.uint32(b + np.uint32(np.uint32(0x7FFF) + odd)) & np.uint32(0xFFFF0000))
    return near if np.uint32(b & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000) else np.uint32(0x7FC00000)


@jit
def from_f16(h: np.uint32) -> np.uint32:
    """float16 bits, zero-extended -> float32 bits."""
    a = np.uint32(np.uint32(h & np.uint32(0x7FFF)) << np.uint32(13))
    # 2**112 turns a float16 exponent, subnormals too, into a float32 one
    wide = bits_of(np.float32(float_of(a) * np.float32(5.192296858534828e33)))
    wide = wide if a < np.uint32(0x0F800000) else np.uint32(a | np.uint32(0x7F800000))
    return np.uint32(wide | np.uint32(np.uint32(h & np.uint32(0x8000)) << np.uint32(16)))


@jit
def round_bits(kind: int, bits: Array) -> np.uint32:
    """Round a row in place to type `kind` (0 float32, 1 float16, 2 bfloat16); gives the largest magnitude."""
    top = np.uint32(0)
    if kind == 1:
        for i in range(bits.size):
            b = f16_value(bits[i])
            bits[i] = b
            top = max(top, np.uint32(b & np.uint32(0x7FFFFFFF)))
    elif kind == 2:
        for i in range(bits.size):
            b = bf16_value(bits[i])
            bits[i] = b
            top = max(top, np.uint32(b & np.uint32(0x7FFFFFFF)))
    else:
        for i in range(bits.size):
            top = max(top, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return top


@jit
def load_bits(source: Array, kind: int, bits: Array) -> np.uint32:
    """One row of type `kind` -> float32 bit patterns; gives the largest magnitude, above or at 0x7F800000 if it is not finite."""
    top = np.uint32(0)
    if kind == 2:
        for i in range(bits.size):
            b = np.uint32(np.uint32(source[i]) << np.uint32(16))
            bits[i] = b
            top = max(top, np.uint32(b & np.uint32(0x7FFFFFFF)))
    elif kind == 1:
        for i in range(bits.size):
            b = from_f16(np.uint32(source[i]))
            bits[i] = b
            top = max(top, np.uint32(b & np.uint32(0x7FFFFFFF)))
    else:
        for i in range(bits.size):
            b = np.uint32(source[i])
            bits[i] = b
            top = max(top, np.uint32(b & np.uint32(0x7FFFFFFF)))
    return top


@jit
def nonfinite(bits: Array) -> np.int64:
    """How many values are NaN or infinite."""
    count = np.int64(0)
    for i in range(bits.size):
        count += np.int64((bits[i] & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F800000))
    return count


@jit
def make_finite(bits: Array) -> tuple[int, np.uint32]:
    """NaN becomes 0, infinity the largest finite magnitude; gives how many there were of both, and that magnitude."""
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
    return bad, top


@jit
def load_finite(source: Array, kind: int, bits: Array) -> int:
    """A row as float32 bits, made finite; gives how many values were not."""
    if load_bits(source, kind, bits) < np.uint32(0x7F800000):
        return 0
    bad: int = make_finite(bits)[0]
    return bad
