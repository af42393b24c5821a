"""AWQ weights exported by ModelOpt, taken over as they are: W4A16_AWQ (quantization spec §5.3).

Written in ModelOpt's own orientation, which the loader lays out for the GPU it builds for: the same files for every GPU
generation and release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import I8, DType
from streamconv.quants.base import Encoding, Findings, Kernel, Part

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PairedWeight(Encoding):
    """Signed integers [N, K] (int8) -> int8 [N/2, K]: low nibble the even channel, high nibble the odd one."""

    name = "int4 per group, ModelOpt orientation"
    row_align = 2

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("weight", I8, (rows // 2, cols), cols // 2),)

    def encode(self, block: torch.Tensor, findings: Findings) -> tuple[torch.Tensor, ...]:
        import torch

        pairs = block.contiguous().view(torch.uint8).reshape(-1, 2, block.shape[1])
        return (((pairs[:, 0] & 15) | (pairs[:, 1] << 4)).reshape(-1),)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        import torch

        packed = parts[0].reshape(rows // 2, cols)
        nibbles = torch.stack([packed & 15, packed >> 4], 1).reshape(rows, cols)
        return ((nibbles ^ 8).to(torch.float32)) - 8.0

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """None: integers."""
        return block.float() * 0.0

    def kernel(self, source: DType) -> Kernel | None:
        from streamconv.kernels.packed import paired_kernel

        return paired_kernel() if source == I8 else None
