"""What was encoded, before it is written: values that would ruin the checkpoint stop the conversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streamconv.errors import DataError, printable
from streamconv.planning.plan import Destination, Plan, RowRange
from streamconv.planning.tasks import EncodeTask
from streamconv.quants import factors
from streamconv.quants.base import EncodeStats

if TYPE_CHECKING:
    import numpy as np


def judge(
    plan: Plan, span: RowRange, task: EncodeTask, dest: Destination, stats: EncodeStats, parts: Sequence[np.ndarray[Any, Any]]
) -> None:
    """Look at a tile that was encoded for `task`.

    Args:
        dest: one of those that take it.
        parts: uint8, as encoded.

    Raises:
        DataError: names the tensor, the value and what it follows from.
    """
    name, matrix, encoding = printable(span.source.name), plan.matrices[dest.matrix], task.encoding
    if stats.nonfinite and encoding.quantizes and not plan.target.allow_nonfinite:
        raise DataError(
            f"{name}: NaN or infinity in a weight that is to be quantized",
            hint="--allow-nonfinite goes on: NaN becomes 0, infinity the largest finite value of its channel",
        )
    if stats.overflow and encoding.computed:
        told = f"{stats.overflow} values of {name} become infinite"
        raise DataError(f"{matrix.places[0].tensor}: {told}", hint=encoding.cause() or None)
    for place, part, data in zip(matrix.places, encoding.parts(encoding.row_align, task.width), parts, strict=True):
        problem = factors.problem(place.tensor, part.dtype, data, matrix.rows == matrix.cols == 1)
        if problem:
            raise DataError(f"{problem}, from {name}", hint=encoding.cause() or None)
