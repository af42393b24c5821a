"""Packed weights of quantized sources -> floats, in one pass. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, jit
from streamconv.kernels.scale_code import store_scale


@jit
def decode_affine(codes: Array, scales: Array, zeros: Array, per_col: int, target: int, out: Array) -> None:
    """out[n, k] = codes[n, k] * scales[g, n] + zeros[g, n] with g = k // per_col, in float64, rounded once to float32 and once to out.

    Args:
        codes: int8, N rows of K one after the other.
        scales, zeros: float32 [G, N].
        out: of the storage type of `target`.
    """
    cols = per_col * scales.shape[0]
    for n in range(scales.shape[1]):
        for k in range(cols):
            g = k // per_col
            value = np.float32(np.float64(codes[n * cols + k]) * np.float64(scales[g, n]) + np.float64(zeros[g, n]))
            store_scale(target, value, out, n * cols + k)


@jit
def decode_turned(codes: Array, values: Array, scales: Array, rows: int, cols: int, target: int, out: Array) -> None:
    """out[k, n] = values[code] * 2^(scales[n, k // 32] - 127), rounded once.

    Args:
        codes: uint8 [cols, rows / 2], the even row in the low half.
        scales: uint8 [cols, rows / 32].
        out: of the storage type of `target`.
    """
    for k in range(rows):
        for n in range(cols):
            byte = codes[n * (rows // 2) + k // 2]
            code = byte >> np.uint8(4) if k & 1 else byte & np.uint8(15)
            power = np.int64(scales[n * (rows // 32) + k // 32])
            factor = np.float32(np.nan) if power == 255 else np.float32(2.0 ** (power - 127))
            value = np.float32(values[code] * factor)
            store_scale(target, value, out, k * cols + n)
