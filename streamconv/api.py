"""The story: open the source, plan every byte, run the plan inside the budget, publish."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamconv import device, hub, memory
from streamconv.allocation import costs_of, foresee
from streamconv.checkpoint.index import Index
from streamconv.errors import OutputError, printable
from streamconv.execution import executor
from streamconv.hub.fetch import Fetch
from streamconv.open_plan import open_and_plan as open_and_plan
from streamconv.options import Resources
from streamconv.planning.plan import Plan
from streamconv.planning.reads import Reads
from streamconv.progress import Meter, unwatched
from streamconv.run.fs import Disk, named
from streamconv.run.writer import Writer, check_plan
from streamconv.targets.base import Target


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did: bytes, seconds, peak memory, and everything the user should know.

    `profile` says where the time went, in seconds: loading, creating the files, an average worker's share of each phase, all tiles
    together, and the final sync. Of `bytes_read`, `bytes_mapped` were encoded from a mapping of the source, without a copy. `parts`
    are those that this process did, None if it did not share the work; `published` if the output has its name.
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
    parts: tuple[int, ...] | None = None
    published: bool = True


def output_problem(index: Index, plan: Plan, out: str | Path) -> str | None:
    """Why `convert` would refuse to write to `out`, as far as that shows without touching anything; None if nothing speaks against it."""
    try:
        place = check_plan(named(out), index.root, plan, index.shards, force=False).top
    except OutputError as error:
        return f"{error.message} ({error.hint})" if error.hint else error.message
    while not place.exists():
        place = place.parent
    return None if os.access(place, os.W_OK | os.X_OK) else f"nothing can be written in {printable(str(place))}"


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
    run = _convert if resources.parts is None else _convert_in_parts
    try:
        return run(source, out, options, resources, force, meter, clock, disk)
    except device.NoRoom as error:
        if resources.device != "auto":
            raise
        on_cpu = dataclasses.replace(resources, device="cpu")
        return run(source, out, options, on_cpu, force, meter, clock, disk, error.message)
    except device.DeviceLost as error:
        if resources.on_device_loss == "stop":
            error.hint = "what is finished is kept: run the same command again to go on, or with --device cpu"
            raise
        on_cpu = dataclasses.replace(resources, device="cpu")
        report = run(source, out, options, on_cpu, force, meter, clock, disk, error.message, error.pinned)
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
    from streamconv.run.output_state import OutputState
    from streamconv.run.pool import Outcome, Pool

    laps = [clock()]
    index, plan = open_and_plan(source, options, resources.memory_budget)
    outcome, profile, state, where, warnings = Outcome(), dict[str, float](), None, "", list(plan.warnings)
    reads = Reads([plan])
    costs = costs_of(reads)
    shares = foresee(reads, resources, costs, 0)  # a budget that is far too small is refused before anything is loaded
    with (
        contextlib.closing(index),
        Writer(Path(out), index.root, plan, index.shards, force, disk, resources.no_lock) as writer,
    ):
        if not writer.finished:
            with executor(reads, resources, costs, hub.memory_of(index) + pinned, instead) as execution:
                shares, where = execution.shares, execution.where
                meter.begin("converting", plan.bytes_read, memory_budget=shares.budget)
                laps.append(clock())
                writer.begin()
                laps.append(clock())
                state = OutputState(plan, writer.folder, writer.journal, writer.past)
                fetch = Fetch(reads, index.shards, [writer.past], resources.hub_keep)
                rows, devices, windows = resources.tile_rows, execution.slots, execution.mapped
                pool = Pool(
                    reads, [state], index.shards, shares, execution.costs, rows, meter.tile, devices, fetch.consumed, windows
                )
                try:
                    fetch.start()
                    outcome = pool.run()
                finally:
                    fetch.close()
                    writer.abandoned = pool.busy
                warnings += [*execution.warnings(), *state.warnings()]
            laps.append(clock())
            for shard in index.shards:
                shard.check_unchanged()
            meter.phase("syncing")
            writer.publish(state.hashes)
            laps.append(clock())
            profile = _profile(laps, outcome.seconds, shares.workers)
    meter.end()
    return Report(
        out=str(out),
        files=len(plan.files),
        tensors=sum(file.tensors for file in plan.files),
        bytes_read=outcome.bytes_read,
        bytes_mapped=outcome.bytes_mapped,
        bytes_written=plan.bytes_written,
        seconds=clock() - laps[0],
        peak_memory=memory.peak_resident(),
        budget=shares.budget,
        workers=shares.workers,
        tiles=outcome.tiles,
        resumed=state.resumed if state is not None else 0,
        device=where,
        profile=profile,
        warnings=tuple(warnings),
    )


def _convert_in_parts(
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
    """As `_convert`, for one of the processes that share the work."""
    from streamconv.in_parts import Worker

    began = clock()
    index, plan = open_and_plan(source, options, resources.memory_budget)
    with contextlib.closing(index):
        reads = Reads([plan])
        foreseen = foresee(reads, resources, costs_of(reads), 0)
        share = Worker(source, Path(out), index, plan, resources, force, meter, disk, instead, pinned).work()
    meter.end()
    used = share.shares or foreseen
    return Report(
        out=str(out),
        files=len(plan.files),
        tensors=sum(file.tensors for file in plan.files),
        bytes_read=share.bytes_read,
        bytes_mapped=share.bytes_mapped,
        bytes_written=plan.bytes_written,
        seconds=clock() - began,
        peak_memory=memory.peak_resident(),
        budget=used.budget,
        workers=used.workers,
        tiles=share.tiles,
        resumed=share.resumed,
        device=share.where,
        profile={},
        warnings=(*plan.warnings, *share.warnings),
        parts=tuple(share.parts),
        published=share.published,
    )


def _profile(laps: Sequence[float], spent: Mapping[str, float], workers: int) -> dict[str, float]:
    """Where the time went, in seconds.

    Args:
        laps: when the run began, had loaded, had made the files, had done the tiles, and had published.
        spent: worker seconds by phase.
    """
    load, create, tiles, sync = (after - before for before, after in itertools.pairwise(laps))
    phases = {phase: seconds / workers for phase, seconds in spent.items()}
    return {"load": load, "create": create, **phases, "tiles": tiles, "sync": sync}
