"""Float32 bit patterns to two-byte floats.

Integer arithmetic on bit patterns in plain loops over contiguous arrays, which LLVM vectorizes. Rows come as slices: a start
added to each index would keep it from that. Types are numbers here: 0 float32, 1 float16, 2 bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import from_f16

CODES = {"F32": 0, "F16": 1, "BF16": 2}
BLOCK = 1 << 16
"""Columns that are worked on at a time where nothing depends on the whole row; a row may be longer than the memory budget."""
RUN = 32
"""Values that share a number in `each_run`: two vectors of 16, a length that LLVM must know."""



@jit
def to_bf16(b: np.uint32) -> np.uint32:
    """float32 bits -> bfloat16 bits, nearest even; NaN becomes the quiet NaN that torch writes."""
    if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint32(0x7FC0)
    return (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@jit
def to_f16(b: np.uint32) -> np.uint32:
    """float32 bits -> float16 bits, nearest even, subnormals kept, overflow to infinity. Selects only, so that it vectorizes."""
    sign = np.uint32(np.uint32(b >> np.uint32(16)) & np.uint32(0x8000))
    a = np.uint32(b & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(a >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(a - np.uint32(np.uint32(0x37FFF001) - odd)) >> np.uint32(13))
    # below 2**-14 the unit is 2**-24, that of float32 between 0.5 and 1
    small = np.uint32(bits_of(np.float32(float_of(a) + np.float32(0.5))) - np.uint32(0x3F000000))
    value = small if a < np.uint32(0x38800000) else normal
    value = np.uint32(0x7C00) if a >= np.uint32(0x477FF000) else value  # 65520 and above round to infinity
    value = np.uint32(0x7E00) if a > np.uint32(0x7F800000) else value
    return np.uint32(sign | value)


@jit
def as_f32(b: np.uint32, by: np.float32) -> np.uint32:
    return b


@jit
def as_f16(b: np.uint32, by: np.float32) -> Any:
    return to_f16(b)


@jit
def as_bf16(b: np.uint32, by: np.float32) -> Any:
    return to_bf16(b)


@jit
def widened(bits: Any, kind: int) -> Any:
    """Bits of a value of type `kind` -> float32 bits."""
    wide = np.uint32(bits)
    return np.uint32(wide << np.uint32(16)) if kind == 2 else from_f16(wide) if kind == 1 else wide


@jit
def magnitude(source: Array, kind: int) -> Any:
    """The largest magnitude of a row of type `kind`, as float32 bits: at or above 0x7F800000 if a value is not finite.

    Bit patterns without their signs are in the order of the values, so it works on the stored type, 16 to a vector of 256 bits.
    """
    mask = source.dtype.type(0x7FFFFFFF if source.itemsize == 4 else 0x7FFF)
    top = source.dtype.type(0)
    for i in range(source.size):
        top = max(top, source.dtype.type(source[i] & mask))
    return widened(top, kind)


@jit
def column_tops(source: Array, start: int, stride: int, rows: int, tops: Array) -> None:
    """Largest magnitude of each column, as bits of the stored type."""
    mask = source.dtype.type(0x7FFFFFFF if source.itemsize == 4 else 0x7FFF)
    tops[:] = 0
    for r in range(rows):
        line = source[start + r * stride : start + r * stride + tops.size]
        for i in range(tops.size):
            tops[i] = max(tops[i], source.dtype.type(line[i] & mask))


@jit
def each(what: Any, source: Array, kind: int, by: np.float32, out: Array) -> None:
    """out = what(float32 bits of a value, by) for each value of a row of type `kind`: in one loop, nothing goes through memory."""
    if source.itemsize == 4:  # known when this is compiled, as the rest is then not
        for i in range(source.size):
            out[i] = what(np.uint32(source[i]), by)
    elif kind == 1:
        for i in range(source.size):
            out[i] = what(from_f16(np.uint32(source[i])), by)
    else:
        for i in range(source.size):
            out[i] = what(np.uint32(np.uint32(source[i]) << np.uint32(16)), by)


@jit
def each_run(what: Any, source: Array, kind: int, by: Array, out: Array) -> None:
    """`each`, with a number of its own for every RUN values."""
    for g in range(source.size // RUN):
        line, to, number = source[g * RUN : (g + 1) * RUN], out[g * RUN : (g + 1) * RUN], by[g]
        if source.itemsize == 4:
            for i in range(RUN):
                to[i] = what(np.uint32(line[i]), number)
        elif kind == 1:
            for i in range(RUN):
                to[i] = what(from_f16(np.uint32(line[i])), number)
        else:
            for i in range(RUN):
                to[i] = what(np.uint32(np.uint32(line[i]) << np.uint32(16)), number)
    for i in range(source.size // RUN * RUN, source.size):
        out[i] = what(widened(source[i], kind), by[i // RUN])
