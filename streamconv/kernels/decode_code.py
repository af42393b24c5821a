"""Stored codes times scales -> floats, in one pass. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.rows import to_bf16, to_f16

CODES = {"e4m3": 0, "int8": 1, "uint8": 2, "e2m1": 3, "uint4": 4}
"""Numbers of the codes of `stored_codes`."""


@jit
def spread(few: Array, each: int, many: Array) -> None:
    """Every number `each` times, the last one as often as there is room for."""
    for g in range(few.size):
        many[g * each : (g + 1) * each] = few[g]


@jit
def from_e4m3(code: np.uint32) -> np.float32:
    """An e4m3 number as float32."""
    field = np.uint32(code & np.uint32(0x7F))
    # the exponent's bias is 120 smaller; multiplying float32's own subnormal numbers would do it too, and takes ten times as long
    normal = np.uint32(np.uint32(field << np.uint32(20)) + np.uint32(120 << 23))
    small = bits_of(np.float32(np.float32(np.int32(field)) * np.float32(0.001953125)))
    size = small if field < np.uint32(8) else normal
    size = np.uint32(size | np.uint32(np.uint32(code & np.uint32(0x80)) << np.uint32(24)))
    return np.float32(float_of(np.uint32(0x7FC00000) if field == np.uint32(0x7F) else size))


@jit
def from_e2m1(code: np.uint32) -> np.float32:
    """An e2m1 number as float32."""
    field = np.uint32(code & np.uint32(7))
    normal = np.uint32(np.uint32(field << np.uint32(22)) + np.uint32(126 << 23))
    size = np.uint32(0x3F000000) if field == np.uint32(1) else normal  # 0.5
    size = np.uint32(0) if field == np.uint32(0) else size
    return np.float32(float_of(np.uint32(size | np.uint32(np.uint32(code & np.uint32(8)) << np.uint32(28)))))


@jit
def values_of(codes: Array, code: int, line: Array) -> None:
    """What the codes of a row stand for."""
    if code == 0:
        for i in range(codes.size):
            line[i] = from_e4m3(np.uint32(codes[i]))
    elif code == 1:
        for i in range(codes.size):
            line[i] = np.float32(np.int8(codes[i]))
    elif code == 2:
        for i in range(codes.size):
            line[i] = np.float32(np.int32(codes[i]) - np.int32(128))
    elif code == 3:
        for i in range(codes.size):
            byte = np.uint32(codes[i])
            line[2 * i] = from_e2m1(byte)
            line[2 * i + 1] = from_e2m1(np.uint32(byte >> np.uint32(4)))
    else:
        for i in range(codes.size):
            line[2 * i] = np.float32(np.int32(codes[i] & np.uint8(15)) - np.int32(8))
            line[2 * i + 1] = np.float32(np.int32(codes[i] >> np.uint8(4)) - np.int32(8))


@jit
def decode_rows(
    codes: Array, code: int, scales: Array, zeros: Array, inputs: Array, first: int, per_row: int, per_col: int,
    rows: int, cols: int, target: int, out: Array,
) -> None:  # fmt: skip
    """out[r, c] = (value of codes[r, c] - zeros[r, c // per_col]) * scales[(first + r) // per_row, c // per_col], rounded once.

    Where there are inputs the scale is multiplied by inputs[c] first, in float32.

    Args:
        codes: uint8, one row after the other; two columns in a byte from code 3 on, the even one in the low half.
        code: one of CODES.
        scales: float32 [groups of rows, groups of columns].
        zeros: whole numbers as float32 [rows, groups of columns], or empty.
        inputs: float32 [cols], or empty.
        out: of the storage type of `target`.
    """
    width = cols // 2 if code >= 3 else cols
    line, factors = np.empty(cols, np.float32), np.empty(cols, np.float32)
    last = -1
    for r in range(rows):
        values_of(codes[r * width : (r + 1) * width], code, line)
        if zeros.size:
            spread(zeros[r], per_col, factors)
            last = -1
            for i in range(cols):
                line[i] -= factors[i]
        if (first + r) // per_row != last:
            last = (first + r) // per_row
            spread(scales[last], per_col, factors)
            for i in range(inputs.size):
                factors[i] *= inputs[i]
        to = out[r * cols : (r + 1) * cols]
        if target == 0:
            for i in range(cols):
                to[i] = bits_of(np.float32(line[i] * factors[i]))
        elif target == 1:
            for i in range(cols):
                to[i] = to_f16(bits_of(np.float32(line[i] * factors[i])))
        else:
            for i in range(cols):
                to[i] = to_bf16(bits_of(np.float32(line[i] * factors[i])))
