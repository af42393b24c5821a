"""Where rows come from: every source of rows is a small class that reads them into a worker's buffer.

A tensor of a shard or of several Meta files is a `SourceTensor`, packed integers are a `PackedTensor`.
More of them: derived_rows.py, and quants/decoded_rows.py for codes that are decoded on the way. Whoever reads rows does not know which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from streamconv.checkpoint.dtypes import F32, DType
from streamconv.checkpoint.packed_rows import read_channels
from streamconv.checkpoint.shard import Shard
from streamconv.lazy import Bytes, np


class RowSource(Protocol):
    """Something rows can be read from."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...

    @property
    def row_align(self) -> int:
        """Rows are read from a multiple of it to a multiple of it, or to the end."""

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of the files that a row is read from."""

    @property
    def scratch_row_bytes(self) -> int:
        """Bytes of scratch that reading takes for each row."""

    @property
    def pieces(self) -> tuple[Extent, ...]:
        """Blocks of the source files that rows are read from."""

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        """Rows [start, stop), row-major in `dtype`, into `out`.

        Raises:
            SourceChangedError: the file ended early.
        """

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        """Take rows [start, stop) out of the page cache, unless they were there before this run."""


class Extent(NamedTuple):
    """A contiguous row-major block [rows, cols] in a source file; `begin` is an absolute offset."""

    shard: int
    begin: int
    rows: int
    cols: int


class KeepsPages:
    """Rows whose pages of the files hold parts of other rows that are wanted later, or that are read from no file."""

    __slots__ = ()

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        """Nothing is dropped."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the checkpoint seen as a matrix: a vector is a column, leading dimensions are flattened into rows.

    Attributes:
        axis: 0 if `pieces` lie one above the other, 1 if side by side.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Extent, ...]
    axis: int = 0

    @property
    def rows(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows if len(self.shape) > 1 else (self.shape[0] if self.shape else 1)

    @property
    def cols(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def nbytes(self) -> int:
        return self.rows * self.cols * self.dtype.itemsize

    @property
    def row_align(self) -> int:
        return 1

    @property
    def stored_row_bytes(self) -> int:
        return self.cols * self.dtype.itemsize

    @property
    def scratch_row_bytes(self) -> int:
        return 0

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        row, itemsize = self.cols * self.dtype.itemsize, self.dtype.itemsize
        if self.axis == 0:
            first = 0  # row of the tensor where the piece begins; a tile may reach over several (a head cut in two)
            for piece in self.pieces:
                low, high = max(start, first), min(stop, first + piece.rows)
                if low < high:
                    shards[piece.shard].read_into(piece.begin + (low - first) * row, out.data[(low - start) * row : (high - start) * row])
                first += piece.rows
            return
        column = 0
        for piece in self.pieces:
            width = piece.cols * itemsize
            begin = piece.begin + start * width
            shards[piece.shard].read_rows_into(begin, width, width, stop - start, out.data[column:], row)
            column += width

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        first, itemsize = 0, self.dtype.itemsize
        for piece in self.pieces:
            low, high, row = max(start, first), min(stop, first + piece.rows), self.cols * itemsize
            if self.axis == 1:
                low, high, first, row = start, stop, 0, piece.cols * itemsize
            if low < high:
                shards[piece.shard].drop_page_cache(piece.begin + (low - first) * row, piece.begin + (high - first) * row)
            first += piece.rows


@dataclass(frozen=True, slots=True)
class PackedTensor(KeepsPages, SourceTensor):
    """An integer weight [N, K] that the source stores packed; reading it gives signed int8, one row per output channel.

    Attributes:
        shape: (N, K); `dtype` is I8; the one piece covers the stored bytes (its rows and cols are those of the file).
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
        piece = self.pieces[0]
        at = (piece.begin, piece.rows, piece.cols)
        read_channels(shards[piece.shard], at, self.packing, self.bits, self.cols, start, stop, out, scratch)


@dataclass(frozen=True, slots=True)
class NoSource(KeepsPages):
    """One zero in the place of a source: the codec gives the stored values from reductions alone."""

    name: str
    dtype: DType = F32
    rows: int = 1
    cols: int = 1
    pieces: tuple[Extent, ...] = ()
    row_align: int = 1
    stored_row_bytes: int = 0
    scratch_row_bytes: int = 0

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


def content(tensor: SourceTensor, shards: Sequence[Shard]) -> bytes:
    """What is stored of a small tensor."""
    data = np.empty(tensor.nbytes, np.uint8)
    tensor.read(shards, 0, tensor.rows, data, data[:0])
    return data.tobytes()


def row_form(source: RowSource) -> RowForm:
    """What the rows of a source are like."""
    return RowForm(source.dtype.name, source.cols, source.stored_row_bytes, source.scratch_row_bytes, source.row_align)
