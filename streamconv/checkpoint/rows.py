"""Where rows come from: every source of rows is a small class that reads them into a worker's buffer.

A tensor of a shard or of several Meta files is a `SourceTensor`, packed integers are a `PackedTensor`.
More of them: derived_rows.py, and quants/decoded_rows.py for codes that are decoded on the way. Whoever reads rows does not know which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from streamconv.checkpoint.dtypes import F32, DType
from streamconv.checkpoint.packed_rows import unpack
from streamconv.checkpoint.shard import Shard
from streamconv.lazy import Bytes, np


class Extent(NamedTuple):
    """A row-major block [rows, cols] in a source file; `begin` is an absolute offset.

    Attributes:
        stride: bytes from one of its rows to the next; 0 where nothing lies between them.
    """

    shard: int
    begin: int
    rows: int
    cols: int
    stride: int = 0


def read_block(
    shards: Sequence[Shard], pieces: Sequence[Extent], axis: int, item: int, rows: tuple[int, int], cols: tuple[int, int], out: Bytes
) -> None:
    """Rows and columns [begin, end) of a matrix of items of so many bytes, row-major, into `out`.

    Args:
        axis: 0 if the pieces lie one above the other, 1 if side by side.

    Raises:
        SourceChangedError: the file ended early.
    """
    row, col, width = 0, 0, (cols[1] - cols[0]) * item
    for piece in pieces:
        low, high = max(rows[0], row), min(rows[1], row + piece.rows)
        left, right = max(cols[0], col), min(cols[1], col + piece.cols)
        if low < high and left < right:
            stride = piece.stride or piece.cols * item
            begin = piece.begin + (low - row) * stride + (left - col) * item
            to = out.data[(low - rows[0]) * width + (left - cols[0]) * item :]
            shards[piece.shard].read_rows_into(begin, stride, (right - left) * item, high - low, to, width)
        row, col = (row + piece.rows, col) if axis == 0 else (row, col + piece.cols)


class RowSource:
    """Something that rows are read from: a matrix, whose leading dimensions are flattened into rows; a vector is a column."""

    __slots__ = ()
    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def pieces(self) -> tuple[Extent, ...]:
        """Blocks of the source files that rows are read from."""
        return ()

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1] if len(self.shape) > 1 else self.shape)

    @property
    def cols(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def nbytes(self) -> int:
        return self.rows * self.cols * self.dtype.itemsize

    @property
    def row_align(self) -> int:
        """Rows are read from a multiple of it to a multiple of it, or to the end."""
        return 1

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of the files that a row is read from."""
        return self.cols * self.dtype.itemsize

    @property
    def scratch_row_bytes(self) -> int:
        """Bytes of scratch that reading takes for each row."""
        return 0

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        """Rows [start, stop), row-major in `dtype`, into `out`.

        Raises:
            SourceChangedError: the file ended early.
        """
        raise NotImplementedError

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        """Take rows [start, stop) out of the page cache, unless they were there before this run, or their pages hold others' parts."""


