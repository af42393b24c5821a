"""The compiled part of `scaled`. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.fp8_code import e4m3_row, quotients, to_e4m3
from streamconv.kernels.jit import bits_of, float_of, jit
from streamconv.kernels.nearest import load_bits
from streamconv.kernels.rows import to_f16
from streamconv.kernels.scale_code import divide, rounded_to, scale_from, store_scale

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
def e2m1_row(bits: _Array, step: np.float32, out: _Array) -> None:
    """Codes of value / step: nearest, ties to the even code, at most 6; the sign is that of value / step < 0."""
    for i in range(bits.size):
        ratio = np.float32(float_of(bits[i]) / step)
        a = np.uint32(bits_of(ratio) & np.uint32(0x7FFFFFFF))
        a = a if a < np.uint32(0x40C00000) else np.uint32(0x40C00000)
        odd = np.uint32((a >> np.uint32(22)) & np.uint32(1))
        normal = np.uint32(np.uint32(np.uint32(a + np.uint32(np.uint32(0x1FFFFF) + odd)) >> np.uint32(22)) - np.uint32(252))
        # below 1 the unit is 1/2, that of float32 at 2**22
        small = np.uint32(bits_of(np.float32(float_of(a) + np.float32(4194304))) & np.uint32(7))
        code = small if a < np.uint32(0x3F800000) else normal
        out[i] = np.uint8(code | (np.uint32(8) if ratio < np.float32(0) else np.uint32(0)))


@jit
def nibbles(codes: _Array, out: _Array) -> None:
    """Pairs of 4-bit codes (`codes` as uint16), the even column in the low nibble."""
    for i in range(codes.size):
        out[i] = np.uint8(codes[i] | (codes[i] >> np.uint16(4)))


@jit
def int_row(values: _Array, half: np.int32, offset: np.int32, out: _Array) -> None:
    """RNE(clamp(value, -half, half - 1)) + offset, as uint8."""
    low, high = np.float32(-half), np.float32(half - np.int32(1))
    for i in range(values.size):
        y = values[i]
        y = y if y > low else low
        y = y if y < high else high
        # adding 1.5 * 2**23 leaves the integer, rounded half to even, in the lowest bits
        whole = np.int32(bits_of(np.float32(y + np.float32(12582912)))) - np.int32(0x4B400000)
        out[i] = np.uint8(whole + offset)


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
                steps[t] = np.float32(1) if tops[t] == 0 else np.float32(np.float32(np.float32(1) / float_of(tops[t])) * np.float32(448))
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
                    for i in range(high - low):
                        values[i] = np.float32(float_of(bits[low + i]) * steps[t])
                    e4m3_row(values[: high - low], to)
                elif quotient == 0:
                    quotients(bits[low:high], steps[t], to)
                else:
                    divide(bits[low:high], steps[t], quotient, values)
                    e4m3_row(values[: high - low], to)
    return bad


@jit
def int_group_rows(
    source: _Array, start: int, stride: int, rows: int, cols: int, out: _Array, scales: _Array,
    kind: int, scale_kind: int, quotient: int, width: int, group: int,
    divisor: np.float32, zero: np.float32, floor: np.float32, form: int,
) -> int:  # fmt: skip
    """Rows -> codes and scales; gives how many values were not finite. `form`: 0 bytes, 1 words, 2 pairs."""
    bits, values = np.empty(cols, np.uint32), np.empty(cols, np.float32)
    per_word = 32 // width
    padded = (cols + per_word - 1) // per_word * per_word
    codes = np.zeros(padded, np.uint8)
    half = np.int32(1 << (width - 1))
    offset = half if form == 1 else np.int32(0)
    groups, bad = cols // group, 0
    for r in range(rows):
        bad += load_finite(source[start + r * stride : start + r * stride + cols], kind, bits)
        for g in range(groups):
            part = bits[g * group : (g + 1) * group]
            scale = scale_from(top_of(part), divisor, scale_kind, zero, floor)
            store_scale(scale_kind, scale, scales, r * groups + g)
            divide(part, scale, quotient, values[g * group : (g + 1) * group])
        int_row(values, half, offset, codes[:cols])
        if form == 2:
            to = out[r // 2 * cols : r // 2 * cols + cols]
            for i in range(cols):
                if r % 2:
                    to[i] = np.uint8(to[i] | (codes[i] << np.uint8(4)))
                else:
                    to[i] = np.uint8(codes[i] & np.uint8(15))
        elif width == 4:
            nibbles(codes.view(np.uint16), out[r * padded // 2 : (r + 1) * padded // 2])
        elif form == 1:
            out[r * padded : (r + 1) * padded] = codes
        else:
            out[r * cols : (r + 1) * cols] = codes[:cols]
    return bad


@jit
def mx_byte(top: np.uint32, read_as: int, fp4: bool, ceiling: bool) -> np.int32:
    """The exponent byte of a group whose largest magnitude has these float32 bits."""
    if ceiling:
        a = bits_of(np.float32(float_of(top) / np.float32(448)))
        if a < np.uint32(0x800000):  # subnormal: at most 2**-126
            return np.int32(1) if a > np.uint32(0x400000) else np.int32(0)
        power = np.int32(a >> np.uint32(23)) - np.int32(127)
        if np.uint32(a & np.uint32(0x7FFFFF)) != np.uint32(0):
            power += np.int32(1)
        return max(power + np.int32(127), np.int32(0))
    less = np.int32(2) if fp4 else np.int32(8)
    if read_as == 1:
        field = np.int32(np.uint32(to_f16(top) + np.uint32(256)) >> np.uint32(10))
        made = field - np.int32(15) - less + np.int32(127)
    else:
        rounding = np.uint32(1 << 21)
        field = np.int32(np.uint32(top + rounding) >> np.uint32(23))
        made = field - less
    return np.int32(0) if field == np.int32(0) else min(max(made, np.int32(0)), np.int32(255))


@jit
def mx_rows(
    source: _Array, start: int, stride: int, rows: int, cols: int, out: _Array, scales: _Array,
    kind: int, read_as: int, fp4: bool, ceiling: bool,
) -> int:  # fmt: skip
    """Rows -> codes and exponent bytes; gives how many values were not finite."""
    bits, codes = np.empty(cols, np.uint32), np.empty(cols, np.uint8)
    values = np.empty(32, np.float32)
    groups, bad = cols // 32, 0
    for r in range(rows):
        bad += load_finite(source[start + r * stride : start + r * stride + cols], kind, bits)
        for g in range(groups):
            part = bits[g * 32 : (g + 1) * 32]
            byte = mx_byte(top_of(part), read_as, fp4, ceiling)
            scales[r * groups + g] = np.uint8(byte)
            # 2 ** (byte - 127), subnormal for byte 0
            step = float_of(np.uint32(np.uint32(byte) << np.uint32(23))) if byte > 0 else float_of(np.uint32(0x400000))
            if fp4:
                e2m1_row(part, step, codes[g * 32 : (g + 1) * 32])
            else:
                divide(part, step, 0, values)
                e4m3_row(values, out[r * cols + g * 32 : r * cols + (g + 1) * 32])
        if fp4:
            nibbles(codes.view(np.uint16), out[r * cols // 2 : (r + 1) * cols // 2])
    return bad


@jit
def nvfp4_rows(
    source: _Array, start: int, stride: int, rows: int, cols: int, out: _Array, scales: _Array,
    kind: int, step_kind: int, shared: np.float32, divisor: bool,
) -> int:  # fmt: skip
    """Rows -> codes and e4m3 block scales; gives how many values were not finite."""
    bits, codes = np.empty(cols, np.uint32), np.empty(cols, np.uint8)
    groups, bad = cols // 16, 0
    six = np.float32(np.float32(6) * shared)
    for r in range(rows):
        bad += load_finite(source[start + r * stride : start + r * stride + cols], kind, bits)
        for g in range(groups):
            part = bits[g * 16 : (g + 1) * 16]
            top = float_of(top_of(part))
            if divisor:
                sixth = rounded_to(step_kind, np.float32(top / np.float32(6)))
                code = to_e4m3(np.float32(sixth * shared))
                code = np.uint8(0x20) if code == np.uint8(0) else code  # 0.125
            else:
                ratio = np.float32(top / six)
                ratio = np.float32(1) if ratio == np.float32(0) else ratio
                code = to_e4m3(max(ratio, np.float32(0.001953125)))
            scales[r * groups + g] = code
            scale = e4m3_value(code)
            step = np.float32(scale / shared) if divisor else np.float32(scale * shared)
            e2m1_row(part, step, codes[g * 16 : (g + 1) * 16])
        nibbles(codes.view(np.uint16), out[r * cols // 2 : (r + 1) * cols // 2])
    return bad


@jit
def e4m3_value(code: np.uint8) -> np.float32:
    """A positive e4m3 number as float32."""
    field, mantissa = np.uint32(code) >> np.uint32(3), np.uint32(code) & np.uint32(7)
    if field == np.uint32(0):
        return np.float32(np.float32(mantissa) * np.float32(0.001953125))
    return np.float32(float_of(np.uint32(((field + np.uint32(120)) << np.uint32(23)) | (mantissa << np.uint32(20)))))
