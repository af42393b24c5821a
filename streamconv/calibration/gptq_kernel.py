"""GPTQ's columns as one Triton kernel. Needs triton: imported by `gptq` alone, for weights on a CUDA device."""

# mypy: ignore-errors
# (triton is not there where no GPU is, and its language has no types)

import triton
import triton.language as tl

_EVEN = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to the nearest integer, ties to even."""
_ROWS = 32


@triton.jit
def _columns(block, steps, upper, stride, codes, errors, size, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """A program takes ROWS rows of the weight through all columns: these stay in its registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    there, in_block = row < rows, column < size
    left = tl.load(block + column[:, None] * rows + row[None, :], mask=in_block[:, None] & there[None, :], other=0.0)
    for at in range(size):
        value = tl.sum(tl.where((column == at)[:, None], left, 0.0), axis=0)
        step = tl.load(steps + at * rows + row, mask=there, other=1.0)
        code = tl.minimum(tl.maximum(tl.div_rn(value, step), -8.0), 7.0)
        code = (code + _EVEN) - _EVEN
        factors = tl.load(upper + at * stride + column, mask=in_block, other=0.0)
        error = tl.div_rn(value - code * step, tl.load(upper + at * stride + at))
        left -= factors[:, None] * error[None, :]  # of columns before this one the factor is 0, and nobody looks at them again
        tl.store(codes + at * rows + row, code, mask=there)
        tl.store(errors + at * rows + row, error, mask=there)


def columns(block, steps, upper, codes, errors):
    """As `gptq._columns`. `upper`: a part of a row-major matrix."""
    size, rows = block.shape
    width = triton.next_power_of_2(size)
    grid = (triton.cdiv(rows, _ROWS),)
    _columns[grid](
        block, steps, upper, upper.stride(0), codes, errors, size, rows, WIDTH=width, ROWS=_ROWS, num_warps=1, enable_fp_fusion=False
    )
