"""Signed integers of a quantized source into a mixed-GEMM layout: reorder, bias, pack in one pass over each row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from streamconv.quants.base import Findings, Kernel
from streamconv.quants.layout import FAMILIES


@cache
def paired_kernel() -> Kernel:
    """The kernel for ModelOpt's orientation: two channels in a byte."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        from streamconv.kernels.packed_code import paired_rows

        paired_rows(flat, start, stride, rows, cols, outs[0])
        return Findings()

    return run


@cache
def packed_kernel(bits: int, family: str) -> Kernel:
    """The kernel for int8 rows of one width and layout; numba is loaded when it is first called."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        from streamconv.kernels.packed_code import int4_rows, int8_rows

        code = int8_rows if bits == 8 else int4_rows
        code(flat, start, stride, rows, cols, outs[0].view("u2"), FAMILIES.index(family))
        return Findings()

    return run
