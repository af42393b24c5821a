"""The story: open the source, plan every byte, run the plan inside the budget, publish."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streamconv import device, hub, memory
from streamconv.checkpoint.index import Index
from streamconv.device.backend import Backend, Cuda
from streamconv.errors import OutputError, printable
from streamconv.hub.fetch import Fetch
from streamconv.open_plan import LOADS
from streamconv.open_plan import open_and_plan as open_and_plan
from streamconv.options import Resources
from streamconv.planning import memory_plan
from streamconv.planning.memory_plan import Shares, TileCost
from streamconv.planning.plan import Plan
from streamconv.progress import Meter, unwatched
from streamconv.run.fs import Disk, named
from streamconv.run.mapped import mapped
from streamconv.run.writer import Writer, check_plan
from streamconv.targets.base import Target

SPARE = 8 * memory.MIB
"""How much a run may differ from what was foreseen and still keep within the budget that a plan accepted."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did: bytes, seconds, peak memory, and everything the user should know.

    `profile` says where the time went, in seconds: loading, creating the files, an average worker's share of each phase, all tiles
    together, and the final sync. Of `bytes_read`, `bytes_mapped` were encoded from a mapping of the source, without a copy.
    """

    out: str
    files: int
    tensors: int
    bytes_read: int
    bytes_mapped: int
    bytes_written: int
    seconds: float
    peak_memory: int
    budget: int
    workers: int
    tiles: int
    resumed: int
    device: str
    profile: dict[str, float]
    warnings: tuple[str, ...]


def costs_of(plan: Plan, on_device: bool = False) -> list[TileCost]:
    """Tile cost of every span of a plan; equal spans are worked out once."""
    known: dict[object, TileCost] = {}
    costs = []
    for number in range(len(plan.spans)):
        kind = plan.spans.kind(number, plan.matrices.encoding_number)
        if kind not in known:
            known[kind] = memory_plan.tile_cost(plan.spans[number], plan.matrices, on_device)
        costs.append(known[kind])
    return costs


def dearest(plan: Plan, costs: list[TileCost]) -> dict[str, TileCost]:
    """The span that needs the largest smallest tile, by source name."""
    if not costs:
        return {}
    number = max(range(len(costs)), key=lambda at: costs[at].smallest())
    return {plan.spans[number].source.name: costs[number]}


def output_problem(index: Index, plan: Plan, out: str | Path) -> str | None:
    """Why `convert` would refuse to write to `out`, as far as that shows without touching anything; None if nothing speaks against it."""
    try:
        place = check_plan(named(out), index.root, plan, index.shards, force=False).top
    except OutputError as error:
        return f"{error.message} ({error.hint})" if error.hint else error.message
    while not place.exists():
        place = place.parent
    return None if os.access(place, os.W_OK | os.X_OK) else f"nothing can be written in {printable(str(place))}"


def foresee(plan: Plan, resources: Resources, costs: list[TileCost], spare: int = SPARE) -> Shares:
    """Workers, tile memory and peak as a run would choose them, without loading what a run loads.

    Args:
        costs: `costs_of` the plan.
        spare: bytes that a run may differ; 0 in the run itself.
    """
    loads = {"numpy": True, "numba": any(cost.kernel for cost in costs), "torch": any(cost.torch for cost in costs)}
    base = memory.resident() + growth(plan)
    base += sum(LOADS[name] for name, needed in loads.items() if needed and name not in sys.modules)
    least = plan.peak + (plan.peak // 32 + spare if plan.peak and spare else 0)
    return memory_plan.share(resources.memory_budget, resources.workers, base, dearest(plan, costs), spare=spare, least=least)


def growth(plan: Plan) -> int:
    """Bytes that a run adds to the plan, tiles apart: hashes of all tensors and those under way, lines for the journal, the manifest."""
    return 16 * sum(file.tensors for file in plan.files) + 8 * len(plan.matrices) + 8 * memory.MIB


def choose_device(plan: Plan, resources: Resources) -> device.Choice:
    """CPU or GPU for this plan, and why.

    Raises:
        UsageError: a device that is not here was asked for.
    """
    total = resources.memory_budget or memory_plan.default_budget()
    return device.choose(resources.device, plan, memory_plan.processors(), total)


def _share_devices(
    backends: list[Backend], plan: Plan, shares: Shares, resources: Resources, costs: list[TileCost], closing: contextlib.ExitStack
) -> tuple[Shares, list[device.Ring]]:
    """Rings that fit the free memory of their devices, and as many workers as they have slots, with pinned arenas.

    Args:
        closing: closes the rings.
    """
    need = device.demand(plan.spans, plan.matrices, all(backend.unfused() is None for backend in backends))
    each = max(1, shares.workers // len(backends))
    budget_of_each = resources.device_memory_budget
    sizes = [device.fit(backend.free_memory(), budget_of_each, each, need, backend.name) for backend in backends]
    workers = min(shares.workers, len(backends) * min(size.slots for size in sizes))
    least = max((cost.smallest() for cost in costs), default=0)
    shares = dataclasses.replace(shares, workers=workers, arena=device.pinned_size(shares.arena, least))
    return shares, [closing.enter_context(contextlib.closing(device.Ring(*pair))) for pair in zip(backends, sizes, strict=True)]


def load_kernels(plan: Plan) -> None:
    """Load and compile what the plan will run, so that it is counted before the first tile."""
    import numpy as np

    from streamconv.quants.base import Findings
    from streamconv.run.encode import encode, is_copy, requests, row_costs

    seen = set[object]()
    kinds = {plan.spans.kind(number, plan.matrices.encoding_number): number for number in range(len(plan.spans))}
    for span in map(plan.spans.__getitem__, sorted(kinds.values())):
        reduce = span.reduce.kernel(span.source.dtype) if span.reduce is not None else None
        if reduce is not None and (type(span.reduce), span.source.dtype) not in seen:
            seen.add((type(span.reduce), span.source.dtype))
            reduce(np.zeros(2, span.source.dtype.storage), 1, 2)
        for request in requests(span, plan.matrices):
            key = (type(request[1]), request[1], span.source.dtype)
            if key in seen or is_copy(request, span.source.dtype):
                continue
            seen.add(key)
            if request[1].needs:  # it cannot run yet
                request[1].prepare(span.source.dtype)
                continue
            rows = request[1].row_align
            block = np.zeros(rows * span.row_bytes, np.uint8)
            space = np.empty(sum(row_costs(request, span)) * rows + 65536, np.uint8)
            encode(request, span, rows, block, space, Findings())


def convert(
    source: str | Path,
    out: str | Path,
    options: Target,
    resources: Resources | None = None,
    *,
    force: bool = False,
    meter: Meter | None = None,
    clock: Callable[[], float] = time.monotonic,
    disk: Disk | None = None,
) -> Report:
    """Convert a checkpoint.

    Args:
        source: folder or file of the source checkpoint, or a model of the Hub (org/name[@revision]).
        out: folder to write; appears only when it is complete.
        options: what decides the bytes.
        resources: what does not.
        force: replace an existing output.
        meter: told about progress.
        disk: the file system operations to use (tests).

    Raises:
        StreamconvError: see streamconv.errors. After a mistake or a bad source nothing is left behind; after a full
            disk, a signal or a crash the same call goes on where this one stopped.
    """
    resources, meter, out = resources or Resources(), meter or Meter(unwatched), named(out)
    try:
        return _convert(source, out, options, resources, force, meter, clock, disk)
    except device.NoRoom as error:
        if resources.device != "auto":
            raise
        on_cpu = dataclasses.replace(resources, device="cpu")
        return _convert(source, out, options, on_cpu, force, meter, clock, disk, error.message)
    except device.DeviceLost as error:
        if resources.on_device_loss == "stop":
            error.hint = "what is finished is kept: run the same command again to go on, or with --device cpu"
            raise
        on_cpu = dataclasses.replace(resources, device="cpu")
        report = _convert(source, out, options, on_cpu, force, meter, clock, disk, error.message, error.pinned)
        warning = f"{error.message}; the rest was done on the CPU"
        return dataclasses.replace(report, warnings=(warning, *report.warnings))


def _convert(
    source: str | Path,
    out: str | Path,
    options: Target,
    resources: Resources,
    force: bool,
    meter: Meter,
    clock: Callable[[], float],
    disk: Disk | None,
    instead: str = "",
    pinned: int = 0,
) -> Report:
    """`convert` on what was chosen.

    Args:
        instead: why it is the CPU and not the device that was meant.
        pinned: bytes of host memory that a device which was lost keeps.
    """
    from streamconv.run.pool import Outcome, Pool

    began = clock()
    index, plan = open_and_plan(source, options, resources.memory_budget)
    outcome, where, rings = Outcome(), "", list[device.Ring]()
    profile: dict[str, float] = {}
    costs = costs_of(plan)
    shares = foresee(plan, resources, costs, 0)  # a budget that is far too small is refused before anything is loaded
    with (
        contextlib.closing(index),
        Writer(Path(out), index.root, plan, index.shards, force, disk, resources.no_lock) as writer,
        contextlib.ExitStack() as closing,
    ):
        if not writer.finished:
            choice = choose_device(plan, resources)
            backends: list[Backend] = [Cuda(name) for name in choice.devices]
            if backends:
                costs = costs_of(plan, on_device=True)
            else:
                load_kernels(plan)
            workers = resources.workers
            if backends and workers is None:
                workers = device.slots(memory_plan.processors(), len(backends)) * len(backends)
            windows = closing.enter_context(mapped("pread" if backends else resources.read, plan, any(cost.kernel for cost in costs)))
            base = memory.resident() + hub.memory_of(index) + pinned + growth(plan)
            best = memory_plan.BEST_ARENA
            if backends and workers:
                least = max((cost.smallest() for cost in costs), default=0)
                best = device.arena(plan.bytes_read, workers, least)
            shares = memory_plan.share(resources.memory_budget, workers, base, dearest(plan, costs), best)
            if backends:
                shares, rings = _share_devices(backends, plan, shares, resources, costs, closing)
            where = ", ".join(choice.devices) or f"cpu ({instead or choice.why})"
            meter.begin("converting", plan.bytes_read, memory_budget=shares.budget)
            loaded = clock()
            writer.begin()
            started = clock()
            rows, journal = resources.tile_rows, writer.journal
            fetch = Fetch(plan, index.shards, writer.past, resources.hub_keep)
            devices = (lambda worker, arena: rings[worker % len(rings)].slot(arena)) if rings else None
            folder, past = writer.folder, writer.past
            pool = Pool(plan, index.shards, folder, shares, costs, rows, meter.tile, devices, journal, past, fetch.consumed, windows)
            try:
                fetch.start()
                outcome = pool.run()
            except device.DeviceLost as error:
                error.pinned = shares.workers * shares.arena
                for ring in rings if error.gone else ():  # torch asks all devices before it frees any pinned memory
                    ring.lost()
                raise
            finally:
                closing.close()
                fetch.close()
                writer.abandoned = pool.busy
            tiled = clock()
            for shard in index.shards:
                shard.check_unchanged()
            meter.phase("syncing")
            writer.publish(pool.hashes)
            workers_spent = {phase: seconds / shares.workers for phase, seconds in outcome.seconds.items()}
            profile = {"load": loaded - began, "create": started - loaded, **workers_spent}
            profile |= {"tiles": tiled - started, "sync": clock() - tiled}
    meter.end()
    warnings = list(plan.warnings)
    warnings += [f"no fused kernels on {ring.backend.name}, slower: {ring.unfused}" for ring in rings if ring.unfused]
    for name, count in outcome.overflow.items():
        warnings.append(f"{name}: {count} values are too large for {plan.dtype.torch} and became infinite")
    for name, count in outcome.nonfinite.items():
        warnings.append(f"{name}: {count} NaN or infinite values were quantized")
    return Report(
        out=str(out),
        files=len(plan.files),
        tensors=sum(file.tensors for file in plan.files),
        bytes_read=outcome.bytes_read,
        bytes_mapped=outcome.bytes_mapped,
        bytes_written=plan.bytes_written,
        seconds=clock() - began,
        peak_memory=memory.peak_resident(),
        budget=shares.budget,
        workers=shares.workers,
        tiles=outcome.tiles,
        resumed=outcome.resumed,
        device=where,
        profile=profile,
        warnings=tuple(warnings),
    )
