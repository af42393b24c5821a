"""The compiled part of `weight_only`, and of integers laid out as they are. Families are their places in `quants.layout.FAMILIES`."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import load_bits, make_finite, nonfinite, round_bits
from streamconv.kernels.rows import each, magnitude
from streamconv.kernels.scale_code import store_scale


@jit
def prepare_row(source: Array, kind: int, target: int, bits: Array) -> tuple[np.uint32, int, int]:
    """Load a row in the model dtype; gives (bits of its largest finite magnitude, non-finite values, overflows)."""
    top = load_bits(source, kind, bits)
    infinite_before: Any = 0
    if kind != target and target != 0:
        if top >= np.uint32(0x477FF000):
            infinite_before = nonfinite(bits)
        top = round_bits(target, bits)
    if top < np.uint32(0x7F800000):
        return top, 0, 0
    bad, top = make_finite(bits)
    return top, bad, bad - infinite_before if kind != target and target != 0 else 0


@jit
def quantize_row(values: Array, scale: np.float32, half: np.int32, bias: np.int32, q: Array) -> None:
    """q = clip(round half away from zero(value / scale)) + bias, as uint8."""
    if scale == np.float32(0):
        for i in range(q.size):
            q[i] = np.uint8(bias)
        return
    low, high = np.float32(-half), np.float32(half - np.int32(1))
    for i in range(q.size):
        q[i] = np.uint8(whole(np.float32(values[i] / scale), low, high) + bias)


@jit
def whole(y: np.float32, low: np.float32, high: np.float32) -> Any:
    """clip(round half away from zero(y))."""
    # the float before 1/2, with the sign of y: what is left after cutting is rounded half away from zero
    y = np.float32(y + float_of(np.uint32(np.uint32(bits_of(y) & np.uint32(0x80000000)) | np.uint32(0x3EFFFFFF))))
    y = y if y > low else low
    return np.int32(y if y < high else high)


@jit
def int8_code(b: np.uint32, scale: np.float32) -> Any:
    return np.uint8(whole(np.float32(float_of(b) / scale), np.float32(-128), np.float32(127)))


@jit
def offset_code(b: np.uint32, scale: np.float32) -> Any:
    return np.uint8(whole(np.float32(float_of(b) / scale), np.float32(-128), np.float32(127)) + np.int32(128))


@jit
def int8_as_stored(line: Array, kind: int, target: int, bias: np.int32, q: Array) -> np.float32:
    """Codes and scale of a row of finite values that the model dtype leaves as they are, or changes where the code is 0; else 0."""
    top = magnitude(line, kind)
    # from 2**-5 on, what float16 rounds (below 2**-14) is less than half a step of top / 128
    fits = kind == target or target == 0 or (kind == 2 and target == 1 and np.uint32(0x3D000000) <= top and top < np.uint32(0x477FF000))
    if not fits or top < np.uint32(0x04800000) or top >= np.uint32(0x7F800000):  # below it the scale would be subnormal
        return np.float32(0)
    scale = np.float32(float_of(top) * np.float32(0.0078125))
    if bias == np.int32(0):
        each(int8_code, line, kind, scale, q)
    else:
        each(offset_code, line, kind, scale, q)
    return scale


@jit
def spaced(b: np.uint64) -> np.uint64:
    """The four low bytes, each in the low half of 16 bits."""
    b = np.uint64((b | (b << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF))
    return np.uint64((b | (b << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF))


@jit
def weave8(q: Array, out: Array) -> None:
    """int8 block order of families A and D: element i next to element i + 8 of each 16."""
    eights, words = q.view(np.uint64), out.view(np.uint64)
    for block in range(np.uint64(q.size // 16)):
        low, high = eights[np.uint64(2) * block], eights[np.uint64(2) * block + np.uint64(1)]
        words[np.uint64(2) * block] = spaced(low & np.uint64(0xFFFFFFFF)) | (spaced(high & np.uint64(0xFFFFFFFF)) << np.uint64(8))
        words[np.uint64(2) * block + np.uint64(1)] = spaced(low >> np.uint64(32)) | (spaced(high >> np.uint64(32)) << np.uint64(8))


@jit
def weave4(q: Array, out: Array) -> None:
    """int4 block order of families A and D: elements i, i + 8, i + 16, i + 24 of each 32 side by side."""
    eights, words = q.view(np.uint64), out.view(np.uint64)
    for block in range(np.uint64(q.size // 32)):
        at, to = np.uint64(4) * block, np.uint64(2) * block
        low = eights[at] | (eights[at + np.uint64(1)] << np.uint64(4))
        high = eights[at + np.uint64(2)] | (eights[at + np.uint64(3)] << np.uint64(4))
        words[to] = spaced(low & np.uint64(0xFFFFFFFF)) | (spaced(high & np.uint64(0xFFFFFFFF)) << np.uint64(8))
        words[to + np.uint64(1)] = spaced(low >> np.uint64(32)) | (spaced(high >> np.uint64(32)) << np.uint64(8))


@jit
def deal(words: Array, run: np.uint64, out: Array) -> None:
    """Family A: runs of `run` 8-byte words of one channel, 16 words apart, the other channels of its group between them."""
    # unsigned indices: no test for negative ones, so that the inner loop becomes one vector move
    for t in range(np.uint64(words.size) // run):
        to, at = np.uint64(t) * np.uint64(16), np.uint64(t) * run
        for i in range(run):
            out[to + np.uint64(i)] = words[at + np.uint64(i)]


@jit
def two(q: Array, k: np.uint64, step: np.uint64) -> np.uint16:
    """A word of two codes."""
    return np.uint16(np.uint16(q[k]) | (np.uint16(q[k + step]) << np.uint16(8)))


@jit
def four(q: Array, k: np.uint64, step: np.uint64) -> np.uint16:
    """A word of four codes, each in the low bits of its byte."""
    low, high = np.uint16(q[k] & 15) | (np.uint16(q[k + step] & 15) << np.uint16(4)), q[k + step + step] & 15
    return np.uint16(low | (np.uint16(high) << np.uint16(8)) | (np.uint16(q[k + step + step + step] & 15) << np.uint16(12)))


@jit
def lay_out(q: Array, bits: int, family: int, r: int, woven: Array, out: Array) -> None:
    """Codes of a channel, offset where the family has them so, to their place in a layout (`out` as uint16)."""
    cols, each, one = q.size, 16 // bits, np.uint64(1)
    line = out[r * cols // each : (r + 1) * cols // each]
    if family == 0 and bits == 8:
        weave8(q, woven)
        deal(woven.view(np.uint64), np.uint64(8), out.view(np.uint64)[(r // 2) * cols // 4 + (r % 2) * 8 :])
    elif family == 0:
        weave4(q, woven)
        deal(woven.view(np.uint64), np.uint64(4), out.view(np.uint64)[(r // 4) * cols // 4 + (r % 4) * 4 :])
    elif family == 3 and bits == 8:
        weave8(q, line)
    elif family == 3:
        weave4(q, line)
    elif family == 1 and bits == 8:
        for block in range(np.uint64(cols // 4)):
            at, k = np.uint64(2) * block, np.uint64(4) * block
            line[at], line[at + one] = two(q, k, np.uint64(2)), two(q, k + one, np.uint64(2))
    elif family == 1:
        for block in range(np.uint64(cols // 8)):
            at, k = np.uint64(2) * block, np.uint64(8) * block
            line[at], line[at + one] = four(q, k, np.uint64(2)), four(q, k + one, np.uint64(2))
    elif bits == 8:
        for i in range(np.uint64(cols // 2)):
            line[i] = two(q, np.uint64(2) * i, one)
    else:
        for i in range(np.uint64(cols // 4)):
            line[i] = four(q, np.uint64(4) * i, one)


@jit
def integer_rows(
    source: Array, start: int, stride: int, rows: int, cols: int, out: Array, scales: Array,
    kind: int, target: int, bits: int, family: int,
) -> tuple[int, int]:  # fmt: skip
    """Rows -> layout bytes (`out` as uint16) and scales; gives (non-finite, overflow) counts."""
    values, q, woven = np.empty(cols, np.float32), np.empty(cols, np.uint8), np.empty(cols // 16 * bits, np.uint16)
    bad = lost = 0
    half = np.int32(1 << (bits - 1))
    bias = np.int32(0) if family == 2 else half
    for r in range(rows):
        line = source[start + r * stride : start + r * stride + cols]
        scale = int8_as_stored(line, kind, target, bias, q) if bits == 8 else np.float32(0)
        if scale == np.float32(0):
            top, row_bad, row_lost = prepare_row(line, kind, target, values.view(np.uint32))
            bad += row_bad
            lost += row_lost
            scale = np.float32(float_of(top) * np.float32(np.float32(1) / np.float32(half)))
            quantize_row(values, scale, half, bias, q)
        store_scale(target, scale, scales, r)
        lay_out(q, bits, family, r, woven, out)
    return bad, lost


@jit
def packed_rows(source: Array, start: int, stride: int, rows: int, cols: int, out: Array, bits: int, family: int) -> None:
    """Rows of signed integers (int8 as uint8) -> layout bytes (`out` as uint16)."""
    q, woven = np.empty(cols, np.uint8), np.empty(cols // 16 * bits, np.uint16)
    mask, flip = np.uint8(255 if bits == 8 else 15), np.uint8(0 if family == 2 else 1 << (bits - 1))
    for r in range(rows):
        line = source[start + r * stride : start + r * stride + cols]
        for i in range(cols):
            q[i] = (line[i] & mask) ^ flip
        lay_out(q, bits, family, r, woven, out)


@jit
def paired_rows(q: Array, start: int, stride: int, rows: int, cols: int, out: Array) -> None:
    """Rows of int8 in -8..7 (as uint8) -> two neighbouring rows in a byte, the even one in the low nibble."""
    for pair in range(rows // 2):
        even, at = start + 2 * pair * stride, pair * cols
        for k in range(cols):
            out[at + k] = (q[even + k] & np.uint8(15)) | np.uint8(q[even + stride + k] << np.uint8(4))
