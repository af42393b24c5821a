"""Read a tile's source rows into a worker's buffer, in the order in which they will be encoded."""

from __future__ import annotations

from collections.abc import Sequence

from streamconv.checkpoint.shard import Shard
from streamconv.errors import TensorError, printable
from streamconv.lazy import Bytes
from streamconv.planning.plan import RowRange


def read_rows(shards: Sequence[Shard], span: RowRange, start: int, stop: int, buffer: Bytes, scratch: Bytes) -> Bytes:
    """Rows [start, stop) of the span's source, after its row operation.

    Args:
        buffer: uint8, (stop-start)*row_bytes bytes or more.
        scratch: uint8, (stop-start)*span.scratch_row_bytes bytes or more.

    Returns:
        A view of one of the two that holds the rows, row-major.

    Raises:
        SourceChangedError: the file ended early.
        TensorError: heads that should be equal are not.
    """
    size = (stop - start) * span.row_bytes
    out = buffer[:size]
    span.source.read(shards, start, stop, out, scratch)
    if span.op.kind == "none":
        return out
    blocks = out.reshape((stop - start) // span.op.block, span.op.block, span.row_bytes)
    half = span.op.block // 2
    if span.op.kind == "rope":
        turned = scratch[:size].reshape(-1, 2, half, span.row_bytes)
        turned[:] = blocks.reshape(-1, half, 2, span.row_bytes).swapaxes(1, 2)
        return scratch[:size]
    if not bool((blocks[:, :half] == blocks[:, half:]).all()):
        raise TensorError(
            f"{printable(span.source.name)}: neighbouring KV heads differ",
            hint="--remove-duplicated-kv-heads is for checkpoints that store every KV head twice",
        )
    kept = scratch[: size // 2].reshape(-1, half, span.row_bytes)
    kept[:] = blocks[:, :half]
    return scratch[: size // 2]
