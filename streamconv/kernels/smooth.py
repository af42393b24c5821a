"""SmoothQuant in one pass over each row: cast, smooth, largest, scale, round; and the column maxima that come before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.dtypes import F16, F32, DType
from streamconv.quants.base import Findings, Kernel, ReduceKernel

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def smooth_kernel(
    source: DType,
    model: DType,
    mode: int,
    smoother: Array,
    largest: float | None,
    keep: tuple[int, int] | None,
    outputs: float,
    activation: float,
) -> Kernel:
    """The kernel for one matrix.

    Args:
        mode: 0 multiplies by the scale, 1 divides by its inverse and rounds to float16, 2 multiplies and rounds to `model`.
        smoother: float64 [cols].
        largest: AW, None for a scale of each row.
        outputs: sy, 0 for the inverse of the weight scale.
        activation: sx.
    """

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        import numpy as np

        from streamconv.kernels.rows import CODES
        from streamconv.kernels.smooth_code import smooth_rows

        scales = outs[1].view(np.float32) if len(outs) > 1 else np.empty(0, np.float32)
        kinds = (CODES[source.name], CODES[model.name])
        top = np.float32(-1 if largest is None else largest)
        with np.errstate(over="ignore"):  # an infinite one is refused when it is written
            numbers = (np.float32(outputs), np.float32(activation))
        args = (flat, start, stride, rows, *kinds, smoother, mode, top, *(keep or (0, cols)), outs[0], scales, *numbers)
        return Findings(int(smooth_rows(*args)))

    return run


def column_maxima_kernel(source: DType) -> ReduceKernel:
    """The kernel of `ColumnMaxima`: float16 [cols]."""

    def run(flat: Any, rows: int, cols: int) -> Array:
        import numpy as np

        from streamconv.kernels.rows import CODES
        from streamconv.kernels.smooth_code import column_maxima, halves

        top = np.zeros(cols, flat.dtype)
        made = np.empty(cols, np.uint16)
        column_maxima(flat, rows, cols, flat.dtype.type((1 << (8 * flat.itemsize - 1)) - 1), top)
        halves(top, CODES[source.name], made)
        return made.view(np.float16)

    return run


def divided_kernel(source: DType, model: DType, smoother: Array) -> Kernel:
    """float16(w / s) of one-row norms, then the model dtype."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        import numpy as np

        from streamconv.kernels.cast import cast_kernel

        half = np.empty(rows * cols, np.uint16)
        cast_kernel(source, F16)(flat, start, stride, rows, cols, [half.view(np.uint8)])
        with np.errstate(over="ignore", invalid="ignore"):
            quotient = half.view(np.float16).reshape(rows, cols).astype(np.float64) / smoother
            bits = quotient.astype(np.float32).view(np.uint32).reshape(-1)
        between = np.empty(rows * cols, np.uint16)
        cast_kernel(F32, F16)(bits, 0, cols, rows, cols, [between.view(np.uint8)])
        cast_kernel(F16, model)(between, 0, cols, rows, cols, [outs[0]])
        sign, infinite = 1 << (8 * flat.itemsize - 1), {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[source.name]
        before = sum(int(((flat[at : at + cols] & (sign - 1)) == infinite).sum()) for at in range(start, start + rows * stride, stride))
        return Findings(overflow=int(((between & 0x7FFF) == 0x7C00).sum()) - before)

    return run
