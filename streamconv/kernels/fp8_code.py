"""The compiled part of `fp8`."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import load_bits, make_finite, round_bits
from streamconv.kernels.rows import BLOCK, each, magnitude
from streamconv.kernels.scale_code import divide, scale_from, store_scale


@jit
def to_e4m3(value: np.float32) -> np.uint8:
    """float32 -> e4m3 bits, nearest even, subnormals kept, at most 448; no NaN, which nobody asks for. It vectorizes."""
    b = bits_of(value)
    a = np.uint32(b & np.uint32(0x7FFFFFFF))
    a = a if a < np.uint32(0x43E00000) else np.uint32(0x43E00000)
    # e4m3's unit at 2**e, at least 2**-6, is that of float32 at 2**(e+20): their sum's last bits count units, rounded half to even.
    # e4m3's exponent has a bias of 7 and not of 127: 0x38 is -8 * 121 in the last byte; it is even, so ties stay as they are
    exponent = np.uint32(max(a, np.uint32(0x3C800000)) & np.uint32(0x7F800000))
    counted = bits_of(np.float32(float_of(a) + float_of(np.uint32(exponent + np.uint32((20 << 23) + 0x38)))))
    code = np.uint32(np.uint32(counted + np.uint32(exponent >> np.uint32(20))) & np.uint32(0x7F))
    return np.uint8(code | np.uint32(np.uint32(b >> np.uint32(24)) & np.uint32(0x80)))


@jit
def repair(bits: Array) -> int:
    """NaN becomes 0, infinity stays; gives how many there were of both."""
    bad = 0
    for i in range(bits.size):
        a = bits[i] & np.uint32(0x7FFFFFFF)
        if a >= np.uint32(0x7F800000):
            bad += 1
            if a > np.uint32(0x7F800000):
                bits[i] = np.uint32(0)
    return bad


@jit
def e4m3_quotient(b: np.uint32, scale: np.float32) -> Any:
    return to_e4m3(np.float32(float_of(b) / scale))


@jit
def e4m3_product(b: np.uint32, factor: np.float32) -> Any:
    return to_e4m3(np.float32(float_of(b) * factor))


@jit
def rounded_quotients(bits: Array, scale: np.float32, quotient: int, out: Array) -> None:
    """e4m3(value / scale), the quotient rounded to type `quotient` first; `bits` is lost."""
    divide(bits, scale, quotient, bits.view(np.float32))
    for i in range(bits.size):
        out[i] = to_e4m3(float_of(bits[i]))


@jit
def fp8_rows(
    source: Array,
    start: int,
    stride: int,
    rows: int,
    cols: int,
    out: Array,
    scales: Array,
    kind: int,
    model: int,
    scale_kind: int,
    quotient: int,
    lo: np.float32,
    hi: np.float32,
    floor: np.float32,
    zero: np.float32,
) -> int:
    """Rows of type `kind`, rounded to type `model` -> e4m3 bytes and scales; gives how many values were NaN or infinite."""
    bits = np.empty(cols, np.uint32)
    bad = 0
    least = min(-lo, hi)
    for r in range(rows):
        line, to = source[start + r * stride : start + r * stride + cols], out[r * cols : (r + 1) * cols]
        top = magnitude(line, kind)
        as_it_is = model == kind and quotient == 0 and top < np.uint32(0x7F800000) and float_of(top) <= least
        if not as_it_is:
            load_bits(line, kind, bits)
            if model != kind:
                top = round_bits(model, bits)
            if top >= np.uint32(0x7F800000):
                bad += make_finite(bits)[0] if hi == np.float32(np.inf) else repair(bits)
        if top >= np.uint32(0x7F800000) or float_of(top) > least:
            top = np.uint32(0)
            for i in range(cols):
                value = float_of(bits[i])
                value = value if value > lo else lo
                value = value if value < hi else hi
                bits[i] = bits_of(value)
                top = max(top, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
        scale = scale_from(top, np.float32(448), scale_kind, zero, floor)
        store_scale(scale_kind, scale, scales, r)
        if as_it_is:
            each(e4m3_quotient, line, kind, scale, to)
        else:
            rounded_quotients(bits, scale, quotient, to)
    return bad


@jit
def fp8_tensor_rows(source: Array, start: int, stride: int, rows: int, cols: int, out: Array, kind: int, scale: np.float32) -> int:
    """Rows -> e4m3 bytes by one scale; gives how many values were NaN or infinite."""
    bits = np.empty(min(cols, BLOCK), np.uint32)
    bad = 0
    for r in range(rows):
        for c in range(0, cols, BLOCK):
            part = bits[: min(BLOCK, cols - c)]
            at, to = start + r * stride + c, r * cols + c
            line, row = source[at : at + part.size], out[to : to + part.size]
            if magnitude(line, kind) >= np.uint32(0x7F800000):
                load_bits(line, kind, part)
                bad += repair(part)
                rounded_quotients(part, scale, 0, row)
            else:
                each(e4m3_quotient, line, kind, scale, row)
    return bad


@jit
def finite_maximum(source: Array, kind: int) -> np.uint32:
    """Bits of type `kind` (0 float32, 1 float16, 2 bfloat16) of the largest finite magnitude."""
    limit = np.uint32(0x7F800000) if kind == 0 else np.uint32(0x7C00) if kind == 1 else np.uint32(0x7F80)
    mask = np.uint32(0x7FFFFFFF) if kind == 0 else np.uint32(0x7FFF)
    top = np.uint32(0)
    for i in range(source.size):
        a = np.uint32(np.uint32(source[i]) & mask)
        a = a if a < limit else np.uint32(0)
        top = max(top, a)
    return top
