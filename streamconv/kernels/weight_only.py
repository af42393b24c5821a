"""Weight-only quantization fused into one pass over each row: cast, absmax, scale, round, reorder, bias, pack."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from streamconv.checkpoint.dtypes import DType
from streamconv.quants.base import ErrorKernel, Errors, Findings, Kernel
from streamconv.quants.layout import FAMILIES


@cache
def weight_only_kernel(source: DType, dtype: DType, bits: int, family: str) -> Kernel:
    """The kernel for one source dtype, model dtype, width and layout; numba is loaded when it is first called."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        from streamconv.kernels.rows import CODES
        from streamconv.kernels.weight_only_code import int4_rows, int8_rows

        code = int8_rows if bits == 8 else int4_rows
        scales = outs[1].view(dtype.storage)
        kinds = (CODES[source.name], CODES[dtype.name])
        bad, lost = code(flat, start, stride, rows, cols, outs[0].view("u2"), scales, *kinds, FAMILIES.index(family))
        return Findings(int(bad), int(lost))

    return run



def _floats(stored: Any, dtype: DType) -> Any:
    """Stored scales as float32."""
    import numpy as np

    if dtype.name == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.view(dtype.numpy).astype(np.float32)


_HALF_ULP = {"BF16": (2.0**-9, 2.0**-134), "F16": (2.0**-12, 2.0**-25), "F32": (2.0**-25, 2.0**-150)}
"""Half a unit in the last place of a model dtype: as a part of the value, and the least there is."""


@cache
def weight_only_errors(source: DType, dtype: DType, bits: int, family: str) -> ErrorKernel:
    """The kernel that holds what `weight_only_kernel` stores against its source."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, parts: Sequence[Any]) -> Errors:
        import numpy as np

        from streamconv.kernels.rows import CODES
        from streamconv.kernels.weight_only_error_code import integer_errors

        half, (relative, least) = 1 << (bits - 1), _HALF_ULP[dtype.name]
        # the casts of the weight, of the scale (which counts `half` times), and of this kernel's own arithmetic
        limits = np.array([half, 3 * relative + 2.0**-20, (2 * half + 1) * least], np.float32)
        sums = np.zeros(4)
        kinds = CODES[source.name], bits, FAMILIES.index(family)
        wrong = integer_errors(flat, start, stride, rows, cols, parts[0].view("u2"), _floats(parts[1], dtype), *kinds, limits, sums)
        noise, signal, largest, peak = map(float, sums)
        return Errors(noise, signal, largest, peak, int(wrong))

    return run
