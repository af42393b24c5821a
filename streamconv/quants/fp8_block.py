"""FP8 with one scale for each tile of 128 x 128 weights, as DeepSeek, compressed-tensors and ModelOpt store it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import F8_E4M3, F32, FLOATS, DType
from streamconv.checkpoint.stored_codes import as_float
from streamconv.kernels.launch import fused
from streamconv.lazy import torch
from streamconv.quants.base import Codec, EncodeStats, Kernel, Part
from streamconv.quants.rounding import HALF_ULP, divided, finite_rows, half_ulp, rounded, scale_of
from streamconv.quants.screen import Screen, around, slack

_LARGEST = 448.0
FINITE = 3.4028234663852886e38
"""The largest float32: a factor that becomes infinite would leave a scale of 0."""


@dataclass(frozen=True)
class Fp8Block(Codec):
    """e4m3 weights [N, K], scales [ceil(N/block), ceil(K/block)]; a tile at the edge may be smaller.

    Attributes:
        block: side of a tile.
        zero: the scale of a tile whose scale would be 0.
        floor: the smallest scale.
        scale: type that scales are rounded to and stored in.
        quotient: type that weight / scale is rounded to before it becomes e4m3.
        multiply: multiply by (1 / amax) * 448 and store the inverse of that, as transformers does, where others divide by amax / 448.
    """

    block: int = 128
    zero: float = 1.0
    floor: float = 0.0
    scale: DType = F32
    quotient: DType = F32
    multiply: bool = False

    quantizes = True
    partial = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"FP8, {self.block} x {self.block} tiles"

    @property
    def row_align(self) -> int:  # type: ignore[override]
        return self.block

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        across = -(-cols // self.block)
        scales = (-(-rows // self.block), across)
        return (
            Part("codes", F8_E4M3, (rows, cols), cols),
            Part("scale", self.scale, scales, across * self.scale.itemsize, self.block),
        )

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        values = finite_rows(block, stats)
        rows, cols = values.shape
        top = self._tops(values)
        if self.multiply:
            factor = torch.where(top == 0, 1.0, (top.reciprocal() * _LARGEST).clamp(max=FINITE))  # torch's number / tensor
            stored, scaled = 1.0 / factor, values * self._spread(factor, rows, cols)
        else:
            stored = scale_of(top, _LARGEST, self.scale, self.zero, self.floor)
            scaled = rounded(values / self._spread(stored, rows, cols), self.quotient)
        codes = scaled.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        scales = stored.to(getattr(torch, self.scale.torch))
        return codes.contiguous().reshape(-1).view(torch.uint8), scales.contiguous().reshape(-1).view(torch.uint8)

    def _tops(self, values: torch.Tensor) -> torch.Tensor:
        """Largest magnitude of each tile, [ceil(rows/block), ceil(cols/block)]."""
        rows, cols = values.shape
        down, across = -(-rows // self.block), -(-cols // self.block)
        padded = torch.nn.functional.pad(values.abs(), (0, across * self.block - cols, 0, down * self.block - rows))
        return padded.reshape(down, self.block, across, self.block).amax((1, 3))

    def _spread(self, tiles: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """One value for each tile -> one for each weight."""
        return tiles.repeat_interleave(self.block, 0)[:rows].repeat_interleave(self.block, 1)[:, :cols]

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        scales = parts[1].view(getattr(torch, self.scale.torch)).float().reshape(-1, -(-cols // self.block))
        return parts[0].view(torch.float8_e4m3fn).float().reshape(rows, cols) * self._spread(scales, rows, cols)

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """e4m3's rounding of W / scale, the quotient's own, and what a rounded scale cuts off at 448."""
        values = block.float()
        scale = self._spread(divided(self._tops(values), _LARGEST).clamp(min=max(self.floor, 1e-38)), *values.shape)
        ratio = values / scale
        return (half_ulp(ratio, F8_E4M3) + 2 * half_ulp(ratio, self.quotient)) * scale + 450 * half_ulp(scale, self.scale)

    def screen(self, source: DType) -> Screen | None:
        if source.name not in FLOATS:
            return None
        within = around(_LARGEST, 2 * HALF_ULP[self.scale.name][0] + 2.0**-20)
        return Screen("e4m3", lambda parts: as_float(parts[1], self.scale.name), self.block, self.block, within, slack(self.quotient))

    def kernel(self, source: DType) -> Kernel | None:
        if source.name not in FLOATS:
            return None
        rule = self.scale, self.quotient, self.block, self.zero, self.floor, self.multiply
        return fused("scaled_code.fp8_block_rows", ["u1", self.scale.storage], source, *rule)
