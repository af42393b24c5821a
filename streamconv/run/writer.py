"""An output from the moment it is claimed until it has its name: lock, journal, data, sync, rename, sync of the folder.

Every step may be the last one of this process. What the next run finds, and does:

    no journal, or one that ends before its first line        nothing was finished: start over
    a journal for other work                                   say what differs; start over with --force
    a journal for this work and the hidden folder              resume
    a journal that ends with "ready", the hidden folder gone   the output has its name: tidy up, done
    a replaced folder aside and nothing under its name         give it its name back first
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import xxhash

from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.untrusted import open_regular
from streamconv.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    OutputError,
    ResumeError,
    SourceChangedError,
    StreamconvError,
    UnreadableError,
    UsageError,
    printable,
)
from streamconv.memory import show_size
from streamconv.planning.plan import Plan, SideFile
from streamconv.run import journal, manifest
from streamconv.run.claims import Claims
from streamconv.run.fs import Disk, free_space
from streamconv.run.inside import choose
from streamconv.run.journal import TileRecord
from streamconv.run.lock import OutputLock
from streamconv.run.order import Hashes
from streamconv.run.output_checks import check_free, check_output, files_read, is_made
from streamconv.run.output_folder import OutputFolder
from streamconv.run.place import Existing


def begin(writers: Sequence[Writer]) -> None:
    """Begin the outputs of a run, if there is room for all of them.

    Raises:
        OutputError: a file system has less free than its outputs need together.
    """
    fresh = [writer for writer in writers if not writer.resumes]
    for writer in fresh if len(fresh) > 1 else ():
        there = [other for other in fresh if other.device() == writer.device()]
        need, free = sum(other.plan.bytes_written for other in there), free_space(writer.place.top)
        if free is not None and need > free:
            where = printable(writer.place.top)
            raise OutputError(
                f"no space for {len(there)} outputs in {where}: {show_size(need)} are to be written, {show_size(free)} are free",
                hint="free some space, or choose other output folders",
            )
    for writer in writers:
        writer.begin()


def _pieces(side: SideFile, tensors: list[tuple[str, int, str]]) -> Iterator[bytes]:
    """The bytes of a side file; afterwards `made` has its name, size and hash.

    Raises:
        SourceChangedError: a copied file is not what it was when it was planned.
    """
    digest, size = xxhash.xxh3_128(), 0
    for piece in [side.data] if side.data is not None else _copied(side):
        digest.update(piece)
        size += len(piece)
        yield piece
    if size != side.size:
        raise SourceChangedError(f"{printable(side.source)} has {size} bytes, and had {side.size} when it was planned")
    tensors.append((side.name, size, digest.hexdigest()))


def _copied(side: SideFile) -> Iterator[bytes]:
    assert side.source is not None
    if side.fetch is not None:
        side.fetch()
    with open(open_regular(side.source), "rb") as file:
        yield from iter(lambda: file.read(1 << 20), b"")


class Writer:
    """Context of one conversion's output; on exit decides what of an unfinished one is kept.

    Args:
        force: replace an existing folder, give up unfinished work for something else.
        no_lock: write even where the file system has no locks, or cannot sync a folder; the manifest says so.
        parts: the files were written in parts (claims.py): they are published as they are, and never given up.
        skip: an output that this very plan has made is finished, and not in the way.

    Attributes:
        folder: where to write.
        past: span -> row ranges that an earlier run finished.
        finished: an earlier run did everything; nothing is left to do.
    """

    def __init__(
        self,
        out: Path,
        source: Path,
        plan: Plan,
        shards: Sequence[Shard],
        force: bool,
        disk: Disk | None,
        no_lock: bool = False,
        parts: bool = False,
        skip: bool = False,
    ) -> None:
        self.plan, self.shards, self.force, self.no_lock, self.parts = plan, shards, force, no_lock, parts
        self.place = choose(out, disk or Disk(), no_lock)
        self.folder = OutputFolder(self.place)
        self.place.ours |= plan.names
        self.past: Mapping[int, Sequence[TileRecord]] = {}
        self.finished = self.abandoned = False
        self._lock = OutputLock(self.place)
        self._existing = Existing()
        self._begun = self._created = False
        self._skip = skip and not force and is_made(self.place.out, source, plan, shards)
        check_output(self.place, source, files_read(plan, shards), force or self._skip)

    def __enter__(self) -> Writer:
        try:
            self.place.open()
            self.journal = self.place.journal()
            self._lock.acquire()
            self._look()
        except BaseException:
            self._leave()
            raise
        return self

    def _leave(self) -> None:
        self._lock.release()
        self.place.remove_parents()
        self.place.close()

    def _look(self) -> None:
        """Find out where an earlier run stopped."""
        self._past = self.journal.read()
        self.place.restore(self._past.ready)
        self.place.adopt(self._past.run)
        self._run = journal.identity(self.plan, self.shards)
        ready = {*self._past.ready}
        if ready and not self.place.has_work() and self.place.existing().files.keys() >= ready:
            if manifest.is_of(self.place.out, self._past.run.get("fingerprint")):
                self.place.remove_old()
                self.journal.remove(self._past)
                self.finished = self.parts or self._past.run == self._run
                if self.finished:
                    return
            self._past = journal.NONE
        if not self._past and (self._skip or (self.parts and self._was_published())):
            self.finished = True
            return
        self._existing = check_free(self.place, self.force)
        if self.place.has_old():
            raise OutputError(
                f"{printable(self.place.top / self.place.hidden('old'))} holds an output that was being replaced",
                hint="move it away, or remove it",
            )
        if self.parts:
            self._past = journal.NONE
            return
        self._not_in_parts()
        if self.place.has_work() and self.place.base.look(self.place.hidden("journal")) is None:
            raise OutputError(
                f"{printable(self.place.top / self.place.hidden('partial'))} is there without a journal: no run leaves it so",
                hint="look at it, then move it away or remove it",
            )
        changed = journal.differences(self._past.run, self._run) if self._past else []
        if changed and not self.force:
            raise ResumeError(
                f"an unfinished conversion to {printable(self.place.out)} used other settings: {', '.join(changed)}",
                hint="run the first command again to finish it, or start over with --force",
            )
        if changed or not self.place.has_work() or not self._past.tiles:
            self._past = journal.NONE

    def _was_published(self) -> bool:
        """Whoever published the parts died before their records were gone.

        Raises:
            OutputError: the files of the work are gone, and no output was made of them.
        """
        if self.place.has_work():
            return False
        if manifest.is_of(self.place.out, self._run["fingerprint"]):
            return True
        raise OutputError(f"the work on {printable(self.place.out)} is gone, its parts with it", hint="start over with --force")

    def device(self) -> int:
        """The file system of the output."""
        return os.fstat(self.place.base.fd).st_dev

    @property
    def resumes(self) -> bool:
        """An earlier run has written some of it."""
        return bool(self._past)

    def _not_in_parts(self) -> None:
        """Give up work that was begun in parts, if that is asked for and nobody is at it.

        Raises:
            ResumeError: there is such work. LockedError: somebody is at it.
        """
        claims = Claims(self.place, 0)
        if not claims.enter():
            return
        try:
            if not self.force:
                raise ResumeError(
                    f"{printable(self.place.out)} was begun in parts",
                    hint="run that command again, with --parts, to join the work, or start over with --force",
                )
            claims.check_idle()
            if not self._past:  # work without a journal is nobody's
                self.journal.start(self._run)
                self.journal.close()
            claims.remove()
        finally:
            claims.close()

    def begin(self) -> None:
        """Open the journal and make the files."""
        self._begun = True
        if self._past:  # the files are no longer ready, and the journal says so before one of them goes
            self.journal.resume(self._past)
            self.past = self._past.of(self.plan)
        else:
            self.journal.start(self._run)
        fresh = not self._past and not self.parts
        if not fresh:
            self.folder.remove_last([side.name for side in self.plan.side_files] + [manifest.NAME])
        self.folder.create(self.plan.files, fresh, made=self.parts)
        self._created = True

    def publish(self, hashes: Hashes, snr: Mapping[str, Mapping[str, float | str]] | None = None) -> None:
        """All tiles are written: sync, write config.json and the manifest, give the folder its name."""
        *others, config = self.plan.side_files
        tensors: list[tuple[str, int, str]] = []
        last = [(side.name, _pieces(side, tensors)) for side in others]
        last.append((manifest.NAME, manifest.build(self.plan, hashes.of_files(), self.no_lock, tensors, snr)))
        self.folder.complete([*last, (config.name, [self.plan.config])])
        self.journal.ready(self.folder.names())
        self.folder.publish(self._existing)
        self.place.remove_old()
        self.journal.remove()
        self.place.check_name()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or not self._begun:
            self._leave()
            return
        # the source is wrong, or there was no room to begin with: nothing of it is worth keeping
        wrong = isinstance(error, (CheckpointError, DataError, UsageError)) and not isinstance(error, UnreadableError)
        if not self.parts and (wrong or (not self._past and not self._created)):
            with contextlib.suppress(StreamconvError, OSError):
                self.folder.discard()
                if not self.place.has_work():  # work without a journal is nobody's
                    self.journal.remove()
            with contextlib.suppress(OSError):
                self.journal.close()
            self._leave()
            return
        if isinstance(error, (OutputError, Interrupted, UnreadableError)):
            error.kept()
        if self.abandoned:
            return  # a thread may still write: the process is about to end, and closes everything
        with contextlib.suppress(OSError):
            self.folder.close()
            self.journal.close()
        self.place.keep_parents()
        self._leave()
