"""FP8 with one float32 scale for the whole matrix, before the tensor parallel split: our own, and what a ModelOpt export brings along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from streamconv.checkpoint.dtypes import F8_E4M3, F32, FLOATS, DType
from streamconv.checkpoint.stored_codes import values as values_of
from streamconv.kernels.launch import fused, weight_maximum
from streamconv.lazy import Array, np, torch
from streamconv.quants.base import Codec, EncodeStats, FinishedReductions, Kernel, OfMaximum, Part, ReduceKernel, Reduction
from streamconv.quants.computed import ComputedNumber
from streamconv.quants.rounding import half_ulp
from streamconv.quants.screen import Screen, slack

LARGEST = 448.0


@dataclass(frozen=True)
class WeightMaximum(Reduction):
    """float32 scalar: the largest absolute weight; NaN and infinity do not count (the engine stops on both unless told)."""

    key: str
    bytes_per_element = 12

    def tile(self, block: torch.Tensor, known: FinishedReductions) -> torch.Tensor:
        return torch.nan_to_num(block.float(), 0.0, 0.0, 0.0).abs().max()

    def kernel(self, source: DType) -> ReduceKernel | None:
        return weight_maximum(source) if source.name in FLOATS else None


@dataclass(frozen=True)
class _OfScale(OfMaximum):
    """What has amax / 448, a true float32 division, for a scale; a matrix of zeros has the scale 1.

    Attributes:
        key: of the WeightMaximum of all sources of the (fused) matrix.
        floor: the smallest scale.
    """

    floor: float = 0.0

    def number_of(self, amax: Array) -> float:
        return max(float(np.float32(amax) / np.float32(LARGEST)), float(np.float32(self.floor))) if amax != 0 else 1.0


@dataclass(frozen=True)
class Fp8Tensor(_OfScale):
    """e4m3 weights, quantized straight from the source dtype: round(W / scale), the division in float32."""

    name = "FP8 per tensor"
    quantizes = True
    kernel_bytes_per_column = 0

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("weight", F8_E4M3, (rows, cols), cols),)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        values = block.float()
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            stats.nonfinite += bad
            values = torch.where(torch.isnan(values), 0.0, values)
        codes = (values / torch.full_like(values[:1], self.known)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return (codes.contiguous().reshape(-1).view(torch.uint8),)

    def screen(self, source: DType) -> Screen | None:
        return Screen("e4m3", lambda parts: np.array([self.known]), band=0, quotient=slack(F32)) if source.name in FLOATS else None

    def kernel(self, source: DType) -> Kernel | None:
        return fused("fp8_code.fp8_tensor_rows", ["u1"], source, self.number) if source.name in FLOATS else None

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        return parts[0].view(torch.float8_e4m3fn).float().reshape(rows, cols) * self.known

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """e4m3's rounding of W / scale, and some of float32's."""
        return half_ulp(block.float() / self.known, F8_E4M3) * self.known + 4 * half_ulp(block, F32)


@dataclass(frozen=True)
class Fp8Scale(ComputedNumber, _OfScale):
    """`weights_scaling_factor` of a matrix; the source is a `NoSource`."""

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("weights_scaling_factor", F32, (1,), 4),)


Scales = tuple[tuple[str, float], ...]
"""(source tensor, its scale) of all sources of a fused matrix."""


@cache
def _codes(own: float, shared: float) -> bytes:
    """e4m3 code -> the code of round(value * own / shared), product and quotient in float32, ties to even; NaN stays NaN."""
    values = values_of("e4m3")[:127].astype(np.float64)
    exact = (values.astype(np.float32) * np.float32(own) / np.float32(shared)).astype(np.float64)
    middles = (values[1:] + values[:-1]) / 2
    low = np.searchsorted(middles, exact, "left")
    tie = np.isin(exact, middles)
    codes = np.where(tie & (low % 2 == 1), low + 1, low).astype(np.uint8)
    half = bytes(codes) + b"\x7f"
    return half + bytes(value | 0x80 for value in half)


@dataclass(frozen=True)
class Fp8Shared(Codec):
    """e4m3 codes of parts with scales of their own, under the largest of them.

    Attributes:
        scales: of each part.
        own: the scale of the rows at hand, None until `bind`.
    """

    scales: Scales
    own: float | None = None

    name = "FP8 per tensor, as it is under one scale"

    @property
    def shared(self) -> float:
        return max(scale for _, scale in self.scales)

    def bind(self, known: FinishedReductions, source: str) -> Fp8Shared:
        return replace(self, own=dict(self.scales)[source])

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("weight", F8_E4M3, (rows, cols), cols),)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        table = torch.frombuffer(bytearray(self._table()), dtype=torch.uint8).to(block.device)
        return (table[block.contiguous().view(torch.uint8).long().reshape(-1)],)

    def kernel(self, source: DType) -> Kernel | None:
        if source != F8_E4M3:
            return None
        table = self._table()

        def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> EncodeStats:
            codes = outs[0].reshape(rows, cols)
            for row in range(rows):
                at = start + row * stride
                codes[row] = np.frombuffer(flat[at : at + cols].tobytes().translate(table), np.uint8)
            return EncodeStats()

        return run

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        return parts[0].view(torch.float8_e4m3fn).float().reshape(rows, cols) * self.shared

    def values(self, block: torch.Tensor) -> torch.Tensor:
        return block.float() * (self.own or self.shared)

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """One rounding to e4m3, and some of float32's."""
        values = self.values(block)
        return half_ulp(values / self.shared, F8_E4M3) * self.shared + 4 * half_ulp(values, F32)

    def _table(self) -> bytes:
        return _codes(self.own or self.shared, self.shared)
