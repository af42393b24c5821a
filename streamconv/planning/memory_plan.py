"""From a memory budget to workers and tile sizes.

The budget is the ceiling of the process's resident set. What is resident before the first tile (interpreter, libraries,
compiled kernels, plan) is measured; what is left is shared by the workers, each with one arena that holds a tile from read
to write. A tile is never larger than its worker's arena.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.errors import BudgetError, UsageError, printable
from streamconv.memory import GIB, MIB, available, resident, show_size
from streamconv.planning.plan import Matrix, RowRange
from streamconv.planning.tasks import encode_tasks

MARGIN = 24 * MIB
"""Left free for thread stacks, allocator slack and Python objects of tiles in flight."""

BEST_ARENA = 4 * MIB
"""More makes a CPU slower: the bytes of a tile then leave the cache between read, encode and write."""
_ROUNDING = 64 * 1024
_JITTER = 2
"""MiB by which the resident set of equal runs differs; what a hint names must work when it is used."""
MAX_WORKERS = 1024
"""No machine has use for more threads, and a typing error is no reason to start them."""


CHECK_BYTES, CHECK_ELEMENT, CHECK_COLUMN = 4 * MIB, 96, 16
"""Working memory of a worker that decodes rows to check them, what each element takes of it, and what a kernel takes for each column."""


@dataclass(frozen=True, slots=True)
class TileCost:
    """Memory of a tile of a span: `fixed` plus `per_row` for each source row, `source` of it as read.

    Tiles hold a multiple of `align` rows.
    """

    source: int
    per_row: int
    align: int
    kernel: bool
    torch: bool
    fixed: int = 0

    def smallest(self) -> int:
        return self.fixed + self.per_row * self.align + _ROUNDING

    def rows(self, arena: int, cap: int | None) -> int:
        """Source rows of a tile that fits an arena; `cap` bounds it (tests)."""
        rows = max(self.align, (arena - self.fixed - _ROUNDING) // self.per_row // self.align * self.align)
        return rows if cap is None else max(self.align, min(rows, cap // self.align * self.align))


def tile_cost(span: RowRange, matrices: Sequence[Matrix], on_device: bool = False) -> TileCost:
    """What one source row of a span costs in host memory from read to write; a device has its own working memory."""
    out = work = fixed = 0
    kernel = torch = False
    for task in encode_tasks(span, matrices):
        row_out, row_work = task.row_costs
        out, work = out + row_out, max(work, 0 if on_device else row_work)
        if not task.is_copy:
            fused = task.kernel is not None
            per_column = max(task.codec.torch_bytes_per_column, task.codec.kernel_bytes_per_column if fused and not on_device else 0)
            fixed = max(fixed, per_column * task.width)
            kernel, torch = kernel or fused, torch or not fused or task.codec.loads_torch
    if span.reduce is not None:  # on the CPU, device or not
        kernel = span.reduce.kernel(span.source.dtype) is not None
        work, torch = 0 if kernel else span.source.cols * span.reduce.bytes_per_element, not kernel
        fixed = span.source.cols * span.reduce.bytes_per_column
    return TileCost(span.row_bytes, span.row_bytes + span.scratch_row_bytes + out + work, span.align, kernel, torch, fixed)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a budget is used.

    Attributes:
        budget: the ceiling, bytes.
        base: resident before the first tile.
        margin: left free.
        arena: bytes of tile memory of each.
    """

    budget: int
    base: int
    margin: int
    workers: int
    arena: int

    @property
    def peak(self) -> int:
        return self.base + self.margin + self.workers * self.arena


def default_budget() -> int:
    """What is in use and four fifths of what is free now, at most 4 GiB: more does not make it faster."""
    return min(4 * GIB, resident() + available() * 4 // 5)


def processors() -> int:
    return len(os.sched_getaffinity(0))


def allocate(
    budget: int | None,
    workers: int | None,
    base: int,
    costs: dict[str, TileCost],
    best: int = BEST_ARENA,
    *,
    margin: int = MARGIN,
    spare: int = 0,
    least: int = 0,
) -> MemoryPlan:
    """Divide a budget.

    Args:
        budget: bytes, None derives it from free memory.
        workers: threads, None chooses.
        base: bytes resident before the first tile.
        costs: source name -> the cost of its most expensive span.
        best: bytes of an arena that more would not make faster.
        margin: bytes left free.
        spare: bytes that the base may turn out to be larger.
        least: bytes that were resident at a time before the first tile.

    Raises:
        UsageError: a number of workers that is none.
        BudgetError: not even one worker with the smallest tile fits; names the tensor and the smallest budget that works.
    """
    if workers is not None and workers < 1:
        raise UsageError("--workers must be at least 1")
    if workers is not None and workers > MAX_WORKERS:
        raise UsageError(f"--workers {workers}: at most {MAX_WORKERS}", hint="leave it out: processors and memory decide")
    total = default_budget() if budget is None else budget
    name, need = max(((n, c.smallest()) for n, c in costs.items()), key=lambda item: item[1], default=("", 0))
    tiles = base + margin + spare + need
    if total < max(tiles, least):
        where = f"one tile of {printable(name)} takes {show_size(need)}; " if name else ""
        why = f"{where}{show_size(base)} are in use before the first tile" if tiles >= least else f"planning takes {show_size(least)}"
        raise BudgetError(
            f"--memory-budget {show_size(total)} cannot work: {why}",
            hint=f"the smallest budget that works here is {-(-max(tiles, least) // MIB) + _JITTER}MiB",
        )
    room = total - base - margin
    most = workers if workers is not None else min(8, 2 * processors())
    count = max(1, min(most, room // max(need, 1), room // (2 * MIB) or 1))
    best = max(best, need)
    return MemoryPlan(total, base, margin, count, min(best, room // count))
