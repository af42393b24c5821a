"""FP8 in one pass over each row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.dtypes import DType
from streamconv.quants.base import Findings, Kernel, ReduceKernel

if TYPE_CHECKING:
    import numpy as np


@cache
def fp8_kernel(
    source: DType, model: DType, lo: float, hi: float, floor: float, zero: float, scale: DType, quotient: DType
) -> Kernel:
    """The kernel for one source dtype, rounded to `model` first; numba is loaded when it is first called."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        import numpy as np

        from streamconv.kernels.fp8_code import fp8_rows
        from streamconv.kernels.rows import CODES

        scales = outs[1].view(scale.storage)
        bounds = (np.float32(lo), np.float32(hi), np.float32(floor), np.float32(zero))
        kinds = (CODES[source.name], CODES[model.name], CODES[scale.name], CODES[quotient.name])
        return Findings(int(fp8_rows(flat, start, stride, rows, cols, outs[0], scales, *kinds, *bounds)))

    return run


def fp8_tensor_kernel(source: DType, scale: float | None) -> Kernel:
    """The kernel for one source dtype and the scale of the whole matrix."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        import numpy as np

        if scale is None:
            raise AssertionError("encoded before its reduction")
        from streamconv.kernels.fp8_code import fp8_tensor_rows
        from streamconv.kernels.rows import CODES

        bad = fp8_tensor_rows(flat, start, stride, rows, cols, outs[0], CODES[source.name], np.float32(scale))
        return Findings(int(bad))

    return run


def weight_maximum(source: DType) -> ReduceKernel:
    """The kernel of the largest finite magnitude, float32 []."""

    def run(flat: Any, rows: int, cols: int) -> np.ndarray[Any, Any]:
        import numpy as np

        from streamconv.kernels.fp8_code import finite_maximum
        from streamconv.kernels.rows import CODES

        kind = CODES[source.name]
        top = np.array([finite_maximum(flat[: rows * cols], kind)], np.uint32)
        if kind == 1:
            return top.astype(np.uint16).view(np.float16).astype(np.float32).reshape(())
        return (top << np.uint32(16 if kind == 2 else 0)).view(np.float32).reshape(())

    return run
