"""W8A16 and W4A16: symmetric, one scale for each output channel of the rank-local matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import FLOATS, I8, DType
from streamconv.kernels.launch import fused, weight_only_errors
from streamconv.lazy import torch
from streamconv.quants.base import Codec, EncodeStats, ErrorKernel, Kernel, Part
from streamconv.quants.layout import FAMILIES, Layout
from streamconv.quants.rounding import finite_rows, half_ulp


@dataclass(frozen=True)
class WeightOnly(Codec):
    """Integers in a mixed-GEMM layout and one scale for each channel.

    Attributes:
        bits: 8 or 4.
        family: layout family.
        dtype: model dtype; weights are cast to it first, scales are stored in it.
    """

    bits: int
    family: str
    dtype: DType

    quantizes = True
    torch_bytes_per_element = 28

    @property
    def layout(self) -> Layout:
        return Layout(self.family, self.bits)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"int{self.bits} per channel, layout of {self.family}"

    @property
    def row_align(self) -> int:  # type: ignore[override]
        return self.layout.interleave

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        lead = (experts,) if experts else ()
        packed = rows * self.bits // 8
        return (
            Part("weight", I8, (*lead, cols, packed), cols * self.bits // 8),
            Part("per_channel_scale", self.dtype, (*lead, rows), self.dtype.itemsize),
        )

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        """NaN counts as 0 and infinity as the largest finite value of its channel (the engine stops on both unless told)."""
        cast = block.to(getattr(torch, self.dtype.torch))
        stats.overflow += int((~torch.isfinite(cast) & torch.isfinite(block)).sum())
        values = finite_rows(cast, stats)
        top = values.abs().amax(1, keepdim=True)
        half = 1 << (self.bits - 1)
        scale = top * (1.0 / half)
        ratio = values / scale
        whole = torch.trunc(ratio)
        whole = whole + torch.where((ratio - whole).abs() >= 0.5, torch.sign(ratio), 0.0)  # half away from zero
        whole = torch.where(scale == 0, 0.0, whole)
        q = whole.clamp(-half, half - 1).to(torch.int8)
        stored = scale.to(getattr(torch, self.dtype.torch))
        return self.layout.pack(q), stored.contiguous().reshape(-1).view(torch.uint8)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        scale = parts[1].view(getattr(torch, self.dtype.torch)).to(torch.float32)
        return self.layout.unpack(parts[0], rows, cols).to(torch.float32) * scale[:, None]

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """Half a step, a whole one at +max, which has no integer; the casts of weight and scale come on top."""
        values = block.float()
        half = 1 << (self.bits - 1)
        step = values.abs().amax(1, keepdim=True) / half
        return step * (0.5 + (values > (half - 1.5) * step)) + half_ulp(values, self.dtype) + 2 * half * half_ulp(step, self.dtype)

    def kernel(self, source: DType) -> Kernel | None:
        if source.name not in FLOATS:
            return None
        rule = self.dtype, self.bits, FAMILIES.index(self.family)
        return fused("weight_only_code.integer_rows", ["u2", self.dtype.storage], source, *rule)

    def error_kernel(self, source: DType) -> ErrorKernel | None:
        return weight_only_errors(source, self.dtype, self.bits, self.family) if source.name in FLOATS else None
