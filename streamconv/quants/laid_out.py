"""Integer weights read back from the mixed-GEMM layout: the inverse of `Layout.pack`, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from streamconv.checkpoint.dtypes import I8
from streamconv.checkpoint.rows import PackedTensor, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.lazy import Bytes, np
from streamconv.quants.layout import Layout

LAID_OUT = "laid out"


@dataclass(frozen=True, slots=True)
class LaidOut(PackedTensor):
    """Signed integers [N, K], one row for each output channel, from matrices that are laid out for a GPU generation.

    Attributes:
        pieces: matrices [rows, cols] one above the other (axis 0) or side by side (axis 1), each laid out by itself; `begin` is the
            first byte of the record of their first row.
    """

    layout: Layout = Layout("sm80", 8)  # noqa: RUF009  frozen

    @property
    def row_align(self) -> int:
        return self.layout.interleave

    @property
    def scratch_row_bytes(self) -> int:
        return self.stored_row_bytes

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        from streamconv.kernels.laid_out_code import unpack_rows

        row = col = 0
        for piece in self.pieces:
            low, high = (max(start, row), min(stop, row + piece.rows)) if self.axis == 0 else (start, stop)
            if low < high:
                stored = scratch[: (high - low) * piece.cols * self.bits // 8]
                begin = piece.begin + (low - row) * piece.cols * self.bits // 8
                shards[piece.shard].read_into(begin, stored.data)
                order, first = _order(self.layout, piece.cols), (low - start) * self.cols + col
                unpack_rows(stored, self.bits, self.layout.biased, order, piece.cols, out, first, self.cols)
            if self.axis == 0:
                row += piece.rows
            else:
                col += piece.cols


def laid_out(tensor: SourceTensor, layout: Layout) -> LaidOut:
    """Pieces of a weight whose integers are laid out."""
    module = tensor.name.removesuffix(".weight")
    return LaidOut(tensor.name, I8, tensor.shape, tensor.pieces, tensor.axis, layout.bits, LAID_OUT, module, layout)


@lru_cache(16)
def _order(layout: Layout, k: int) -> np.ndarray[Any, Any]:
    """For each element of a record's channels, one after the other, where it is stored in the record."""
    count, block = layout.interleave, len(layout.table)
    plain = np.arange(count * k)
    rows = plain.reshape(k // layout.tile, count, layout.tile).swapaxes(0, 1) if count > 1 else plain
    places = rows.reshape(count, k // block, block)
    found = np.empty_like(places)
    found[:, :, list(layout.table)] = places
    return found.reshape(-1)
