"""Read a tile's source rows into a worker's buffer, in the order in which they will be encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from streamconv.checkpoint.packed_rows import read_channels
from streamconv.checkpoint.shard import Shard
from streamconv.errors import TensorError, printable
from streamconv.planning.plan import Blank, PackedTensor, SourceTensor, Span
from streamconv.targets.trtllm.rope import RopeTable

if TYPE_CHECKING:
    import numpy as np

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def read_rows(shards: Sequence[Shard], span: Span, start: int, stop: int, buffer: Bytes, spare: Bytes) -> Bytes:
    """Rows [start, stop) of the span's source, after its row operation.

    Args:
        buffer: uint8, (stop-start)*row_bytes bytes or more.
        spare: uint8, (stop-start)*spare_bytes_per_row bytes or more.

    Returns:
        A view of one of the two that holds the rows, row-major.

    Raises:
        SourceChangedError: the file ended early.
        TensorError: heads that should be equal are not.
    """
    size = (stop - start) * span.row_bytes
    out = buffer[:size]
    if isinstance(span.source, RopeTable):
        import numpy as np

        out[:] = np.ascontiguousarray(span.source.fill(start, stop)).reshape(-1).view(np.uint8)
        return out
    if isinstance(span.source, Blank):
        out[:] = 0
        return out
    if isinstance(span.source, PackedTensor):
        return read_channels(shards, span.source, start, stop, buffer, spare)
    source = cast(SourceTensor, span.source)
    itemsize = source.dtype.itemsize
    if source.axis == 0:
        first = 0  # row of the tensor where the piece begins; a tile may reach over several (a head cut in two)
        for piece in source.pieces:
            low, high = max(start, first), min(stop, first + piece.rows)
            if low < high:
                part = out.data[(low - start) * span.row_bytes : (high - start) * span.row_bytes]
                shards[piece.shard].read_into(piece.begin + (low - first) * span.row_bytes, part)
            first += piece.rows
    else:
        column = 0
        for piece in source.pieces:
            width = piece.cols * itemsize
            shards[piece.shard].read_rows_into(
                piece.begin + start * width, width, width, stop - start, out.data[column:], span.row_bytes
            )
            column += width
    if span.op.kind == "none":
        return out
    blocks = out.reshape((stop - start) // span.op.block, span.op.block, span.row_bytes)
    if span.op.kind == "rope":
        half = span.op.block // 2
        turned = spare[:size].reshape(-1, 2, half, span.row_bytes)
        turned[:] = blocks.reshape(-1, half, 2, span.row_bytes).swapaxes(1, 2)
        return spare[:size]
    half = span.op.block // 2
    if not bool((blocks[:, :half] == blocks[:, half:]).all()):
        raise TensorError(
            f"{printable(source.name)}: neighbouring KV heads differ",
            hint="--remove-duplicated-kv-heads is for checkpoints that store every KV head twice",
        )
    kept = spare[: size // 2].reshape(-1, half, span.row_bytes)
    kept[:] = blocks[:, :half]
    return spare[: size // 2]


def give_back(shards: Sequence[Shard], span: Span, start: int, stop: int) -> None:
    """Take rows [start, stop) of the source out of the page cache, unless they were there before this run.

    Packed stripes are left alone: their pages hold parts of the next stripes.
    """
    source = span.source
    if not isinstance(source, SourceTensor) or isinstance(source, PackedTensor):
        return
    first, itemsize = 0, source.dtype.itemsize
    for piece in source.pieces:
        low, high, row = max(start, first), min(stop, first + piece.rows), span.row_bytes
        if source.axis == 1:
            low, high, first, row = start, stop, 0, piece.cols * itemsize
        if low < high:
            shards[piece.shard].give_back(piece.begin + (low - first) * row, piece.begin + (high - first) * row)
        first += piece.rows


def spare_bytes_per_row(span: Span) -> int:
    """Extra buffer a source row needs for its row operation or for unpacking."""
    if isinstance(span.source, PackedTensor):
        return span.source.cols
    return 0 if span.op.kind == "none" else span.row_bytes
