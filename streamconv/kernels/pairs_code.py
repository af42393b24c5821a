"""A row as pairs of neighbouring columns: both codes of a packed byte come from the same lane of two vectors.

Loops go over a whole row: one for each group would begin with tests for overlap, and slices with tests of their ends and counts.
Types are numbers: 0 float32, 1 float16, 2 bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamconv.kernels.jit import Array, bits_of, float_of, jit
from streamconv.kernels.nearest import load_finite, round_bits
from streamconv.kernels.scale_code import store_scale


@jit
def each_pair(what: Any, words: Array, packed: bool, steps: Array, half: np.float32, offset: np.float32, out: Array) -> None:
    """out = what(float32 bits of an even column, of the odd one after it, the pair's step, half, offset).

    Args:
        words: uint32; `packed`: two bfloat16 in each, else float32 bits.
    """
    if packed:
        for i in range(out.size):
            word = np.uint32(words[i])
            out[i] = what(np.uint32(word << np.uint32(16)), np.uint32(word & np.uint32(0xFFFF0000)), steps[i], half, offset)
    else:
        for i in range(out.size):
            out[i] = what(np.uint32(words[2 * i]), np.uint32(words[2 * i + 1]), steps[i], half, offset)


@jit
def larger(even: np.uint32, odd: np.uint32, step: np.float32, half: np.float32, offset: np.float32) -> np.uint32:
    """The larger magnitude."""
    return max(np.uint32(even & np.uint32(0x7FFFFFFF)), np.uint32(odd & np.uint32(0x7FFFFFFF)))


@jit
def halve(tops: Array, count: int, out: Array) -> None:
    for i in range(count):
        out[i] = max(tops[2 * i], tops[2 * i + 1])


@jit
def group_tops(tops: Array, each: int, other: Array) -> Array:
    """The largest of each `each` numbers, at the beginning of an array: one of the two given, both of which are overwritten."""
    count = tops.size
    while each % 2 == 0:
        count, each = count // 2, each // 2
        halve(tops, count, other)
        tops, other = other, tops
    if each > 1:
        for g in range(count // each):
            top = tops[g * each]
            for i in range(np.uint64(g * each), np.uint64((g + 1) * each)):
                top = max(top, tops[i])
            tops[g] = top
    return tops


@jit
def tops_of(line: Array, group: int, tops: Array) -> None:
    """Largest magnitude of each group of a row of float32 bits, or of bfloat16 numbers, as float32 bits."""
    mask = line.dtype.type(0x7FFFFFFF if line.itemsize == 4 else 0x7FFF)
    for g in range(line.size // group):
        at, top = np.uint64(g * group), line.dtype.type(0)
        for i in range(np.uint64(group)):
            top = max(top, line.dtype.type(line[at + i] & mask))
        tops[g] = np.uint32(np.uint32(top) << np.uint32(0 if line.itemsize == 4 else 16))


@jit
def group_tops_of(line: Array, words: Array, packed: bool, each: int, tops: Array, other: Array) -> Any:
    """The largest magnitude of each `each` pairs, at the beginning of `tops` or `other`."""
    if each >= 32:
        tops_of(line, 2 * each, tops)
        return tops
    nothing = np.float32(0)
    each_pair(larger, words, packed, tops.view(np.float32), nothing, nothing, tops)
    return group_tops(tops, each, other)


@jit
def pairs_of(line: Array, kind: int, each: int, bits: Array, tops: Array, other: Array) -> Any:
    """A row for `each_pair`, `packed`, the largest magnitude of each `each` pairs, and how many values were not finite.

    Args:
        bits: room for the row as float32 bits, and one more if its length is odd; `tops`, `other`: for a number of each pair.
    """
    if kind == 2 and line.size % 2 == 0:
        words = line.view(np.uint32)
        group_tops, top = group_tops_of(line, words, True, each, tops, other), np.uint32(0)
        for g in range(tops.size // each):
            top = max(top, group_tops[g])
        if top < np.uint32(0x7F800000):
            return words, True, group_tops, 0
    bad = load_finite(line, kind, bits[: line.size])
    return bits, False, group_tops_of(bits, bits, False, each, tops, other), bad


@jit
def group_steps(
    tops: Array, divisor: np.float32, kind: int, zero: np.float32, floor: np.float32, steps: Array, out: Array, first: int
) -> None:  # fmt: skip
    """As `scale_from`, of each group; stored from the place `first` on."""
    for g in range(steps.size):
        steps[g] = np.float32(float_of(tops[g]) / divisor)
    round_bits(kind, steps.view(np.uint32))
    for g in range(steps.size):
        step = zero if steps[g] == np.float32(0) else steps[g]
        steps[g] = step if step > floor else floor
        store_scale(kind, steps[g], out, first + g)


@jit
def double(few: Array, count: int, many: Array) -> None:
    for i in range(count):
        many[2 * i], many[2 * i + 1] = few[i], few[i]


@jit
def spread(few: Array, each: int, many: Array, other: Array) -> Array:
    """Every number `each` times: one of the two arrays given, both of which are overwritten."""
    if each == 8 or each == 16:
        double(few, few.size, many)
        for times in range(1, 4 if each == 16 else 3):
            double(many, few.size << times, other)
            many, other = other, many
        return many
    for g in range(few.size):
        number = few[g]
        for i in range(np.uint64(g * each), np.uint64((g + 1) * each)):
            many[i] = number
    return many


@jit
def to_int(y: np.float32, low: np.float32, high: np.float32, offset: np.float32) -> np.uint32:
    """RNE(clamp(y, low, high)) + offset, an even number, in the lowest 16 bits."""
    y = y if y > low else low
    y = y if y < high else high
    # adding 1.5 * 2**23 leaves the integer, rounded half to even, in the lowest bits
    return np.uint32(bits_of(np.float32(y + np.float32(np.float32(12582912) + offset))))


@jit
def int4_pair(even: np.uint32, odd: np.uint32, step: np.float32, half: np.float32, offset: np.float32) -> np.uint8:
    """Codes with an offset of 8, the even column's in the low nibble."""
    low, high = np.float32(-8), np.float32(7)
    first = to_int(np.float32(float_of(even) / step), low, high, np.float32(8))
    second = to_int(np.float32(float_of(odd) / step), low, high, np.float32(8))
    return np.uint8(np.uint32(first | np.uint32(second << np.uint32(4))))


@jit
def int8_pair(even: np.uint32, odd: np.uint32, step: np.float32, half: np.float32, offset: np.float32) -> np.uint16:
    """Codes in two bytes, the even column's in the low one."""
    low, high = np.float32(-half), np.float32(half - np.float32(1))
    first = to_int(np.float32(float_of(even) / step), low, high, offset)
    second = to_int(np.float32(float_of(odd) / step), low, high, offset)
    return np.uint16(np.uint32(np.uint32(first & np.uint32(0xFF)) | np.uint32(second << np.uint32(8))))
