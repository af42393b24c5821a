"""How far a value moves when it is rounded to a floating-point type: what the formats' own error bounds are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import DType

if TYPE_CHECKING:
    import torch

_HALF_ULP = {"F32": (2.0**-24, 2.0**-150), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 2.0**-134), "F8_E4M3": (2.0**-4, 2.0**-10)}
"""(relative to the value, half the smallest subnormal): IEEE 754 and, for e4m3, the OCP 8-bit floating point specification."""


def half_ulp(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """The largest rounding error of these values to nearest in `dtype`, float32, as long as none overflows."""
    relative, least = _HALF_ULP[dtype.name]
    return (values.float().abs() * relative).clamp(min=least)
