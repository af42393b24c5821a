"""An output that is built in a hidden folder beside it, which gets its name when it is complete."""

from __future__ import annotations

import stat
from collections.abc import Sequence

from streamconv.errors import OutputError, printable
from streamconv.run.fs import Mark, translate_errors
from streamconv.run.place import Found, Part, Place


class Beside(Place):
    """A hidden folder beside the output."""

    def found(self) -> Found:
        there = self.base.look(self.out.name)
        if there is None:
            return Found()
        if not stat.S_ISDIR(there.st_mode):
            raise OutputError(f"output {printable(str(self.out))} exists and is not a folder", hint="choose another name")
        folder = self.base.enter(self.out.name)
        try:
            files = Part(folder).marks()
            return Found(folder.mark() if files else None, files)
        finally:
            folder.close()

    def has_work(self) -> bool:
        if self.base.made(self.hidden("partial"), stat.S_IFDIR) is None:
            self._left = {}
            return False
        folder = self.base.enter(self.hidden("partial"))
        try:
            self._left = Part(folder).marks()
        finally:
            folder.close()
        return True

    def has_old(self) -> bool:
        return self.base.look(self.hidden("old")) is not None

    def restore(self, ready: Sequence[str]) -> None:
        old = self.hidden("old")
        if self.base.made(old, stat.S_IFDIR, ours=False) is None or self.found().folder is not None:
            return
        with translate_errors(self.base.path / old, "restore"):
            self.base.rename(old, self.out.name)  # an empty folder of that name goes
            self.base.sync()

    def begin(self, fresh: bool) -> None:
        name = self.hidden("partial")
        if fresh:
            self._remove(name)
        elif self._begun:
            return
        if self.base.made(name, stat.S_IFDIR) is None:
            self.disk.mkdir(self.base, name)
        self.work, self._begun = Part(self._entered(self.base.enter(name))), True
        self.base.made(name, stat.S_IFDIR)  # what was entered is ours
        self.base.expect(name, self.work.folder.mark())

    def publish(self, found: Found, names: Sequence[str]) -> None:
        old, mine = self.hidden("old"), self.work.folder.mark()
        self._expect(found)
        self._aside = found.files
        if found.folder is not None:
            self.disk.rename(self.base, self.out.name, old, found.folder)
            self.base.sync()
        self.disk.rename(self.base, self.hidden("partial"), self.out.name, mine)
        self.base.sync()

    def remove_old(self) -> None:
        with translate_errors(self.base.path / self.hidden("old"), "remove"):
            if self._remove(self.hidden("old"), ours=False):
                self.base.sync()

    def discard(self, marks: dict[str, Mark]) -> None:
        if self._begun:
            self.work.remove(marks)
            self.base.expect(self.hidden("partial"), self.work.folder.mark())
            self.disk.rmdir(self.base, self.hidden("partial"))

    def _remove(self, name: str, ours: bool = True) -> bool:
        if self.base.made(name, stat.S_IFDIR, ours) is None:
            return False
        folder = self.base.enter(name)
        try:
            Part(folder).empty(self.ours, self._left if ours else self._aside)
            self.base.expect(name, folder.mark())
        finally:
            folder.close()
        self.disk.rmdir(self.base, name)
        return True
