"""Integers of 4 or 8 bits with one scale for each group of K, or for each output channel; symmetric, round to nearest (RTN)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamconv.checkpoint.dtypes import F32, FLOATS, I8, DType
from streamconv.checkpoint.stored_codes import as_float
from streamconv.kernels.launch import fused
from streamconv.lazy import np, torch
from streamconv.quants.base import Codec, EncodeStats, Kernel, Part
from streamconv.quants.packing import Packing, pack, packed_part, unpack
from streamconv.quants.rounding import HALF_ULP, LEAST_NORMAL, divided, finite_rows, half_ulp, rounded, scale_of
from streamconv.quants.screen import Codes, Screen, around, slack

RATIOS = tuple(1 - step / 40 for step in range(21))
"""Shares of a group's maximum that a search for its scale tries, the largest first."""


@dataclass(frozen=True)
class IntGroup(Codec):
    """q = RNE(clamp(W / s)) with s = amax / divisor.

    Attributes:
        bits: 4 or 8.
        group: columns that share a scale; 0 for a whole channel.
        divisor: what amax is divided by: (2^bits - 1) / 2 in compressed-tensors, 2^(bits - 1) - 1 in ModelOpt.
        zero: the scale of a group whose scale would be 0.
        floor: the smallest scale.
        scale: type that scales are rounded to, and stored in unless `wide`.
        quotient: type that weight / scale is rounded to.
        wide: scales are stored as float32.
        search: the scale is that of `RATIOS` times amax with the smallest squared error; among equals the largest.
    """

    bits: int
    group: int
    divisor: float
    zero: float
    scale: DType
    quotient: DType
    packing: Packing
    floor: float = 0.0
    wide: bool = False
    search: bool = False

    quantizes = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"INT{self.bits} " + (f"in groups of {self.group}" if self.group else "per channel")

    @property
    def row_align(self) -> int:  # type: ignore[override]
        return 2 if self.packing == "pairs" else 1

    @property
    def _half(self) -> int:
        return 1 << (self.bits - 1)

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        groups = cols // self.group if self.group else 1
        kind = F32 if self.wide else self.scale
        scale = Part("scale", kind, (rows, groups), groups * kind.itemsize)
        return (packed_part("codes", self.packing, self.bits, rows, cols), scale)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        values = finite_rows(block, stats)
        rows, cols = values.shape
        grouped = values.reshape(rows, -1, self.group or cols)
        stored = self.scales(grouped)
        q = self.integers(grouped, stored).to(torch.int32).reshape(rows, cols)
        scales = stored.to(torch.float32 if self.wide else getattr(torch, self.scale.torch)).contiguous().reshape(-1).view(torch.uint8)
        return pack(q, self.packing, self.bits), scales

    def scales(self, grouped: torch.Tensor) -> torch.Tensor:
        """[rows, groups, group] -> [rows, groups, 1]."""
        top, rule = grouped.abs().amax(2, keepdim=True), (self.divisor, self.scale, self.zero, self.floor)
        best, least = scale_of(top, *rule), None
        for ratio in RATIOS if self.search else ():
            tried = scale_of(top * ratio, *rule)
            loss = (self.integers(grouped, tried) * tried - grouped).square().sum(2, keepdim=True)
            better = loss < least if least is not None else torch.ones_like(loss, dtype=torch.bool)
            best, least = torch.where(better, tried, best), torch.where(better, loss, loss if least is None else least)
        return best

    def integers(self, grouped: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        return rounded(grouped / stored, self.quotient).clamp(-self._half, self._half - 1).round()

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        scales = parts[1].view(torch.float32 if self.wide else getattr(torch, self.scale.torch)).float().reshape(rows, -1, 1)
        q = unpack(parts[0], self.packing, self.bits, rows, cols).float()
        return (q.reshape(rows, scales.shape[1], -1) * scales).reshape(rows, cols)

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """Half a step, and a whole one at an end that has no integer; the roundings of quotient and scale come on top."""
        values = block.float()
        rows, cols = values.shape
        grouped = values.reshape(rows, -1, self.group or cols)
        step = divided(grouped.abs().amax(2, keepdim=True), self.divisor).clamp(min=self.floor)
        over = (grouped.abs() - (self._half - 1) * step * (RATIOS[-1] if self.search else 1)).clamp(min=0)
        bound = torch.maximum(over, 0.5 * step) + 2 * half_ulp(grouped, self.quotient) + 2 * self._half * half_ulp(step, self.scale)
        return bound.reshape(rows, cols)

    def screen(self, source: DType) -> Screen | None:
        if source.name not in FLOATS or self.search:
            return None
        words: Codes = "uint4" if self.bits == 4 else "uint8"
        codes: Codes = words if self.packing == "words" else "int4" if self.packing == "pairs" else "int8"
        kind = F32 if self.wide else self.scale
        return Screen(
            codes,
            lambda parts: as_float(parts[1], kind.name),
            self.group,
            ratio=around(self.divisor, 2 * HALF_ULP[self.scale.name][0] + 2.0**-20),
            quotient=slack(self.quotient),
            paired=self.packing == "pairs",
        )

    def kernel(self, source: DType) -> Kernel | None:
        if source.name not in FLOATS or self.search:
            return None
        form = ("bytes", "words", "pairs").index(self.packing)
        rule = self.scale, self.quotient, self.bits, self.group, self.divisor, self.zero, self.floor, form
        kernel = fused("int_group_code.int_group_rows", ["u1", self.scale.storage], source, *rule)
        return _widened(kernel, self.scale) if self.wide else kernel


def _widened(kernel: Kernel, scale: DType) -> Kernel:
    """A kernel that stores scales of two bytes, as one that stores them as float32."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> EncodeStats:
        narrow = np.empty(outs[1].size // 2, np.uint8)
        stats = kernel(flat, start, stride, rows, cols, [outs[0], narrow])
        if scale.name == "BF16":
            np.left_shift(narrow.view(np.uint16), np.uint32(16), out=outs[1].view(np.uint32), dtype=np.uint32)
        else:
            outs[1].view(np.float32)[:] = narrow.view(np.float16)
        return stats

    return run


@dataclass(frozen=True)
class PairedRtn(IntGroup):
    """`IntGroup` under the names of TensorRT-LLM's W4A16_AWQ; `scale` is the model dtype, and a source that is wider is cast to it first.

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
    floor = LEAST_NORMAL["F16"] if dtype.name == "F16" else 0.0
    return PairedRtn(4, group, 7.0 if search else 8.0, 1.0, dtype, F32, "pairs", floor, wide=True, search=search)
