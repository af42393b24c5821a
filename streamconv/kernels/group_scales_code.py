"""The compiled part of `group_scales`. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, jit
from streamconv.kernels.nearest import load_bits, nonfinite, round_bits
from streamconv.kernels.rows import to_bf16, to_f16


@jit
def group_rows(
    data: Array,
    start: int,
    stride: int,
    rows: int,
    cols: int,
    scales: Array,
    zeros: Array,
    kind: int,
    target: int,
    bits_each: int,
    shuffled: bool,
    middle: int,
) -> tuple[int, int]:
    """Groups (packed zeros, then scales, as bytes) -> scales and zeros; gives 0 and how many finite scales became infinite."""
    n = 8 * cols // (bits_each + (32 if kind == 0 else 16))
    values = np.empty(n, np.float32)
    bits = values.view(np.uint32)
    word = np.empty(n, np.uint32)
    lost = 0
    for r in range(rows):
        row = start + r * stride
        at = row + n * bits_each // 8
        if kind == 0:
            for i in range(n):
                k = at + 4 * i
                word[i] = (
                    np.uint32(data[k])
                    | (np.uint32(data[k + 1]) << np.uint32(8))
                    | (np.uint32(data[k + 2]) << np.uint32(16))
                    | (np.uint32(data[k + 3]) << np.uint32(24))
                )
        else:
            for i in range(n):
                k = at + 2 * i
                word[i] = np.uint32(data[k]) | (np.uint32(data[k + 1]) << np.uint32(8))
        load_bits(word, kind, bits)
        lost -= nonfinite(bits)
        round_bits(target, bits)
        lost += nonfinite(bits)
        for i in range(n):
            if bits_each == 8:
                z = np.int32(data[row + i])
            else:
                place = i % 8
                if shuffled:
                    place = place // 2 + 4 * (place % 2)
                byte = data[row + i // 8 * 4 + place // 2]
                z = np.int32(byte >> np.uint8(4)) if place % 2 else np.int32(byte & np.uint8(15))
            b = bits[i]
            scales[r * n + i] = to_f16(b) if target == 1 else to_bf16(b)
            # the product of a two-byte float and a small integer is exact in float32
            values[i] = values[i] * np.float32(np.int32(middle) - z)
            b = bits[i]
            zeros[r * n + i] = to_f16(b) if target == 1 else to_bf16(b)
    return 0, lost
