"""Scales and zeros of packed sources: unpack, cast, multiply in one pass over each group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from streamconv.checkpoint.dtypes import DType
from streamconv.quants.base import Findings, Kernel


@cache
def group_scales_kernel(source: DType, dtype: DType, bits: int, shuffled: bool, middle: int) -> Kernel:
    """The kernel for stored scales of `source` and a model dtype of two bytes; numba is loaded when it is first called.

    Args:
        bits, shuffled, middle: as in `GroupScales`.
    """

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        from streamconv.kernels.group_scales_code import group_rows
        from streamconv.kernels.rows import CODES

        n = 8 * cols // (bits + 8 * source.itemsize)
        scales, zeros = (out.view(dtype.storage) for out in outs)
        kinds = (CODES[source.name], CODES[dtype.name])
        return Findings(overflow=int(group_rows(flat, start, stride, rows, n, scales, zeros, *kinds, bits, shuffled, middle)))

    return run
