"""FP8 rowwise in one pass over each row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from streamconv.checkpoint.dtypes import DType
from streamconv.quants.base import Findings, Kernel


@cache
def fp8_kernel(source: DType, lo: float, hi: float) -> Kernel:
    """The kernel for one source dtype; numba is loaded when it is first called."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        import numpy as np

        from streamconv.kernels.fp8_code import fp8_rows
        from streamconv.kernels.rows import CODES

        scales = outs[1].view(np.float32)
        bounds = (np.float32(lo), np.float32(hi))
        return Findings(int(fp8_rows(flat, start, stride, rows, cols, outs[0], scales, CODES[source.name], *bounds)))

    return run
