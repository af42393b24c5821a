"""A quick look at stored rows, without torch: sums of errors where every value is plainly within half a step of its code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.stored_codes import Code, values
from streamconv.lazy import Array, Bytes, np
from streamconv.quants.base import Errors
from streamconv.quants.rounding import HALF_ULP

Codes = Code | Literal["int4"]
"""int4: two's complement nibbles."""
_ROUNDING = 1.001
"""What float32 takes of half a step."""


@dataclass(frozen=True, slots=True)
class Screen:
    """What an encoding promises, in steps: stored scales as they multiply values. It may be stricter than `Codec.error`, which decides.

    Attributes:
        codes: what a code stands for.
        steps: stored parts -> float32 steps, one for each `group` columns of `band` rows.
        group, band: 0: all.
        ratio: least and greatest that the largest magnitude of a group may be, over its step.
        quotient: what rounding weight / scale may move a value, relative to it.
        paired: codes of two rows share a byte.
        most: the largest source value that is taken as it is.
    """

    codes: Codes
    steps: Callable[[Sequence[Bytes]], Array]
    group: int = 0
    band: int = 1
    ratio: tuple[float, float] = (0.0, math.inf)
    quotient: float = 0.0
    paired: bool = False
    most: float = 3e38

    def errors(self, source: DType, flat: Array, start: int, stride: int, rows: int, cols: int, parts: Sequence[Bytes]) -> Errors | None:
        """As of `ErrorKernel`; None if the definition has to look."""
        from streamconv.kernels.rows import CODES
        from streamconv.kernels.value_error_code import value_errors

        table, relative, least, edge, bits = _rules(self.codes)
        packing = (2 if self.paired else 1) if bits == 4 else 0
        group, band = self.group or cols, self.band or rows
        width = parts[0].size // (rows // 2 if self.paired else rows)
        steps = np.ascontiguousarray(self.steps(parts), np.float32).reshape(-(-rows // band), -(-cols // group))
        rules = relative * _ROUNDING, least * _ROUNDING, edge, self.quotient, *self.ratio, self.most
        sums, kind = np.zeros(4), CODES[source.name]
        sound = value_errors(
            flat, start, stride, rows, cols, kind, parts[0], width, packing, table, steps, group, band, np.array(rules, np.float32), sums
        )
        noise, signal, largest, peak = map(float, sums)
        return Errors(noise, signal, largest, peak) if sound else None


def around(ratio: float, apart: float) -> tuple[float, float]:
    """`Screen.ratio` of scales that are rounded."""
    return ratio * (1 - apart), ratio * (1 + apart)


def slack(quotient: DType) -> float:
    """`Screen.quotient` of a type."""
    return 2 * HALF_ULP[quotient.name][0]


@lru_cache
def _rules(codes: Codes) -> tuple[Array, float, float, float, int]:
    """float32 value of each code; half the distance to the next, relative and at least; where integers end; bits."""
    if codes == "e4m3":
        return values(codes), 2.0**-4, 2.0**-10, math.inf, 8
    if codes == "e2m1":
        return values(codes), 0.25, 0.25, math.inf, 4
    half = 128 if codes in ("int8", "uint8") else 8
    table = np.roll(values("uint4"), 8) if codes == "int4" else values(codes)
    return table, 0.0, 0.5, half - 1.0, 8 if half == 128 else 4
