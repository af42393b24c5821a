"""From plans and a memory budget to workers and tile memory, and what a run loads before its first tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from streamconv import memory
from streamconv.open_plan import KERNELS, loading
from streamconv.options import Resources
from streamconv.planning import memory_plan
from streamconv.planning.memory_plan import MemoryPlan, TileCost
from streamconv.planning.reads import Reads
from streamconv.planning.tasks import encode_tasks

SPARE = 8 * memory.MIB
"""How much a run may differ from what was foreseen and still keep within the budget that a plan accepted."""


def costs_of(reads: Reads, on_device: bool = False, checked: bool = False) -> list[TileCost]:
    """Tile cost of every read; equal reads are worked out once. `checked`: each tile is decoded (`run.inline_check`)."""
    known: dict[object, TileCost] = {}
    costs = []
    for number, kind in enumerate(reads.kinds()):
        cost = known.get(kind)
        if cost is None:
            cost = _cost(reads, number, on_device)
            cost = known[kind] = _with_check(reads, number, cost) if checked else cost
        costs.append(cost)
    return costs


def _cost(reads: Reads, number: int, on_device: bool) -> TileCost:
    """The tasks of a tile follow each other: each has the memory beside the rows for itself."""
    read = reads[number]
    plans = ((reads.plans[share.output], share.span) for share in read.shares)
    each = [memory_plan.tile_cost(plan.spans[at], plan.matrices, on_device) for plan, at in plans]
    return TileCost(
        each[0].source,
        max(cost.per_row for cost in each),
        read.align,
        any(cost.kernel for cost in each),
        any(cost.torch for cost in each),
        max(cost.fixed for cost in each),
    )


def _with_check(reads: Reads, number: int, cost: TileCost) -> TileCost:
    """A tile that is decoded as well, a few rows at a time."""
    fixed, torch = 0, cost.torch
    for share in reads[number].shares:
        plan = reads.plans[share.output]
        span = plan.spans[share.span]
        for task in encode_tasks(span, plan.matrices):
            if task.is_copy:
                continue
            if task.codec.error_kernel(span.source.dtype) is not None and len(task.cols) == 1:
                fixed = max(fixed, task.width * memory_plan.CHECK_COLUMN)
                continue
            torch = torch or task.codec.error_kernel(span.source.dtype) is None
            fixed = max(fixed, memory_plan.CHECK_BYTES, task.codec.row_align * task.width * memory_plan.CHECK_ELEMENT)
    return replace(cost, fixed=cost.fixed + fixed, torch=torch)


def least(costs: Sequence[TileCost]) -> int:
    """Bytes of the smallest arena that every tile fits."""
    return max((cost.smallest() for cost in costs), default=0)


def most_expensive(reads: Reads, costs: Sequence[TileCost]) -> dict[str, TileCost]:
    """The read that needs the largest smallest tile, by source name."""
    if not costs:
        return {}
    number = max(range(len(costs)), key=lambda at: costs[at].smallest())
    return {reads.source(number).name: costs[number]}


def estimate_memory(reads: Reads, resources: Resources, costs: Sequence[TileCost], spare: int = SPARE) -> MemoryPlan:
    """Workers, tile memory and peak as a run would choose them, without loading what a run loads.

    Args:
        costs: `costs_of` the reads.
        spare: bytes that a run may differ; 0 in the run itself.
    """
    kernels, torch = (KERNELS if any(cost.kernel for cost in costs) else ()), (("torch",) if any(cost.torch for cost in costs) else ())
    base = memory.resident() + growth(reads) + loading("numpy", *kernels, *torch)
    peak = max((plan.peak for plan in reads.plans), default=0)
    peak += peak // 32 + spare if peak and spare else 0
    return memory_plan.allocate(resources.memory_budget, resources.workers, base, most_expensive(reads, costs), spare=spare, least=peak)


def growth(reads: Reads) -> int:
    """Bytes that a run adds to the plans, tiles apart: hashes of all tensors and those under way, lines for the journal, the manifest."""
    each = [16 * sum(file.tensors for file in plan.files) + 8 * len(plan.matrices) for plan in reads.plans]
    return sum(each) + 8 * memory.MIB


def load_kernels(reads: Reads) -> None:
    """Load and compile what the plans will run, so that it is counted before the first tile."""
    import numpy as np

    from streamconv.planning.tasks import encode_tasks
    from streamconv.quants.base import EncodeStats
    from streamconv.run.encode import encode

    seen = set[object]()
    for plan in reads.plans:
        kinds = {kind: number for number, kind in enumerate(plan.spans.kinds(plan.matrices.codecs()))}
        for span in map(plan.spans.__getitem__, sorted(kinds.values())):
            kernel = span.reduce.kernel(span.source.dtype) if span.reduce is not None else None
            if kernel is not None and (type(span.reduce), span.source.dtype) not in seen:
                seen.add((type(span.reduce), span.source.dtype))
                kernel(np.zeros(2, span.source.dtype.storage), 1, 2)
            for task in encode_tasks(span, plan.matrices):
                key = (type(task.codec), task.codec, span.source.dtype)
                if key in seen or task.is_copy:
                    continue
                seen.add(key)
                if task.codec.needs:  # it cannot run yet
                    task.codec.prepare(span.source.dtype)
                    continue
                rows = task.codec.row_align
                block = np.zeros(rows * span.row_bytes, np.uint8)
                out_arena = np.empty(sum(task.row_costs) * rows + 65536, np.uint8)
                encode(task, rows, block, out_arena, EncodeStats())
