"""FP8 with one float32 scale for each output channel of the rank-local matrix (quantization spec §9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import F8_E4M3, F32, DType
from streamconv.quants.base import Encoding, Findings, Kernel, Part
from streamconv.quants.rounding import half_ulp

if TYPE_CHECKING:
    import torch

_LARGEST = 448.0
FLOOR = 1.0 / (448.0 * 512.0)


@dataclass(frozen=True)
class Fp8Rowwise(Encoding):
    """e4m3 weights, clamped to [lo, hi] first.

    Attributes:
        model: what the source is rounded to before anything else, as the loader of Meta's files does; None: nothing (§9).
    """

    lo: float = -1200.0
    hi: float = 1200.0
    model: DType | None = None

    name = "FP8 per channel"
    quantizes = True

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        lead = (experts,) if experts else ()
        return (Part("weight", F8_E4M3, (*lead, rows, cols), cols), Part("per_channel_scale", F32, (*lead, rows), 4))

    def encode(self, block: torch.Tensor, findings: Findings) -> tuple[torch.Tensor, ...]:
        """NaN counts as 0 and infinity as the clamp (the engine stops on both unless told)."""
        import torch

        values = self._rounded(block).to(torch.float32)
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            findings.nonfinite += bad
            values = torch.where(torch.isnan(values), 0.0, values)
        values = values.clamp(self.lo, self.hi)
        # both are true divisions: products with reciprocals give other bytes, and CUDA divides by a number that way
        top = values.abs().amax(1, keepdim=True)
        scale = (top / torch.full_like(top, _LARGEST)).clamp(min=FLOOR)
        made = (values / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return made.contiguous().reshape(-1).view(torch.uint8), scale.reshape(-1).view(torch.uint8)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        import torch

        scale = parts[1].view(torch.float32)
        return parts[0].view(torch.float8_e4m3fn).to(torch.float32).reshape(rows, cols) * scale[:, None]

    def values(self, block: torch.Tensor) -> torch.Tensor:
        import torch

        return self._rounded(block).to(torch.float32).clamp(self.lo, self.hi)

    def _rounded(self, block: torch.Tensor) -> torch.Tensor:
        import torch

        return block if self.model is None else block.to(getattr(torch, self.model.torch))

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """e4m3's rounding of W / scale (§9), and some of float32's."""
        values = self.values(block)
        scale = (values.abs().amax(1, keepdim=True) / _LARGEST).clamp(min=FLOOR)
        return half_ulp(values / scale, F8_E4M3) * scale + 4 * half_ulp(values, F32)

    def kernel(self, source: DType) -> Kernel | None:
        if source.name not in ("F32", "F16", "BF16"):
            return None
        from streamconv.kernels.fp8 import fp8_kernel

        return fp8_kernel(source, self.model or source, self.lo, self.hi)
