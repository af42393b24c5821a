"""FP8 with one float32 scale for each output channel of the rank-local matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import F8_E4M3, F32, FLOATS, DType
from streamconv.checkpoint.stored_codes import as_float
from streamconv.kernels.launch import fused
from streamconv.lazy import torch
from streamconv.quants.base import Codec, EncodeStats, Kernel, Part
from streamconv.quants.rounding import HALF_ULP, half_ulp, rounded, scale_of
from streamconv.quants.screen import Screen, around, slack

_LARGEST = 448.0
FLOOR = 1.0 / (448.0 * 512.0)


@dataclass(frozen=True)
class Fp8Rowwise(Codec):
    """e4m3 weights, clamped to [lo, hi] first.

    Attributes:
        model: what the source is rounded to before anything else, as the loader of Meta's files does; None: nothing.
        floor: the smallest scale.
        zero: the scale of a row whose scale would be 0; the floor applies to it too.
        scale: type that scales are rounded to and stored in.
        quotient: type that weight / scale is rounded to before it becomes e4m3.
    """

    lo: float = -1200.0
    hi: float = 1200.0
    model: DType | None = None
    floor: float = FLOOR
    zero: float = 0.0
    scale: DType = F32
    quotient: DType = F32

    name = "FP8 per channel"
    quantizes = True

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        lead = (experts,) if experts else ()
        scale = Part("per_channel_scale", self.scale, (*lead, rows), self.scale.itemsize)
        return (Part("weight", F8_E4M3, (*lead, rows, cols), cols), scale)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        """NaN counts as 0 and infinity as the clamp (the engine stops on both unless told)."""
        values = self._rounded(block).to(torch.float32)
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            stats.nonfinite += bad
            values = torch.where(torch.isnan(values), 0.0, values)
        if self.hi == math.inf and bad:
            finite = torch.where(torch.isfinite(values), values, 0.0).abs().amax(1, keepdim=True)
            values = torch.maximum(torch.minimum(values, finite), -finite)
        values = values.clamp(self.lo, self.hi)
        scale = scale_of(values.abs().amax(1, keepdim=True), _LARGEST, self.scale, self.zero, self.floor)
        codes = rounded(values / scale, self.quotient).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        stored = scale.to(getattr(torch, self.scale.torch)).reshape(-1)
        return codes.contiguous().reshape(-1).view(torch.uint8), stored.view(torch.uint8)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        scale = parts[1].view(getattr(torch, self.scale.torch)).float()
        return parts[0].view(torch.float8_e4m3fn).to(torch.float32).reshape(rows, cols) * scale[:, None]

    def values(self, block: torch.Tensor) -> torch.Tensor:
        return self._rounded(block).to(torch.float32).clamp(self.lo, self.hi)

    def _rounded(self, block: torch.Tensor) -> torch.Tensor:
        return block if self.model is None else block.to(getattr(torch, self.model.torch))

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """e4m3's rounding of W / scale, the quotient's own, and what a rounded scale cuts off at 448."""
        values = self.values(block)
        scale = (values.abs().amax(1, keepdim=True) / _LARGEST).clamp(min=max(self.floor, 1e-38))
        ratio = values / scale
        return (half_ulp(ratio, F8_E4M3) + 2 * half_ulp(ratio, self.quotient)) * scale + 450 * half_ulp(scale, self.scale)

    def screen(self, source: DType) -> Screen | None:
        if source.name not in FLOATS or self.model not in (None, source):
            return None
        within = around(_LARGEST, 2 * HALF_ULP[self.scale.name][0])
        unclamped = min(-self.lo, self.hi, 3e38)
        steps = lambda parts: as_float(parts[1], self.scale.name)  # noqa: E731
        return Screen("e4m3", steps, ratio=within, quotient=slack(self.quotient), most=unclamped)

    def kernel(self, source: DType) -> Kernel | None:
        if source.name not in FLOATS:
            return None
        rule = self.scale, self.quotient, float(self.lo), float(self.hi), self.floor, self.zero
        return fused("fp8_code.fp8_rows", ["u1", self.scale.storage], source, self.model or source, *rule)
