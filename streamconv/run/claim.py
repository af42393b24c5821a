"""Work in parts: what it is for, the right to do a part, and small files that are complete as soon as they have their name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv import __version__
from streamconv.errors import printable
from streamconv.run import journal
from streamconv.run.fs import Disk, Folder, translate_errors, write_all

FORMAT = 1
"""Of plan.json."""


class Over(Exception):
    """The work is not there any more: it was published, or given up."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where the journal of a part lies."""

    base: Folder
    part: int

    @property
    def disk(self) -> Disk:
        return self.base.disk

    def hidden(self, what: str) -> str:
        return f"{self.part}.{what}"


@dataclass(slots=True)
class Claim:
    """The right to do a part, until it is closed.

    Attributes:
        attempt: names what this holder keeps aside.
    """

    part: int
    home: Home
    attempt: str
    fd: int

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self.home.disk.close(fd)


@dataclass(frozen=True, slots=True)
class SharedFolder:
    """Small files that several processes write and read."""

    folder: Folder

    def content(self, name: str, limit: int) -> bytes | None:
        with translate_errors(self.folder.path / name, "read"):
            try:
                if self.folder.made(name) is None:
                    return None
                fd = self.folder.open(name, make=False)
            except FileNotFoundError:
                return None
            try:
                with os.fdopen(fd, "rb", closefd=False) as file:
                    return file.read(limit)
            finally:
                self.folder.disk.close(fd)

    def write(self, name: str, data: bytes, before: str = "plan.new") -> None:
        """A file that is complete as soon as it has its name."""
        with translate_errors(self.folder.path / name, "write"):
            self.overwrite(before, data)
            try:
                self.folder.rename(before, name)
            except FileExistsError:
                self.folder.unlink(before)  # somebody was faster, with as much
            self.folder.sync()

    def overwrite(self, name: str, data: bytes) -> None:
        with translate_errors(self.folder.path / name, "write"):
            fd = self.folder.open(name)
            try:
                self.folder.disk.truncate(fd, 0)
                write_all(self.folder.disk, fd, data, 0)
                self.folder.disk.sync(fd)
            finally:
                self.folder.disk.close(fd)


def told(identity: dict[str, Any], count: int, page: int, private: bool, force: bool, source: str | Path) -> dict[str, Any]:
    """What plan.json holds.

    Args:
        identity: `journal.identity` without what differs between machines.
        page: bytes that a machine writes at once.
        source: what is converted, for whoever publishes by hand.
    """
    run = {"parts": count, "page": page, "private": private}
    return {"format": FORMAT, "run": identity, **run, "force": force, "source": str(source), "streamconv": __version__}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = journal.differences(old["run"], new["run"])
    for name in ("parts", "private"):
        if old.get(name) != new[name]:
            found.append(f"--{name.replace('private', 'private-parts')} ({printable(str(old.get(name)))}, now {new[name]})")
    return found
