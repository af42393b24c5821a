"""Tensors of which other rows are wanted than those that a file stores: columns, or every second row.

A tile of columns is a stripe, read as one run of bytes of each stored row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.rows import Extent, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.lazy import Bytes

BLOCK = 32
"""Rows that are turned at once: what the processor's cache holds, and several times as fast as all of them."""
WIDE = 512
"""Columns of a large matrix that are worth a look at each of its rows: a stripe is read with a call for each."""


@dataclass(frozen=True, slots=True)
class Turned(SourceTensor):
    """A stored matrix read by its columns: `shape` is (columns wanted, stored rows); the one piece is as it is stored.

    Attributes:
        step: every how manieth column is wanted; the piece begins with the first of them.
        wide: so many columns are read at once.
    """

    step: int = 1
    wide: int = 1

    @property
    def row_align(self) -> int:
        return self.wide

    @property
    def scratch_row_bytes(self) -> int:
        return self.stored_row_bytes * self.step

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        item = self.dtype.itemsize
        first, last = start * self.step, (stop - 1) * self.step + 1
        stripe = read_stripe(shards, self.pieces[0], item, first, last, scratch)
        turn(stripe, (self.cols, last - first), item, out, self.step)

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        """Nothing: the pages of a stripe hold parts of the next ones."""


@dataclass(frozen=True, slots=True)
class EveryRow(SourceTensor):
    """Every `step`-th row of a stored matrix; the one piece begins with the first of them."""

    step: int = 1

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        piece, row = self.pieces[0], self.stored_row_bytes
        shards[piece.shard].read_rows_into(piece.begin + start * self.step * row, self.step * row, row, stop - start, out.data, row)

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        """Nothing: the rows between are wanted too."""


def rows_of(tensor: SourceTensor, name: str, first: int, shape: tuple[int, int], step: int = 1) -> SourceTensor:
    """Rows first, first + step, ... of a tensor whose rows are shape[1] long, as a tensor of their own."""
    rows, cols = shape
    piece = tensor.pieces[0]
    begin = piece.begin + first * cols * tensor.dtype.itemsize
    if step == 1:
        return SourceTensor(name, tensor.dtype, shape, (Extent(piece.shard, begin, rows, cols),))
    return EveryRow(name, tensor.dtype, shape, (Extent(piece.shard, begin, rows * step - step + 1, cols),), 0, step)


def turned(tensor: SourceTensor, wide: int = 1) -> Turned:
    """A tensor [R, C] as (C, R)."""
    return Turned(tensor.name, tensor.dtype, (tensor.cols, tensor.rows), tensor.pieces, wide=wide)


def turn(stored: Bytes, shape: tuple[int, int], item: int, out: Bytes, step: int = 1) -> None:
    """A matrix of items of so many bytes, or every `step`-th column of it -> its transpose."""
    rows, cols = shape
    values = stored.view(f"u{item}").reshape(rows, cols)[:, ::step]
    made = out[: values.size * item].view(f"u{item}").reshape(values.shape[1], rows)
    for first in range(0, rows, BLOCK):
        made[:, first : first + BLOCK] = values[first : first + BLOCK].T


def read_stripe(shards: Sequence[Shard], piece: Extent, item: int, start: int, stop: int, out: Bytes) -> Bytes:
    """Columns [start, stop) of a stored matrix, row-major, at the beginning of `out`."""
    width = (stop - start) * item
    found = out[: piece.rows * width]
    shards[piece.shard].read_rows_into(piece.begin + start * item, piece.cols * item, width, piece.rows, found.data, width)
    return found
