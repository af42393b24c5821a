"""Triton kernels of the codecs, bit for bit the torch definitions. Needs triton: imported by `launch` alone.

Launched with enable_fp_fusion=False: where torch rounds a product and then a sum, so do these. Divisions are div_rn, the others of
Triton are approximate. bfloat16 comes and goes as int16: Triton's interpreter does not round it as devices do. Each kernel is told
the first source element, the stride between rows and the columns; outputs are dense. `counts` is int32: [nonfinite, overflow], added to.
"""

# mypy: ignore-errors
# (triton is not there where no GPU is, and its language has no types)

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
EVEN = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to the nearest integer, ties to even."""


@triton.jit
def _wide(raw):
    """Elements as they were loaded -> float32."""
    if raw.dtype == tl.int16:
        value = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = raw.to(tl.float32)
    return value


@triton.jit
def _rounded(value, MODEL: tl.constexpr):
    """float32 -> the nearest value of MODEL, ties to even, as float32."""
    if MODEL == "BF16":
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        rounded = tl.where(value == value, rounded, float("nan"))
    elif MODEL == "F16":
        rounded = value.to(tl.float16).to(tl.float32)
    else:
        rounded = value
    return rounded


@triton.jit
def _stored(value, MODEL: tl.constexpr):
    """A value of MODEL in float32 -> what is stored."""
    if MODEL == "BF16":
        stored = (value.to(tl.uint32, bitcast=True) >> 16).to(tl.int16)
    elif MODEL == "F16":
        stored = value.to(tl.float16)
    else:
        stored = value
    return stored


@triton.jit
def cast(
    x, out, counts, total, cols, stride,
    MODEL: tl.constexpr, ADD_ONE: tl.constexpr, VIA_HALF: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`Plain`: element by element. A program takes BLOCK elements of the whole block."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    row = at // cols
    raw = tl.load(x + row * stride + (at - row * cols), mask=inside, other=0)
    value = _wide(raw)
    if ADD_ONE:
        value = value + 1.0
        if x.dtype.element_ty == tl.float16:
            value = value.to(tl.float16).to(tl.float32)
    result = value
    if VIA_HALF:
        result = result.to(tl.float16).to(tl.float32)
    result = _rounded(result, MODEL)
    tl.store(out + at, _stored(result, MODEL), mask=inside)
    if COUNT:
        over = (tl.abs(result) == INFINITY) & (tl.abs(value) != INFINITY) & inside
        count = tl.sum(over.to(tl.int32), 0)
        tl.atomic_add(counts + 1, count, mask=count > 0)


@triton.jit
def _integer(x, table, place, inside, top, scale, MODEL: tl.constexpr, PERIOD: tl.constexpr, HALF: tl.constexpr, BIASED: tl.constexpr):
    """The integers that a row's output elements `place` hold, as unsigned bits in int32."""
    col = place
    if PERIOD > 1:
        block = place // PERIOD
        col = block * PERIOD + tl.load(table + (place - block * PERIOD), mask=inside, other=0)
    value = _rounded(_wide(tl.load(x + col, mask=inside, other=0)), MODEL)
    value = tl.where(value == value, tl.maximum(tl.minimum(value, top), -top), 0.0)
    ratio = tl.div_rn(value, tl.where(scale == 0.0, 1.0, scale))
    whole = tl.where(ratio >= 0.0, tl.floor(ratio), tl.ceil(ratio))
    away = tl.where(ratio >= 0.0, 1.0, -1.0)
    whole = tl.where(tl.abs(ratio - whole) >= 0.5, whole + away, whole)
    whole = tl.where(scale == 0.0, 0.0, whole)
    number = tl.minimum(tl.maximum(whole, -HALF * 1.0), HALF - 1.0).to(tl.int32)
    if BIASED:
        number = number + HALF
    return number & (2 * HALF - 1)


