"""What is computed of a tile's rows, on the CPU or on a device: the caller does not know which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamconv.lazy import Bytes, np, torch
from streamconv.planning.plan import Destination, Plan, RowRange
from streamconv.planning.tasks import EncodeTask, encode_tasks
from streamconv.quants.base import EncodeStats
from streamconv.run.encode import encode
from streamconv.run.results import ReductionResults

if TYPE_CHECKING:
    from streamconv.device.pipeline import WorkerBuffers
    from streamconv.device.step import Job


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows as they are stored in all of `dests`: uint8, one array for each part of the codec."""

    task: EncodeTask
    dests: list[Destination]
    parts: list[Bytes]
    stats: EncodeStats


def encoded(
    plan: Plan, span: RowRange, rows: int, block: Bytes, out_arena: Bytes, results: ReductionResults, slot: WorkerBuffers | None
) -> Iterator[Encoded]:
    """Encode rows of a span for every matrix that takes them; equal requests are encoded once.

    Args:
        rows: output rows, whose source rows are in `block`.
        out_arena: uint8; holds what is encoded until the last of it was used.
        slot: of a device, which encodes all that is no copy; None encodes on the CPU.
    """
    name, dtype = span.source.name, span.source.dtype
    wanted = encode_tasks(span, plan.matrices)
    jobs: dict[EncodeTask, Job] = {}
    if slot is not None:
        from streamconv.device.step import Job

        jobs = {task: Job(task.bound(results, name)) for task in wanted if not task.is_copy(dtype)}
        out_arena = slot.encode(list(jobs.values()), span, rows, block, out_arena) if jobs else out_arena
    for task, dests in wanted.items():
        if task in jobs:
            yield Encoded(task, dests, jobs[task].parts, jobs[task].stats)
            continue
        stats = EncodeStats()
        parts = encode(task.bound(results, name), span, rows, block, out_arena, stats)
        out_arena = out_arena[-(-task.row_costs(span)[0] * rows // 64) * 64 :]
        yield Encoded(task, dests, parts, stats)


def reduced(span: RowRange, rows: int, block: Bytes, results: ReductionResults, slot: WorkerBuffers | None) -> np.ndarray[Any, Any]:
    """What rows contribute to the reduction of a span."""
    if span.reduce is None:
        raise AssertionError(f"{span.source.name}: nothing to reduce")
    kernel = span.reduce.kernel(span.source.dtype)
    if slot is not None:
        found: np.ndarray[Any, Any] = slot.reduce(span, rows, block, results).numpy()
        return found
    if kernel is not None:
        return kernel(block.view(span.source.dtype.storage), rows, span.source.cols)
    matrix = torch.from_numpy(block).view(getattr(torch, span.source.dtype.torch)).reshape(rows, span.source.cols)
    found = span.reduce.tile(matrix, results).numpy()
    return found
