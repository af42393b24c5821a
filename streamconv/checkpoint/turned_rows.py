"""Sources whose rows run across what the files store: weights kept input-major, and experts that are wanted turned.

A tile is a stripe of stored columns, read as one run of bytes of each stored row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.packed_rows import AWQ_POSITION
from streamconv.checkpoint.rows import PackedTensor, Piece, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.stored_codes import as_float, values

if TYPE_CHECKING:
    import numpy as np

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_TILE = 8 << 20
"""Bytes of a decoded stripe of an expert: the wider, the fewer stored bytes are passed over."""


@dataclass(frozen=True, slots=True)
class Turned(SourceTensor):
    """A stored matrix read by its columns: `shape` is (columns wanted, stored rows); the one piece is as it is stored.

    Attributes:
        step: every how manieth column is wanted; the piece begins with the first of them.
    """

    step: int = 1

    @property
    def scratch_row_bytes(self) -> int:
        return self.stored_row_bytes * self.step

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        count, item = stop - start, self.dtype.itemsize
        first, last = start * self.step, (stop - 1) * self.step + 1
        stripe = read_stripe(shards, self.pieces[0], item, first, last, scratch)
        out.reshape(count, self.cols, item)[:] = stripe.reshape(self.cols, last - first, item)[:, :: self.step].swapaxes(0, 1)

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
        return SourceTensor(name, tensor.dtype, shape, (Piece(piece.shard, begin, rows, cols),))
    return EveryRow(name, tensor.dtype, shape, (Piece(piece.shard, begin, rows * step - step + 1, cols),), 0, step)


def turned(tensor: SourceTensor) -> Turned:
    """A tensor [R, C] as (C, R)."""
    return Turned(tensor.name, tensor.dtype, (tensor.cols, tensor.rows), tensor.pieces)


def read_stripe(shards: Sequence[Shard], piece: Piece, item: int, start: int, stop: int, out: Bytes) -> Bytes:
    """Columns [start, stop) of a stored matrix, row-major, at the beginning of `out`."""
    width = (stop - start) * item
    found = out[: piece.rows * width]
    shards[piece.shard].read_rows_into(piece.begin + start * item, piece.cols * item, width, piece.rows, found.data, width)
    return found


@dataclass(frozen=True, slots=True)
class DecodedIntegers:
    """A GPTQ or AutoAWQ weight [N, K] as floats: (code - zero) * scale, exact in float32 but for the last product, rounded once.

    Attributes:
        dtype: F32, F16 or BF16.
        codes: the integers.
        scales: stored as [groups, N].
        zeros: stored as int32 [groups, N * bits / 32].
        order: int32 [K], the group of each input channel (act order); None for groups one after the other.
        offset: what the stored zero points lack: 1 in GPTQ v1.
    """

    name: str
    dtype: DType
    codes: PackedTensor
    scales: SourceTensor
    zeros: SourceTensor
    order: SourceTensor | None
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def rows(self) -> int:
        return self.codes.rows

    @property
    def cols(self) -> int:
        return self.codes.cols

    @property
    def row_align(self) -> int:
        return 32 // self.codes.bits

    @property
    def pieces(self) -> tuple[Piece, ...]:
        order = self.order.pieces if self.order is not None else ()
        return (*self.codes.pieces, *self.scales.pieces, *self.zeros.pieces, *order)

    @property
    def nbytes(self) -> int:
        return self.rows * self.cols * self.dtype.itemsize

    @property
    def stored_row_bytes(self) -> int:
        return self.codes.stored_row_bytes

    @property
    def scratch_row_bytes(self) -> int:
        return 2 * self.cols + self.scales.rows * (2 * self.scales.dtype.itemsize + 12) + 8 * self.cols // self.row_align

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        import numpy as np

        from streamconv.kernels.integers_code import decode_integers
        from streamconv.kernels.rows import CODES

        count, groups, unit = stop - start, self.scales.rows, self.row_align
        codes, rest = scratch[: count * self.cols], scratch[count * self.cols :]
        self.codes.read(shards, start, stop, codes, rest)
        raw = read_stripe(shards, self.scales.pieces[0], self.scales.dtype.itemsize, start, stop, rest)
        scales = as_float(raw, self.scales.dtype.name).reshape(groups, count).copy()
        words = read_stripe(shards, self.zeros.pieces[0], 4, start // unit, stop // unit, rest)
        zeros = unpacked_zeros(words, groups, self.codes.bits, self.codes.packing == "awq")
        middle = (1 << (self.codes.bits - 1)) - self.offset
        decode_integers(
            codes.view(np.int8), scales, zeros.reshape(groups, count), self._groups(shards, groups), middle,
            CODES[self.dtype.name], out.view(self.dtype.storage),
        )  # fmt: skip

    def _groups(self, shards: Sequence[Shard], groups: int) -> np.ndarray[Any, Any]:
        """int32 [K]: the group of each input channel.

        Raises:
            CheckpointError: the file names a group that there is not.
        """
        import numpy as np

        from streamconv.errors import CheckpointError, printable

        if self.order is None:
            return np.arange(self.cols, dtype=np.int32) // np.int32(self.cols // groups)
        found = np.empty(self.cols, np.int32)
        self.order.read(shards, 0, self.cols, found.view(np.uint8), found.view(np.uint8)[:0])
        if found.min() < 0 or found.max() >= groups:
            raise CheckpointError(f"{printable(self.order.name)} names a group that there is not: there are {groups}")
        return found

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        """Nothing: the pages of a stripe hold parts of the next ones."""


def unpacked_zeros(words: Bytes, groups: int, bits: int, shuffled: bool) -> Bytes:
    """Packed zero points [groups, n * bits / 32] -> uint8 [groups, n].

    Args:
        shuffled: in AutoAWQ's order of channels.
    """
    import numpy as np

    if bits == 8:
        return words.reshape(groups, -1).copy()
    found = np.stack([words & 15, words >> 4], 1).reshape(groups, -1, 8)
    return np.ascontiguousarray(found[:, :, AWQ_POSITION] if shuffled else found).reshape(groups, -1)


@dataclass(frozen=True, slots=True)
class TurnedMx:
    """MXFP4 experts, codes [E, N, K / 32, 16] and scales [E, N, K / 32], decoded to floats [E, K, N].

    Attributes:
        dtype: F32, F16 or BF16; the product of a code and a power of two is exact.
        shape: (E, K, N).
    """

    name: str
    dtype: DType
    shape: tuple[int, int, int]
    codes: SourceTensor
    scales: SourceTensor

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def cols(self) -> int:
        return self.shape[2]

    @property
    def row_align(self) -> int:
        """Whole blocks, the most of an expert's that make a moderate stripe."""
        blocks = self.shape[1] // 32
        fit = max(1, _TILE // (32 * self.cols * self.dtype.itemsize))
        return 32 * max(n for n in range(1, min(blocks, fit) + 1) if blocks % n == 0)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (*self.codes.pieces, *self.scales.pieces)

    @property
    def nbytes(self) -> int:
        return self.rows * self.cols * self.dtype.itemsize

    @property
    def stored_row_bytes(self) -> int:
        return self.cols // 2 + self.cols // 32

    @property
    def scratch_row_bytes(self) -> int:
        return self.cols // 2 + self.cols // 32 + 2

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        from streamconv.kernels.integers_code import decode_turned
        from streamconv.kernels.rows import CODES

        _, k, n = self.shape
        while start < stop:
            expert, first = divmod(start, k)
            last = min(k, first + stop - start)
            codes = self._stripe(shards, self.codes, expert, k // 2, first // 2, last // 2, scratch)
            scales = self._stripe(shards, self.scales, expert, k // 32, first // 32, last // 32, scratch[codes.size :])
            made = out[: (last - first) * n * self.dtype.itemsize]
            decode_turned(codes, values("e2m1"), scales, last - first, n, CODES[self.dtype.name], made.view(self.dtype.storage))
            out, start = out[made.size :], start + last - first

    def _stripe(self, shards: Sequence[Shard], tensor: SourceTensor, expert: int, width: int, first: int, last: int, out: Bytes) -> Bytes:
        """Bytes [first, last) of each of an expert's N rows of `width` bytes."""
        piece, n = tensor.pieces[0], self.shape[2]
        at = Piece(piece.shard, piece.begin + expert * n * width, n, width)
        return read_stripe(shards, at, 1, first, last, out)

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        """Nothing: the pages of a stripe hold parts of the next ones."""
