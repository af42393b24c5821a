"""The compiled part of `nvfp4`. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

import numpy as np

from streamconv.kernels.fp8_code import to_e4m3
from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import round_bits
from streamconv.kernels.pairs_code import each_pair, pairs_of, spread


@jit
def to_e2m1(ratio: np.float32) -> np.uint32:
    """Nearest, ties to the even code, at most 6; the sign is that of ratio < 0."""
    a = np.uint32(bits_of(ratio) & np.uint32(0x7FFFFFFF))
    a = a if a < np.uint32(0x40C00000) else np.uint32(0x40C00000)
    # e2m1's unit at 2**e, at least 1, is that of float32 at 2**(e+22): their sum's last bits count units, rounded half to even;
    # 2 is -2 * 127 in the last three bits
    exponent = np.uint32(max(a, np.uint32(0x3F800000)) & np.uint32(0x7F800000))
    counted = bits_of(np.float32(float_of(a) + float_of(np.uint32(exponent + np.uint32((22 << 23) + 2)))))
    code = np.uint32(np.uint32(counted + np.uint32(exponent >> np.uint32(22))) & np.uint32(7))
    return np.uint32(code | (np.uint32(8) if ratio < np.float32(0) else np.uint32(0)))


@jit
def e2m1_quotients(even: np.uint32, odd: np.uint32, step: np.float32, half: np.float32, offset: np.float32) -> np.uint8:
    """Codes of value / step, the even column's in the low nibble."""
    first, second = to_e2m1(np.float32(float_of(even) / step)), to_e2m1(np.float32(float_of(odd) / step))
    return np.uint8(np.uint32(first | np.uint32(second << np.uint32(4))))


@jit
def nvfp4_scales(tops: Array, kind: int, shared: np.float32, divisor: bool, codes: Array, steps: Array) -> None:
    """Largest magnitudes of blocks -> e4m3 scales, and what values are divided by."""
    if divisor:
        for g in range(steps.size):
            steps[g] = np.float32(float_of(tops[g]) / np.float32(6))
        round_bits(kind, steps.view(np.uint32))
        for g in range(steps.size):
            code = to_e4m3(np.float32(steps[g] * shared))
            codes[g] = np.uint8(0x20) if code == np.uint8(0) else code  # 0.125
            steps[g] = np.float32(e4m3_value(codes[g]) / shared)
    else:
        six, least = np.float32(np.float32(6) * shared), np.float32(0.001953125)
        for g in range(steps.size):
            ratio = np.float32(float_of(tops[g]) / six)
            ratio = np.float32(1) if ratio == np.float32(0) else ratio
            codes[g] = to_e4m3(ratio if ratio > least else least)
            steps[g] = np.float32(e4m3_value(codes[g]) * shared)


@jit
def nvfp4_rows(
    source: Array, start: int, stride: int, rows: int, cols: int, out: Array, scales: Array,
    kind: int, step_kind: int, shared: np.float32, divisor: bool,
) -> int:  # fmt: skip
    """Rows -> codes and e4m3 block scales; gives how many values were not finite."""
    pairs, groups, bad, nothing = cols // 2, cols // 16, 0, np.float32(0)
    bits, tops, other = np.empty(cols, np.uint32), np.empty(pairs, np.uint32), np.empty(pairs, np.uint32)
    few, room, more = np.empty(groups, np.float32), np.empty(pairs, np.float32), np.empty(pairs, np.float32)
    for r in range(rows):
        words, packed, group_tops, lost = pairs_of(source[start + r * stride : start + r * stride + cols], kind, 8, bits, tops, other)
        bad += lost
        nvfp4_scales(group_tops, step_kind, shared, divisor, scales[r * groups : (r + 1) * groups], few)
        steps = spread(few, 8, room, more)
        each_pair(e2m1_quotients, words, packed, steps, nothing, nothing, out[r * pairs : (r + 1) * pairs])
    return bad


@jit
def e4m3_value(code: np.uint8) -> np.float32:
    """A positive e4m3 number as float32."""
    # its bits are those of a float32 that is 2 ** 120 times smaller, subnormal ones too
    return np.float32(float_of(np.uint32(np.uint32(code) << np.uint32(20))) * np.float32(1.329227995784916e36))