@dataclass(frozen=True, slots=True)
class SourceTensor(RowSource):
    """A tensor of the checkpoint.

    Attributes:
        axis: 0 if `pieces` lie one above the other, 1 if side by side.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Extent, ...] = field()
    axis: int = 0

    @property
    def as_stored(self) -> bool:
        """Its files hold just these rows, one after the other; what is derived from them lies otherwise."""
        return type(self) is SourceTensor and not any(piece.stride for piece in self.pieces)

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        self.read_part(shards, (start, stop), (0, self.cols), out)

    def read_part(self, shards: Sequence[Shard], rows: tuple[int, int], cols: tuple[int, int], out: Bytes) -> None:
        """As `read_block`."""
        read_block(shards, self.pieces, self.axis, self.dtype.itemsize, rows, cols, out)

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        if self.as_stored:
            _drop(shards, self.pieces, self.axis, self.dtype.itemsize, start, stop)


def _drop(shards: Sequence[Shard], pieces: Sequence[Extent], axis: int, item: int, start: int, stop: int) -> None:
    first = 0
    for piece in pieces:
        low, high, row = max(start, first), min(stop, first + piece.rows), piece.cols * item
        if low < high:
            shards[piece.shard].drop_page_cache(piece.begin + (low - first) * row, piece.begin + (high - first) * row)
        first += piece.rows if axis == 0 else 0


@dataclass(frozen=True, slots=True)
class Derived(SourceTensor):
    """Rows that are made of as many of another tensor."""

    stored: SourceTensor = field(kw_only=True)

    @property
    def row_align(self) -> int:
        return self.stored.row_align

    @property
    def stored_row_bytes(self) -> int:
        return self.stored.stored_row_bytes

    @property
    def scratch_row_bytes(self) -> int:
        return self.stored.scratch_row_bytes


@dataclass(frozen=True, slots=True)
class PackedTensor(SourceTensor):
    """An integer weight [N, K] that the source stores packed; reading it gives signed int8, one row per output channel.

    Attributes:
        shape: (N, K); `dtype` is I8; the pieces cover what is stored (their rows and cols are those of the files), of all but
            "modelopt" there is one.
        bits: 4 or 8.
        packing: how the file stores it: "gptq", int32 [K*bits/32, N] along K;
            "awq", int32 [K, N/8] along shuffled channels; "modelopt", one byte for two neighbouring channels [N/2, K].
        module: name without the last component, e.g. "model.layers.0.mlp.up_proj".
    """

    bits: int = 4
    packing: str = "gptq"
    module: str = ""

    @property
    def row_align(self) -> int:
        return {"awq": 8, "modelopt": 2}.get(self.packing, 1)

    @property
    def stored_row_bytes(self) -> int:
        return self.cols * self.bits // 8

    @property
    def scratch_row_bytes(self) -> int:
        return self.cols

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        size = (stop - start) * self.cols * self.bits // 8
        packed = scratch[:size]
        if self.packing == "modelopt":
            self.read_part(shards, (start // 2, stop // 2), (0, self.cols), packed)
        else:  # input-major: a block of channels is a stripe of columns of words
            each = 1 if self.packing == "gptq" else 8
            read_block(shards, self.pieces, 0, 4, (0, self.pieces[0].rows), (start // each, stop // each), packed)
        unpack(self.packing, self.bits, self.cols, packed, scratch[size : 2 * size], out)

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        if self.packing == "modelopt":
            _drop(shards, self.pieces, self.axis, 1, start // 2, stop // 2)


def gptq_or_awq(weight: SourceTensor, zeros: SourceTensor, scales: SourceTensor, bits: int) -> tuple[str, int, bool]:
    """The packing that the shapes of qweight, qzeros and scales tell, K, and whether they fit together at 4 or 8 bits."""
    groups, n = scales.rows, scales.cols
    gptq = weight.cols == n
    k = weight.rows * (32 // bits if gptq else 1)
    fits = groups > 0 and k % groups == 0 and zeros.shape == (groups, n * bits // 32)
    return "gptq" if gptq else "awq", k, fits and (gptq or (bits == 4 and weight.cols * 8 == n))


@dataclass(frozen=True, slots=True)
class NoSource(RowSource):
    """One zero in the place of a source: the codec gives the stored values from reductions alone."""

    name: str
    dtype: DType = F32
    shape: tuple[int, ...] = (1,)

    @property
    def stored_row_bytes(self) -> int:
        return 0

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        out[:] = 0


class RowForm(NamedTuple):
    """What the rows of a source are like.

    Attributes:
        stored: bytes of the checkpoint that a row is read from; 0 for what is computed.
        scratch: further bytes of memory that reading a row takes.
        align: rows that are read together.
    """

    dtype: str
    cols: int
    stored: int
    scratch: int
    align: int


@dataclass(frozen=True, slots=True)
class SourceFile:
    """Identity of a source file: what a resume and a verify compare."""

    name: str
    size: int
    header_hash: str


def tensor_at(name: str, dtype: DType, shape: tuple[int, ...], shard: int, begin: int) -> SourceTensor:
    """A tensor that lies in one place."""
    rows, cols = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)
    return SourceTensor(name, dtype, shape, (Extent(shard, begin, rows, cols),))


def content(tensor: SourceTensor, shards: Sequence[Shard]) -> bytes:
    """What is stored of a small tensor."""
    data = np.empty(tensor.nbytes, np.uint8)
    tensor.read(shards, 0, tensor.rows, data, data[:0])
    return data.tobytes()


def row_form(source: RowSource) -> RowForm:
    """What the rows of a source are like."""
    return RowForm(source.dtype.name, source.cols, source.stored_row_bytes, source.scratch_row_bytes, source.row_align)
