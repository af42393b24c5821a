"""AutoAWQ's layout: a row for each input channel, int32 words of eight output channels. These codecs see a weight by its input channels.

    codes   I32 [K, N / 8]     unsigned nibbles, in the order 0 2 4 6 1 3 5 7 of the channels, the first in the lowest bits
    zero    I32 [K / g, N / 8] the code that stands for 0, packed alike
    scale   F16 [K / g, N]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import F16, FLOATS, I32, DType
from streamconv.kernels.launch import fused
from streamconv.lazy import torch
from streamconv.quants.base import Codec, EncodeStats, Kernel, Part
from streamconv.quants.int_group import IntGroup
from streamconv.quants.packing import pack, packed_part, unpack
from streamconv.quants.rounding import divided, finite_rows, half_ulp, scale_of

_MIDDLE = 8
LEAST = 2.0**-14
"""The smallest scale: a normal number of float16."""


@dataclass(frozen=True)
class AwqWords(Codec):
    """Float rows [K, N] -> codes, zero points and scales of groups of g rows.

    w = (q - z) * s. Asymmetric: s = (max - min) / 15, z = RNE(-min / s), zero counted among the values of a group.

    Attributes:
        scale: F16 or BF16, the type of the model: scales are rounded to it before the codes are made, as engines cast them to it.
        symmetric: the rule for scales with z = 8; None for asymmetric ones.
    """

    group: int
    scale: DType
    symmetric: IntGroup | None = None

    quantizes = True
    computed = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"INT4 in groups of {self.group}, AutoAWQ's words"

    @property
    def row_align(self) -> int:  # type: ignore[override]
        return self.group

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        scale = Part("scale", F16, (rows // self.group, cols), 2 * cols, self.group)
        zero = Part("zero", I32, (rows // self.group, cols // 8), cols // 2, self.group)
        return (packed_part("codes", "awq", 4, rows, cols), zero, scale)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        values = finite_rows(block, stats)
        if self.symmetric is not None:  # whose groups lie in rows
            grouped = values.T.reshape(values.shape[1], -1, self.group)
            scale = self.symmetric.scales(grouped)
            q = self.symmetric.integers(grouped, scale).reshape(values.shape[1], -1).T
            scale = scale[:, :, 0].T
            zero = torch.zeros_like(scale)
        else:
            grouped = values.reshape(-1, self.group, values.shape[1])
            low, extent = self._range(grouped)
            scale = scale_of(extent, 15.0, self.scale, 1.0, LEAST)
            zero = (-low / scale).round().clamp(0, 15) - _MIDDLE
            q = ((grouped / scale[:, None]).round() + zero[:, None]).clamp(-_MIDDLE, 15 - _MIDDLE).reshape(values.shape)
        stored = scale.to(torch.float16)
        stats.overflow += int(stored.isinf().sum())
        return pack(q, "awq", 4), pack(zero, "awq", 4), stored.contiguous().reshape(-1).view(torch.uint8)

    def _range(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[groups, g, N] -> least value, 0 at most, and how far it is from there to the largest, [groups, N]."""
        low = grouped.amin(1).clamp(max=0)
        return low, grouped.amax(1).clamp(min=0) - low

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        codes, zero = (unpack(part, "awq", 4, part.numel() * 2 // cols, cols).float() for part in parts[:2])
        scale = parts[2].view(torch.float16).float().reshape(-1, 1, cols)
        return ((codes.reshape(-1, self.group, cols) - zero[:, None]) * scale).reshape(rows, cols)

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """Half a step, which at an end holds for what the rounded zero point leaves, and what the step itself was rounded by, 15 times."""
        values = block.float()
        if self.symmetric is not None:
            return self.symmetric.error(values.T).T
        grouped = values.reshape(-1, self.group, values.shape[1])
        step = divided(self._range(grouped)[1], 15.0).clamp(min=LEAST)
        bound = 0.5 * step + 16 * half_ulp(step, self.scale)
        return bound[:, None].expand(grouped.shape).reshape(values.shape)

    def kernel(self, source: DType) -> Kernel | None:
        if source.name not in FLOATS or (self.symmetric is not None and self.symmetric.search):
            return None
        divisor = 15.0 if self.symmetric is None else self.symmetric.divisor
        rule = self.group, divisor, LEAST, self.symmetric is not None
        return fused("awq_words_code.awq_rows", ["u1", "u1", "u2"], source, self.scale, *rule)


@dataclass(frozen=True)
class AwqScales(Codec):
    """Scales [K / g, N] of such integers, and the zero points that go with them: all 8."""

    name = "scales of AutoAWQ's words"
    computed = True

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("scale", F16, (rows, cols), 2 * cols), packed_part("zero", "awq", 4, rows, cols))

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        stored = block.to(torch.float16).contiguous()
        stats.overflow += int((stored.isinf() & block.isfinite()).sum())
        return stored.reshape(-1).view(torch.uint8), pack(torch.zeros(block.shape, device=block.device), "awq", 4)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        return parts[0].view(torch.float16).float().reshape(rows, cols)

    def error(self, block: torch.Tensor) -> torch.Tensor:
        return half_ulp(block, F16)

    def kernel(self, source: DType) -> Kernel | None:
        return fused("awq_words_code.awq_scale_rows", ["u2", "u1"], source) if source.name in FLOATS else None
