"""An output that is built in hidden files inside its folder, which get their names when all are complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from streamconv.run.fs import Disk, Mark, hidden, translate_errors
from streamconv.run.place import CONFIG, WHATS, Entries, Existing, Place

_HIDDEN = ".streamconv-"


class Inside(Place):
    """Hidden files in the output's own folder."""

    def __init__(self, out: Path, disk: Disk, lenient: bool = False, why: str = "") -> None:
        super().__init__(out, disk, lenient)
        self.inside = why

    @property
    def top(self) -> Path:
        return self.out

    def hidden(self, what: str) -> str:
        return _HIDDEN + what

    def _entries(self, what: str) -> Entries:
        return Entries(self.base, f"{_HIDDEN}{what}.")

    def existing(self) -> Existing:
        files = {name: mark for name, mark in Entries(self.base).marks().items() if not _passed_over(name)}
        return Existing(self.base.mark() if files else None, files)

    def has_work(self) -> bool:
        self._left = self._entries("partial").marks()
        return bool(self._left)

    def has_old(self) -> bool:
        return bool(self._entries("old").names())

    def restore(self, ready: Sequence[str]) -> None:
        work, old = self._entries("partial"), self._entries("old")
        with translate_errors(self.out, "restore"):
            if self.has_work():  # else the new output is all there
                # a file that is ready and not among the work has been renamed already
                moved = [name for name in reversed(ready) if work.look(name) is None and self.base.look(name) is not None]
                self._rename(moved, "", work.prefix)
            if self.has_work() or not self.base.look(CONFIG):
                kept = [name for name in old.names() if self.base.look(name) is None]
                self._rename([*(name for name in kept if name != CONFIG), *(name for name in kept if name == CONFIG)], old.prefix, "")

    def _rename(self, names: Sequence[str], before: str, after: str) -> None:
        """Rename files in order; config.json is apart from the others on the disk, too."""
        for number, name in enumerate(names):
            if name == CONFIG and number:
                self.base.sync()
            self.base.rename(before + name, after + name)
            if name == CONFIG and number + 1 < len(names):
                self.base.sync()
        if names:
            self.base.sync()

    def begin(self, fresh: bool) -> None:
        self.work, self._begun = self._entries("partial"), True
        if fresh:
            self.work.empty(self.ours, self._left)

    def publish(self, existing: Existing, names: Sequence[str]) -> None:
        self._expect(existing)
        self._aside = existing.files
        old = self._entries("old").prefix
        aside = sorted(existing.files, key=lambda name: name != CONFIG)
        for number, name in enumerate(aside):
            self.disk.rename(self.base, name, old + name, existing.files[name])
            if number in (0, len(aside) - 1):
                self.base.sync()
        self._rename(names, self.work.prefix, "")

    def shown(self) -> Entries:
        return Entries(self.base)

    def remove_old(self) -> None:
        with translate_errors(self.out, "remove"):
            if self.has_old():
                self._entries("old").empty(self.ours, self._aside)
                self.base.sync()

    def discard(self, marks: dict[str, Mark]) -> None:
        if self._begun:
            self.work.remove(marks)


def _passed_over(name: str) -> bool:
    """Entries of a mount point that are no content: our hidden names, and what ext4 puts into its root."""
    return name == "lost+found" or name in {_HIDDEN + what for what in WHATS} or name.startswith((f"{_HIDDEN}partial.", f"{_HIDDEN}old."))


def choose(out: Path, disk: Disk, lenient: bool = False) -> Place:
    """The place for an output. Raises OutputError: its name cannot be one."""
    out = Path(os.path.realpath(out))
    with translate_errors(out, "look at"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(out)  # a name that cannot be
        why = disk.why_inside(out, os.path.lexists(hidden(out, "journal")))
    return Place(out, disk, lenient) if why is None else Inside(out, disk, lenient, why)
