"""How far a value moves when it is rounded to a floating-point type: what the formats' own error bounds are made of."""

from __future__ import annotations

from streamconv.checkpoint.dtypes import DType
from streamconv.lazy import torch
from streamconv.quants.base import EncodeStats

HALF_ULP = {"F32": (2.0**-24, 2.0**-150), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 2.0**-134), "F8_E4M3": (2.0**-4, 2.0**-10)}
"""(relative to the value, half the smallest subnormal): IEEE 754 and, for e4m3, the OCP 8-bit floating point specification."""
LEAST_NORMAL = {"F32": 2.0**-126, "F16": 2.0**-14, "BF16": 2.0**-126}


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


def scale_of(amax: torch.Tensor, divisor: float, dtype: DType, zero: float, floor: float) -> torch.Tensor:
    """amax / divisor rounded to `dtype`, float32: `zero` in the place of 0, `floor` at least."""
    scale = rounded(divided(amax, divisor), dtype)
    return torch.where(scale == 0, zero, scale).clamp(min=floor)


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


def e2m1_codes(ratio: torch.Tensor) -> torch.Tensor:
    """float32 -> FP4, uint8 codes 0 to 15: nearest, ties to the even code, at most 6. The sign is that of ratio < 0: -0.0 is code 0."""
    size = ratio.abs()
    code = torch.zeros_like(ratio, dtype=torch.uint8)
    for edge, up in ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code += (size >= edge) if up else (size > edge)
    return code + 8 * (ratio < 0).to(torch.uint8)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes -> float32."""
    from streamconv.checkpoint.stored_codes import E2M1

    table = torch.tensor(E2M1 + tuple(-value for value in E2M1), device=codes.device)
    return table[codes.to(torch.int64)]
