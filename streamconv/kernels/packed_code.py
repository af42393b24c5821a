"""The compiled part of `packed`. Layout families are their places in `quants.layout.FAMILIES`; 64 divides K.

A and D share the order inside a block: eight words hold channels i, i+8 (int8) or i, i+8, i+16, i+24 (int4).
"""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, jit


@jit
def int8_rows(q: Array, start: int, stride: int, rows: int, cols: int, out: Array, family: int) -> None:
    """Rows of int8 (as uint8) -> layout bytes (`out` as uint16)."""
    flip = np.uint16(0) if family == 2 else np.uint16(0x8080)
    for r in range(rows):
        row = start + r * stride
        if family == 2:
            base = r * cols // 2
            for i in range(cols // 2):
                out[base + i] = np.uint16(q[row + 2 * i]) | (np.uint16(q[row + 2 * i + 1]) << np.uint16(8))
            continue
        for t in range(cols // 64):
            at = (r // 2) * cols + t * 64 + (r % 2) * 32 if family == 0 else (r * cols + t * 64) // 2
            for block in range(4):
                for i in range(8):
                    k = row + t * 64 + block * 16 + i
                    out[at + block * 8 + i] = (np.uint16(q[k]) | (np.uint16(q[k + 8]) << np.uint16(8))) ^ flip


@jit
def int4_rows(q: Array, start: int, stride: int, rows: int, cols: int, out: Array, family: int) -> None:
    """Rows of int8 in -8..7 (as uint8) -> layout bytes (`out` as uint16, four nibbles each)."""
    low, flip = np.uint16(15), np.uint16(0x8888)
    for r in range(rows):
        row = start + r * stride
        if family == 2:
            base = r * cols // 4
            for i in range(cols // 4):
                k = row + 4 * i
                out[base + i] = (
                    (np.uint16(q[k]) & low)
                    | ((np.uint16(q[k + 1]) & low) << np.uint16(4))
                    | ((np.uint16(q[k + 2]) & low) << np.uint16(8))
                    | ((np.uint16(q[k + 3]) & low) << np.uint16(12))
                )
            continue
        for t in range(cols // 64):
            at = (r // 4) * cols + t * 64 + (r % 4) * 16 if family == 0 else (r * cols + t * 64) // 4
            for block in range(2):
                for i in range(8):
                    k = row + t * 64 + block * 32 + i
                    word = (
                        (np.uint16(q[k]) & low)
                        | ((np.uint16(q[k + 8]) & low) << np.uint16(4))
                        | ((np.uint16(q[k + 16]) & low) << np.uint16(8))
                        | ((np.uint16(q[k + 24]) & low) << np.uint16(12))
                    )
                    out[at + block * 8 + i] = word ^ flip


@jit
def paired_rows(q: Array, start: int, stride: int, rows: int, cols: int, out: Array) -> None:
    """Rows of int8 in -8..7 (as uint8) -> two neighbouring rows in a byte, the even one in the low nibble."""
    for pair in range(rows // 2):
        even, at = start + 2 * pair * stride, pair * cols
        for k in range(cols):
            out[at + k] = (q[even + k] & np.uint8(15)) | np.uint8(q[even + stride + k] << np.uint8(4))
