"""Float casts, one pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from streamconv.checkpoint.dtypes import DType
from streamconv.quants.base import Findings, Kernel


@cache
def cast_kernel(source: DType, target: DType, via: DType | None = None) -> Kernel:
    """The kernel that casts `source` to `target`, by way of `via` (all of F32, F16, BF16); numba is loaded when it is first called."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        from streamconv.kernels.cast_code import cast_rows
        from streamconv.kernels.rows import CODES

        made = outs[0].view(target.storage)
        kinds = (CODES[source.name], CODES[target.name], 0 if via is None else CODES[via.name])
        lost = cast_rows(flat, start, stride, rows, cols, made, *kinds)
        return Findings(overflow=int(lost))

    return run
