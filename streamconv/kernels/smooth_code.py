"""The compiled part of `smooth`. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import bf16_value, f16_value, load_bits, nonfinite, round_bits
from streamconv.kernels.rows import to_f16


@jit
def half(value: np.float32) -> Any:
    """Rounded to float16."""
    return float_of(f16_value(bits_of(value)))


@jit
def whole(value: np.float32) -> np.uint8:
    """Nearest integer, ties to even, in -127..127, as a byte; NaN is 0."""
    value = value if value == value else np.float32(0)
    value = value if value < np.float32(127) else np.float32(127)
    value = value if value > np.float32(-127) else np.float32(-127)
    # the unit of float32 at 1.5 * 2**23 is 1: the sum's low byte is the integer
    return np.uint8(bits_of(np.float32(value + np.float32(12582912))) & np.uint32(0xFF))


@jit
def smooth_row(bits: Array, smoother: Array) -> Any:
    """float16(W * s) in place, the product in float64, rounded as torch does: to float32, then to float16. Gives the largest."""
    for i in range(bits.size):
        bits[i] = bits_of(np.float32(np.float64(float_of(bits[i])) * smoother[i]))
    return round_bits(1, bits)  # a loop of its own: the vectors of float64 are half as wide


@jit
def integers(bits: Array, target: int, mode: int, scale: np.float32, inverse: np.float32, out: Array) -> None:
    """Values -> int8. mode 0: times scale; 1: float16(divided by inverse); 2: times scale, rounded to `target`."""
    if mode == 1:
        for i in range(bits.size):
            out[i] = whole(half(np.float32(float_of(bits[i]) / inverse)))
    elif mode == 0 or target == 0:
        for i in range(bits.size):
            out[i] = whole(np.float32(float_of(bits[i]) * scale))
    elif target == 1:
        for i in range(bits.size):
            out[i] = whole(half(np.float32(float_of(bits[i]) * scale)))
    else:
        for i in range(bits.size):
            out[i] = whole(float_of(bf16_value(bits_of(np.float32(float_of(bits[i]) * scale)))))


@jit
def smooth_rows(
    source: Array,
    start: int,
    stride: int,
    rows: int,
    cols: int,
    out: Array,
    scales: Array,
    kind: int,
    target: int,
    smoother: Array,
    mode: int,
    largest: np.float32,
    first: int,
    last: int,
    outputs: np.float32,
    activation: np.float32,
) -> np.int64:
    """Rows -> int8 of columns [first, last), and their scales; gives how many source values were NaN or infinite.

    Args:
        largest: the AW of a matrix with one scale; negative: each row has its own.
        scales: one float32 for each row, or empty where the rows have none.
        outputs: sy; 0 stores the inverse of the weight scale (activations for each token).
        activation: sx.
    """
    bits = np.empty(cols, np.uint32)
    width = last - first
    bad = np.int64(0)
    for r in range(rows):
        if load_bits(source[start + r * stride : start + r * stride + cols], kind, bits) >= np.uint32(0x7F800000):
            bad += nonfinite(bits)
        if kind != 1:
            round_bits(1, bits)
        top = float_of(smooth_row(bits, smoother))
        if largest >= np.float32(0) or largest != largest:
            top = largest
        scale = half(np.float32(np.float32(127) * half(np.float32(np.float32(1) / top))))
        inverse = half(np.float32(np.float32(1) / scale))
        if target == 2:
            round_bits(2, bits)
        integers(bits[first:last], target, mode, scale, inverse, out[r * width : (r + 1) * width])
        if scales.size:
            scales[r] = inverse if outputs == np.float32(0) else np.float32(outputs / np.float32(activation * scale))
    return bad


@jit
def halves(top: Array, kind: int, out: Array) -> None:
    """Bit patterns of type `kind` -> those of float16."""
    bits = np.empty(top.size, np.uint32)
    load_bits(top, kind, bits)
    for i in range(top.size):
        out[i] = to_f16(bits[i])
