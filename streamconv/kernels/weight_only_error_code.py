"""How far stored integers are from the source, in one pass over each row: the inverse of `weight_only_code`, written on its own.

Sums run in lanes in a fixed order, so that they are the same on every processor.
"""

from __future__ import annotations

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import load_bits

_NIBBLES = np.uint64(0x000F000F000F000F)
LANES = 256
"""Columns whose sums are kept apart: one vector operation after the other, and the same order of additions everywhere."""


@jit
def _even(x: np.uint64) -> np.uint64:
    """Bytes 0, 2, 4 and 6 side by side."""
    x = x & np.uint64(0x00FF00FF00FF00FF)
    x = (x | (x >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
    return (x | (x >> np.uint64(16))) & np.uint64(0xFFFFFFFF)


@jit
def unpack8(words: Array, run: int, apart: int, q: Array, family: int) -> None:
    """int8 words (uint16) of one row -> codes, offset by 128; families as in `weight_only_code`.

    Args:
        run: words of the row that lie side by side; the next run begins `apart` words later.
    """
    if family == 0 or family == 3:
        packed, to = words.view(np.uint64), q.view(np.uint64)
        for begin in range(q.size // 2 // run):
            source, at = packed[begin * apart // 4 : (begin * apart + run) // 4], begin * run // 4
            for block in range(run // 8):  # eight words: the low bytes of all, then the high ones
                a, b = source[2 * block], source[2 * block + 1]
                to[at + 2 * block] = _even(a) | (_even(b) << np.uint64(32))
                to[at + 2 * block + 1] = _even(a >> np.uint64(8)) | (_even(b >> np.uint64(8)) << np.uint64(32))
        return
    at = 0
    for begin in range(q.size // 2 // run):
        part = words[begin * apart : begin * apart + run]
        if family == 1:
            for block in range(run // 2):
                for i in range(2):
                    q[at + block * 4 + i] = np.uint8(part[block * 2 + i] & np.uint16(255))
                    q[at + block * 4 + 2 + i] = np.uint8(part[block * 2 + i] >> np.uint16(8))
        else:
            for i in range(run):
                q[at + 2 * i] = np.uint8(part[i] & np.uint16(255)) ^ np.uint8(128)
                q[at + 2 * i + 1] = np.uint8(part[i] >> np.uint16(8)) ^ np.uint8(128)
        at += run * 2


@jit
def unpack4(words: Array, run: int, apart: int, q: Array, family: int) -> None:
    """int4 words (four in a uint16) of one row -> codes, offset by 8; see `unpack8`."""
    if family == 0 or family == 3:
        packed, to = words.view(np.uint64), q.view(np.uint64)
        for begin in range(q.size // 4 // run):
            source, at = packed[begin * apart // 4 : (begin * apart + run) // 4], begin * run // 2
            for block in range(run // 8):  # eight words: the lowest nibbles of all, then the next ones
                a, b = source[2 * block], source[2 * block + 1]
                for j in range(4):
                    low, high = (a >> np.uint64(4 * j)) & _NIBBLES, (b >> np.uint64(4 * j)) & _NIBBLES
                    to[at + 4 * block + j] = _even(low) | (_even(high) << np.uint64(32))
        return
    at = 0
    for begin in range(q.size // 4 // run):
        part = words[begin * apart : begin * apart + run]
        for block in range(run // 2):
            for side in range(2):
                for j in range(4):
                    code = np.uint8((part[block * 2 + side] >> np.uint16(4 * j)) & np.uint16(15))
                    if family == 1:
                        q[at + block * 8 + 2 * j + side] = code
                    else:
                        q[at + block * 8 + 4 * side + j] = code ^ np.uint8(8)
        at += run * 4


@jit
def _gap(value: np.float32, code: np.uint8, half: np.float32, scale: np.float32) -> np.float32:
    return np.float32(np.float32(np.float32(np.float32(code) - half) * scale) - value)


@jit
def _size(value: np.float32) -> np.uint32:
    """A magnitude as bits, which have its order: a maximum of floats is no vector operation."""
    return np.uint32(bits_of(value) & np.uint32(0x7FFFFFFF))


@jit
def compare_row(
    source: Array, q: Array, scale: np.float32, top: np.float32, limits: Array, sums: Array, lanes: Array
) -> bool:
    """Add a row to the sums; False if a value is farther off than it may be.

    Args:
        source: float32.
        q: codes, offset by `limits[0]`; they count `scale` each.
        top: largest finite magnitude of the source.
        limits: (integers on a side, relative and absolute slack for the casts).
        sums: [noise, signal, largest error, largest value].
        lanes: float32 [2, LANES] to work in.
    """
    half = limits[0]
    step = np.float32(top / half)
    bound = np.float32(step * np.float32(0.5) + top * limits[1] + limits[2])
    lanes[:] = np.float32(0)
    noise, signal = lanes[0], lanes[1]
    far = np.uint32(0)
    whole = source.size // (4 * LANES) * (4 * LANES)
    for begin in range(0, whole, 4 * LANES):
        v, c = source[begin : begin + 4 * LANES], q[begin : begin + 4 * LANES]
        v0, v1, v2, v3 = v[:LANES], v[LANES : 2 * LANES], v[2 * LANES : 3 * LANES], v[3 * LANES :]
        c0, c1, c2, c3 = c[:LANES], c[LANES : 2 * LANES], c[2 * LANES : 3 * LANES], c[3 * LANES :]
        for i in range(LANES):
            e, f, g, h = v0[i], v1[i], v2[i], v3[i]
            ge, gf = _gap(e, c0[i], half, scale), _gap(f, c1[i], half, scale)
            gg, gh = _gap(g, c2[i], half, scale), _gap(h, c3[i], half, scale)
            noise[i] += np.float32(np.float32(ge * ge + gf * gf) + np.float32(gg * gg + gh * gh))
            signal[i] += np.float32(np.float32(e * e + f * f) + np.float32(g * g + h * h))
            far = max(far, max(max(_size(ge), _size(gf)), max(_size(gg), _size(gh))))
    for begin in range(whole, source.size, LANES):
        v, c = source[begin : begin + LANES], q[begin : begin + LANES]
        for i in range(v.size):
            gap = _gap(v[i], c[i], half, scale)
            noise[i] += np.float32(gap * gap)
            signal[i] += np.float32(v[i] * v[i])
            far = max(far, _size(gap))
    for i in range(LANES):
        sums[0] += np.float64(noise[i])
        sums[1] += np.float64(signal[i])
    sums[2], sums[3] = max(sums[2], np.float64(float_of(far))), max(sums[3], np.float64(top))
    near, wide = bits_of(bound), bits_of(np.float32(bound + step))
    if far <= near:
        return True
    last = np.float32((half - np.float32(1.5)) * step)  # above it the next integer would be one too many
    wrong = np.uint32(0)
    for i in range(source.size):
        size = _size(_gap(source[i], q[i], half, scale))
        wrong |= np.uint32(size > (wide if source[i] > last else near))
    return bool(wrong == 0)


@jit
def integer_errors(
    source: Array, start: int, stride: int, rows: int, cols: int, words: Array, scales: Array,
    kind: int, bits: int, family: int, limits: Array, sums: Array,
) -> int:  # fmt: skip
    """Rows of a mixed-GEMM layout against their source; gives how many rows hold a value that is farther off than it may be.

    Args:
        source, start, stride, kind: as of `weight_only_code.integer_rows`; `words` is its output.
        scales: float32 of each row, as stored.
        limits, sums: see `compare_row`.
    """
    values = np.empty(cols, np.float32)
    pattern = values.view(np.uint32)
    q = np.empty(cols, np.uint8)
    lanes = np.empty((2, LANES), np.float32)
    each = 16 // bits
    wrong = 0
    for r in range(rows):
        highest = load_bits(source[start + r * stride : start + r * stride + cols], kind, pattern)
        if family == 0:
            group = 2 if bits == 8 else 4
            run = 64 // each
            line = words[(r // group) * group * (cols // each) + (r % group) * run :]
            apart = group * run
        else:
            run, apart, line = cols // each, cols // each, words[r * (cols // each) : (r + 1) * (cols // each)]
        if bits == 8:
            unpack8(line, run, apart, q, family)
        else:
            unpack4(line, run, apart, q, family)
        if highest >= np.uint32(0x7F800000):  # values that are not finite have no error
            for i in range(cols):
                if (pattern[i] & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F800000):
                    values[i] = np.float32(0)
                    q[i] = np.uint8(limits[0])
            highest = np.uint32(0)
            for i in range(cols):
                highest = max(highest, np.uint32(pattern[i] & np.uint32(0x7FFFFFFF)))
        if not compare_row(values, q, scales[r], float_of(highest), limits, sums, lanes):
            wrong += 1
    return wrong
