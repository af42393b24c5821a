"""Weights as they are, in the model dtype: one direct cast, round to nearest even."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import F16, DType
from streamconv.lazy import torch
from streamconv.quants.base import Codec, EncodeStats, Kernel, Part
from streamconv.quants.rounding import HALF_ULP, half_ulp


@dataclass(frozen=True)
class Plain(Codec):
    """Values cast to `dtype`.

    Attributes:
        add_one: store value + 1 (Gemma norms): added in float32 for BF16 sources, else in the source dtype.
        vector: a matrix of one column that is stored as a vector.
        suffix: last component of the tensor's name.
        via_half: rounded to float16 first, as everything beside SmoothQuant is.
    """

    dtype: DType
    add_one: bool = False
    vector: bool = False
    suffix: str = "weight"
    via_half: bool = False

    torch_bytes_per_element = 16
    kernel_bytes_per_column = 0

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.dtype.name

    def halved(self, source: DType) -> bool:
        """The rounding to float16 changes something."""
        return self.via_half and source.name != "F16"

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        lead = (experts,) if experts else ()
        shape = (*lead, rows) if self.vector else (*lead, rows, cols)
        return (Part(self.suffix, self.dtype, shape, cols * self.dtype.itemsize),)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        target = getattr(torch, self.dtype.torch)
        if self.add_one:
            block = (block.float() if block.dtype == torch.bfloat16 else block) + 1.0
        cast = (block.to(torch.float16) if self.via_half else block).to(target)
        if cast.dtype != block.dtype or self.via_half:
            stats.overflow += int((torch.isinf(cast) & ~torch.isinf(block)).sum())
        return (cast.contiguous().reshape(-1).view(torch.uint8),)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        return parts[0].view(getattr(torch, self.dtype.torch)).reshape(rows, cols).to(torch.float32)

    def values(self, block: torch.Tensor) -> torch.Tensor:
        return block.float() + 1.0 if self.add_one else block.float()

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """One rounding; two by way of float16, and one of the sum for a norm stored as value + 1 in the source's type."""
        if self.dtype.name not in HALF_ULP:  # integers
            return block.float() * 0.0
        moved = block.float().abs() + 1.0 if self.add_one else block
        bound = half_ulp(moved, self.dtype)
        return bound + half_ulp(moved, F16) if self.via_half or self.add_one else bound

    def kernel(self, source: DType) -> Kernel | None:
        if self.add_one or not {source.name, self.dtype.name} <= {"F32", "F16", "BF16"}:
            return None
        from streamconv.kernels.launch import cast_kernel

        return cast_kernel(source, self.dtype, F16 if self.halved(source) else None)
