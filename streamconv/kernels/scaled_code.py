"""The compiled part of `scaled`. Types are numbers: 0 float32, 1 float16, 2 bfloat16."""

from __future__ import annotations

import numpy as np

from streamconv.kernels.fp8_code import e4m3_product, e4m3_quotient, rounded_quotients
from streamconv.kernels.jit import Array, float_of, jit
from streamconv.kernels.nearest import load_finite
from streamconv.kernels.rows import RUN, column_tops, each_run, magnitude
from streamconv.kernels.scale_code import scale_from, store_scale


@jit
def fp8_block_rows(
    source: Array, start: int, stride: int, rows: int, cols: int, out: Array, scales: Array,
    kind: int, scale_kind: int, quotient: int, block: int, zero: np.float32, floor: np.float32, multiply: bool,
) -> int:  # fmt: skip
    """Rows from the start of a tile on -> e4m3 bytes and one scale for each tile; gives how many values were not finite.

    Args:
        block: side of a tile, a multiple of RUN.
    """
    bits, columns = np.empty(cols, np.uint32), np.empty(cols, source.dtype)
    across, runs = (cols + block - 1) // block, block // RUN
    tops, steps = np.empty(across, np.uint32), np.empty(across * runs, np.float32)
    bad = 0
    for first in range(0, rows, block):
        last = min(first + block, rows)
        column_tops(source, start + first * stride, stride, last - first, columns)
        finite = magnitude(columns, kind) < np.uint32(0x7F800000)
        if finite:
            for t in range(across):
                tops[t] = magnitude(columns[t * block : (t + 1) * block], kind)
        else:
            tops[:] = np.uint32(0)
            for r in range(first, last):
                bad += load_finite(source[start + r * stride : start + r * stride + cols], kind, bits)
                for t in range(across):
                    tops[t] = max(tops[t], magnitude(bits[t * block : (t + 1) * block], 0))
        for t in range(across):
            if multiply:
                factor = np.float32(np.float32(np.float32(1) / float_of(tops[t])) * np.float32(448))
                step = np.float32(1) if tops[t] == 0 else min(factor, np.float32(3.4028234663852886e38))
                stored = np.float32(np.float32(1) / step)
            else:
                stored = step = scale_from(tops[t], np.float32(448), scale_kind, zero, floor)
            store_scale(scale_kind, stored, scales, first // block * across + t)
            steps[t * runs : (t + 1) * runs] = step
        for r in range(first, last):
            line, to = source[start + r * stride : start + r * stride + cols], out[r * cols : (r + 1) * cols]
            if not finite or quotient != 0:
                load_finite(line, kind, bits)
            if quotient != 0:
                for t in range(across):
                    part = bits[t * block : (t + 1) * block]
                    rounded_quotients(part, steps[t * runs], quotient, to[t * block : t * block + part.size])
            elif finite:
                each_run(e4m3_product, line, kind, steps, to) if multiply else each_run(e4m3_quotient, line, kind, steps, to)
            else:
                each_run(e4m3_product, bits, 0, steps, to) if multiply else each_run(e4m3_quotient, bits, 0, steps, to)
    return bad
