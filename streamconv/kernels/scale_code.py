"""Scales of a group of weights, and quotients by them, rounded to a type. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import bf16_value, f16_value
from streamconv.kernels.rows import to_bf16, to_f16


@jit
def rounded_to(kind: int, value: np.float32) -> np.float32:
    """float32 rounded to a type, as float32."""
    if kind == 1:
        return np.float32(float_of(f16_value(bits_of(value))))
    if kind == 2:
        return np.float32(float_of(bf16_value(bits_of(value))))
    return value


@jit
def scale_from(top: np.uint32, divisor: np.float32, kind: int, zero: np.float32, floor: np.float32) -> np.float32:
    """The scale of a group whose largest magnitude has these bits."""
    value = rounded_to(kind, np.float32(float_of(top) / divisor))
    return max(zero if value == np.float32(0) else value, floor)


@jit
def store_scale(kind: int, value: np.float32, out: Array, place: int) -> None:
    """A scale, a value of its type already, into an array of that type's storage."""
    bits = bits_of(value)
    out[place] = bits if kind == 0 else to_f16(bits) if kind == 1 else to_bf16(bits)


@jit
def divide(bits: Array, scale: np.float32, kind: int, out: Array) -> None:
    """value / scale, rounded to a type."""
    if kind == 0:
        for i in range(bits.size):
            out[i] = np.float32(float_of(bits[i]) / scale)
    elif kind == 1:
        for i in range(bits.size):
            out[i] = float_of(f16_value(bits_of(np.float32(float_of(bits[i]) / scale))))
    else:
        for i in range(bits.size):
            out[i] = float_of(bf16_value(bits_of(np.float32(float_of(bits[i]) / scale))))
