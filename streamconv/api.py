"""The story: open the source, plan every byte, run the plan inside the budget, publish."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv import device, hub, memory
from streamconv.allocation import costs_of, estimate_memory
from streamconv.checkpoint.index import Index
from streamconv.errors import LockedError
from streamconv.estimate import look
from streamconv.execution import executor
from streamconv.open_plan import open_and_plan as open_and_plan
from streamconv.open_plan import open_and_plan_all
from streamconv.options import Resources
from streamconv.planning.memory_plan import MemoryPlan
from streamconv.planning.plan import Plan
from streamconv.planning.reads import Reads
from streamconv.progress import Meter, OutputProgress, unwatched
from streamconv.reports import Report, Written, profile_of, together
from streamconv.run import source_record
from streamconv.run.fs import Disk, named
from streamconv.run.output_checks import check_apart
from streamconv.run.writer import Writer, begin
from streamconv.targets.base import Output, Target

if TYPE_CHECKING:
    from streamconv.run.inline_check import InlineCheck
    from streamconv.run.output_state import OutputState


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
    run = Conversion(source, (Output(str(out), options),), resources or Resources(), force, meter or Meter(unwatched), clock, disk)
    return run.run()


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
            disk, a signal or a crash the same call goes on where this one stopped.
    """
    run = Conversion(source, tuple(outputs), resources or Resources(), force, meter or Meter(unwatched), clock, disk, several=True)
    return run.run()


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` and `convert_all` were asked for.

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

    def run(self) -> Report:
        """On the device that was chosen, or on the CPU where that has no room, or is lost."""
        on_cpu = dataclasses.replace(self.resources, device="cpu")
        try:
            return self._run() if self.resources.parts is None else self._run_in_parts()
        except device.NoRoom as error:
            if self.resources.device != "auto":
                raise
            return dataclasses.replace(self, resources=on_cpu, instead=error.message).run()
        except device.DeviceLost as error:
            if self.resources.on_device_loss == "stop":
                error.hint = "what is finished is kept: run the same command again to go on, or with --device cpu"
                raise
            report = dataclasses.replace(self, resources=on_cpu, instead=error.message, pinned=error.pinned).run()
            warning = f"{error.message}; the rest was done on the CPU"
            return dataclasses.replace(report, warnings=(warning, *report.warnings))

    def _run(self) -> Report:
        from streamconv.run.output_state import OutputState
        from streamconv.run.pool import Outcome

        laps, resources, meter = [self.clock()], self.resources, self.meter
        index, plans = open_and_plan_all(self.source, self.outputs, resources.memory_budget)
        shares = _estimated(plans, resources)  # a budget that is far too small is refused before anything is loaded
        with contextlib.closing(index), contextlib.ExitStack() as stack:
            writers = [self._writer(index, *pair) for pair in zip(self.outputs, plans, strict=True)]
            if self.several:
                check_apart([writer.place for writer in writers], index.root)
            for writer in writers:
                stack.enter_context(writer)
            outcome, profile, where, warnings = Outcome(), dict[str, float](), "", list[str]()
            states: dict[Writer, OutputState] = {}
            each = _progress_of(self.outputs, writers, states) if self.several else tuple
            estimate = None
            unfinished = [writer for writer in writers if not writer.finished]
            if not unfinished:
                meter.begin("converting", 0, outputs=each)
            else:
                if resources.source_check:
                    self._check_source(index, plans[0])
                reads = Reads([writer.plan for writer in unfinished])
                places: dict[Path | None, int] = {writer.place.out: writer.plan.bytes_written for writer in unfinished}
                looking = look(index, [*places], reads.nbytes + sum(places.values()), runs=True) if resources.probe else None
                taken = hub.memory_of(index) + self.pinned
                with executor(reads, resources, costs_of(reads, checked=resources.verify_inline), taken, self.instead) as execution:
                    shares, where = execution.shares, execution.where
                    estimate = looking.estimate(reads, places, execution.costs, shares, bool(execution.rings)) if looking else None
                    meter.begin("converting", reads.nbytes, memory_budget=shares.budget, estimate=estimate, outputs=each)
                    laps.append(self.clock())
                    begin(unfinished)
                    laps.append(self.clock())
                    states |= {
                        writer: OutputState(writer.plan, writer.folder, writer.journal, writer.past, loose, self._check(writer.plan))
                        for writer, loose in zip(unfinished, reads.loose, strict=True)
                    }
                    try:
                        outcome = execution.run([*states.values()], index.shards, meter.tile)
                    finally:
                        for writer in unfinished:
                            writer.abandoned = execution.busy
                    warnings = execution.warnings()
                laps.append(self.clock())
                for shard in (*index.shards, *(file for writer in unfinished for file in writer.plan.beside)):
                    shard.check_unchanged()
                meter.phase("syncing")
                for state in states.values():
                    if state.check is not None:
                        state.check.finish()
                for writer, state in states.items():
                    writer.publish(state.hashes, state.check.manifest() if state.check is not None else None)
                laps.append(self.clock())
                profile = profile_of(laps, outcome.seconds, shares.workers)
        meter.end()
        made = [_written(output, writer, states.get(writer)) for output, writer in zip(self.outputs, writers, strict=True)]
        return Report(
            out=", ".join(output.out for output in self.outputs),
            files=sum(written.files for written in made),
            tensors=sum(written.tensors for written in made),
            bytes_read=outcome.bytes_read,
            bytes_mapped=outcome.bytes_mapped,
            bytes_written=sum(written.bytes_written for written in made if not (self.several and written.finished)),
            seconds=self.clock() - laps[0],
            peak_memory=memory.peak_resident(),
            budget=shares.budget,
            workers=shares.workers,
            tiles=outcome.tiles,
            resumed=sum(written.resumed for written in made),
            device=where,
            profile=profile,
            warnings=tuple(warnings) + together(made),
            outputs=tuple(made),
            estimate=estimate,
        )

    def _check_source(self, index: Index, plan: Plan) -> None:
        if plan.bytes_checked:
            self.meter.begin("checking", plan.bytes_checked)
            source_record.check(index, self.meter.add)

    def _check(self, plan: Plan) -> InlineCheck | None:
        from streamconv.run.inline_check import InlineCheck

        return InlineCheck(plan, self.resources.min_snr) if self.resources.verify_inline else None

    def _run_in_parts(self) -> Report:
        """As `_run`, for one of the processes that share the work."""
        from streamconv.in_parts import Worker

        began, resources, meter = self.clock(), self.resources, self.meter
        index, plans = open_and_plan_all(self.source, self.outputs, resources.memory_budget)
        with contextlib.closing(index):
            foreseen, instead = [_estimated([plan], resources) for plan in plans], (self.instead, self.pinned)
            workers = [
                Worker(self.source, Path(named(one.out)), index, plan, resources, self.force, meter, self.disk, *instead)
                for one, plan in zip(self.outputs, plans, strict=True)
            ]
            if self.several:
                check_apart([worker.place() for worker in workers], index.root)
            each_of = (lambda: [worker.progress() for worker in workers]) if self.several else tuple
            meter.begin("converting", sum(worker.read for worker in workers), memory_budget=foreseen[0].budget, outputs=each_of)
            if len(workers) > 1 and resources.part is None:
                for worker in workers:  # what nobody holds, of all outputs; then what others held
                    with contextlib.suppress(LockedError):
                        worker.work(0.0)
            for worker in workers:
                worker.work()
        meter.end()
        made = list(zip(self.outputs, plans, [worker.share for worker in workers], strict=True))
        used = next((share.shares for _, _, share in made if share.shares is not None), foreseen[0])
        each = tuple(
            Written(
                one.out, len(plan.files), sum(file.tensors for file in plan.files), plan.bytes_written, share.resumed,
                share.published and not share.parts, (*plan.warnings, *share.warnings), tuple(share.errors), _losses(plan),
                tuple(share.parts), share.published,
            )
            for one, plan, share in made
        )  # fmt: skip
        return Report(
            out=", ".join(one.out for one in each),
            files=sum(one.files for one in each),
            tensors=sum(one.tensors for one in each),
            bytes_read=sum(share.bytes_read for _, _, share in made),
            bytes_mapped=sum(share.bytes_mapped for _, _, share in made),
            bytes_written=sum(one.bytes_written for one in each),
            seconds=self.clock() - began,
            peak_memory=memory.peak_resident(),
            budget=used.budget,
            workers=used.workers,
            tiles=sum(share.tiles for _, _, share in made),
            resumed=sum(one.resumed for one in each),
            device=next((share.where for _, _, share in made if share.where), ""),
            profile={},
            warnings=together(each),
            outputs=each,
            parts=tuple(part for one in each for part in one.parts or ()),
            published=all(one.published for one in each),
        )

    def _writer(self, index: Index, output: Output, plan: Plan) -> Writer:
        out = Path(named(output.out))
        return Writer(out, index.root, plan, index.shards, self.force, self.disk, self.resources.no_lock, skip=self.several)


def _estimated(plans: Sequence[Plan], resources: Resources) -> MemoryPlan:
    reads = Reads(plans)
    return estimate_memory(reads, resources, costs_of(reads, checked=resources.verify_inline), 0)


def _progress_of(
    outputs: Sequence[Output], writers: Sequence[Writer], states: dict[Writer, OutputState]
) -> Callable[[], list[OutputProgress]]:
    """Tells how far each output is."""
    sizes = [writer.plan.matrices.nbytes for writer in writers]

    def told() -> list[OutputProgress]:
        each = zip(outputs, writers, sizes, strict=True)
        done = {writer: state.done for writer, state in states.copy().items()}
        return [OutputProgress(one.out, size if by.finished else done.get(by, 0), size, by.finished) for one, by, size in each]

    return told


def _written(output: Output, writer: Writer, state: OutputState | None) -> Written:
    plan = writer.plan
    return Written(
        output.out,
        len(plan.files),
        sum(file.tensors for file in plan.files),
        plan.bytes_written,
        state.resumed if state is not None else 0,
        writer.finished,
        (*plan.warnings, *(state.warnings() if state is not None else ())),
        tuple(state.check.errors()) if state is not None and state.check is not None else (),
        _losses(plan),
    )


def _losses(plan: Plan) -> Mapping[str, Any] | None:
    return plan.losses.to_json() if plan.losses is not None else None
