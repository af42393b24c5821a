"""Weight-only quantization fused into one pass over each row: cast, absmax, scale, round, reorder, bias, pack."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from streamconv.checkpoint.dtypes import DType
from streamconv.quants.base import Findings, Kernel


@cache
def weight_only_kernel(source: DType, dtype: DType, bits: int, family: str) -> Kernel:
    """The kernel for one source dtype, model dtype, width and layout; numba is loaded when it is first called."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        from streamconv.kernels.rows import CODES
        from streamconv.kernels.weight_only_code import int4_rows, int8_rows

        code = int8_rows if bits == 8 else int4_rows
        scales = outs[1].view(dtype.storage)
        kinds = (CODES[source.name], CODES[dtype.name])
        bad, lost = code(flat, start, stride, rows, cols, outs[0].view("u2"), scales, *kinds, "ABCD".index(family))
        return Findings(int(bad), int(lost))

    return run
