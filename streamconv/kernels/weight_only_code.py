"""The compiled part of `weight_only`. Layout families are their places in `quants.layout.FAMILIES`."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import load_bits, nonfinite, round_bits
from streamconv.kernels.rows import each, magnitude, to_bf16, to_f16


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
    bad = 0
    top = np.uint32(0)
    for i in range(bits.size):
        a = bits[i] & np.uint32(0x7FFFFFFF)
        if a >= np.uint32(0x7F800000):
            bad += 1
        else:
            top = max(top, a)
    for i in range(bits.size):
        a = bits[i] & np.uint32(0x7FFFFFFF)
        if a > np.uint32(0x7F800000):
            bits[i] = np.uint32(0)
        elif a == np.uint32(0x7F800000):
            bits[i] = top | (bits[i] & np.uint32(0x80000000))
    lost = bad - infinite_before if kind != target and target != 0 else 0
    return top, bad, lost


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
def int8_as_stored(line: Array, kind: int, target: int, bias: np.int32, q: Array, scale: Array) -> bool:
    """Codes and scale of a row of finite values that the model dtype leaves as they are, or changes where the code is 0; else False."""
    top = magnitude(line, kind)
    # from 2**-5 on, what float16 rounds (below 2**-14) is less than half a step of top / 128
    fits = kind == target or target == 0 or (kind == 2 and target == 1 and np.uint32(0x3D000000) <= top and top < np.uint32(0x477FF000))
    if not fits or top < np.uint32(0x04800000) or top >= np.uint32(0x7F800000):  # below it the scale would be subnormal
        return False
    scale[0] = float_of(top) * np.float32(0.0078125)
    if bias == np.int32(0):
        each(int8_code, line, kind, scale[0], q)
    else:
        each(offset_code, line, kind, scale[0], q)
    return True


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
def store_scale(scales: Array, row: int, scale: Array, target: int) -> None:
    """Store a scale (uint32 view of one float32) in the model dtype."""
    if target == 0:
        scales[row] = scale[0]
    elif target == 1:
        scales[row] = to_f16(scale[0])
    else:
        scales[row] = to_bf16(scale[0])


@jit
def int8_rows(
    source: Array,
    start: int,
    stride: int,
    rows: int,
    cols: int,
    out: Array,
    scales: Array,
    kind: int,
    target: int,
    family: int,
) -> tuple[int, int]:
    """Rows -> int8 layout bytes (`out` as uint16) and scales; gives (non-finite, overflow) counts."""
    values = np.empty(cols, np.float32)
    bits = values.view(np.uint32)
    q = np.empty(cols, np.uint8)
    woven = np.empty(cols // 8 * 4, np.uint16)
    words = woven.view(np.uint64)
    one = np.empty(1, np.float32)
    one_bits = one.view(np.uint32)
    bad = lost = 0
    bias = np.int32(0) if family == 2 else np.int32(128)
    for r in range(rows):
        line = source[start + r * stride : start + r * stride + cols]
        if not int8_as_stored(line, kind, target, bias, q, one):
            one_bits[0], b, o = prepare_row(line, kind, target, bits)
            bad += b
            lost += o
            one[0] = one[0] * np.float32(0.0078125)
            quantize_row(values, one[0], np.int32(128), bias, q)
        store_scale(scales, r, one_bits, target)
        if family == 0:
            weave8(q, woven)
            deal(words, np.uint64(8), out.view(np.uint64)[(r // 2) * cols // 4 + (r % 2) * 8 :])
        elif family == 3:
            weave8(q, out[r * cols // 2 : (r + 1) * cols // 2])
        elif family == 1:
            base = r * cols // 2
            for block in range(cols // 4):
                k = block * 4
                out[base + block * 2] = np.uint16(q[k]) | (np.uint16(q[k + 2]) << np.uint16(8))
                out[base + block * 2 + 1] = np.uint16(q[k + 1]) | (np.uint16(q[k + 3]) << np.uint16(8))
        else:
            base = r * cols // 2
            for i in range(cols // 2):
                out[base + i] = np.uint16(q[2 * i]) | (np.uint16(q[2 * i + 1]) << np.uint16(8))
    return bad, lost


@jit
def int4_rows(
    source: Array,
    start: int,
    stride: int,
    rows: int,
    cols: int,
    out: Array,
    scales: Array,
    kind: int,
    target: int,
    family: int,
) -> tuple[int, int]:
    """Rows -> int4 layout bytes (`out` as uint16, four nibbles each) and scales; gives (non-finite, overflow) counts."""
    values = np.empty(cols, np.float32)
    bits = values.view(np.uint32)
    q = np.empty(cols, np.uint8)
    woven = np.empty(cols // 16 * 4, np.uint16)
    words = woven.view(np.uint64)
    one = np.empty(1, np.float32)
    one_bits = one.view(np.uint32)
    bad = lost = 0
    bias = np.int32(0) if family == 2 else np.int32(8)
    for r in range(rows):
        top, b, o = prepare_row(source[start + r * stride : start + r * stride + cols], kind, target, bits)
        bad += b
        lost += o
        one_bits[0] = top
        one[0] = one[0] * np.float32(0.125)
        quantize_row(values, one[0], np.int32(8), bias, q)
        store_scale(scales, r, one_bits, target)
        if family == 0:
            weave4(q, woven)
            deal(words, np.uint64(4), out.view(np.uint64)[(r // 4) * cols // 4 + (r % 4) * 4 :])
        elif family == 3:
            weave4(q, out[r * cols // 4 : (r + 1) * cols // 4])
        else:
            base = r * cols // 4
            for block in range(cols // 8):
                k = block * 8
                if family == 1:
                    low = np.uint16(q[k]) | (np.uint16(q[k + 2]) << np.uint16(4))
                    low |= (np.uint16(q[k + 4]) << np.uint16(8)) | (np.uint16(q[k + 6]) << np.uint16(12))
                    high = np.uint16(q[k + 1]) | (np.uint16(q[k + 3]) << np.uint16(4))
                    high |= (np.uint16(q[k + 5]) << np.uint16(8)) | (np.uint16(q[k + 7]) << np.uint16(12))
                else:
                    low = np.uint16(q[k] & 15) | (np.uint16(q[k + 1] & 15) << np.uint16(4))
                    low |= (np.uint16(q[k + 2] & 15) << np.uint16(8)) | (np.uint16(q[k + 3] & 15) << np.uint16(12))
                    high = np.uint16(q[k + 4] & 15) | (np.uint16(q[k + 5] & 15) << np.uint16(4))
                    high |= (np.uint16(q[k + 6] & 15) << np.uint16(8)) | (np.uint16(q[k + 7] & 15) << np.uint16(12))
                out[base + block * 2] = low
                out[base + block * 2 + 1] = high
    return bad, lost
