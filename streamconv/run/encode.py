"""Encode a tile's rows."""

from __future__ import annotations

from streamconv.lazy import Bytes, torch
from streamconv.planning.plan import RowRange
from streamconv.planning.tasks import EncodeTask
from streamconv.quants.base import EncodeStats


def encode(task: EncodeTask, span: RowRange, rows: int, block: Bytes, out_arena: Bytes, stats: EncodeStats) -> list[Bytes]:
    """The bytes of each part for `rows` rows.

    Args:
        block: uint8, rows * span.row_bytes bytes, row-major.
        out_arena: uint8, where outputs (and a gathered copy) may go.

    Returns:
        One uint8 array per part, views of block or out_arena.
    """
    columns, codec = task
    dtype, total = span.source.dtype, span.source.cols
    if task.is_whole_copy(span):
        return [block]
    item = dtype.itemsize
    if task.is_copy(dtype):
        return [_gather(columns, block, out_arena, rows, total, item)]
    if len(columns) > 1:
        gathered = _gather(columns, block, out_arena, rows, total, item)
        out_arena = out_arena[gathered.size :]
        block, start, stride, cols = gathered, 0, task.width, task.width
    else:
        start, stride, cols = columns[0][0], total, columns[0][1] - columns[0][0]
    outs = []
    for part in codec.parts(codec.row_align, cols):
        size = part.nbytes(rows)
        outs.append(out_arena[:size])
        out_arena = out_arena[-(-size // 64) * 64 :]
    kernel = codec.kernel(dtype)
    if kernel is not None:
        stats.add(kernel(block.view(dtype.storage), start, stride, rows, cols, outs))
        return outs
    flat = torch.from_numpy(block).view(getattr(torch, dtype.torch))
    matrix = flat.reshape(rows, stride)[:, start : start + cols]
    for out, made in zip(outs, codec.encode(matrix, stats), strict=True):
        out[:] = made.cpu().numpy()
    return outs


def _gather(columns: tuple[tuple[int, int], ...], block: Bytes, out_arena: Bytes, rows: int, total: int, item: int) -> Bytes:
    cols = sum(stop - start for start, stop in columns)
    out = out_arena[: rows * cols * item]
    source, target, at = block.reshape(rows, total * item), out.reshape(rows, cols * item), 0
    for start, stop in columns:
        target[:, at : at + (stop - start) * item] = source[:, start * item : stop * item]
        at += (stop - start) * item
    return out
