"""What a format reaches on given weights: the nearest codes for scales of the largest magnitude, and how far off a value may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.lazy import np
from streamconv.quants.decoded_rows import DecodedTensor, groups_of
from streamconv.targets.hf.sources import Weight

if TYPE_CHECKING:
    Floats = np.ndarray[Any, np.dtype[np.float64]]

_FLOATS = {"e4m3": (3, -6, 448.0), "e2m1": (1, 0, 6.0)}
"""Bits of the mantissa, least exponent, largest value."""
_BITS = {"int8": 8, "uint8": 8, "uint4": 4}
_TALLEST = 1024
"""Rows of a tile that are read at a time; a scale for more of them is taken from the file."""


@dataclass(frozen=True, slots=True)
class Format:
    """How a stored weight was quantized.

    Attributes:
        code: "e4m3", "e2m1", or "" for integers of `bits`.
        per_row, per_col: of a tile with a scale.
        power: scales are powers of two.
        zeros: there are zero points.
        scale: of the whole weight, where one serves more rows than are read at a time; 0 where it follows from the values.
        floor: what scales that are too small for their type may add to any error.
        order: group of each input feature, where they do not come one after the other.
    """

    code: str
    bits: int
    per_row: int
    per_col: int
    power: bool = False
    zeros: bool = False
    scale: float = 0.0
    floor: float = 0.0
    order: Any = None

    @property
    def slack(self) -> float:
        """dB by which values may be worse than the nearest: tools that minimize the error of a layer's output, not that of its weights."""
        return 3.0 if not self.code and self.bits < 8 else 2.0


def format_of(weight: Weight, shards: tuple[Shard, ...], symmetric: bool) -> Format | None:
    """The format of a stored weight, None of a plain tensor or one that is not known here."""
    if not isinstance(weight, DecodedTensor):
        return None
    code = weight.code if weight.code in _FLOATS else ""
    bits = weight.bits or (8 if code == "e4m3" else 4 if code else _BITS[weight.code])
    power = weight.scales.dtype.name in ("U8", "F8_E8M0")
    words = weight.zeros is not None and weight.bits is not None  # GPTQ's and AutoAWQ's, which are there in symmetric weights too
    zeros = weight.zeros is not None and not (words and symmetric)
    scale = 0.0
    if weight.per_row > _TALLEST:
        scale = float(weight.factors(shards, 0, 1).max())
    shared = 1.0 / weight.factor if weight.divide else weight.factor
    floor = shared / 16 if weight.scales.dtype.name == "F8_E4M3" else _floor(weight.scales, 1 << (bits if words else bits - 1))
    order = None if weight.order is None else groups_of(weight.order, weight.cols, weight.scales.cols, shards)
    return Format(code, bits, min(weight.per_row, weight.rows), weight.per_col, power, zeros, scale, floor, order)


def _floor(scales: SourceTensor, largest: int) -> float:
    return largest * 2.0**-25 if scales.dtype.name == "F16" else 0.0


def nearest(want: Floats, form: Format) -> tuple[Floats, Floats]:
    """(what the format gives for these values, how far off a value may be), both [rows, cols]."""
    if form.zeros:
        low, high = (np.minimum(_tiles(np.minimum, want, form), 0.0), np.maximum(_tiles(np.maximum, want, form), 0.0))
        scale = (high - low) / (2**form.bits - 1)
        scale[scale == 0] = 1.0
        reached: Floats = np.clip(np.rint((want - low) / scale), 0, 2**form.bits - 1) * scale + low
        return reached, _clipped(want, np.maximum(-low, high), scale, form)
    amax = _tiles(np.maximum, np.abs(want), form)
    top = _FLOATS[form.code][2] if form.code else (2**form.bits - 1) / 2
    scale = np.full_like(amax, form.scale) if form.scale else amax / top
    if form.power:
        part, exponent = np.frexp(amax)  # 0.5 <= part < 1
        scale = np.ldexp(1.0, exponent - 1 + (part >= 0.875) - (8 if form.code == "e4m3" else 2))
    scale[scale == 0] = 1.0
    x = want / scale
    if not form.code:
        return np.clip(np.rint(x), -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1) * scale, _clipped(want, amax, scale, form)
    mantissa, least, largest = _FLOATS[form.code]
    step = np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 1, least) - mantissa)
    reached = np.clip(np.rint(x / step) * step, -largest, largest) * scale
    gap = 2.0**least * 2.0**-mantissa * scale
    return reached, np.maximum(np.abs(want) * 1.1 * 2.0**-mantissa, 2.2 * gap)


def _clipped(want: Floats, amax: Floats, scale: Floats, form: Format) -> Floats:
    """How far off integers may be: a step and a half; in few bits tools that search scales cut off what is above half the largest value."""
    step: Floats = 1.6 * scale
    return step if form.bits >= 8 else np.maximum(step, np.abs(want) - amax / 2 + 0.6 * scale)


def _tiles(function: Any, values: Floats, form: Format) -> Floats:
    """The extreme of each tile, in the place of every value."""
    rows, cols = values.shape
    down = function.reduceat(values, np.arange(0, rows, form.per_row), axis=0)
    both = function.reduceat(down, np.arange(0, cols, form.per_col), axis=1)
    wide: Floats = np.repeat(np.repeat(both, form.per_row, axis=0)[:rows], form.per_col, axis=1)[:, :cols]
    return wide
