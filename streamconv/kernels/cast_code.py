"""The compiled part of `cast`."""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, jit
from streamconv.kernels.nearest import load_bits, round_bits
from streamconv.kernels.rows import BLOCK, as_bf16, as_f16, as_f32, each, magnitude


@jit
def cast_rows(
    source: Array, start: int, stride: int, rows: int, cols: int, out: Array, kind: int, target: int, via: int
) -> tuple[int, int]:  # fmt: skip
    """Cast rows, rounding to type `via` before if it is not 0; gives 0 and how many finite values became infinite."""
    bits = np.empty(min(cols, BLOCK), np.uint32)
    # the smallest float32 that rounds to infinity in the target; float16 is the narrowest
    limit = np.uint32(0x477FF000) if target == 1 or via == 1 else np.uint32(0x7F7F8000)
    lost = 0
    for r in range(rows):
        for c in range(0, cols, BLOCK):
            part = bits[: min(BLOCK, cols - c)]
            at, to = start + r * stride + c, r * cols + c
            line, row = source[at : at + part.size], out[to : to + part.size]
            if (target != 0 or via != 0) and magnitude(line, kind) >= limit:
                load_bits(line, kind, part)
                for i in range(part.size):
                    a = part[i] & np.uint32(0x7FFFFFFF)
                    if limit <= a and a < np.uint32(0x7F800000):
                        lost += 1
            if via != 0:
                load_bits(line, kind, part)
                round_bits(via, part)
                store(part, 0, target, row)
            else:
                store(line, kind, target, row)
    return 0, lost


@jit
def store(line: Array, kind: int, target: int, out: Array) -> None:
    """A row of type `kind` rounded to type `target`."""
    if target == 0:
        each(as_f32, line, kind, np.float32(0), out)
    elif target == 1:
        each(as_f16, line, kind, np.float32(0), out)
    else:
        each(as_bf16, line, kind, np.float32(0), out)
