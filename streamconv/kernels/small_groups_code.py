"""The compiled part of `mx`: exponents, and FP8 elements. Types are numbers, as in `rows`."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.fp8_code import e4m3_product
from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.rows import RUN, each_run, to_f16, widened
from streamconv.kernels.scaled_code import load_finite
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
        made = field - np.int32(15) - less + np.int32(127)
    else:
        field = np.int32(np.uint32(top + np.uint32(1 << 21)) >> np.uint32(23))
        made = field - less
    return np.int32(0) if field == np.int32(0) else min(max(made, np.int32(0)), np.int32(255))


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
def mx_fp8_rows(
    source: Array, start: int, stride: int, rows: int, cols: int, out: Array, scales: Array,
    kind: int, read_as: int, ceiling: bool,
) -> int:  # fmt: skip
    """Rows -> codes and exponent bytes; gives how many values were not finite."""
    bits, groups, bad = np.empty(cols, np.uint32), cols // RUN, 0
    tops, inverses = np.empty(groups, np.uint32), np.empty(groups, np.float32)
    for r in range(rows):
        line, to = source[start + r * stride : start + r * stride + cols], out[r * cols : (r + 1) * cols]
        finite = run_tops(line, kind, tops) < np.uint32(0x7F800000)
        if not finite:
            bad += load_finite(line, kind, bits)
            run_tops(bits, 0, tops)
        mx_inverses(tops, read_as, False, ceiling, scales[r * groups : (r + 1) * groups], inverses)
        if finite:
            each_run(e4m3_product, line, kind, inverses, to)
        else:
            each_run(e4m3_product, bits, 0, inverses, to)
    return bad
