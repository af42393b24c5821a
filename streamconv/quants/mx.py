"""OCP microscaling: FP4 or FP8 elements with a power-of-two scale for each 32 columns, as compressed-tensors and ModelOpt store it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from streamconv.checkpoint.dtypes import F8_E4M3, F32, FLOATS, U8, DType
from streamconv.checkpoint.stored_codes import as_float
from streamconv.kernels.launch import fused
from streamconv.lazy import torch
from streamconv.quants.base import Codec, EncodeStats, Kernel, Part
from streamconv.quants.packing import pack_nibbles, unpack_nibbles
from streamconv.quants.rounding import e2m1_codes, e2m1_values, finite_rows, half_ulp
from streamconv.quants.screen import Screen

GROUP = 32
_ROUND = {"F32": 1 << 21, "F16": 1 << 8, "BF16": 1 << 5}
"""What is added to the bits of amax before its mantissa is dropped: a quarter of its last power of two."""
_MANTISSA = {"F32": 23, "F16": 10, "BF16": 7}
_BIAS = {"F32": 127, "F16": 15, "BF16": 127}


@dataclass(frozen=True)
class Mx(Codec):
    """Codes and one exponent byte (bias 127) for each group.

    Attributes:
        element: "fp4" (e2m1, two in a byte, the even column in the low nibble) or "fp8" (e4m3).
        exponent: "rounded", as compressed-tensors: amax rounded up to a power of two from 1.75 times one on, over the largest power
            that the element has; "ceiling", as ModelOpt: the smallest at which amax / 448 fits.
        read_as: type whose bits the exponent is taken from.
    """

    element: Literal["fp4", "fp8"]
    exponent: Literal["rounded", "ceiling"] = "rounded"
    read_as: DType = F32

    quantizes = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"MX{self.element.upper()}"

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        scale = Part("scale", U8, (rows, cols // GROUP), cols // GROUP)
        if self.element == "fp4":
            return (Part("codes", U8, (rows, cols // 2), cols // 2), scale)
        return (Part("codes", F8_E4M3, (rows, cols), cols), scale)

    def _bytes(self, top: torch.Tensor) -> torch.Tensor:
        """Largest magnitudes, float32 -> exponent bytes, int32."""
        if self.exponent == "ceiling":
            ratio = top / torch.full_like(top, 448.0)
            fraction, power = torch.frexp(ratio)
            power = torch.where(fraction == 0.5, power - 1, power)
            return torch.where(ratio == 0, 0, (power + 127).clamp(0, 254)).to(torch.int32)
        kind, drop = self.read_as.name, _MANTISSA[self.read_as.name]
        typed = top.to(getattr(torch, self.read_as.torch)).contiguous()
        bits = typed.view(torch.int32 if kind == "F32" else torch.int16).to(torch.int64)
        field = (bits + _ROUND[kind]) >> drop
        exponents = (field - _BIAS[kind] - (2 if self.element == "fp4" else 8) + 127).clamp(0, 255)
        return torch.where(field == 0, 0, exponents).to(torch.int32)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        values = finite_rows(block, stats)
        rows, cols = values.shape
        grouped = values.reshape(rows, -1, GROUP)
        exponent = self._bytes(grouped.abs().amax(2, keepdim=True))
        ratio = torch.ldexp(grouped.double(), 127 - exponent).float().reshape(rows, cols)
        scale = exponent.to(torch.uint8).reshape(-1)
        if self.element == "fp4":
            return pack_nibbles(e2m1_codes(ratio)), scale
        codes = ratio.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return codes.contiguous().reshape(-1).view(torch.uint8), scale

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        exponent = parts[1].to(torch.int32).reshape(rows, -1, 1) - 127
        if self.element == "fp4":
            values = e2m1_values(unpack_nibbles(parts[0], rows, cols))
        else:
            values = parts[0].view(torch.float8_e4m3fn).float().reshape(rows, cols)
        return torch.ldexp(values.double().reshape(rows, -1, GROUP), exponent).float().reshape(rows, cols)

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """A rounding of the element; FP4 cuts off what is above 6 scales (from 7/8 of amax on)."""
        values = block.float()
        rows, cols = values.shape
        grouped = values.reshape(rows, -1, GROUP)
        step = torch.ldexp(torch.ones_like(grouped[:, :, :1]).double(), self._bytes(grouped.abs().amax(2, keepdim=True)) - 127).float()
        if self.element == "fp4":
            # neighbouring values are at most two apart, and nothing that is cut off is farther than one from 6
            near = step * (grouped.abs() / step).div(4.0).clamp(0.25, 1.0) * 1.01
        else:
            near = half_ulp(grouped / step, F8_E4M3) * step
        lost = torch.where(step < 2.0**-126, grouped.abs(), 0.0)  # read as float16, a subnormal amax has no exponent
        return torch.maximum(near, lost).reshape(rows, cols)

    def screen(self, source: DType) -> Screen | None:
        if source.name not in FLOATS:
            return None
        within = (223.0, 449.0) if self.element == "fp8" else (3.49, 7.01)
        return Screen("e4m3" if self.element == "fp8" else "e2m1", lambda parts: as_float(parts[1], "F8_E8M0"), GROUP, ratio=within)

    def kernel(self, source: DType) -> Kernel | None:
        if source.name not in FLOATS:
            return None
        return fused("mx_code.mx_rows", ["u1", "u1"], source, self.read_as, self.element == "fp4", self.exponent == "ceiling")
