"""The compiled part of `awq_words`: rows are input channels. Types are numbers: 0 float32, 1 float16, 2 bfloat16.

A row is read as pairs of channels, so that channels 0 2 4 6 and 1 3 5 7 of a word lie in the halves of 32-bit lanes; what belongs to a
channel is kept in that order: those of even channels, then those of odd ones.
"""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import from_f16, load_bits, load_finite, round_bits
from streamconv.kernels.pairs_code import to_int
from streamconv.kernels.rows import to_f16


@jit
def awq_pack(pairs: Array, out: Array) -> None:
    """Codes of two channels in each number, 16 bits apart -> words of 8 channels: 0 2 4 6 1 3 5 7, the first in the lowest bits."""
    words = out.view(np.uint32)
    for i in range(words.size):
        low = np.uint32(pairs[4 * i] | np.uint32(pairs[4 * i + 1] << np.uint32(4)))
        high = np.uint32(pairs[4 * i + 2] | np.uint32(pairs[4 * i + 3] << np.uint32(4)))
        words[i] = np.uint32(low | np.uint32(high << np.uint32(8)))


@jit
def awq_steps(
    low: Array, high: Array, zeros: Array, steps: Array, scale_kind: int, divisor: np.float32, least: np.float32, symmetric: bool
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
        near = to_int(np.float32(-low[i] / steps[i]), np.float32(0), np.float32(15), np.float32(0))
        zeros[i] = np.uint32(8) if symmetric else np.uint32(near & np.uint32(15))
    return lost


@jit
def widen_ends(line: Array, low: Array, high: Array) -> None:
    """The ends of each column so far and a row more, by bits of the stored type: of those with a sign the largest are the least values."""
    sign = line.dtype.type(1 << (8 * line.itemsize - 1))
    for i in range(line.size):
        low[i], high[i] = max(low[i], line[i]), max(high[i], line.dtype.type(line[i] ^ sign))


@jit
def as_ends(ends: Array, kind: int, flip: int, out: Array) -> np.uint32:
    """Bits of a type -> float32 of even columns, then of odd ones; gives the largest magnitude's bits."""
    half, top = ends.size // 2, np.uint32(0)
    for i in range(ends.size):
        wide = np.uint32(np.uint32(ends[i]) ^ np.uint32(flip))
        wide = np.uint32(wide << np.uint32(16)) if kind == 2 else from_f16(wide) if kind == 1 else wide
        top = max(top, np.uint32(wide & np.uint32(0x7FFFFFFF)))
        out[i // 2 + i % 2 * half] = float_of(wide)
    return top


@jit
def awq_code(b: np.uint32, step: np.float32, zero: np.uint32) -> np.uint32:
    """clamp(RNE(value / step) + zero, 0, 15), in the lowest 16 bits; the quotient is no larger than 16, a step being a 15th of a range."""
    code = np.uint32(bits_of(np.float32(np.float32(float_of(b) / step) + np.float32(12582912))) + zero)
    code = code if code > np.uint32(0x4B400000) else np.uint32(0x4B400000)
    return code if code < np.uint32(0x4B40000F) else np.uint32(0x4B40000F)


@jit
def awq_codes(words: Array, packed: bool, steps: Array, zeros: Array, out: Array) -> None:
    """A row -> codes of two channels in each number, 16 bits apart. `packed`: as in `each_pair`."""
    half = np.uint64(out.size)
    if packed:
        for i in range(half):
            first = awq_code(np.uint32(words[i] << np.uint32(16)), steps[i], zeros[i])
            second = awq_code(np.uint32(words[i] & np.uint32(0xFFFF0000)), steps[half + i], zeros[half + i])
            out[i] = np.uint32(np.uint32(first & np.uint32(15)) | np.uint32(second << np.uint32(16)))
    else:
        for i in range(half):
            two = np.uint64(2) * i
            first, second = awq_code(words[two], steps[i], zeros[i]), awq_code(words[two + np.uint64(1)], steps[half + i], zeros[half + i])
            out[i] = np.uint32(np.uint32(first & np.uint32(15)) | np.uint32(second << np.uint32(16)))


@jit
def awq_rows(
    source: Array, start: int, stride: int, rows: int, cols: int, out: Array, zero: Array, scales: Array,
    kind: int, scale_kind: int, group: int, divisor: np.float32, least: np.float32, symmetric: bool,
) -> tuple[int, int]:  # fmt: skip
    """Groups of rows -> packed codes, packed zero points, scales; gives how many values, and how many scales, were not finite."""
    half, bits = cols // 2, np.empty(cols, np.uint32)
    least_bits, most_bits = np.empty(cols, source.dtype), np.empty(cols, source.dtype)
    wide_least, wide_most = np.empty(cols, np.uint32), np.empty(cols, np.uint32)
    low, high, steps = np.empty(cols, np.float32), np.empty(cols, np.float32), np.empty(cols, np.float32)
    codes, zeros = np.empty(half, np.uint32), np.empty(cols, np.uint32)
    sign, bad, lost = 1 << (8 * source.itemsize - 1), 0, 0
    for g in range(rows // group):
        least_bits[:], most_bits[:] = source.dtype.type(sign), source.dtype.type(sign)
        for r in range(g * group, (g + 1) * group):
            widen_ends(source[start + r * stride : start + r * stride + cols], least_bits, most_bits)
        top = max(as_ends(least_bits, kind, 0, low), as_ends(most_bits, kind, sign, high))
        finite = top < np.uint32(0x7F800000)
        if not finite:
            wide_least[:], wide_most[:] = np.uint32(0x80000000), np.uint32(0x80000000)
            for r in range(g * group, (g + 1) * group):
                bad += load_finite(source[start + r * stride : start + r * stride + cols], kind, bits)
                widen_ends(bits, wide_least, wide_most)
            as_ends(wide_least, 0, 0, low)
            as_ends(wide_most, 0, 0x80000000, high)
        lost += awq_steps(low, high, zeros, steps, scale_kind, divisor, least, symmetric)
        for i in range(half):
            codes[i] = np.uint32(zeros[i] | np.uint32(zeros[half + i] << np.uint32(16)))
        awq_pack(codes, zero[g * half : (g + 1) * half])
        stored, step_row = steps.view(np.uint32), scales[g * cols : (g + 1) * cols]
        for i in range(half):
            step_row[2 * i], step_row[2 * i + 1] = to_f16(stored[i]), to_f16(stored[half + i])
        for r in range(g * group, (g + 1) * group):
            line = source[start + r * stride : start + r * stride + cols]
            if kind == 2 and finite:
                awq_codes(line.view(np.uint32), True, steps, zeros, codes)
            else:
                load_finite(line, kind, bits)
                awq_codes(bits, False, steps, zeros, codes)
            awq_pack(codes, out[r * half : (r + 1) * half])
    return bad, lost


@jit
def awq_given_rows(source: Array, start: int, stride: int, rows: int, cols: int, out: Array) -> int:
    """Signed integers from -8 to 7 -> packed codes."""
    codes = np.empty(cols // 2, np.uint32)
    for r in range(rows):
        row = source[start + r * stride : start + r * stride + cols]
        for i in range(codes.size):
            first, second = np.uint32(np.uint8(row[2 * i] + np.uint8(8))), np.uint32(np.uint8(row[2 * i + 1] + np.uint8(8)))
            codes[i] = np.uint32(first | np.uint32(second << np.uint32(16)))
        awq_pack(codes, out[r * cols // 2 : (r + 1) * cols // 2])
    return 0


@jit
def awq_scale_rows(
    source: Array, start: int, stride: int, rows: int, cols: int, scales: Array, zero: Array, kind: int
) -> tuple[int, int]:  # fmt: skip
    """Scales -> float16, and zero points of 8; gives 0 and how many became infinite."""
    bits, lost = np.empty(cols, np.uint32), 0
    zero[:] = np.uint8(0x88)
    for r in range(rows):
        load_bits(source[start + r * stride : start + r * stride + cols], kind, bits)
        row = scales[r * cols : (r + 1) * cols]
        for i in range(cols):
            row[i] = to_f16(bits[i])
            lost += float_of(bits[i]) >= np.float32(65520) and bits[i] < np.uint32(0x7F800000)
    return 0, lost
