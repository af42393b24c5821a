"""How far a value moves when it is rounded to a floating-point type: what the formats' own error bounds are made of."""

from __future__ import annotations

from streamconv.checkpoint.dtypes import DType
from streamconv.lazy import torch
from streamconv.quants.base import EncodeStats

HALF_ULP = {"F32": (2.0**-24, 2.0**-150), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 2.0**-134), "F8_E4M3": (2.0**-4, 2.0**-10)}
"""(relative to the value, half the smallest subnormal): IEEE 754 and, for e4m3, the OCP 8-bit floating point specification."""


def half_ulp(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """The largest rounding error of these values to nearest in `dtype`, float32, as long as none overflows."""
    relative, least = HALF_ULP[dtype.name]
    return (values.float().abs() * relative).clamp(min=least)


def rounded(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """float32 values rounded to `dtype` and back."""
    return values if dtype.name == "F32" else values.to(getattr(torch, dtype.torch)).float()


def divided(values: torch.Tensor, number: float) -> torch.Tensor:
    """A true float32 division: CUDA divides by a Python number through its reciprocal, which gives other bits."""
    return values / torch.full_like(values, number)


def finite_rows(block: torch.Tensor, stats: EncodeStats) -> torch.Tensor:
    """float32 rows in which NaN is 0 and infinity the largest finite value of its row (the engine stops on both unless told)."""
    values = block.float()
    finite = torch.isfinite(values)
    bad = int((~finite).sum())
    if not bad:
        return values
    stats.nonfinite += bad
    top = torch.where(finite, values, 0.0).abs().amax(1, keepdim=True)
    return torch.where(torch.isnan(values), 0.0, torch.maximum(torch.minimum(values, top), -top))
