"""Parts of wider matrices, seen as one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.rows import KeepsPages, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.lazy import Bytes


@dataclass(frozen=True, slots=True)
class Strided(KeepsPages, SourceTensor):
    """Pieces one above the other (axis 0) or side by side (axis 1), each some columns of a stored matrix.

    Attributes:
        strides: for each piece, bytes from one of its rows to the next.
    """

    strides: tuple[int, ...] = ()

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        self.read_part(shards, (start, stop), (0, self.cols), out)

    def read_part(self, shards: Sequence[Shard], rows: tuple[int, int], cols: tuple[int, int], out: Bytes) -> None:
        """Rows and columns [begin, end), row-major, into `out`."""
        item, row, col = self.dtype.itemsize, 0, 0
        width = (cols[1] - cols[0]) * item
        for piece, stride in zip(self.pieces, self.strides, strict=True):
            low, high = max(rows[0], row), min(rows[1], row + piece.rows)
            left, right = max(cols[0], col), min(cols[1], col + piece.cols)
            if low < high and left < right:
                begin = piece.begin + (low - row) * stride + (left - col) * item
                to = out.data[(low - rows[0]) * width + (left - cols[0]) * item :]
                shards[piece.shard].read_rows_into(begin, stride, (right - left) * item, high - low, to, width)
            row, col = (row + piece.rows, col) if self.axis == 0 else (row, col + piece.cols)


def beside(name: str, tensors: Sequence[Strided]) -> Strided:
    """Tensors of equal height whose pieces lie side by side, as one."""
    pieces = tuple(piece for tensor in tensors for piece in tensor.pieces)
    strides = tuple(stride for tensor in tensors for stride in tensor.strides)
    return Strided(name, tensors[0].dtype, (tensors[0].rows, sum(t.cols for t in tensors)), pieces, 1, strides)
