"""One output, made by several processes on any machines: each takes parts of the plan that nobody has, and the last one publishes."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from streamconv import hub
from streamconv.allocation import costs_of
from streamconv.checkpoint.index import Index
from streamconv.errors import Interrupted, LockedError, OutputError, ResumeError, UsageError, few, printable
from streamconv.execution import executor
from streamconv.options import Resources
from streamconv.planning.memory_plan import MemoryPlan
from streamconv.planning.parts import Part, cut
from streamconv.planning.plan import Plan
from streamconv.planning.reads import Reads
from streamconv.progress import Meter, OutputProgress
from streamconv.publishing import POLL, anywhere, publish
from streamconv.reports import TensorError
from streamconv.run import journal, sampled, source_record
from streamconv.run.claim import Claim, Over, told
from streamconv.run.claims import Claims
from streamconv.run.fs import Disk
from streamconv.run.inside import choose
from streamconv.run.joining import join
from streamconv.run.output_checks import check_place
from streamconv.run.part_folder import Aside, PartFolder
from streamconv.run.part_record import Record, hashes_of
from streamconv.run.place import Place
from streamconv.run.resume import fits

if TYPE_CHECKING:
    from streamconv.run.output_state import OutputState

PAGE = 4096


@dataclass(slots=True)
class Share:
    """What one process did of the work.

    Attributes:
        parts: those that it did; `resumed` tiles of them were there.
        published: the output has its name.
        errors: of the matrices of these parts, with `verify_inline`.
        where: devices, or the CPU and why.
    """

    parts: list[int] = dataclasses.field(default_factory=list)
    published: bool = False
    bytes_read: int = 0
    bytes_mapped: int = 0
    tiles: int = 0
    resumed: int = 0
    where: str = ""
    shares: MemoryPlan | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    errors: list[TensorError] = dataclasses.field(default_factory=list)


class Worker:
    """Does parts of a plan, until none is left.

    Args:
        instead, pinned: as of `api.convert`.
    """

    def __init__(
        self,
        source: str | Path,
        out: Path,
        index: Index,
        plan: Plan,
        resources: Resources,
        force: bool,
        meter: Meter,
        disk: Disk | None,
        instead: str = "",
        pinned: int = 0,
    ) -> None:
        if resources.parts is None:
            raise UsageError("in how many parts?", hint="--parts N, the same for every worker")
        if resources.part is not None and not 0 <= resources.part < resources.parts:
            raise UsageError(f"--part {resources.part}/{resources.parts}: parts are 0 to {resources.parts - 1}")
        if resources.no_lock and resources.part is None and not resources.private_parts:
            raise UsageError(
                "--no-lock: without locks nobody knows which parts are taken",
                hint="give each worker its part, with --part K/N, or add --private-parts",
            )
        self.source, self.out, self.index, self.plan, self.resources = source, out, index, plan, resources
        self.force, self.meter, self.disk, self.instead, self.pinned = force, meter, disk, instead, pinned
        self.parts = cut(plan, resources.parts)
        self.identity = journal.identity(plan, index.shards)  # reads some of every source file: once for all parts
        self.share = Share()
        self._source = source_record.OfPart(plan)
        self._abandoned, self._wait = False, resources.wait
        self._there = set[int]()  # parts that are done, as far as this worker has seen
        self._state: OutputState | None = None

    @property
    def read(self) -> int:
        """Source bytes of all parts."""
        return sum(part.read for part in self.parts)

    def progress(self) -> OutputProgress:
        """How far the output is, with the parts that others did."""
        written, state = [part.written for part in self.parts], self._state
        done = sum(written[part] for part in self._there) + (state.done if state is not None else 0)
        finished = self.share.published and not self.share.parts
        return OutputProgress(str(self.out), sum(written) if self.share.published else done, sum(written), finished)

    def _see(self, part: int) -> None:
        """A part is done, by whomever: from now on it counts."""
        if part not in self._there:
            self._there.add(part)
            if part not in self.share.parts:  # its tiles have counted
                self.meter.add(self.parts[part].read)

    def place(self) -> Place:
        """Where the output is made."""
        return choose(Path(os.path.realpath(self.out)), self.disk or Disk(), self.resources.no_lock)

    def work(self, wait: float | None = None) -> Share:
        """Join the work, do what there is to do, and publish if all is done.

        Args:
            wait: seconds for parts that others hold; as `resources` says if None.

        Raises:
            LockedError: parts are held by others, and nothing went on for so long.
            ResumeError: the work that is there is for something else. Else as of `api.convert`.
        """
        self._wait = self.resources.wait if wait is None else wait
        place = self.place()
        place.ours |= self.plan.names
        check_place(place, self.index.root, [*(shard.path for shard in self.index.shards), *self.plan.target.files_read])
        claims = Claims(place, len(self.parts))
        page, private = max(PAGE, mmap.PAGESIZE), self.resources.private_parts
        source = os.path.realpath(self.source) if os.path.lexists(self.source) else self.source
        run = told(anywhere(self.identity), len(self.parts), page, private, self.force, source)
        files = [(file.name, file.size) for file in self.plan.files]
        try:
            is_of = partial(sampled.is_of, self.plan, self.index.shards, place.out)
            if not join(claims, run, files, self.force, max(10.0, self.resources.wait), is_of):
                self.share.published = True
                return self.share
            if claims.told["page"] < page:
                raise ResumeError(f"the work was begun on a machine with pages of {claims.told['page']} bytes; here they have {page}")
            if self.resources.part is None and not private:
                claims.check_reach()
            self.meter.phase("converting")
            self._take(claims)
            self._publish(claims)
        except Over:
            self._over()
        except (OutputError, Interrupted) as error:
            if not isinstance(error, ResumeError | LockedError):
                also = "what is finished is kept: run the same command again to go on"
                error.hint = f"{error.hint}; {also}" if error.hint else also
            raise
        finally:
            if not self._abandoned:
                claims.leave()
        return self.share

    def _over(self) -> None:
        """The work is not there any more: somebody has published it."""
        if not os.path.lexists(self.out):
            shown = printable(str(self.out))
            raise OutputError(f"the work on {shown} was removed while this run was at it", hint="run the same command again")
        self.share.published = True

    def _order(self) -> Iterator[int]:
        """Parts as this worker looks at them: the large ones first, then from its own place on, so that neighbours share source files."""
        if self.resources.part is not None:
            yield self.resources.part
            return
        large = sum(part.alone for part in self.parts[: len(self.parts) - 1]) if len(self.parts) > 1 else 0
        count = len(self.parts) - large
        first = max(self.share.parts[-1] + 1 - large, 0) if self.share.parts else int(count * self.resources.begin)
        yield from range(large)
        yield from (large + (first + step) % count for step in range(count))

    def _take(self, claims: Claims) -> None:
        """Do parts until all are done."""
        seen, since = claims.progress(), time.monotonic()
        while True:
            waiting, claim = list[int](), None
            for part in self._order():
                if claims.done(part):
                    self._see(part)
                    continue
                claim = claims.claim(part)
                if claim is not None:
                    break
                waiting.append(part)
            if claim is not None:
                try:
                    self._do(claims, claim)
                finally:
                    if not self._abandoned:
                        claim.close()
                seen, since = claims.progress(), time.monotonic()
                continue
            waiting = [part for part in waiting if not claims.done(part)]
            if not waiting:
                return
            if not claims.is_there():
                raise Over
            if (now := claims.progress()) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since >= self._wait:
                who = claims.held(waiting[0]) or "another process"
                raise LockedError(
                    f"of {len(self.parts)} parts {few([*map(str, waiting)], 5)} are held by {who}; nothing went on for {self._wait:g} s",
                    hint="run the same command again later; a lock of a machine that is gone ends with its lease",
                )
            time.sleep(POLL)

    def _do(self, claims: Claims, claim: Claim) -> None:
        part, fingerprint = self.parts[claim.part], self.plan.fingerprint()
        evidence = tuple(tuple(entry[3:6]) for entry in self.identity["sources"] if len(entry) == 7)
        if not part.matrices and not part.constants:
            claims.record(claim, Record(fingerprint, claim.attempt, (), evidence))
            self.share.parts.append(claim.part)
            self._see(claim.part)
            return
        told, plan = claims.told, part.of(self.plan)
        aside = Aside(claims.base, f"{claim.part}.{claim.attempt}.aside", plan.files, told["page"], fresh=True)
        folder = PartFolder(claims.place, plan.files, part.extents(self.plan), told["page"], aside, told["private"])
        book = journal.Journal(claim.home)
        try:
            try:
                folder.open()
            except BlockingIOError:  # whoever had the part before still holds its pages
                time.sleep(POLL)
                return
            run = self.identity | {"part": claim.part, "parts": len(self.parts)}
            past = journal.read(claim.home)
            if past is not None and past.run == run and not told["private"]:
                book.resume(past)
                done = {span: [tile for tile in tiles if fits(plan, tile)] for span, tiles in past.tiles.items()}
            else:
                book.start(run)
                done = {}
            record = self._run(part, plan, folder, book, done, claim.attempt, evidence)
            claims.record(claim, dataclasses.replace(record, aside=folder.finish()))
            self.share.parts.append(claim.part)
            self._state = None
            self._see(claim.part)
        finally:
            if not self._abandoned:
                with contextlib.suppress(OSError):
                    folder.close()
                    book.close()

    def _run(
        self,
        part: Part,
        plan: Plan,
        folder: PartFolder,
        book: journal.Journal,
        past: dict[int, list[journal.TileRecord]],
        attempt: str,
        evidence: tuple[tuple[int, ...], ...],
    ) -> Record:
        from streamconv.run.inline_check import InlineCheck
        from streamconv.run.output_state import OutputState

        reads, shards = Reads([plan]), self.index.shards
        check = InlineCheck(plan, self.resources.min_snr) if self.resources.verify_inline else None
        state = OutputState(plan, folder, book, past, check=check)
        if self.resources.source_check and plan.bytes_checked:
            source_record.check(self.index, wanted=self._source.wanted(plan))
        costs = costs_of(reads, checked=self.resources.verify_inline)
        with executor(reads, self.resources, costs, hub.memory_of(self.index) + self.pinned, self.instead) as execution:
            try:
                outcome = execution.run([state], shards, self.meter.tile)
            finally:
                self._abandoned = execution.busy
            self.share.where, self.share.shares = execution.where, execution.shares
            self.share.warnings += [warning for warning in execution.warnings() if warning not in self.share.warnings]
        for shard in (*shards, *plan.beside):
            shard.check_unchanged()
        if check is not None:
            check.finish()
            self.share.errors += check.errors()
        self.share.bytes_read += outcome.bytes_read
        self.share.bytes_mapped += outcome.bytes_mapped
        self.share.tiles += outcome.tiles
        self.share.resumed += state.resumed
        found = state.overflow, state.nonfinite
        hashes = hashes_of(self.plan, part, state.hashes)
        snr = check.manifest() if check is not None else {}
        return Record(self.plan.fingerprint(), attempt, hashes, evidence, "", *found, outcome.tiles, outcome.bytes_read, snr)

    def _publish(self, claims: Claims) -> None:
        """Publish if all parts are done, unless another process is at it, or locks would not keep it away."""
        if self.resources.no_lock:
            return
        if not all(claims.done(part) for part in range(len(self.parts))):
            if not claims.is_there():  # the records went with the work
                raise Over
            return
        patience = max(10.0, self.resources.wait)
        self.share.warnings += publish(claims, self.index, self.plan, self.parts, self.disk, self.meter, patience)
        self.share.published = True
