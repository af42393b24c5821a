"""One output, made by several processes on any machines: each takes parts of the plan that nobody has, and the last one publishes."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from streamconv.checkpoint.index import Index
from streamconv.errors import Interrupted, LockedError, OutputError, ResumeError, UsageError, few, printable
from streamconv.execution import Conversion, executor
from streamconv.planning.memory_plan import MemoryPlan
from streamconv.planning.parts import Part, cut
from streamconv.planning.plan import Plan
from streamconv.planning.reads import Reads
from streamconv.progress import OutputProgress
from streamconv.publishing import POLL, publish
from streamconv.reports import TensorError
from streamconv.run import journal, source_record
from streamconv.run.claims import Claim, Claims, Over
from streamconv.run.fs import Disk, named
from streamconv.run.inside import choose
from streamconv.run.joining import join, plan_file
from streamconv.run.journal import TileRecord
from streamconv.run.output_checks import check_place, files_read
from streamconv.run.part_folder import Aside, PartFolder
from streamconv.run.part_record import Record, hashes_of
from streamconv.run.place import Place
from streamconv.run.tile import Tally

if TYPE_CHECKING:
    from streamconv.run.output_state import OutputState

PAGE = 4096


class Worker:
    """Does parts of the plan of one output, until none is left.

    Attributes:
        did: its parts; `resumed` tiles of them were there.
        published: the output has its name.
        errors: of the matrices of these parts, with `verify_inline`.
        where: devices, or the CPU and why.
    """

    def __init__(self, asked: Conversion, out: str, index: Index, plan: Plan) -> None:
        resources = asked.resources
        count = resources.parts or 1
        if resources.part is not None and not 0 <= resources.part < count:
            raise UsageError(f"--part {resources.part}/{count}: parts are 0 to {count - 1}")
        if resources.no_lock and resources.part is None and not resources.private_parts:
            raise UsageError(
                "--no-lock: without locks nobody knows which parts are taken",
                hint="give each worker its part, with --part K/N, or add --private-parts",
            )
        self.asked, self.resources, self.out, self.index, self.plan = asked, resources, named(out), index, plan
        self.parts = cut(plan, count)
        self.identity = journal.identity(plan, index.shards)  # reads some of every source file: once for all parts
        self.did: list[int] = []
        self.published, self.resumed, self.tally, self.where = False, 0, Tally(), ""
        self.memory_plan: MemoryPlan | None = None
        self.warnings: list[str] = []
        self.errors: list[TensorError] = []
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
        finished = self.published and not self.did
        return OutputProgress(str(self.out), sum(written) if self.published else done, sum(written), finished)

    def _see(self, part: int) -> None:
        """A part is done, by whomever: from now on it counts."""
        if part not in self._there:
            self._there.add(part)
            if part not in self.did:  # its tiles have counted
                self.asked.meter.add(self.parts[part].read)

    def place(self) -> Place:
        """Where the output is made."""
        return choose(self.out, self.asked.disk or Disk(), self.resources.no_lock)

    def work(self, wait: float | None = None) -> None:
        """Join the work, do what there is to do, and publish if all is done.

        Args:
            wait: seconds for parts that others hold; as `resources` says if None.

        Raises:
            LockedError: parts are held by others, and nothing went on for so long.
            ResumeError: the work that is there is for something else. Else as of `api.convert`.
        """
        self._wait, source, force = self.resources.wait if wait is None else wait, self.asked.source, self.asked.force
        place = self.place()
        place.ours |= self.plan.names
        check_place(place, self.index.root, files_read(self.plan, self.index.shards))
        claims = Claims(place, len(self.parts))
        page, private = max(PAGE, mmap.PAGESIZE), self.resources.private_parts
        where = os.path.realpath(source) if os.path.lexists(source) else source
        run = plan_file(self.identity, len(self.parts), page, private, force, where)
        try:
            if not join(claims, self.plan, self.index.shards, run, force, max(10.0, self.resources.wait)):
                self.published = True
                return
            if claims.plan_file["page"] < page:
                raise ResumeError(f"the work was begun on a machine with pages of {claims.plan_file['page']} bytes; here they have {page}")
            if self.resources.part is None and not private and claims.presence is not None:
                claims.presence.check()
            self.asked.meter.phase("converting")
            self._take(claims)
            self._publish(claims)
        except Over:
            if not os.path.lexists(self.out):
                shown = printable(self.out)
                raise OutputError(f"the work on {shown} was removed while this run was at it", hint="run the same command again") from None
            self.published = True  # by somebody else
        except (OutputError, Interrupted) as error:
            if not isinstance(error, ResumeError | LockedError):
                error.kept()
            raise
        finally:
            if not self._abandoned:
                claims.leave()

    def _order(self) -> Iterator[int]:
        """Parts as this worker looks at them: the large ones first, then from its own place on, so that neighbours share source files."""
        if self.resources.part is not None:
            yield self.resources.part
            return
        large = sum(part.alone for part in self.parts[: len(self.parts) - 1]) if len(self.parts) > 1 else 0
        count = len(self.parts) - large
        first = max(self.did[-1] + 1 - large, 0) if self.did else int(count * self.resources.begin)
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
        part, number = self.parts[claim.part], claim.part
        evidence = tuple(tuple(entry[3:6]) for entry in self.identity["sources"] if len(entry) == 7)
        done = Record(self.plan.fingerprint(), claim.attempt, (), evidence)
        if not part.matrices and not part.constants:
            claims.record(claim, done)
            self.did.append(number)
            self._see(number)
            return
        plan, page, private = part.of(self.plan), claims.plan_file["page"], claims.plan_file["private"]
        aside = Aside(claims.base, f"{number}.{claim.attempt}.aside", plan.files, page, fresh=True)
        folder = PartFolder(claims.place, plan.files, part.extents(self.plan), page, aside, private)
        book = claims.journal(number)
        try:
            try:
                folder.open()
            except BlockingIOError:  # whoever had the part before still holds its pages
                time.sleep(POLL)
                return
            run = self.identity | {"part": number, "parts": len(self.parts)}
            past = book.read()
            if past.run == run and not private:
                book.resume(past)
                finished = past.of(plan)
            else:
                book.start(run)
                finished = {}
            done = self._run(part, plan, folder, book, finished, done)
            claims.record(claim, dataclasses.replace(done, aside=folder.finish()))
            self.did.append(number)
            self._state = None
            self._see(number)
        finally:
            if not self._abandoned:
                with contextlib.suppress(OSError):
                    folder.close()
                    book.close()

    def _run(
        self, part: Part, plan: Plan, folder: PartFolder, book: journal.Journal, finished: dict[int, list[TileRecord]], done: Record
    ) -> Record:
        """Do the tiles of a part; gives its record, which is `done` without what becomes known by that."""
        from streamconv.run.output_state import OutputState

        if self.resources.source_check and plan.bytes_checked:
            source_record.check(self.index, wanted=self._source.wanted(plan))
        with executor(self.asked, Reads([plan]), self.index) as execution:
            check = execution.check_of(plan)
            self._state = state = OutputState(plan, folder, book, finished, check=check)
            try:
                tally = execution.run([state])
            finally:
                self._abandoned = execution.busy
            self.where, self.memory_plan = execution.where, execution.memory_plan
            self.warnings += [warning for warning in execution.warnings() if warning not in self.warnings]
        if check is not None:
            self.errors += check.errors()
        self.tally.add(tally)
        self.resumed += state.resumed
        return dataclasses.replace(
            done,
            hashes=hashes_of(self.plan, part, state.hashes),
            overflow=state.overflow,
            nonfinite=state.nonfinite,
            tiles=tally.tiles,
            bytes_read=tally.bytes_read,
            snr=check.manifest() if check is not None else {},
        )

    def _publish(self, claims: Claims) -> None:
        """Publish if all parts are done, unless another process is at it, or locks would not keep it away."""
        if self.resources.no_lock:
            return
        if not all(claims.done(part) for part in range(len(self.parts))):
            if not claims.is_there():  # the records went with the work
                raise Over
            return
        self.warnings += publish(claims, self.index, self.plan, self.parts, self.asked.meter, max(10.0, self.resources.wait))
        self.published = True
