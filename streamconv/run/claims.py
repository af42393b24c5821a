"""Work on one output that several processes share, on any machines: who does which part, and what is done.

A hidden folder beside the output, .NAME.streamconv-parts:

    plan.json                  what the work is for, in how many parts; the first worker makes it, all others compare
    claims                     empty; who holds the lock of its byte K does part K, and who holds all of them publishes
    K.holder                   who took part K last, for people
    K.journal                  which tiles of part K are on the disk
    K.ATTEMPT.aside            bytes of part K that go into place at the end (part_folder.py)
    K.json                     part K is done (part_record.py)
    worker-HOST-PID-...        held by a living worker (presence.py)

Locks end with their holder, so what a dead one left is free at once, and goes on where its journal ends.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.limits import MAX_JOURNAL, MAX_JOURNAL_LINE
from streamconv.errors import LockedError, OutputError, printable
from streamconv.run import journal
from streamconv.run.fs import Disk, Folder, Mark, translate_errors, write_all
from streamconv.run.inside import choose
from streamconv.run.place import Place
from streamconv.run.presence import Presence

if TYPE_CHECKING:
    from streamconv.run.part_record import Record

PLAN, CLAIMS = "plan.json", "claims"


class Over(Exception):
    """The work is not there any more: it was published, or given up."""


@dataclass(slots=True)
class Claim:
    """The right to do a part, or to publish, until it is closed.

    Attributes:
        attempt: names what this holder keeps aside.
    """

    disk: Disk
    fd: int
    part: int = -1
    attempt: str = ""

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self.disk.close(fd)


class Claims:
    """The parts of the work on an output.

    Args:
        place: of the output, not opened.
        count: parts.

    Attributes:
        base: the folder, once `join` found work to share.
        plan_file: what its plan.json holds.
    """

    base: Folder
    plan_file: dict[str, Any]

    def __init__(self, place: Place, count: int) -> None:
        self.place, self.disk, self.count = place, place.disk, count
        self.folders: list[Folder] = []
        self.presence: Presence | None = None

    @property
    def name(self) -> str:
        return self.place.hidden("parts")

    @classmethod
    def of(cls, out: Path, disk: Disk | None = None) -> Claims | None:
        """The work in parts on an output, as it is; None if there is none. Nothing is touched.

        Raises:
            OutputError: something else has the name.
        """
        place = choose(out, disk or Disk())
        if not os.path.isdir(place.top):
            return None
        claims = cls(place, 0)
        place.open()
        content = claims.content() if claims.enter() else None
        if content is None:
            claims.leave()
            return None
        claims.plan_file, claims.count = content, content["parts"]
        return claims

    def enter(self) -> bool:
        """Open the folder, if it is there; the place is open."""
        if self.place.base.made(self.name, stat.S_IFDIR) is None:
            return False
        self.base = self.place.base.enter(self.name)
        self.folders.append(self.base)
        return True

    def content(self) -> dict[str, Any] | None:
        """What the work is for; None if it was not begun."""
        data = self._read(PLAN, MAX_JOURNAL_LINE)
        if data is None:
            return None
        lines = journal.unsealed(data[:-1])
        if lines is None or not isinstance(lines.get("run"), dict) or not isinstance(lines.get("parts"), int):
            raise OutputError(f"{printable(self.base.path / PLAN)} is not what a run writes", hint="start over with --force")
        return lines

    def claim(self, part: int) -> Claim | None:
        """Take a part that is neither done nor held; None if it is.

        Raises:
            Over: somebody has published.
        """
        if self.done(part) or (fd := self._lock(part, part + 1)) is None:
            return None
        claim = Claim(self.disk, fd, part, os.urandom(4).hex())
        try:
            if self.done(part):  # meanwhile
                claim.close()
                return None
            self._overwrite(f"{part}.holder", f"process {os.getpid()} on {os.uname().nodename}\n".encode())
            for name in self.base.names():  # what a dead holder kept aside is done again
                if name.startswith(f"{part}.") and name.endswith(".aside"):
                    self.base.unlink(name)
        except BaseException:
            claim.close()
            raise
        return claim

    def publisher(self) -> Claim | None:
        """The right to publish, which nobody has while a part is held; None if another has it.

        Raises:
            Over: somebody has published.
        """
        fd = self._lock(0, self.count)
        return None if fd is None else Claim(self.disk, fd)

    def _open_claims(self) -> int:
        try:
            return self.base.open(CLAIMS, make=False)
        except FileNotFoundError:
            raise Over from None

    def _lock(self, begin: int, end: int) -> int | None:
        """A descriptor that holds the locks of parts [begin, end); None if somebody else holds one of them."""
        fd = self._open_claims()
        try:
            self.base.lock_range(fd, begin, end)
            there = self.base.look(CLAIMS)
            if there is None or Mark.of(there) != Mark.of(os.fstat(fd)):
                raise Over  # its last holder has published, and removed it
        except BaseException as error:
            self.disk.close(fd)
            if isinstance(error, BlockingIOError):
                return None
            raise
        return fd

    def held(self, part: int) -> str | None:
        """Who is at work on a part, None if nobody is."""
        fd = self._open_claims()
        try:
            if not self.disk.locked(fd, part):
                return None
        finally:
            self.disk.close(fd)
        text = (self._read(f"{part}.holder", 400) or b"").decode(errors="replace").strip()
        return printable(text) if text else "another process"

    def _read(self, name: str, limit: int) -> bytes | None:
        with translate_errors(self.base.path / name, "read"):
            try:
                if self.base.made(name) is None:
                    return None
                fd = self.base.open(name, make=False)
            except FileNotFoundError:
                return None
            try:
                with os.fdopen(fd, "rb", closefd=False) as file:
                    return file.read(limit)
            finally:
                self.disk.close(fd)

    def write(self, name: str, data: bytes, before: str = "plan.new") -> None:
        """A file that is complete as soon as it has its name."""
        with translate_errors(self.base.path / name, "write"):
            self._overwrite(before, data)
            try:
                self.base.rename(before, name)
            except FileExistsError:
                self.base.unlink(before)  # somebody was faster, with as much
            self.base.sync()

    def _overwrite(self, name: str, data: bytes) -> None:
        with translate_errors(self.base.path / name, "write"):
            fd = self.base.open(name)
            try:
                self.disk.truncate(fd, 0)
                write_all(self.disk, fd, data, 0)
                self.disk.sync(fd)
            finally:
                self.disk.close(fd)

    def journal(self, part: int) -> journal.Journal:
        return journal.Journal(self.base, f"{part}.journal")

    def done(self, part: int) -> bool:
        return self.base.look(f"{part}.json") is not None

    def record(self, claim: Claim, record: Record) -> None:
        """A part is done; all of its bytes are on the disk."""
        self.base.sync()  # the name of what it kept aside, before that of its record
        self.write(f"{claim.part}.json", record.to_bytes(), f"{claim.part}.{claim.attempt}.new")

    def read(self, part: int) -> Record | None:
        """What is known of a part that is done; None if it is not.

        Raises:
            OutputError: it is not what a run writes.
        """
        data = self._read(f"{part}.json", MAX_JOURNAL)
        if data is None:
            return None
        from streamconv.run.part_record import Record

        record = Record.from_bytes(data)
        if record is None:
            raise OutputError(f"{printable(self.base.path / f'{part}.json')} is not what a run writes", hint="start over with --force")
        return record

    def progress(self) -> tuple[int, ...]:
        """Changes whenever a part is begun, goes on, or is done."""
        looks = (self.base.look(f"{part}.{what}") for part in range(self.count) for what in ("json", "journal", "holder"))
        return tuple(-1 if there is None else there.st_size + there.st_mtime_ns for there in looks)

    def is_there(self) -> bool:
        """The work is still this one."""
        there = self.place.base.look(self.name)
        return there is not None and Mark.of(there) == self.base.mark() and self.base.look(CLAIMS) is not None

    def remove(self) -> None:
        """The work is published, or given up; what others would begin with goes first."""
        with translate_errors(self.base.path, "remove"):
            for again in range(5):
                for name in sorted(self.base.names(), key=lambda name: (name != CLAIMS, name == PLAN)):
                    self.base.unlink(name)
                self.place.base.expect(self.name, self.base.mark())
                try:
                    self.disk.rmdir(self.place.base, self.name)
                    break
                except OSError as error:  # somebody came by meanwhile
                    if again == 4 or error.errno != errno.ENOTEMPTY:
                        raise
            self.place.base.sync()

    def check_idle(self) -> None:
        """Raises LockedError if somebody is at work."""
        from streamconv.planning.parts import MOST

        try:
            fd = self._lock(0, MOST)
        except Over:
            return
        if fd is None:
            raise LockedError(
                f"{printable(self.place.out)} is being written in parts",
                hint="wait for it, or choose another output folder; `streamconv status` shows who is at it",
            )
        self.disk.close(fd)

    def close(self) -> None:
        if self.presence is not None:
            self.presence.close()
        for folder in self.folders:
            folder.close()
        self.folders.clear()

    def leave(self) -> None:
        """Close all, and the place with it."""
        self.close()
        self.place.remove_parents()
        self.place.close()
