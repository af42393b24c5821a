"""The compiled part of `mx`. Types are numbers, as in `rows`."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.fp4_code import to_e2m1
from streamconv.kernels.fp8_code import e4m3_product
from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import load_finite
from streamconv.kernels.rows import RUN, each_run, to_f16, widened
from streamconv.kernels.vector import top_of_run


@jit
def run_tops(line: Array, kind: int, tops: Array) -> Any:
    """Largest magnitude of each RUN values of type `kind`, and of all, as float32 bits."""
    top = np.uint32(0)
    for g in range(tops.size):
        tops[g] = widened(top_of_run(line, g * RUN, RUN), kind)
        top = max(top, tops[g])
    return top


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
        byte = field - np.int32(15) - less + np.int32(127)
    else:
        field = np.int32(np.uint32(top + np.uint32(1 << 21)) >> np.uint32(23))
        byte = field - less
    return np.int32(0) if field == np.int32(0) else min(max(byte, np.int32(0)), np.int32(255))


@jit
def mx_inverses(tops: Array, read_as: int, fp4: bool, ceiling: bool, stored: Array, inverses: Array) -> None:
    """Largest magnitudes of groups -> exponent bytes, and what values are multiplied by."""
    if read_as != 1 and not ceiling:  # the common case, so that it becomes vectors
        less = np.uint32(2 if fp4 else 8)
        for g in range(stored.size):
            field = np.uint32(np.uint32(tops[g] + np.uint32(1 << 21)) >> np.uint32(23))
            stored[g] = np.uint8(np.uint32(field - less) if field > less else np.uint32(0))
    else:
        for g in range(stored.size):
            stored[g] = np.uint8(mx_byte(tops[g], read_as, fp4, ceiling))
    for g in range(stored.size):
        # 2 ** (127 - byte): what dividing by 2 ** (byte - 127) gives, to the bit; subnormal from 254 on
        byte = np.uint32(stored[g])
        inverse = np.uint32(np.uint32(254) - byte) << np.uint32(23)
        inverses[g] = float_of(np.uint32(inverse if byte < np.uint32(254) else np.uint32(0x400000) >> np.uint32(byte - np.uint32(254))))


@jit
def e2m1_product(bits: np.uint32, by: np.float32) -> np.uint8:
    """Code of value * by."""
    return np.uint8(to_e2m1(np.float32(float_of(bits) * by)))


@jit
def nibbles(codes: Array, out: Array) -> None:
    """Pairs of codes (as uint16), the even column's in the low nibble."""
    for i in range(codes.size):
        out[i] = np.uint8(codes[i] | (codes[i] >> np.uint16(4)))


@jit
def lifts_of(tops: Array, exponents: Array, lifts: Array) -> bool:
    """What bits of bfloat16 lose when the value is divided by its group's power of two; False where exponent bits alone do not do that.

    A group of zeros keeps its bits. Below 2 ** -124 a value may be subnormal, above 2 ** 15 its quotient may vanish, and then its sign.
    """
    fit = True
    for g in range(lifts.size):
        byte = np.int32(exponents[g])
        fit = fit and bool(tops[g] == np.uint32(0) or np.int32(3) <= byte <= np.int32(142))
        lifts[g] = np.int16(0) if tops[g] == np.uint32(0) else np.int16((byte - np.int32(127)) << np.int32(7))
    return fit


@jit
def e2m1_of_bf16(line: Array, lifts: Array, codes: Array) -> None:
    """Codes of bfloat16 values divided by powers of two, 16 to a vector: nothing is widened."""
    for g in range(lifts.size):
        values, code_row, lift = line[g * RUN : (g + 1) * RUN], codes[g * RUN : (g + 1) * RUN], lifts[g]
        for i in range(RUN):
            raw = np.uint16(values[i])
            a = np.int16(np.int16(np.uint16(raw & np.uint16(0x7FFF))) - lift)
            # from 1 on: one bit of mantissa, nearest even; below: 0.25 is still 0, 0.75 already 1
            normal = np.int16(np.int16(np.int16(a + np.int16(31)) + np.int16(np.int16(a >> np.int16(6)) & np.int16(1))) >> np.int16(6))
            small = np.int16(np.int16(a > np.int16(0x3E80)) + np.int16(a >= np.int16(0x3F40)))
            code = min(max(np.int16(normal - np.int16(252)), small), np.int16(7))
            code_row[i] = np.uint8(np.int16(code | (np.int16(8) if raw > np.uint16(0x8000) else np.int16(0))))


@jit
def mx_rows(
    source: Array, start: int, stride: int, rows: int, cols: int, out: Array, scales: Array,
    kind: int, read_as: int, fp4: bool, ceiling: bool,
) -> int:  # fmt: skip
    """Rows -> codes and exponent bytes; gives how many values were not finite."""
    width, groups, bad = cols // 2 if fp4 else cols, cols // RUN, 0
    bits, codes = np.empty(cols, np.uint32), np.empty(cols, np.uint8)
    tops, inverses, lifts = np.empty(groups, np.uint32), np.empty(groups, np.float32), np.empty(groups, np.int16)
    for r in range(rows):
        line, stored = source[start + r * stride : start + r * stride + cols], scales[r * groups : (r + 1) * groups]
        to = out[r * width : (r + 1) * width]
        finite = run_tops(line, kind, tops) < np.uint32(0x7F800000)
        if not finite:
            bad += load_finite(line, kind, bits)
            run_tops(bits, 0, tops)
        mx_inverses(tops, read_as, fp4, ceiling, stored, inverses)
        if not fp4:
            each_run(e4m3_product, line, kind, inverses, to) if finite else each_run(e4m3_product, bits, 0, inverses, to)
            continue
        if finite and kind == 2 and lifts_of(tops, stored, lifts):
            e2m1_of_bf16(line, lifts, codes)
        elif finite:
            each_run(e2m1_product, line, kind, inverses, codes)
        else:
            each_run(e2m1_product, bits, 0, inverses, codes)
        nibbles(codes.view(np.uint16), to)
    return bad
