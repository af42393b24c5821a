"""The compiled part of `scaled` for groups of 16 and 32 values: NVFP4 and the MX formats. Types are numbers, as in `rows`.

LLVM makes vectors of long loops alone, so each step runs over a whole row: maxima of pairs of pairs, and a factor for every value.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.fp8_code import to_e4m3
from streamconv.kernels.jit import bits_of, float_of, jit
from streamconv.kernels.rows import to_f16
from streamconv.kernels.scale_code import rounded_to
from streamconv.kernels.scaled_code import load_finite, nibbles

_Array = np.ndarray[Any, Any]


@jit
def tops_of(bits: _Array, levels: int, tops: _Array) -> None:
    """Largest magnitude of each 2 ** levels values, at the beginning of `tops`, which has room for half as many as there are values."""
    count = bits.size // 2
    for i in range(count):
        one, other = np.uint32(bits[2 * i] & np.uint32(0x7FFFFFFF)), np.uint32(bits[2 * i + 1] & np.uint32(0x7FFFFFFF))
        tops[i] = max(one, other)
    for _ in range(levels - 1):
        count //= 2
        for i in range(count):
            tops[i] = max(tops[2 * i], tops[2 * i + 1])


@jit
def spread(few: _Array, each: int, many: _Array) -> None:
    """Every number `each` times, the last one as often as there is room for."""
    for g in range(few.size):
        many[g * each : (g + 1) * each] = few[g]


@jit
def to_e2m1(ratio: np.float32) -> np.uint8:
    """Nearest, ties to the even code, at most 6; the sign is that of ratio < 0."""
    a = np.uint32(bits_of(ratio) & np.uint32(0x7FFFFFFF))
    a = a if a < np.uint32(0x40C00000) else np.uint32(0x40C00000)
    odd = np.uint32((a >> np.uint32(22)) & np.uint32(1))
    normal = np.uint32(np.uint32(np.uint32(a + np.uint32(np.uint32(0x1FFFFF) + odd)) >> np.uint32(22)) - np.uint32(252))
    # below 1 the unit is 1/2, that of float32 at 2**22
    small = np.uint32(bits_of(np.float32(float_of(a) + np.float32(4194304))) & np.uint32(7))
    code = small if a < np.uint32(0x3F800000) else normal
    return np.uint8(code | (np.uint32(8) if ratio < np.float32(0) else np.uint32(0)))


@jit
def e2m1_quotients(bits: _Array, steps: _Array, out: _Array) -> None:
    """Codes of value / step."""
    for i in range(bits.size):
        out[i] = to_e2m1(np.float32(float_of(bits[i]) / steps[i]))


@jit
def e2m1_products(bits: _Array, factors: _Array, out: _Array) -> None:
    """Codes of value * factor."""
    for i in range(bits.size):
        out[i] = to_e2m1(np.float32(float_of(bits[i]) * factors[i]))


@jit
def e4m3_products(bits: _Array, factors: _Array, out: _Array) -> None:
    """e4m3(value * factor)."""
    for i in range(bits.size):
        out[i] = to_e4m3(np.float32(float_of(bits[i]) * factors[i]))


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
    groups, bad = cols // 32, 0
    tops, inverses, factors = np.empty(cols // 2, np.uint32), np.empty(groups, np.float32), np.empty(cols, np.float32)
    for r in range(rows):
        bad += load_finite(source[start + r * stride : start + r * stride + cols], kind, bits)
        tops_of(bits, 5, tops)
        stored = scales[r * groups : (r + 1) * groups]
        for g in range(groups):
            byte = np.uint32(mx_byte(tops[g], read_as, fp4, ceiling))
            stored[g] = np.uint8(byte)
            # 2 ** (127 - byte): what dividing by 2 ** (byte - 127) gives, to the bit; subnormal from 254 on
            inverse = np.uint32(np.uint32(254) - byte) << np.uint32(23)
            inverse = inverse if byte < np.uint32(254) else np.uint32(0x400000) >> np.uint32(byte - np.uint32(254))
            inverses[g] = float_of(np.uint32(inverse))
        spread(inverses, 32, factors)
        if fp4:
            e2m1_products(bits, factors, codes)
            nibbles(codes.view(np.uint16), out[r * cols // 2 : (r + 1) * cols // 2])
        else:
            e4m3_products(bits, factors, out[r * cols : (r + 1) * cols])
    return bad


@jit
def nvfp4_rows(
    source: _Array, start: int, stride: int, rows: int, cols: int, out: _Array, scales: _Array,
    kind: int, step_kind: int, shared: np.float32, divisor: bool,
) -> int:  # fmt: skip
    """Rows -> codes and e4m3 block scales; gives how many values were not finite."""
    bits, codes = np.empty(cols, np.uint32), np.empty(cols, np.uint8)
    groups, bad = cols // 16, 0
    tops, steps, factors = np.empty(cols // 2, np.uint32), np.empty(groups, np.float32), np.empty(cols, np.float32)
    six = np.float32(np.float32(6) * shared)
    for r in range(rows):
        bad += load_finite(source[start + r * stride : start + r * stride + cols], kind, bits)
        tops_of(bits, 4, tops)
        stored = scales[r * groups : (r + 1) * groups]
        for g in range(groups):
            top = float_of(tops[g])
            if divisor:
                sixth = rounded_to(step_kind, np.float32(top / np.float32(6)))
                code = to_e4m3(np.float32(sixth * shared))
                code = np.uint8(0x20) if code == np.uint8(0) else code  # 0.125
            else:
                ratio = np.float32(top / six)
                ratio = np.float32(1) if ratio == np.float32(0) else ratio
                code = to_e4m3(max(ratio, np.float32(0.001953125)))
            stored[g] = code
            scale = e4m3_value(code)
            steps[g] = np.float32(scale / shared) if divisor else np.float32(scale * shared)
        spread(steps, 16, factors)
        e2m1_quotients(bits, factors, codes)
        nibbles(codes.view(np.uint16), out[r * cols // 2 : (r + 1) * cols // 2])
    return bad


@jit
def e4m3_value(code: np.uint8) -> np.float32:
    """A positive e4m3 number as float32."""
    # its bits are those of a float32 that is 2 ** 120 times smaller, subnormal ones too
    return np.float32(float_of(np.uint32(np.uint32(code) << np.uint32(20))) * np.float32(1.329227995784916e36))
