"""The compiled part of `root`: the smoother for alpha 1/2, and whether the last bit of a square root could change any byte."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from streamconv.kernels.jit import Array, bits_of, jit
from streamconv.kernels.nearest import f16_value


@jit
def other_root(value: np.float64, near: np.float64) -> Any:
    """The float64 on the other side of the exact root from `near`, the rounded one; `near` where that is exact."""
    if near == 0.0:
        return near
    # value - near**2 to far below a unit: near in two halves whose products are exact
    c = np.float64(134217729.0) * near
    high = c - (c - near)
    low = near - high
    rest = ((value - high * high) - 2.0 * high * low) - low * low
    return near if rest == 0.0 else np.int64(np.float64(near).view(np.int64) + (1 if rest > 0.0 else -1)).view(np.float64)


@jit
def half_power(inputs: Array, maxima: Array, roots: Array, smoother: Array, low: Array, high: Array) -> Any:
    """max(sqrt(x) / sqrt(m), 1e-5) in `made`, and the least and the greatest that it is by other roots in `low` and `high`.

    Args:
        inputs: float64, x. maxima: float64, m. roots: float64, the rounded roots of m.

    Returns:
        The largest x / s by `made`, and the least and the greatest it can be.
    """
    top = least = greatest = 0.0
    for i in range(inputs.size):
        near, root = math.sqrt(inputs[i]), roots[i]
        far, other = other_root(inputs[i], near), other_root(maxima[i], root)
        smoother[i] = max(near / root, 1e-5)
        low[i] = max(min(near, far) / max(root, other), 1e-5)
        high[i] = max(max(near, far) / min(root, other), 1e-5)
        top = max(top, inputs[i] / smoother[i])
        least = max(least, inputs[i] / high[i])
        greatest = max(greatest, inputs[i] / low[i])
    return top, least, greatest


@jit
def close_call(s: np.float64, t: np.float64) -> bool:
    """Some float16 value times s, or divided by it, is another float16 than with t."""
    for mantissa in range(1024, 2048):
        for exponent in range(-34, 6):
            h = math.ldexp(np.float64(mantissa), exponent)
            if f16_value(bits_of(np.float32(h * s))) != f16_value(bits_of(np.float32(h * t))):
                return True
            if f16_value(bits_of(np.float32(h / s))) != f16_value(bits_of(np.float32(h / t))):
                return True
    return False


@jit
def alike(low: Array, high: Array) -> bool:
    """Both, and so all between them, give the same bytes, as float32 and for every float16 value they are multiplied with or divide."""
    for i in range(low.size):
        s, t = low[i], high[i]
        if s == t:
            continue
        if np.float32(s) != np.float32(t):
            return False
        differ = 0
        for mantissa in range(1024, 2048):  # rounded to float32, a mantissa stands for all exponents
            h = np.float64(mantissa)
            differ += np.float32(h * s) != np.float32(h * t)
            differ += np.float32(h / s) != np.float32(h / t)
        if differ > 0 and close_call(s, t):
            return False
    return True
