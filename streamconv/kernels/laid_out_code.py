"""Integers in a mixed-GEMM layout -> rows of signed integers, in one pass."""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, jit


@jit
def unpack_rows(stored: Array, bits: int, biased: bool, order: Array, k: int, out: Array, first: int, stride: int) -> None:
    """Signed integers of whole records, one channel after the other; a channel begins `stride` after the one before, the first at `first`.

    Args:
        stored: uint8, the records.
        bits: 8, or 4: two in a byte, the even one in the low half.
        biased: stored as unsigned, offset by half of their range.
        order: int64, for each element of a record's channels where it is stored in the record.
        k: elements of a channel.
        out: uint8, which carries int8.
    """
    half = 1 << (bits - 1)
    size = order.size
    for record in range(stored.size * 8 // (bits * size)):
        for channel in range(size // k):
            to = first + (record * (size // k) + channel) * stride
            for i in range(k):
                at = record * size + order[channel * k + i]
                value = np.int64(stored[at]) if bits == 8 else (np.int64(stored[at >> 1]) >> (4 * (at & 1))) & 15
                value = value - half if biased else (value ^ half) - half
                out[to + i] = np.uint8(value & 255)
