"""A tile's rows: read in the order in which they are encoded, and encoded on the CPU or on a device: the caller does not know which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.shard import Shard
from streamconv.errors import TensorError, printable
from streamconv.lazy import Bytes, np, torch
from streamconv.planning.plan import Destination, RowRange
from streamconv.planning.tasks import EncodeTask
from streamconv.quants.base import EncodeStats
from streamconv.run.order import ReductionResults

if TYPE_CHECKING:
    from streamconv.device.pipeline import WorkerBuffers
    from streamconv.device.step import Job


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


def encode(task: EncodeTask, rows: int, block: Bytes, out_arena: Bytes, stats: EncodeStats) -> list[Bytes]:
    """The bytes of each part for `rows` rows.

    Args:
        block: uint8, all columns of the rows, row-major.
        out_arena: uint8, where outputs (and a gathered copy) may go.

    Returns:
        One uint8 array per part, views of block or out_arena.
    """
    columns, dtype, total, item = task.cols, task.dtype, task.total, task.dtype.itemsize
    if task.is_whole_copy:
        return [block]
    if task.is_copy:
        return [_gather(columns, block, out_arena, rows, total, item)]
    if len(columns) > 1:
        gathered = _gather(columns, block, out_arena, rows, total, item)
        out_arena = out_arena[gathered.size :]
        block, start, stride, cols = gathered, 0, task.width, task.width
    else:
        start, stride, cols = columns[0][0], total, columns[0][1] - columns[0][0]
    outs = []
    for part in task.parts:
        size = part.nbytes(rows)
        outs.append(out_arena[:size])
        out_arena = out_arena[-(-size // 64) * 64 :]
    if task.kernel is not None:
        stats.add(task.kernel(block.view(dtype.storage), start, stride, rows, cols, outs))
        return outs
    flat = torch.from_numpy(block).view(getattr(torch, dtype.torch))
    matrix = flat.reshape(rows, stride)[:, start : start + cols]
    for out, codes in zip(outs, task.codec.encode(matrix, stats), strict=True):
        out[:] = codes.cpu().numpy()
    return outs


def _gather(columns: tuple[tuple[int, int], ...], block: Bytes, out_arena: Bytes, rows: int, total: int, item: int) -> Bytes:
    cols = sum(stop - start for start, stop in columns)
    out = out_arena[: rows * cols * item]
    source, target, at = block.reshape(rows, total * item), out.reshape(rows, cols * item), 0
    for start, stop in columns:
        target[:, at : at + (stop - start) * item] = source[:, start * item : stop * item]
        at += (stop - start) * item
    return out


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows as they are stored in all of `dests`: uint8, one array for each part of the codec."""

    task: EncodeTask
    dests: list[Destination]
    parts: list[Bytes]
    stats: EncodeStats


def encoded(
    tasks: Mapping[EncodeTask, list[Destination]],
    span: RowRange,
    rows: int,
    block: Bytes,
    out_arena: Bytes,
    results: ReductionResults,
    slot: WorkerBuffers | None,
) -> Iterator[Encoded]:
    """Encode rows of a span for every matrix that takes them; equal requests are encoded once.

    Args:
        tasks: of the span, with the matrices that take what each makes.
        rows: output rows, whose source rows are in `block`.
        out_arena: uint8; holds what is encoded until the last of it was used.
        slot: of a device, which encodes all that is no copy; None encodes on the CPU.
    """
    name = span.source.name
    jobs: dict[EncodeTask, Job] = {}
    if slot is not None:
        from streamconv.device.step import Job

        jobs = {task: Job(task.bound(results, name)) for task in tasks if not task.is_copy}
        out_arena = slot.encode(list(jobs.values()), span, rows, block, out_arena) if jobs else out_arena
    for task, dests in tasks.items():
        if task in jobs:
            yield Encoded(task, dests, jobs[task].parts, jobs[task].stats)
            continue
        stats = EncodeStats()
        parts = encode(task.bound(results, name), rows, block, out_arena, stats)
        out_arena = out_arena[-(-task.row_costs[0] * rows // 64) * 64 :]
        yield Encoded(task, dests, parts, stats)


def reduced(span: RowRange, rows: int, block: Bytes, results: ReductionResults, slot: WorkerBuffers | None) -> np.ndarray[Any, Any]:
    """What rows contribute to the reduction of a span."""
    if span.reduce is None:
        raise AssertionError(f"{span.source.name}: nothing to reduce")
    kernel = span.reduce.kernel(span.source.dtype)
    if slot is not None:
        result: np.ndarray[Any, Any] = slot.reduce(span, rows, block, results).numpy()
        return result
    if kernel is not None:
        return kernel(block.view(span.source.dtype.storage), rows, span.source.cols)
    matrix = torch.from_numpy(block).view(getattr(torch, span.source.dtype.torch)).reshape(rows, span.source.cols)
    result = span.reduce.tile(matrix, results).numpy()
    return result
