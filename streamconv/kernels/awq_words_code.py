"""The compiled part of `awq_words`: rows are input channels. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import float_of, jit
from streamconv.kernels.nearest import load_bits, round_bits
from streamconv.kernels.rows import to_f16
from streamconv.kernels.scaled_code import load_finite, to_int

_Array = np.ndarray[Any, Any]


@jit
def awq_pack(codes: _Array, out: _Array) -> None:
    """Codes of 8 channels -> the bytes of a word: channels 0 2 4 6 1 3 5 7, the first in the lowest bits."""
    for word in range(codes.size // 8):
        for half in range(2):
            for byte in range(2):
                at = 8 * word + 4 * byte + half
                out[4 * word + 2 * half + byte] = np.uint8(codes[at] | (codes[at + 2] << np.uint8(4)))


@jit
def awq_steps(
    low: _Array, high: _Array, zeros: _Array, steps: _Array, scale_kind: int, divisor: np.float32, least: np.float32, symmetric: bool
) -> int:
    """Steps and zero points of a group, from its ends; gives how many steps are no float16."""
    for i in range(low.size):
        step = max(high[i], -low[i]) if symmetric else np.float32(high[i] - low[i])
        steps[i] = np.float32(step / divisor)
    round_bits(scale_kind, steps.view(np.uint32))
    lost = 0
    for i in range(low.size):
        step = steps[i] if steps[i] != 0 else np.float32(1)
        steps[i] = step if step > least else least
        lost += steps[i] >= np.float32(65520)
        zeros[i] = np.uint8(8) if symmetric else np.uint8(to_int(np.float32(-low[i] / steps[i]), np.float32(0), np.float32(15)))
    return lost


@jit
def awq_rows(
    source: _Array, start: int, stride: int, rows: int, cols: int, out: _Array, zero: _Array, scales: _Array,
    kind: int, scale_kind: int, group: int, divisor: np.float32, least: np.float32, symmetric: bool,
) -> tuple[int, int]:  # fmt: skip
    """Groups of rows -> packed codes, packed zero points, scales; gives how many values, and how many scales, were not finite."""
    values, low, high = np.empty(cols, np.float32), np.empty(cols, np.float32), np.empty(cols, np.float32)
    steps, bits = np.empty(cols, np.float32), values.view(np.uint32)
    codes, zeros = np.empty(cols, np.uint8), np.empty(cols, np.uint8)
    bad, lost = 0, 0
    for g in range(rows // group):
        low[:], high[:] = np.float32(0), np.float32(0)
        for r in range(g * group, (g + 1) * group):
            bad += load_finite(source[start + r * stride : start + r * stride + cols], kind, bits)
            for i in range(cols):
                low[i], high[i] = min(low[i], values[i]), max(high[i], values[i])
        lost += awq_steps(low, high, zeros, steps, scale_kind, divisor, least, symmetric)
        awq_pack(zeros, zero[g * cols // 2 : (g + 1) * cols // 2])
        stored, made = steps.view(np.uint32), scales[g * cols : (g + 1) * cols]
        for i in range(cols):
            made[i] = to_f16(stored[i])
        for r in range(g * group, (g + 1) * group):
            load_finite(source[start + r * stride : start + r * stride + cols], kind, bits)
            for i in range(cols):
                z = np.float32(zeros[i])
                codes[i] = np.uint8(to_int(np.float32(values[i] / steps[i]), -z, np.float32(15) - z) + np.int32(zeros[i]))
            awq_pack(codes, out[r * cols // 2 : (r + 1) * cols // 2])
    return bad, lost


@jit
def awq_given_rows(source: _Array, start: int, stride: int, rows: int, cols: int, out: _Array) -> int:
    """Signed integers from -8 to 7 -> packed codes."""
    codes = np.empty(cols, np.uint8)
    for r in range(rows):
        row = source[start + r * stride : start + r * stride + cols]
        for i in range(cols):
            codes[i] = np.uint8(row[i] + np.uint8(8))
        awq_pack(codes, out[r * cols // 2 : (r + 1) * cols // 2])
    return 0


@jit
def awq_scale_rows(
    source: _Array, start: int, stride: int, rows: int, cols: int, scales: _Array, zero: _Array, kind: int
) -> int:  # fmt: skip
    """Scales -> float16, and zero points of 8; gives how many became infinite."""
    bits, lost = np.empty(cols, np.uint32), 0
    zero[:] = np.uint8(0x88)
    for r in range(rows):
        load_bits(source[start + r * stride : start + r * stride + cols], kind, bits)
        made = scales[r * cols : (r + 1) * cols]
        for i in range(cols):
            made[i] = to_f16(bits[i])
            lost += float_of(bits[i]) >= np.float32(65520) and bits[i] < np.uint32(0x7F800000)
    return lost
