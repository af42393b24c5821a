"""Where a run computes, on the CPU or on devices, and the memory that it then has."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from streamconv import device, hub, memory
from streamconv.allocation import costs_of, growth, least, load_kernels, most_expensive
from streamconv.checkpoint.index import Index
from streamconv.open_plan import KERNELS, loading
from streamconv.options import Resources
from streamconv.planning import memory_plan
from streamconv.planning.memory_plan import MemoryPlan, TileCost
from streamconv.planning.plan import Plan
from streamconv.planning.reads import Reads
from streamconv.progress import Meter
from streamconv.run.fs import Disk
from streamconv.run.mapped import Mapped, mapped
from streamconv.targets.base import Output

if TYPE_CHECKING:
    from streamconv.device.backend import Backend
    from streamconv.run.inline_check import InlineCheck
    from streamconv.run.output_state import OutputState
    from streamconv.run.tile import Tally


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion was asked for.

    Attributes:
        several: outputs that are finished are skipped.
        instead: why it is the CPU and not the device that was meant.
        pinned: bytes of host memory that a device which was lost keeps.
    """

    source: str | Path
    outputs: tuple[Output, ...]
    resources: Resources
    force: bool
    meter: Meter
    clock: Callable[[], float]
    disk: Disk | None
    several: bool = False
    instead: str = ""
    pinned: int = 0


@dataclass(slots=True)
class Execution:
    """What tiles are run with.

    Attributes:
        where: devices, or the CPU and why.
        mapped: maps tiles that need not be read.
        busy: a thread was still at work when an interruption stopped waiting for it; it may use the folders.
    """

    asked: Conversion
    reads: Reads
    index: Index
    where: str
    costs: Sequence[TileCost]
    memory_plan: MemoryPlan
    mapped: Mapped | None
    rings: list[device.DevicePipeline] = field(default_factory=list)
    busy: bool = False

    def check_of(self, plan: Plan) -> InlineCheck | None:
        """What holds the tiles of an output against their source, if that was asked for."""
        from streamconv.run.inline_check import InlineCheck

        return InlineCheck(plan, self.asked.resources.min_snr) if self.asked.resources.verify_inline else None

    def run(self, outputs: Sequence[OutputState]) -> Tally:
        """Do the tiles of all outputs: a whole conversion, or one part of it. Files of the Hub are downloaded as they are needed.

        Args:
            outputs: those of `reads`.

        Raises:
            SourceChangedError: a file is not what it was. VerifyError: a matrix is below the least SNR. Else as `Pool.run`.
        """
        from streamconv.run.pool import Pool

        shards = self.index.shards
        with self._downloads(outputs) as consumed:
            pool = Pool(
                self.reads, outputs, shards, self.memory_plan, self.costs, self.asked.resources.tile_rows, self.asked.meter.tile,
                self.slots, consumed, self.mapped,
            )  # fmt: skip
            try:
                tally = pool.run()
            finally:
                self.busy = pool.busy
        for shard in (*shards, *(file for output in outputs for file in output.plan.beside)):
            shard.check_unchanged()
        for output in outputs:
            if output.check is not None:
                output.check.finish()
        return tally

    @contextlib.contextmanager
    def _downloads(self, outputs: Sequence[OutputState]) -> Iterator[Callable[[int, int, int], None]]:
        """Files of the Hub come ahead of the run; gives what wants to know of rows that were read."""
        if self.index.repo is None:
            yield lambda output, span, rows: None
            return
        from streamconv.hub.fetch import Fetch

        fetch = Fetch(self.reads, self.index.shards, [output.past for output in outputs], self.asked.resources.hub_keep)
        try:
            fetch.start()
            yield fetch.consumed
        finally:
            fetch.close()

    @property
    def slots(self) -> Callable[[int, int], device.WorkerBuffers] | None:
        """Makes the device slot of a worker, by (worker number, arena bytes); None on the CPU."""
        return (lambda worker, arena: self.rings[worker % len(self.rings)].slot(arena)) if self.rings else None

    def warnings(self) -> list[str]:
        return [f"no fused kernels on {ring.backend.name}, slower: {ring.unfused}" for ring in self.rings if ring.unfused]


def choose_device(reads: Reads, resources: Resources) -> device.Choice:
    """CPU or GPU for these plans, and why.

    Raises:
        UsageError: a device that is not here was asked for.
    """
    total = resources.memory_budget or memory_plan.default_budget()
    return device.choose(resources.device, reads, memory_plan.processors(), total)


@contextlib.contextmanager
def executor(asked: Conversion, reads: Reads, index: Index) -> Iterator[Execution]:
    """Load what a run computes with, and share the memory that is left.

    Raises:
        BudgetError: not even one worker with the smallest tile fits. NoRoom: nor does it on a device.
        DeviceLost: raised in the block by a device; `pinned` is set, and the rings are closed.
    """
    resources = asked.resources
    costs = costs_of(reads, checked=resources.verify_inline)
    choice = choose_device(reads, resources)
    backends: list[Backend] = [device.Cuda(name) for name in choice.devices]
    kernels, workers, best = any(cost.kernel for cost in costs), resources.workers, memory_plan.BEST_ARENA
    if resources.verify_inline:  # beside the tile, which keeps its size
        best += max((cost.fixed for cost in costs), default=0)
    if backends:
        costs = costs_of(reads, on_device=True, checked=resources.verify_inline)
        workers = workers or device.slots(memory_plan.processors(), len(backends)) * len(backends)
        best = device.arena(reads.nbytes, workers, least(costs))
    else:
        load_kernels(reads)
    with contextlib.ExitStack() as closing:
        windows = closing.enter_context(mapped("pread" if backends else resources.read, reads, kernels))
        base = memory.resident() + hub.memory_of(index) + asked.pinned + growth(reads)
        if kernels and not backends:  # a run may meet one that is not on the disk
            base += loading(*KERNELS)
        allotted = memory_plan.allocate(resources.memory_budget, workers, base, most_expensive(reads, costs), best)
        where = ", ".join(choice.devices) or f"cpu ({asked.instead or choice.why})"
        execution = Execution(asked, reads, index, where, costs, allotted, windows)
        if backends:
            execution.memory_plan, execution.rings = _share_devices(backends, reads, allotted, resources, costs, closing)
        try:
            yield execution
        except device.DeviceLost as error:
            error.pinned = execution.memory_plan.workers * execution.memory_plan.arena
            for ring in execution.rings if error.gone else ():  # torch asks all devices before it frees any pinned memory
                ring.lost()
            raise


def _share_devices(
    backends: list[Backend],
    reads: Reads,
    allotted: MemoryPlan,
    resources: Resources,
    costs: Sequence[TileCost],
    closing: contextlib.ExitStack,
) -> tuple[MemoryPlan, list[device.DevicePipeline]]:
    """Rings that fit the free memory of their devices, and as many workers as they have slots, with pinned arenas."""
    fused = all(backend.unfused() is None for backend in backends)
    need = functools.reduce(device.Demand.larger, (device.demand(plan.spans, plan.matrices, fused) for plan in reads.plans))
    each = max(1, allotted.workers // len(backends))
    budget_of_each = resources.device_memory_budget
    sizes = [device.fit(backend.free_memory(), budget_of_each, each, need, backend.name) for backend in backends]
    workers = min(allotted.workers, len(backends) * min(size.slots for size in sizes))
    allotted = dataclasses.replace(allotted, workers=workers, arena=device.pinned_size(allotted.arena, least(costs)))
    return allotted, [closing.enter_context(contextlib.closing(device.DevicePipeline(*pair))) for pair in zip(backends, sizes, strict=True)]
