"""How far stored values are from the source, in one pass over each row, for formats whose codes stand for a value times a scale.

What is not plainly within half a step of the code is left to the codec's own definition: nothing here says what is wrong.
"""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import load_bits

_LANES = 256
"""Columns whose sums are kept apart: vector operations, and the same order of additions everywhere."""


@jit
def _size(value: np.float32) -> np.uint32:
    """A magnitude as bits, which have its order."""
    return np.uint32(bits_of(value) & np.uint32(0x7FFFFFFF))


@jit
def _unpack(line: Array, row: int, packing: int, table: Array, to: Array) -> None:
    """Codes of a row -> their values."""
    if packing == 0:
        for i in range(to.size):
            to[i] = table[line[i]]
    elif packing == 1:
        for i in range(to.size // 2):
            code = line[i]
            to[2 * i], to[2 * i + 1] = table[code & np.uint8(15)], table[code >> np.uint8(4)]
    elif row % 2 == 0:
        for i in range(to.size):
            to[i] = table[line[i] & np.uint8(15)]
    else:
        for i in range(to.size):
            to[i] = table[line[i] >> np.uint8(4)]


@jit
def value_errors(
    source: Array, start: int, stride: int, rows: int, cols: int, kind: int, codes: Array, width: int, packing: int,
    table: Array, steps: Array, group: int, band: int, rules: Array, sums: Array,
) -> bool:  # fmt: skip
    """Add rows to the sums; False at the first that the definition has to look at.

    Args:
        source, start, stride, kind: as of `weight_only_error_code.integer_errors`.
        codes: bytes, `width` of them for each row, or for two if `packing` is 2.
        packing: 0: a code in each byte; 1: two, the even column in the low nibble; 2: two, the even row in the low nibble.
        table: float32, what a code stands for in steps.
        steps: float32 [rows / band, cols / group], both rounded up.
        rules: float32, see `screen.Screen`: relative and least half step, edge, slack, least and greatest top, most.
        sums: [noise, signal, largest error, largest value].
    """
    relative, smallest, edge, slack, least, greatest, most = rules
    values, gaps, spread = np.empty(cols, np.float32), np.empty(cols, np.float32), np.empty(cols, np.float32)
    pattern, tops = values.view(np.uint32), np.zeros(steps.shape[1], np.uint32)
    lanes = np.empty((2, _LANES), np.float32)
    noise, signal = lanes[0], lanes[1]
    far = np.uint32(0)
    for r in range(rows):
        highest = float_of(load_bits(source[start + r * stride : start + r * stride + cols], kind, pattern))
        if not highest <= most:
            return False
        line = codes[r // 2 * width : (r // 2 + 1) * width] if packing == 2 else codes[r * width : (r + 1) * width]
        _unpack(line, r, packing, table, gaps)
        scales = steps[r // band]
        for g in range(scales.size):
            begin, end, step = g * group, min((g + 1) * group, cols), scales[g]
            top = np.uint32(0) if r % band == 0 else tops[g]
            for i in range(begin, end):
                spread[i] = step
                top = max(top, np.uint32(pattern[i] & np.uint32(0x7FFFFFFF)))
            tops[g] = top
        if r % band == band - 1 or r == rows - 1:
            for g in range(scales.size):
                top, step = float_of(tops[g]), scales[g]
                if top != np.float32(0) and not (least * step <= top and top <= greatest * step):
                    return False
        lanes[:] = np.float32(0)
        wrong = np.uint32(0)
        for begin in range(0, cols, _LANES):
            v, u, s = values[begin : begin + _LANES], gaps[begin : begin + _LANES], spread[begin : begin + _LANES]
            for i in range(v.size):
                gap = np.float32(np.float32(u[i] * s[i]) - v[i])
                size = np.float32(abs(v[i]))
                half, over = np.float32(abs(u[i]) * relative), np.float32(size - np.float32(edge * s[i]))
                half = np.float32((half if half > smallest else smallest) * s[i])
                bound = np.float32((over if over > half else half) + np.float32(size * slack))
                wrong |= np.uint32(_size(gap) > bits_of(bound))
                noise[i] += np.float32(gap * gap)
                signal[i] += np.float32(v[i] * v[i])
                far = max(far, _size(gap))
        if wrong:
            return False
        for i in range(_LANES):
            sums[0] += np.float64(noise[i])
            sums[1] += np.float64(signal[i])
        sums[3] = max(sums[3], np.float64(highest))
    sums[2] = np.float64(float_of(far))
    return True
