"""The story: open the source, plan every byte, run the plan inside the budget, publish."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streamconv import device, memory
from streamconv.allocation import costs_of, estimate_memory
from streamconv.errors import LockedError
from streamconv.estimate import look
from streamconv.execution import Conversion, executor
from streamconv.open_plan import open_and_plan as open_and_plan
from streamconv.open_plan import open_and_plan_all
from streamconv.options import Resources
from streamconv.planning.memory_plan import MemoryPlan
from streamconv.planning.plan import Plan
from streamconv.planning.reads import Reads
from streamconv.progress import Meter, OutputProgress, unwatched
from streamconv.reports import Estimate, Report, Written, together
from streamconv.run import source_record
from streamconv.run.fs import Disk, named
from streamconv.run.output_checks import check_apart
from streamconv.run.writer import Writer, begin
from streamconv.targets.base import Output, Target

if TYPE_CHECKING:
    from streamconv.run.inline_check import InlineCheck
    from streamconv.run.output_state import OutputState
    from streamconv.run.tile import Tally


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
    """Convert a checkpoint into one output; a finished one in its place is an error. Everything else as `convert_all`.

    Args:
        out: folder to write; appears only when it is complete.
    """
    outputs = (Output(str(out), options),)
    return _run(Conversion(source, outputs, resources or Resources(), force, meter or Meter(unwatched), clock, disk))


def convert_all(
    source: str | Path,
    outputs: Sequence[Output],
    resources: Resources | None = None,
    *,
    force: bool = False,
    meter: Meter | None = None,
    clock: Callable[[], float] = time.monotonic,
    disk: Disk | None = None,
) -> Report:
    """Convert a checkpoint into several outputs; each byte of the source is read once for all of them, where their formats allow it.

    An output that this very call has finished before is skipped, the others are resumed.

    Args:
        source: folder or file of the source checkpoint, or a model of the Hub (org/name[@revision]).

    Raises:
        StreamconvError: see streamconv.errors. After a mistake or a bad source nothing is left behind; after a full
            disk, a signal or a crash the same call resumes where this one stopped.
    """
    asked = Conversion(source, tuple(outputs), resources or Resources(), force, meter or Meter(unwatched), clock, disk, several=True)
    return _run(asked)


def _run(asked: Conversion) -> Report:
    """On the device that was chosen, or on the CPU where that has no room, or is lost."""
    on_cpu = dataclasses.replace(asked, resources=dataclasses.replace(asked.resources, device="cpu"))
    try:
        return _whole(asked) if asked.resources.parts is None else _in_parts(asked)
    except device.NoRoom as error:
        if asked.resources.device != "auto":
            raise
        return _run(dataclasses.replace(on_cpu, instead=error.message))
    except device.DeviceLost as error:
        if asked.resources.on_device_loss == "stop":
            error.hint = "what is finished is kept: run the same command again to resume, or with --device cpu"
            raise
        report = _run(dataclasses.replace(on_cpu, instead=error.message, pinned=error.pinned))
        warning = f"{error.message}; the rest was done on the CPU"
        return dataclasses.replace(report, warnings=(warning, *report.warnings))


def _whole(asked: Conversion) -> Report:
    from streamconv.run.output_state import OutputState
    from streamconv.run.tile import Tally

    laps, resources, meter = [asked.clock()], asked.resources, asked.meter
    index, plans = open_and_plan_all(asked.source, asked.outputs, resources.memory_budget)
    memory_plan = _estimated(plans, resources)  # a budget that is far too small is refused before anything is loaded
    with index, contextlib.ExitStack() as stack:
        writers = [
            Writer(Path(named(one.out)), index.root, plan, index.shards, asked.force, asked.disk, resources.no_lock, skip=asked.several)
            for one, plan in zip(asked.outputs, plans, strict=True)
        ]
        if asked.several:
            check_apart([writer.place for writer in writers], index.root)
        for writer in writers:
            stack.enter_context(writer)
        tally, profile, where, warnings = Tally(), dict[str, float](), "", list[str]()
        states: dict[Writer, OutputState] = {}
        each = _progress_of(asked.outputs, writers, states) if asked.several else tuple
        estimate = None
        unfinished = [writer for writer in writers if not writer.finished]
        if not unfinished:
            meter.begin("converting", 0, outputs=each)
        else:
            if resources.source_check and plans[0].bytes_checked:
                meter.begin("checking", plans[0].bytes_checked)
                source_record.check(index, meter.add)
            reads = Reads([writer.plan for writer in unfinished])
            places: dict[Path | None, int] = {writer.place.out: writer.plan.bytes_written for writer in unfinished}
            looking = look(index, [*places], reads.nbytes + sum(places.values()), runs=True) if resources.probe else None
            with executor(asked, reads, index) as execution:
                memory_plan, where = execution.memory_plan, execution.where
                estimate = looking.estimate(reads, places, execution.costs, memory_plan, bool(execution.rings)) if looking else None
                meter.begin("converting", reads.nbytes, memory_budget=memory_plan.budget, estimate=estimate, outputs=each)
                laps.append(asked.clock())
                begin(unfinished)
                laps.append(asked.clock())
                states |= {
                    writer: OutputState(writer.plan, writer.folder, writer.journal, writer.past, loose, execution.check_of(writer.plan))
                    for writer, loose in zip(unfinished, reads.loose, strict=True)
                }
                try:
                    tally = execution.run([*states.values()])
                finally:
                    for writer in unfinished:
                        writer.abandoned = execution.busy
                warnings = execution.warnings()
            laps.append(asked.clock())
            meter.phase("syncing")
            for writer, state in states.items():
                writer.publish(state.hashes, state.check.manifest() if state.check is not None else None)
            laps.append(asked.clock())
            load, create, tiles, sync = (after - before for before, after in itertools.pairwise(laps))
            phases = {phase: spent / memory_plan.workers for phase, spent in tally.seconds.items()}
            profile = {"load": load, "create": create, **phases, "tiles": tiles, "sync": sync}
    meter.end()
    results = []
    for output, writer in zip(asked.outputs, writers, strict=True):
        done = states.get(writer)
        history = (done.resumed, done.warnings(), done.check) if done is not None else (0, (), None)
        results.append(_written(output, writer.plan, writer.finished, *history))
    written = sum(one.bytes_written for one in results if not (asked.several and one.finished))
    seconds = asked.clock() - laps[0]
    every = (*warnings, *together(results))
    return _report(results, tally, written, seconds, memory_plan, where, every, profile=profile, estimate=estimate)


def _in_parts(asked: Conversion) -> Report:
    """As `_whole`, for one of the processes that share the work."""
    from streamconv.in_parts import Worker
    from streamconv.run.tile import Tally

    began, resources, meter = asked.clock(), asked.resources, asked.meter
    index, plans = open_and_plan_all(asked.source, asked.outputs, resources.memory_budget)
    with index:
        foreseen = [_estimated([plan], resources) for plan in plans]
        workers = [Worker(asked, one.out, index, plan) for one, plan in zip(asked.outputs, plans, strict=True)]
        if asked.several:
            check_apart([worker.place() for worker in workers], index.root)
        each = (lambda: [worker.progress() for worker in workers]) if asked.several else tuple
        meter.begin("converting", sum(worker.read for worker in workers), memory_budget=foreseen[0].budget, outputs=each)
        if len(workers) > 1 and resources.part is None:
            for worker in workers:  # what nobody holds, of all outputs; then what others held
                with contextlib.suppress(LockedError):
                    worker.work(0.0)
        for worker in workers:
            worker.work()
    meter.end()
    results, tally = list[Written](), Tally()
    for output, worker in zip(asked.outputs, workers, strict=True):
        one = _written(output, worker.plan, worker.published and not worker.did, worker.resumed, worker.warnings)
        results.append(dataclasses.replace(one, errors=tuple(worker.errors), parts=tuple(worker.did), published=worker.published))
        tally.add(worker.tally)
    memory_plan = next((worker.memory_plan for worker in workers if worker.memory_plan is not None), foreseen[0])
    where = next((worker.where for worker in workers if worker.where), "")
    written, seconds = sum(one.bytes_written for one in results), asked.clock() - began
    report = _report(results, tally, written, seconds, memory_plan, where, together(results))
    parts = tuple(part for one in results for part in one.parts or ())
    return dataclasses.replace(report, parts=parts, published=all(one.published for one in results))


def _estimated(plans: Sequence[Plan], resources: Resources) -> MemoryPlan:
    reads = Reads(plans)
    return estimate_memory(reads, resources, costs_of(reads, checked=resources.verify_inline), 0)


def _progress_of(
    outputs: Sequence[Output], writers: Sequence[Writer], states: dict[Writer, OutputState]
) -> Callable[[], list[OutputProgress]]:
    """Tells how far each output is."""
    sizes = [writer.plan.matrices.nbytes for writer in writers]

    def outputs_now() -> list[OutputProgress]:
        each = zip(outputs, writers, sizes, strict=True)
        done = {writer: state.done for writer, state in states.copy().items()}
        return [OutputProgress(one.out, size if by.finished else done.get(by, 0), size, by.finished) for one, by, size in each]

    return outputs_now


def _written(
    output: Output, plan: Plan, finished: bool, resumed: int, warnings: Sequence[str], check: InlineCheck | None = None
) -> Written:
    tensors, losses = sum(file.tensors for file in plan.files), plan.losses.to_json() if plan.losses is not None else None
    errors = tuple(check.errors()) if check is not None else ()
    sizes = len(plan.files), tensors, plan.bytes_written
    return Written(output.out, *sizes, resumed, finished, (*plan.warnings, *warnings), errors, losses)


def _report(
    outputs: Sequence[Written], tally: Tally, bytes_written: int, seconds: float, memory_plan: MemoryPlan, where: str,
    warnings: tuple[str, ...], profile: dict[str, float] | None = None, estimate: Estimate | None = None,
) -> Report:  # fmt: skip
    return Report(
        out=", ".join(one.out for one in outputs),
        files=sum(one.files for one in outputs),
        tensors=sum(one.tensors for one in outputs),
        bytes_read=tally.bytes_read,
        bytes_mapped=tally.bytes_mapped,
        bytes_written=bytes_written,
        seconds=seconds,
        peak_memory=memory.peak_resident(),
        budget=memory_plan.budget,
        workers=memory_plan.workers,
        tiles=tally.tiles,
        resumed=sum(one.resumed for one in outputs),
        device=where,
        profile=profile or {},
        warnings=warnings,
        outputs=tuple(outputs),
        estimate=estimate,
    )
