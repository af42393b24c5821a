"""Tensors whose rows are wanted otherwise than a file stores them: columns, every second row, another order, less one.

A tile of columns is a stripe, read as one run of bytes of each stored row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import F32
from streamconv.checkpoint.rows import Derived, Extent, SourceTensor, read_block
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.stored_codes import as_float
from streamconv.lazy import Bytes, np

BLOCK = 32
"""Rows that are turned at once: what the processor's cache holds, and several times as fast as all of them."""
WIDE = 512
"""Columns of a large matrix that are worth a look at each of its rows: a stripe is read with a call for each."""


@dataclass(frozen=True, slots=True)
class Turned(SourceTensor):
    """A stored matrix read by its columns: `shape` is (columns wanted, stored rows); `pieces` and `axis` are as it is stored.

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
        item, first, last = self.dtype.itemsize, start * self.step, (stop - 1) * self.step + 1
        stripe = scratch[: self.cols * (last - first) * item]
        read_block(shards, self.pieces, self.axis, item, (0, self.cols), (first, last), stripe)
        values = stripe.view(f"u{item}").reshape(self.cols, last - first)[:, :: self.step]
        columns = out[: values.size * item].view(f"u{item}").reshape(stop - start, self.cols)
        for row in range(0, self.cols, BLOCK):
            columns[:, row : row + BLOCK] = values[row : row + BLOCK].T


def rows_of(tensor: SourceTensor, name: str, first: int, shape: tuple[int, int], step: int = 1) -> SourceTensor:
    """Rows first, first + step, ... of a tensor whose rows are shape[1] long, as a tensor of their own."""
    piece, row = tensor.pieces[0], shape[1] * tensor.dtype.itemsize
    at = Extent(piece.shard, piece.begin + first * row, *shape, step * row if step > 1 else 0)
    return SourceTensor(name, tensor.dtype, shape, (at,))


def turned(tensor: SourceTensor, wide: int = 1) -> Turned:
    """A tensor [R, C] as (C, R)."""
    return Turned(tensor.name, tensor.dtype, (tensor.cols, tensor.rows), tensor.pieces, tensor.axis, wide=wide)


def read_stripe(shards: Sequence[Shard], piece: Extent, start: int, stop: int, out: Bytes) -> Bytes:
    """Columns [start, stop) of a stored matrix of bytes, row-major, at the beginning of `out`."""
    stripe = out[: piece.rows * (stop - start)]
    read_block(shards, (piece,), 0, 1, (0, piece.rows), (start, stop), stripe)
    return stripe


@dataclass(frozen=True, slots=True)
class RotaryRows(SourceTensor):
    """Queries or keys of Meta's checkpoints, [heads * head, K], read in the order of Hugging Face.

    Rotary embedding turns pairs of a head's outputs: Meta stores a pair as neighbours, Hugging Face its first ones in the upper half of
    the head and its second ones in the lower (`permute` of transformers' convert_llama_weights_to_hf.py).

    Attributes:
        head: rows of a head, even; whole heads are read.
    """

    head: int = 2

    @property
    def row_align(self) -> int:
        return self.head

    @property
    def scratch_row_bytes(self) -> int:
        return self.stored_row_bytes

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        stored = scratch[: (stop - start) * self.stored_row_bytes]
        SourceTensor.read(self, shards, start, stop, stored, scratch[:0])
        heads, half, row = (stop - start) // self.head, self.head // 2, self.stored_row_bytes
        out.reshape(heads, 2, half, row)[:] = stored.reshape(heads, half, 2, row).swapaxes(1, 2)


@dataclass(frozen=True, slots=True)
class LessOne(Derived):
    """A column less 1. float32 holds the difference exactly, of 16-bit values down to 2^-16, so that adding 1 gives them again."""

    @property
    def scratch_row_bytes(self) -> int:
        return self.stored.stored_row_bytes

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        values = scratch[: (stop - start) * self.stored_row_bytes]
        self.stored.read(shards, start, stop, values, scratch[:0])
        np.subtract(as_float(values, self.stored.dtype.name), np.float32(1), out=out.view(np.float32))


def less_one(stored: SourceTensor) -> LessOne:
    """A norm that is stored as value + 1."""
    return LessOne(stored.name, F32, stored.shape, stored.pieces, stored.axis, stored=stored)
