"""NVFP4: e2m1 codes, an e4m3 scale for each 16 columns, and one float32 scale that partners (q, k, v; gate, up) share.

The shared scale comes from the largest weight of all partners, so their rows are read once before any of them is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from streamconv.checkpoint.dtypes import F8_E4M3, F32, FLOATS, U8, DType
from streamconv.checkpoint.stored_codes import as_float
from streamconv.kernels.launch import fused
from streamconv.lazy import Array, Bytes, np, torch
from streamconv.quants.base import EncodeStats, Kernel, OfMaximum, Part
from streamconv.quants.computed import ComputedNumber
from streamconv.quants.packing import pack_nibbles, unpack_nibbles
from streamconv.quants.rounding import LEAST_NORMAL, divided, e2m1_codes, e2m1_values, finite_rows, half_ulp, rounded
from streamconv.quants.screen import Screen, around

GROUP = 16
Rule = Literal["divisor", "multiplier"]
"""How the shared scale is stored: "divisor", (1 / amax) * 2688 (compressed-tensors); "multiplier", amax / 2688 (ModelOpt)."""


def shared_scale(amax: float, rule: Rule, kind: DType) -> float:
    """The shared scale as it is stored, a float32 value; 1 for weights that are all zero.

    Args:
        amax: largest weight of all partners.
        kind: type that a divisor is rounded to on the way.
    """
    if rule == "multiplier":
        return float(np.float32(amax) / np.float32(2688.0)) if amax else 1.0
    # what torch makes of 2688 / amax: the reciprocal, rounded, times 2688, rounded
    with np.errstate(over="ignore"):
        inverse = _rounded(np.float32(1.0) / np.float32(max(amax, LEAST_NORMAL[kind.name])), kind)
        value = _rounded(inverse * np.float32(2688.0), kind)
    return float(value) if np.isfinite(value) and amax else 1.0


def _rounded(value: np.float32, kind: DType) -> np.float32:
    """A float32 number rounded to a type, nearest even."""
    if kind.name == "F16":
        return np.float32(np.float16(value))
    if kind.name == "BF16" and np.isfinite(value):
        bits = int(value.view(np.uint32))
        return np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    return value


@dataclass(frozen=True)
class _OfShared(OfMaximum):
    """What the shared scale decides.

    Attributes:
        key: of the `WeightMaximum` of all partners.
        kind: type that the shared scale and amax / 6 of a block are rounded to ("divisor" only).
    """

    rule: Rule
    kind: DType = F32

    def number_of(self, amax: Array) -> float:
        return shared_scale(float(amax), self.rule, self.kind)


@dataclass(frozen=True)
class NvFp4(_OfShared):
    """Codes [N, K / 2] and block scales [N, K / 16]; the shared scale is a tensor of its own (`SharedScale`)."""

    name = "NVFP4"
    quantizes = True

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("codes", U8, (rows, cols // 2), cols // 2), Part("scale", F8_E4M3, (rows, cols // GROUP), cols // GROUP))

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        values = finite_rows(block, stats)
        rows, cols = values.shape
        grouped = values.reshape(rows, -1, GROUP)
        top, shared = grouped.abs().amax(2, keepdim=True), self.known
        if self.rule == "divisor":
            sixth = rounded(divided(top, 6.0), self.kind)
            stored = (sixth * torch.full_like(sixth, shared)).clamp(max=448.0).to(torch.float8_e4m3fn)
            scale = torch.where(stored.float() == 0, 0.125, stored.float())
            step = divided(scale, shared)
        else:
            ratio = top / (6.0 * torch.full_like(top, shared))
            ratio = torch.where(ratio == 0, 1.0, ratio)
            scale = ratio.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float()
            step = scale * torch.full_like(scale, shared)
        codes = e2m1_codes((grouped / step).reshape(rows, cols))
        return pack_nibbles(codes), scale.to(torch.float8_e4m3fn).contiguous().reshape(-1).view(torch.uint8)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        values = e2m1_values(unpack_nibbles(parts[0], rows, cols)).reshape(rows, -1, GROUP)
        scale = parts[1].view(torch.float8_e4m3fn).float().reshape(rows, -1, 1)
        step = divided(scale, self.known) if self.rule == "divisor" else scale * self.known
        return (values * step).reshape(rows, cols)

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """Half the distance of neighbouring values, in steps of a block scale that is itself rounded to e4m3."""
        values = block.float()
        rows, cols = values.shape
        top = values.reshape(rows, -1, GROUP).abs().amax(2, keepdim=True)
        unit = 1.0 / self.known if self.rule == "divisor" else self.known
        step = (top / 6.0) + half_ulp(top / 6.0 / unit, F8_E4M3) * unit + 0.125 * unit
        return (step * 1.02).expand(rows, cols // GROUP, GROUP).reshape(rows, cols) + 0.07 * values.abs()

    def screen(self, source: DType) -> Screen | None:
        """An e4m3 scale is up to 1/16 off."""
        return Screen("e2m1", self._steps, GROUP, ratio=around(6.0, 0.07)) if source.name in FLOATS else None

    def _steps(self, parts: Sequence[Bytes]) -> Array:
        scale, shared = as_float(parts[1], "F8_E4M3"), np.float32(self.known)
        steps: Array = scale / shared if self.rule == "divisor" else scale * shared
        return steps

    def kernel(self, source: DType) -> Kernel | None:
        if source.name not in FLOATS:
            return None
        return fused("fp4_code.nvfp4_rows", ["u1", "u1"], source, self.kind, self.number, self.rule == "divisor")


@dataclass(frozen=True)
class SharedScale(ComputedNumber, _OfShared):
    """The shared scale of NVFP4 partners, one float32; the source is a `NoSource`."""

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("shared_scale", F32, (1,) if self.rule == "divisor" else (), 4),)
