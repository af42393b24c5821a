"""Tensors whose rows are wanted otherwise than a file stores them: columns, every second row, another order, less one, unpacked.

A tile of columns is a stripe, read as one run of bytes of each stored row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import F32, I8
from streamconv.checkpoint.rows import Extent, KeepsPages, PackedTensor, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.stored_codes import as_float
from streamconv.lazy import Bytes, np

BLOCK = 32
"""Rows that are turned at once: what the processor's cache holds, and several times as fast as all of them."""
WIDE = 512
"""Columns of a large matrix that are worth a look at each of its rows: a stripe is read with a call for each."""


@dataclass(frozen=True, slots=True)
class Turned(KeepsPages, SourceTensor):
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


@dataclass(frozen=True, slots=True)
class EveryRow(KeepsPages, SourceTensor):
    """Every `step`-th row of a stored matrix; the one piece begins with the first of them."""

    step: int = 1

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        piece, row = self.pieces[0], self.stored_row_bytes
        shards[piece.shard].read_rows_into(piece.begin + start * self.step * row, self.step * row, row, stop - start, out.data, row)


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
        held = scratch[: (stop - start) * self.stored_row_bytes]
        SourceTensor.read(self, shards, start, stop, held, scratch[:0])
        heads, half, row = (stop - start) // self.head, self.head // 2, self.stored_row_bytes
        out.reshape(heads, 2, half, row)[:] = held.reshape(heads, half, 2, row).swapaxes(1, 2)


@dataclass(frozen=True, slots=True)
class LessOne(SourceTensor):
    """What is stored less 1. float32 holds the difference exactly, of 16-bit values down to 2^-16, so that adding 1 gives them again.

    Attributes:
        stored: a tensor of one column; `dtype` is F32.
    """

    stored: SourceTensor | None = None

    @property
    def _own(self) -> SourceTensor:
        assert self.stored is not None
        return self.stored

    @property
    def stored_row_bytes(self) -> int:
        return self._own.stored_row_bytes

    @property
    def scratch_row_bytes(self) -> int:
        return self._own.stored_row_bytes

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        held = scratch[: (stop - start) * self._own.stored_row_bytes]
        self._own.read(shards, start, stop, held, scratch[:0])
        np.subtract(as_float(held, self._own.dtype.name), np.float32(1), out=out.view(np.float32))


def less_one(stored: SourceTensor) -> LessOne:
    """A norm that is stored as value + 1."""
    return LessOne(stored.name, F32, stored.shape, stored.pieces, stored.axis, stored)


@dataclass(frozen=True, slots=True)
class PairedRows(PackedTensor):
    """Integer weights [N, K] of which a byte holds two neighbouring channels, from several matrices: W4A16_AWQ of TensorRT-LLM.

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