@triton.jit
def weight_only(
    x, out, scales, counts, table, cols, stride,
    MODEL: tl.constexpr, BITS: tl.constexpr, BIASED: tl.constexpr, PERIOD: tl.constexpr, SHARED: tl.constexpr, RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`WeightOnly`: a program takes a row. SHARED rows have runs of RUN bytes in turn; `table` orders PERIOD elements."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    half: tl.constexpr = 1 << (BITS - 1)
    at = tl.arange(0, BLOCK)
    tops = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    over = tl.zeros([BLOCK], tl.int32)
    for first in range(0, cols, BLOCK):
        raw = _wide(tl.load(x + first + at, mask=first + at < cols, other=0))
        size = tl.abs(_rounded(raw, MODEL))
        infinite = (size < INFINITY) == 0
        tops = tl.maximum(tops, tl.where(infinite, 0.0, size))
        bad += infinite.to(tl.int32)
        over += (infinite & (tl.abs(raw) < INFINITY)).to(tl.int32)
    top = tl.max(tops, 0)
    scale = top * (1.0 / half)
    tl.store(scales + row, _stored(_rounded(scale, MODEL), MODEL))
    size = cols * BITS // 8
    out += row // SHARED * SHARED * size + row % SHARED * RUN
    for first in range(0, size, BLOCK):
        place = first + at
        inside = place < size
        if BITS == 8:
            code = _integer(x, table, place, inside, top, scale, MODEL, PERIOD, half, BIASED)
        else:
            low = _integer(x, table, 2 * place, inside, top, scale, MODEL, PERIOD, half, BIASED)
            code = low | (_integer(x, table, 2 * place + 1, inside, top, scale, MODEL, PERIOD, half, BIASED) << 4)
        if SHARED > 1:
            place = place // RUN * (SHARED * RUN) + place % RUN
        tl.store(out + place, code.to(tl.uint8), mask=inside)
    bads = tl.sum(bad, 0)
    tl.atomic_add(counts, bads, mask=bads > 0)
    overs = tl.sum(over, 0)
    tl.atomic_add(counts + 1, overs, mask=overs > 0)


@triton.jit
def _e4m3(value):
    """float32, at most 448 in size -> the bits of e4m3 nearest to it, ties to even, in uint8."""
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000  # steps of 2^-9
    code = tl.where(size < (121 << 23), small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def fp8_rowwise(x, out, scales, counts, cols, stride, lo, hi, floor, MODEL: tl.constexpr, BLOCK: tl.constexpr):
    """`Fp8Rowwise`: a program takes a row."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    out += row * cols
    at = tl.arange(0, BLOCK)
    tops = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, cols, BLOCK):
        inside = first + at < cols
        value = _rounded(_wide(tl.load(x + first + at, mask=inside, other=0)), MODEL)
        bad += (((tl.abs(value) < INFINITY) == 0) & inside).to(tl.int32)
        value = tl.minimum(tl.maximum(tl.where(value == value, value, 0.0), lo), hi)
        tops = tl.maximum(tops, tl.where(inside, tl.abs(value), 0.0))
    scale = tl.maximum(tl.div_rn(tl.max(tops, 0), 448.0), floor)
    tl.store(scales + row, scale)
    for first in range(0, cols, BLOCK):
        inside = first + at < cols
        value = _rounded(_wide(tl.load(x + first + at, mask=inside, other=0)), MODEL)
        value = tl.minimum(tl.maximum(tl.where(value == value, value, 0.0), lo), hi)
        ratio = tl.minimum(tl.maximum(tl.div_rn(value, scale), -448.0), 448.0)
        tl.store(out + first + at, _e4m3(ratio), mask=inside)
    bads = tl.sum(bad, 0)
    tl.atomic_add(counts, bads, mask=bads > 0)


@triton.jit
def _smoothed(raw, factor):
    """Rounded as torch does it: the float64 product to float32, that to float16; given as float32."""
    return (_wide(raw).to(tl.float16).to(tl.float64) * factor).to(tl.float32).to(tl.float16).to(tl.float32)


@triton.jit
def smooth(
    x, factors, out, rows, counts, cols, stride, first_kept, kept, given, activation, output,
    MODEL: tl.constexpr, GIVEN: tl.constexpr, DIVIDE: tl.constexpr, SINGLE: tl.constexpr, VECTOR: tl.constexpr, TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`SmoothWeight`: a program takes a row; `factors` is the smoother, float64; `rows` gets the row's scale if VECTOR."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    at = tl.arange(0, BLOCK)
    tops = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    nan = tl.zeros([BLOCK], tl.int32)
    for first in range(0, cols, BLOCK):
        inside = first + at < cols
        raw = tl.load(x + first + at, mask=inside, other=0)
        bad += ((tl.abs(_wide(raw)) < INFINITY) == 0).to(tl.int32)
        if not GIVEN:
            weight = _smoothed(raw, tl.load(factors + first + at, mask=inside, other=0))
            tops = tl.maximum(tops, tl.where(weight == weight, tl.abs(weight), 0.0))
            nan += (weight != weight).to(tl.int32)
    if GIVEN:
        scale = given
    else:
        top = tl.where(tl.sum(nan, 0) > 0, float("nan"), tl.max(tops, 0))
        scale = (127.0 * tl.div_rn(1.0, top).to(tl.float16).to(tl.float32)).to(tl.float16).to(tl.float32)
    undone = tl.div_rn(1.0, scale).to(tl.float16).to(tl.float32)
    if VECTOR:
        if TOKEN:
            tl.store(rows + row, undone)
        else:
            tl.store(rows + row, tl.div_rn(output, activation * scale))
    out += row * kept
    for first in range(0, kept, BLOCK):
        inside = first + at < kept
        col = first_kept + first + at
        weight = _smoothed(tl.load(x + col, mask=inside, other=0), tl.load(factors + col, mask=inside, other=0))
        weight = _rounded(weight, MODEL)
        if DIVIDE:
            value = tl.div_rn(weight, undone).to(tl.float16).to(tl.float32)
        else:
            value = weight * scale
            if SINGLE:
                value = _rounded(value, MODEL)
        value = tl.where(value == value, tl.minimum(tl.maximum(value, -127.0), 127.0), 0.0)
        tl.store(out + first + at, ((value + EVEN) - EVEN).to(tl.int32).to(tl.int8), mask=inside)
    bads = tl.sum(bad, 0)
    tl.atomic_add(counts, bads, mask=bads > 0)
