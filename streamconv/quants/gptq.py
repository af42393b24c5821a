"""GPTQ and AutoAWQ weights, taken over as they are: W4A16_GPTQ and W8A16_GPTQ.

The source's integers are laid out for the GPU generation; group scales and zeros become `weights_scaling_factor` and
`zero`, both [K/g, N] row-major. Nothing is rounded but scale and zero, when the model dtype is not the source's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import FLOATS, I8, DType
from streamconv.checkpoint.packed_rows import AWQ_POSITION
from streamconv.kernels.launch import fused
from streamconv.lazy import torch
from streamconv.quants.base import Codec, EncodeStats, Exact, Kernel, Part
from streamconv.quants.layout import FAMILIES, Layout
from streamconv.quants.rounding import half_ulp


@dataclass(frozen=True, slots=True)
class PackedWeight(Exact):
    """Signed integers [N, K] (int8) -> the bytes that the GPU kernel reads, viewed as the model dtype."""

    dtype: DType
    layout: Layout

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"int{self.layout.bits} per {'channel' if self.dtype == I8 else 'group'}, layout of {self.layout.family}"

    @property
    def row_align(self) -> int:  # type: ignore[override]
        return 32 // self.layout.bits

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        bits = self.layout.bits
        lead = (experts,) if experts else ()
        shape = (*lead, cols, rows * bits // (8 * self.dtype.itemsize))
        return (Part("weight", self.dtype, shape, cols * bits // 8),)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        return (self.layout.pack(block),)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        """The integers; scales and zeros are compared on their own."""
        return self.layout.unpack(parts[0], rows, cols).to(torch.float32)

    def kernel(self, source: DType) -> Kernel | None:
        if source != I8 or self.layout.family == "sm70":
            return None
        return fused("weight_only_code.packed_rows", ["u2"], self.layout.bits, FAMILIES.index(self.layout.family))


@dataclass(frozen=True, slots=True)
class GroupScales(Codec):
    """Zeros and scales side by side, as bytes -> `weights_scaling_factor` and `zero`.

    A row is a group: first the packed zeros of all channels, then their scales.

    Attributes:
        dtype: model dtype.
        source: dtype of the stored scales.
        bits: 4 or 8.
        shuffled: zeros in AutoAWQ's channel order.
        middle: zero = (middle - stored zero) * scale: 2^(b-1), one less for GPTQ v1, which stores zeros less one.
    """

    dtype: DType
    source: DType
    bits: int
    shuffled: bool
    middle: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return "group scales and zeros"

    def channels(self, cols: int) -> int:
        """Output channels of a row of `cols` bytes."""
        return 8 * cols // (self.bits + 8 * self.source.itemsize)

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        n = self.channels(cols)
        size = n * self.dtype.itemsize
        return tuple(Part(suffix, self.dtype, (rows, n), size) for suffix in ("weights_scaling_factor", "zero"))

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        stored, factor = self._split(block)
        scale = stored.to(getattr(torch, self.dtype.torch))
        stats.overflow += int((torch.isinf(scale) & torch.isfinite(stored)).sum())
        zero = factor.to(scale.dtype) * scale  # exact factor, scale already rounded: one product, one rounding
        return tuple(t.contiguous().reshape(-1).view(torch.uint8) for t in (scale, zero))

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        """Scales, then zeros: float32 [rows, 2N]."""
        dtype, n = getattr(torch, self.dtype.torch), self.channels(cols)
        return torch.cat([part.view(dtype).reshape(rows, n).to(torch.float32) for part in parts], 1)

    def values(self, block: torch.Tensor) -> torch.Tensor:
        stored, factor = self._split(block)
        scale = stored.to(torch.float32)
        return torch.cat([scale, factor * scale], 1)

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """A rounding of the scale; of the zero a second one, of the product."""
        stored, factor = self._split(block)
        scale = half_ulp(stored, self.dtype)
        return torch.cat([scale, factor.float().abs() * scale + half_ulp(factor * stored.float() * 1.01, self.dtype)], 1)

    def kernel(self, source: DType) -> Kernel | None:
        if self.source.name not in FLOATS or self.dtype.itemsize != 2:
            return None
        rule = self.source, self.dtype, self.bits, self.shuffled, self.middle
        return fused("group_scales_code.group_rows", [self.dtype.storage] * 2, *rule)

    def _split(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored scales [r, N] and the integer factors of the zeros, int16 [r, N]."""
        rows, n = block.shape[0], self.channels(block.shape[1])
        edge = n * self.bits // 8
        packed = block[:, :edge].contiguous()
        scales = block[:, edge:].contiguous().view(getattr(torch, self.source.torch))
        if self.bits == 8:
            zeros = packed.to(torch.int16)
        else:
            zeros = torch.stack([packed & 15, packed >> 4], 2).reshape(rows, n).to(torch.int16)
            if self.shuffled:
                order = torch.tensor(AWQ_POSITION, device=block.device)
                zeros = zeros.reshape(rows, n // 8, 8)[:, :, order].reshape(rows, n)
        return scales, self.middle - zeros
