"""The compiled part of `weight_only`. Layout families are numbers: 0 A, 1 B, 2 C, 3 D (quantization spec §3)."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import jit
from streamconv.kernels.rows import load_row, round_row, to_bf16, to_f16

_Array = np.ndarray[Any, Any]


@jit
def prepare_row(
    source: _Array, start: int, cols: int, kind: int, target: int, half: _Array, bits: _Array, values: _Array
) -> tuple[np.uint32, int, int]:
    """Load a row in the model dtype; gives (bits of its largest finite magnitude, non-finite values, overflows)."""
    load_row(source, start, cols, kind, bits, values)
    before = np.uint32(0)
    for i in range(cols):
        before = max(before, bits[i] & np.uint32(0x7FFFFFFF))
    finite_before: Any = 0
    if kind != target and target != 0:
        if before >= np.uint32(0x477FF000):
            for i in range(cols):
                finite_before += np.int64((bits[i] & np.uint32(0x7FFFFFFF)) < np.uint32(0x7F800000))
        round_row(cols, target, half, bits, values)
    top = np.uint32(0)
    for i in range(cols):
        top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
    if top < np.uint32(0x7F800000):
        return top, 0, 0
    bad = 0
    top = np.uint32(0)
    for i in range(cols):
        a = bits[i] & np.uint32(0x7FFFFFFF)
        if a >= np.uint32(0x7F800000):
            bad += 1
        else:
            top = max(top, a)
    for i in range(cols):
        a = bits[i] & np.uint32(0x7FFFFFFF)
        if a > np.uint32(0x7F800000):
            bits[i] = np.uint32(0)
        elif a == np.uint32(0x7F800000):
            bits[i] = top | (bits[i] & np.uint32(0x80000000))
    lost = max(0, bad - (cols - finite_before)) if finite_before else 0
    return top, bad, lost


@jit
def quantize_row(values: _Array, cols: int, scale: np.float32, half: np.int32, bias: np.int32, q: _Array) -> None:
    """q = clip(round half away from zero(value / scale)) + bias, as uint8."""
    if scale == np.float32(0):
        for i in range(cols):
            q[i] = np.uint8(bias)
        return
    for i in range(cols):
        y = values[i] / scale
        t = np.int32(y)
        r = y - np.float32(t)
        t = t + np.int32(r >= np.float32(0.5)) - np.int32(r <= np.float32(-0.5))
        t = max(-half, min(half - np.int32(1), t))
        q[i] = np.uint8(t + bias)


@jit
def store_scale(scales: _Array, row: int, scale: _Array, target: int) -> None:
    """Store a scale (uint32 view of one float32) in the model dtype."""
    if target == 0:
        scales[row] = scale[0]
    elif target == 1:
        scales[row] = to_f16(scale[0])
    else:
        scales[row] = to_bf16(scale[0])


@jit
def int8_rows(
    source: _Array,
    start: int,
    stride: int,
    rows: int,
    cols: int,
    out: _Array,
    scales: _Array,
    kind: int,
    target: int,
    family: int,
) -> tuple[int, int]:
    """Rows -> int8 layout bytes (`out` as uint16) and scales; gives (non-finite, overflow) counts."""
    values = np.empty(cols, np.float32)
    bits = values.view(np.uint32)
    half_scratch = np.empty(cols, np.uint16)
    q = np.empty(cols, np.uint8)
    one = np.empty(1, np.float32)
    one_bits = one.view(np.uint32)
    bad = lost = 0
    bias = np.int32(0) if family == 2 else np.int32(128)
    for r in range(rows):
        top, b, o = prepare_row(source, start + r * stride, cols, kind, target, half_scratch, bits, values)
        bad += b
        lost += o
        one_bits[0] = top
        one[0] = one[0] * np.float32(0.0078125)
        quantize_row(values, cols, one[0], np.int32(128), bias, q)
        store_scale(scales, r, one_bits, target)
        if family == 0:
            base = (r // 2) * cols + (r % 2) * 32
            for t in range(cols // 64):
                at = base + t * 64
                for block in range(4):
                    for i in range(8):
                        k = t * 64 + block * 16 + i
                        out[at + block * 8 + i] = np.uint16(q[k]) | (np.uint16(q[k + 8]) << np.uint16(8))
        elif family == 3:
            base = r * cols // 2
            for block in range(cols // 16):
                for i in range(8):
                    k = block * 16 + i
                    out[base + block * 8 + i] = np.uint16(q[k]) | (np.uint16(q[k + 8]) << np.uint16(8))
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
    source: _Array,
    start: int,
    stride: int,
    rows: int,
    cols: int,
    out: _Array,
    scales: _Array,
    kind: int,
    target: int,
    family: int,
) -> tuple[int, int]:
    """Rows -> int4 layout bytes (`out` as uint16, four nibbles each) and scales; gives (non-finite, overflow) counts."""
    values = np.empty(cols, np.float32)
    bits = values.view(np.uint32)
    half_scratch = np.empty(cols, np.uint16)
    q = np.empty(cols, np.uint8)
    one = np.empty(1, np.float32)
    one_bits = one.view(np.uint32)
    bad = lost = 0
    bias = np.int32(0) if family == 2 else np.int32(8)
    for r in range(rows):
        top, b, o = prepare_row(source, start + r * stride, cols, kind, target, half_scratch, bits, values)
        bad += b
        lost += o
        one_bits[0] = top
        one[0] = one[0] * np.float32(0.125)
        quantize_row(values, cols, one[0], np.int32(8), bias, q)
        store_scale(scales, r, one_bits, target)
        if family == 0:
            base = (r // 4) * cols + (r % 4) * 16
            for t in range(cols // 64):
                at = base + t * 64
                for block in range(2):
                    for i in range(8):
                        k = t * 64 + block * 32 + i
                        out[at + block * 8 + i] = (
                            np.uint16(q[k])
                            | (np.uint16(q[k + 8]) << np.uint16(4))
                            | (np.uint16(q[k + 16]) << np.uint16(8))
                            | (np.uint16(q[k + 24]) << np.uint16(12))
                        )
        elif family == 3:
            base = r * cols // 4
            for block in range(cols // 32):
                for i in range(8):
                    k = block * 32 + i
                    out[base + block * 8 + i] = (
                        np.uint16(q[k])
                        | (np.uint16(q[k + 8]) << np.uint16(4))
                        | (np.uint16(q[k + 16]) << np.uint16(8))
                        | (np.uint16(q[k + 24]) << np.uint16(12))
                    )
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
