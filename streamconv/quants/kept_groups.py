"""Zeros [groups, N] of group-wise integers, as other containers have them: by channel, as whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from streamconv.checkpoint.dtypes import I32
from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import DataError, printable
from streamconv.lazy import Bytes, np
from streamconv.quants.decoded_rows import columns_of


@dataclass(frozen=True, slots=True)
class ZeroWords(SourceTensor):
    """Zero points [N * bits / 32, groups], int32 words of unsigned integers, the lowest channel in the lowest bits.

    A TensorRT-LLM checkpoint has (half - zero point) * scale in the model's type instead, half being 2^(bits-1).

    Attributes:
        scales, zeros: float [groups, N].
    """

    scales: SourceTensor = field(kw_only=True)
    zeros: SourceTensor = field(kw_only=True)
    bits: int = field(kw_only=True)

    @property
    def scratch_row_bytes(self) -> int:
        return 24 * self.cols * 32 // self.bits

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        each, groups, half = 32 // self.bits, self.cols, 1 << (self.bits - 1)
        scales, zeros = (columns_of(tensor, shards, start * each, stop * each) for tensor in (self.scales, self.zeros))
        with np.errstate(all="ignore"):
            below = np.where(scales == 0, np.float32(0), np.rint(zeros / scales))
            whole = np.abs(below * scales - zeros) <= np.abs(zeros) * np.float32(2.0**-8)  # a rounding to bfloat16
        points = half - below
        if not bool((whole & (points >= 0) & (points < 2 * half)).all()):
            told = f"{printable(self.name)} has zeros that are no whole number of {self.bits} bits times their scale"
            raise DataError(told, hint="--quant none decodes it")
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)[None, :, None]
        words = points.T.astype(np.uint32).reshape(stop - start, each, groups) << shifts
        out.view(np.uint32)[:] = np.bitwise_or.reduce(words, 1).reshape(-1)


def zero_words(scales: SourceTensor, zeros: SourceTensor, bits: int) -> ZeroWords:
    """Zero points of group-wise integers."""
    shape = (zeros.cols * bits // 32, zeros.rows)
    return ZeroWords(zeros.name, I32, shape, (*zeros.pieces, *scales.pieces), scales=scales, zeros=zeros, bits=bits)
