"""The numbers that INT4 in groups can hold: w = q * scale, q from -8 to 7, the scale rounded to the type that engines compute with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NEAREST = 0.875
"""The share of a group's maximum that 7 steps are in plain rounding: amax / 8."""
_LEAST_F16 = 2.0**-14


@dataclass(frozen=True)
class Grid:
    """Attributes:
    group: input channels that share a scale.
    dtype: what scales are rounded to.
    """

    group: int
    dtype: torch.dtype

    def largest(self, weight: torch.Tensor) -> torch.Tensor:
        """float32 [N, K] -> largest magnitude of each group [N, K/g]."""
        return weight.reshape(len(weight), -1, self.group).abs().amax(2)

    def scales(self, largest: torch.Tensor, ratio: torch.Tensor | float) -> torch.Tensor:
        """Scales [N, K/g], float32, of which 7 steps are `ratio` times the group's maximum; 1 where that is 0."""
        return self.rounded(largest * ratio / torch.full_like(largest, 7.0))

    def rounded(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales as they are stored, float32; 1 where that is 0."""
        scale = scale.to(self.dtype).float()
        scale = torch.where(scale == 0, 1.0, scale)
        return scale.clamp(min=_LEAST_F16) if self.dtype == torch.float16 else scale

    def codes(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Nearest integers, ties to even, as float32 [N, K]."""
        return (weight.reshape(*scales.shape, self.group) / scales[:, :, None]).round().clamp(-8, 7).reshape(weight.shape)

    def values(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What codes stand for, float32 [N, K]."""
        return (codes.reshape(*scales.shape, self.group) * scales[:, :, None]).reshape(codes.shape)
