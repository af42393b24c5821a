"""The compiled part of `int_group`. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import load_finite, round_bits
from streamconv.kernels.pairs_code import each_pair, group_steps, int4_pair, int8_pair, pairs_of, spread, tops_of


@jit
def divide_groups(bits: Array, group: int, steps: Array, kind: int) -> None:
    """value / step, rounded to a type."""
    for g in range(steps.size):
        for i in range(np.uint64(g * group), np.uint64((g + 1) * group)):
            bits[i] = bits_of(np.float32(float_of(bits[i]) / steps[g]))
    round_bits(kind, bits)


@jit
def int_group_rows(
    source: Array, start: int, stride: int, rows: int, cols: int, out: Array, scales: Array,
    kind: int, scale_kind: int, quotient: int, width: int, group: int,
    divisor: np.float32, zero: np.float32, floor: np.float32, form: int,
) -> int:  # fmt: skip
    """Rows -> codes and scales; gives how many values were not finite. `group`: 0 for a whole row; `form`: 0 bytes, 1 words, 2 pairs."""
    group = group if group else cols
    pairs, groups, bad = (cols + 1) // 2, cols // group, 0
    bits, few = np.zeros(2 * pairs, np.uint32), np.empty(groups, np.float32)
    tops, other, room = np.empty(pairs, np.uint32), np.empty(pairs, np.uint32), np.empty(pairs, np.float32)
    more = steps = np.empty(pairs, np.float32)
    size = (cols * width + 31) // 32 * 4 if form == 1 else cols
    codes, before = np.zeros(size // 2 + 1, np.uint16), np.empty(pairs, np.uint16)
    nibbles, half = codes.view(np.uint8), np.float32(1 << (width - 1))
    offset = half if form == 1 else np.float32(0)
    odd = group % 2 == 1 and groups > 1  # a pair lies in two groups
    for r in range(rows):
        line = source[start + r * stride : start + r * stride + cols]
        if odd:
            words, packed, group_tops = bits, False, few.view(np.uint32)
            bad += load_finite(line, kind, bits[:cols])
            tops_of(bits, group, group_tops)
        else:
            words, packed, group_tops, lost = pairs_of(line, kind, pairs // groups, bits, tops, other)
            bad += lost
        group_steps(group_tops, divisor, scale_kind, zero, floor, few, scales, r * groups)
        if odd or quotient:
            load_finite(line, kind, bits[:cols])
            divide_groups(bits[:cols], group, few, quotient)
            words, packed = bits, False
            steps[:] = np.float32(1)
        else:
            steps = spread(few, pairs // groups, room, more)
        if form == 1 and width == 4:
            each_pair(int4_pair, words, packed, steps, half, offset, nibbles[:pairs])
            nibbles[pairs - 1] &= np.uint8(15 if cols % 2 else 255)
        elif form == 2 and r % 2:
            each_pair(int8_pair, words, packed, steps, half, offset, before)
            for i in range(pairs):
                codes[i] = np.uint16((codes[i] & np.uint16(0x0F0F)) | np.uint16((before[i] & np.uint16(0x0F0F)) << np.uint16(4)))
        else:
            each_pair(int8_pair, words, packed, steps, half, offset, codes[:pairs])
            nibbles[2 * pairs - 1] &= np.uint8(0 if cols % 2 else 255)
        if form != 2 or r % 2:
            to = out[(r // 2 if form == 2 else r) * size :]
            for i in range(size):
                to[i] = nibbles[i]
    return bad
