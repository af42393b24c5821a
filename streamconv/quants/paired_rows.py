"""Integer weights [N, K] of which a byte holds two neighbouring channels, from several matrices: W4A16_AWQ of TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import I8
from streamconv.checkpoint.rows import PackedTensor, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.lazy import Bytes, np


@dataclass(frozen=True, slots=True)
class PairedRows(PackedTensor):
    """Signed integers, one row for each output channel.

    Attributes:
        pieces: matrices [rows, cols] one above the other (axis 0) or side by side (axis 1), two of their rows in one of bytes.
    """

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        whole, row, col = out.reshape(stop - start, self.cols), 0, 0
        for piece in self.pieces:
            low, high = (max(start, row), min(stop, row + piece.rows)) if self.axis == 0 else (start, stop)
            if low < high:
                size = (high - low) // 2 * piece.cols
                stored, nibbles = scratch[:size].reshape(-1, piece.cols), scratch[size : 2 * size].reshape(-1, piece.cols)
                shards[piece.shard].read_into(piece.begin + (low - row) // 2 * piece.cols, scratch[:size].data)
                block = whole[low - start : high - start, col : col + piece.cols]
                for at in (0, 1):
                    np.right_shift(stored, 4, out=nibbles) if at else np.bitwise_and(stored, 15, out=nibbles)
                    np.bitwise_xor(nibbles, 8, out=nibbles)  # two's complement of four bits
                    np.subtract(nibbles, 8, out=block[at::2])
            if self.axis == 0:
                row += piece.rows
            else:
                col += piece.cols


def paired_rows(tensor: SourceTensor) -> PairedRows:
    """Pieces of a weight whose channels are paired."""
    module = tensor.name.removesuffix(".weight")
    return PairedRows(tensor.name, I8, tensor.shape, tensor.pieces, tensor.axis, 4, "modelopt", module)
