"""AutoAWQ's layout: a row for each input channel, int32 words of eight output channels. These codecs see a weight by its input channels.

    codes   I32 [K, N / 8]     unsigned nibbles, in the order 0 2 4 6 1 3 5 7 of the channels, the first in the lowest bits
    zero    I32 [K / g, N / 8] the code that stands for 0, packed alike
    scale   F16 [K / g, N]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import F16, FLOATS, I8, I32, DType
from streamconv.checkpoint.packed_rows import AWQ_POSITION
from streamconv.kernels.launch import fused
from streamconv.lazy import torch
from streamconv.quants.base import Codec, EncodeStats, Exact, Kernel, Part
from streamconv.quants.int_group import IntGroup
from streamconv.quants.rounding import divided, finite_rows, half_ulp, rounded

_CHANNELS = [AWQ_POSITION.index(nibble) for nibble in range(8)]
_MIDDLE = 8
LEAST = 2.0**-14
"""The smallest scale: a normal number of float16."""


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """[rows, N] of 0 to 15 -> the bytes of their words."""
    nibbles = codes.to(torch.uint8).reshape(-1, 8)[:, _CHANNELS]
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).reshape(-1)


def _unpacked(stored: torch.Tensor, cols: int) -> torch.Tensor:
    """Bytes of words -> float32 [rows, cols]."""
    nibbles = torch.stack([stored & 15, stored >> 4], 1).reshape(-1, 8)
    return nibbles[:, list(AWQ_POSITION)].reshape(-1, cols).float()


def _words(role: str, rows: int, cols: int, record_rows: int = 1) -> Part:
    return Part(role, I32, (rows // record_rows, cols // 8), cols // 2, record_rows)


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
        return (_words("codes", rows, cols), _words("zero", rows, cols, self.group), scale)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        values = finite_rows(block, stats)
        if self.symmetric is not None:  # whose groups lie in rows
            grouped = values.T.reshape(values.shape[1], -1, self.group)
            scale = self.symmetric.scales(grouped)
            q = self.symmetric.integers(grouped, scale).reshape(values.shape[1], -1).T + _MIDDLE
            scale = scale[:, :, 0].T
            zero = torch.full_like(scale, _MIDDLE)
        else:
            grouped = values.reshape(-1, self.group, values.shape[1])
            low, step = self._range(grouped)
            scale = rounded(step, self.scale)
            scale = torch.where(scale == 0, 1.0, scale).clamp(min=LEAST)
            zero = (-low / scale).round().clamp(0, 15)
            q = ((grouped / scale[:, None]).round() + zero[:, None]).clamp(0, 15).reshape(values.shape)
        stored = scale.to(torch.float16)
        stats.overflow += int(stored.isinf().sum())
        return _packed(q), _packed(zero), stored.contiguous().reshape(-1).view(torch.uint8)

    def _range(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[groups, g, N] -> least value, 0 at most, and the step [groups, N]."""
        low = grouped.amin(1).clamp(max=0)
        return low, divided(grouped.amax(1).clamp(min=0) - low, 15.0)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        codes, zero = (_unpacked(stored, cols) for stored in parts[:2])
        scale = parts[2].view(torch.float16).float().reshape(-1, 1, cols)
        return ((codes.reshape(-1, self.group, cols) - zero[:, None]) * scale).reshape(rows, cols)

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """Half a step, which at an end holds for what the rounded zero point leaves, and what the step itself was rounded by, 15 times."""
        values = block.float()
        if self.symmetric is not None:
            return self.symmetric.error(values.T).T
        grouped = values.reshape(-1, self.group, values.shape[1])
        _, step = self._range(grouped)
        step = step.clamp(min=LEAST)
        bound = 0.5 * step + 16 * half_ulp(step, self.scale)
        return bound[:, None].expand(grouped.shape).reshape(values.shape)

    def kernel(self, source: DType) -> Kernel | None:
        if source.name not in FLOATS or (self.symmetric is not None and self.symmetric.search):
            return None
        divisor = 15.0 if self.symmetric is None else self.symmetric.divisor
        rule = self.group, divisor, LEAST, self.symmetric is not None
        return fused("awq_words_code.awq_rows", ["u1", "u1", "u2"], source, self.scale, *rule)


@dataclass(frozen=True)
class AwqCodes(Exact):
    """Signed integers [K, N] (int8), found elsewhere -> words."""

    name = "INT4, as found, AutoAWQ's words"

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (_words("codes", rows, cols),)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        return (_packed(block.to(torch.int16) + _MIDDLE),)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        return _unpacked(parts[0], cols) - _MIDDLE

    def kernel(self, source: DType) -> Kernel | None:
        return fused("awq_words_code.awq_given_rows", ["u1"]) if source == I8 else None


@dataclass(frozen=True)
class AwqScales(Codec):
    """Scales [K / g, N] of such integers, and the zero points that go with them: all 8."""

    name = "scales of AutoAWQ's words"
    computed = True

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("scale", F16, (rows, cols), 2 * cols), _words("zero", rows, cols))

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        stored = block.to(torch.float16).contiguous()
        stats.overflow += int((stored.isinf() & block.isfinite()).sum())
        return stored.reshape(-1).view(torch.uint8), _packed(torch.full(block.shape, _MIDDLE, device=block.device))

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        return parts[0].view(torch.float16).float().reshape(rows, cols)

    def error(self, block: torch.Tensor) -> torch.Tensor:
        return half_ulp(block, F16)

    def kernel(self, source: DType) -> Kernel | None:
        return fused("awq_words_code.awq_scale_rows", ["u2", "u1"], source) if source.name in FLOATS else None
