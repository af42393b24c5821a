"""W4A16_AWQ weights of TensorRT-LLM: codes that are taken over, and our own round-to-nearest.

Written in ModelOpt's own orientation, which the loader lays out for the GPU it builds for: the same files for every GPU
generation and release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamconv.checkpoint.dtypes import F32, I8, U8, DType
from streamconv.kernels.launch import fused
from streamconv.lazy import torch
from streamconv.quants.base import EncodeStats, Exact, Kernel, Part
from streamconv.quants.int_group import IntGroup
from streamconv.quants.rounding import rounded
from streamconv.quants.screen import Screen

LEAST_F16 = 2.0**-14
"""The smallest scale of a float16 model: a normal number."""


@dataclass(frozen=True, slots=True)
class PairedWeight(Exact):
    """Signed integers [N, K] (int8) -> int8 [N/2, K]: low nibble the even channel, high nibble the odd one."""

    name = "int4 per group, ModelOpt orientation"
    row_align = 2

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("weight", I8, (rows // 2, cols), cols // 2),)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        pairs = block.contiguous().view(torch.uint8).reshape(-1, 2, block.shape[1])
        return (((pairs[:, 0] & 15) | (pairs[:, 1] << 4)).reshape(-1),)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        packed = parts[0].reshape(rows // 2, cols)
        nibbles = torch.stack([packed & 15, packed >> 4], 1).reshape(rows, cols)
        return ((nibbles ^ 8).to(torch.float32)) - 8.0

    def kernel(self, source: DType) -> Kernel | None:
        return fused("weight_only_code.paired_rows", ["u1"]) if source == I8 else None


@dataclass(frozen=True, slots=True)
class PairedCodes(PairedWeight):
    """`PairedWeight` as a Hugging Face directory of ModelOpt's stores it."""

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("codes", U8, (rows // 2, cols), cols // 2),)


@dataclass(frozen=True)
class PairedRtn(IntGroup):
    """`IntGroup` under the names of W4A16_AWQ; `scale` is the model dtype, and a source that is wider is cast to it first.

    The loader casts float32 scales to the model dtype, so they are rounded to it before the integers are made.
    """

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        codes, scale = super().parts(rows, cols, experts)
        return replace(codes, role="weight", dtype=I8), replace(scale, role="weights_scaling_factor")

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        return super().encode(self.values(block), stats)

    def values(self, block: torch.Tensor) -> torch.Tensor:
        return rounded(block, self.scale) if block.dtype.itemsize > self.scale.itemsize else block.float()

    def screen(self, source: DType) -> Screen | None:
        return super().screen(source) if source.itemsize <= self.scale.itemsize else None

    def kernel(self, source: DType) -> Kernel | None:
        return super().kernel(source) if source.itemsize <= self.scale.itemsize else None


def round_to_nearest(group: int, dtype: DType, search: bool = False) -> PairedRtn:
    """Scales of a group's maximum over 8, for which there is a code; a search ends at 7, for which both ends have one.

    Args:
        dtype: of the model; scales are rounded to it.
        search: see `IntGroup`.
    """
    floor = LEAST_F16 if dtype.name == "F16" else 0.0
    return PairedRtn(4, group, 7.0 if search else 8.0, 1.0, dtype, F32, "pairs", floor, wide=True, search=search)
