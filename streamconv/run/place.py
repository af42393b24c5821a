"""Where an output is built, and how it gets its name: beside it, or, where it cannot be renamed, inside it.

Beside it (the rule): a hidden sibling folder, renamed when it is complete. What it replaces is moved aside first.

    .NAME.streamconv-lock      held while a run is at work
    .NAME.streamconv-journal   which tiles are safely on disk (journal.py)
    .NAME.streamconv-partial   the folder being built
    .NAME.streamconv-old       with --force: the folder being replaced, while the new one takes its name
    .NAME.streamconv-parts     work that several machines share: what is done of it (claims.py)

Inside it (a mount point): hidden files, each renamed when all are complete, config.json last.

    OUT/.streamconv-lock, OUT/.streamconv-journal
    OUT/.streamconv-partial.rank0.safetensors ...
    OUT/.streamconv-old.rank0.safetensors ...

A replaced output is looked at once, under the lock; nothing that is not exactly that is ever moved or removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.errors import OutputError, printable
from streamconv.run import manifest
from streamconv.run.fs import Disk, Folder, Mark, hidden, translate_errors
from streamconv.run.journal import Journal

OURS = re.compile(r"config\.json|streamconv\.json|rank[0-9]+\.safetensors")
"""What every checkpoint folder may hold; an output's own names are `Place.ours`."""
CONFIG = "config.json"
"""Without it a folder is no checkpoint: the first to go, and the last to come."""
WHATS = ("lock", "journal", "partial", "old", "parts")


def foreign(marks: Mapping[str, Mark], ours: Collection[str], path: Path) -> list[str]:
    """Names of what is no file of a checkpoint.

    Args:
        ours: names that a checkpoint of this kind has.
        path: the manifest of the folder, if it has one: the files it lists are a checkpoint's too, of whatever kind.
    """
    odd = [name for name, mark in marks.items() if mark.kind == stat.S_IFDIR or not (name in ours or OURS.fullmatch(name))]
    if not odd:
        return []
    listed = manifest.names(path)
    return [name for name in odd if marks[name].kind == stat.S_IFDIR or name not in listed]


@dataclass(frozen=True, slots=True)
class Existing:
    """What lay under the output's name when a run looked.

    Attributes:
        folder: the folder itself, None if there is none, or an empty one.
        files: its entries.
    """

    folder: Mark | None = None
    files: dict[str, Mark] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entries:
    """The files of a folder whose names begin with `prefix`; their names here are without it."""

    folder: Folder
    prefix: str = ""

    def names(self) -> list[str]:
        size = len(self.prefix)
        return [name[size:] for name in self.folder.names() if name.startswith(self.prefix)]

    def path(self, name: str) -> Path:
        return self.folder.path / (self.prefix + name)

    def look(self, name: str) -> os.stat_result | None:
        return self.folder.look(self.prefix + name)

    def open(self, name: str, fresh: bool = False) -> int:
        return self.folder.open(self.prefix + name, fresh=fresh)

    def unlink(self, name: str) -> None:
        self.folder.unlink(self.prefix + name)

    def marks(self) -> dict[str, Mark]:
        looks = [(name, self.look(name)) for name in self.names()]
        return {name: Mark.of(status) for name, status in looks if status is not None}

    def empty(self, ours: Collection[str], known: dict[str, Mark] | None = None) -> None:
        """Remove the files of a checkpoint.

        Args:
            ours: names that it may have.
            known: what they are, if this run has looked at them before.

        Raises:
            OutputError: something else is there; nothing was removed.
        """
        marks = self.marks()
        odd = foreign(marks, ours, self.path(manifest.NAME))
        odd += [name for name, mark in marks.items() if known is not None and known.get(name) != mark]
        if odd:
            shown = printable(self.path(odd[0]))
            raise OutputError(f"{shown} is not what a run leaves there", hint="move it away; nothing was removed")
        for name in sorted(marks, key=lambda name: name == manifest.NAME):  # last: it tells whose the others are
            self.folder.disk.unlink(self.folder, self.prefix + name, marks[name])

    def remove(self, marks: dict[str, Mark]) -> None:
        """Remove these files."""
        for name, mark in marks.items():
            self.folder.disk.unlink(self.folder, self.prefix + name, mark)


class Place:
    """The folder in which all names of one output lie, its own and the hidden ones: here its parent, for `inside.Inside` itself.

    Args:
        out: the output, resolved.
        lenient: see `Folder`.

    Attributes:
        base: that folder, once it is open.
        inside: why the work is done inside the output; None if beside it.
        work: the files being built, once they were begun.
        ours: names of files that an output of this kind has.
    """

    inside: str | None = None
    base: Folder
    work: Entries

    def __init__(self, out: Path, disk: Disk, lenient: bool = False) -> None:
        self.out, self.disk, self.lenient = out, disk, lenient
        self.ours: set[str] = set()
        self._made: list[tuple[Folder, str]] = []
        self._open: list[Folder] = []
        self._begun = False
        self._aside: dict[str, Mark] | None = None
        self._left: dict[str, Mark] | None = None

    @property
    def top(self) -> Path:
        return self.out.parent

    def hidden(self, what: str) -> str:
        return hidden(self.out, what).name

    def adopt(self, run: Mapping[str, Any]) -> None:
        """Files of work that was begun with other options have other names: those of its `journal.identity` are ours, too."""
        files = run.get("files")
        self.ours.update(name for name in (files if isinstance(files, list) else ()) if isinstance(name, str))

    def journal(self) -> Journal:
        """Of the output, whose base is open."""
        return Journal(self.base, self.hidden("journal"))

    def hidden_paths(self) -> list[Path]:
        return [self.top / self.hidden(what) for what in WHATS]

    def open(self) -> None:
        """Open the base, and make it and the folders above it; `remove_parents` takes back those that were made."""
        missing, place = list[str](), self.top
        with translate_errors(self.top, "create"):
            while not os.path.lexists(place):
                missing.append(place.name)
                place = place.parent
            folder = self._entered(Folder.at(self.disk, place, self.lenient))
            for name in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    self.disk.mkdir(folder, name)
                    self._made.append((folder, name))
                    folder.sync()
                folder = self._entered(folder.enter(name))
        self.base = folder

    def _entered(self, folder: Folder) -> Folder:
        self._open.append(folder)
        return folder

    def keep_parents(self) -> None:
        self._made.clear()

    def remove_parents(self) -> None:
        for folder, name in reversed(self._made):
            try:
                self.disk.rmdir(folder, name)
            except OSError:
                break  # somebody uses it
        self._made.clear()

    def close(self) -> None:
        for folder in self._open:
            folder.close()
        self._open.clear()

    def check_name(self) -> None:
        """After a publication: the output's path leads to it.

        Raises:
            OutputError: a folder above it was moved or replaced while the run was at work.
        """
        there = self.base.look(self.out.name) if self.inside is None else os.fstat(self.base.fd)
        if there is None or not os.path.exists(self.out) or not os.path.samestat(there, os.stat(self.out)):
            lies = Path(os.readlink(f"/proc/self/fd/{self.base.fd}"), "" if self.inside else self.out.name)
            raise OutputError(
                f"a folder above {printable(self.out)} was moved while the run was at work",
                hint=f"the output is complete: {printable(lies)}",
            )

    def _expect(self, existing: Existing) -> None:
        """What is under the output's name must be what the run has checked."""
        now = self.existing()
        if now != existing:
            what = "appeared" if existing.folder is None else "is gone" if now.folder is None else "was changed"
            raise OutputError(
                f"{printable(self.out)} {what} while the run was at work; nothing in it was touched",
                hint=f"the finished checkpoint waits in {printable(self.work.path(''))}: move away what is in its place",
            )

    def existing(self) -> Existing:
        there = self.base.look(self.out.name)
        if there is None:
            return Existing()
        if not stat.S_ISDIR(there.st_mode):
            raise OutputError(f"output {printable(self.out)} exists and is not a folder", hint="choose another name")
        with contextlib.closing(self.base.enter(self.out.name)) as folder:
            files = Entries(folder).marks()
            return Existing(folder.mark() if files else None, files)

    def has_work(self) -> bool:
        """Work of an earlier run is there; `begin` removes nothing but what was seen here."""
        if self.base.made(self.hidden("partial"), stat.S_IFDIR) is None:
            self._left = {}
            return False
        with contextlib.closing(self.base.enter(self.hidden("partial"))) as folder:
            self._left = Entries(folder).marks()
        return True

    def has_old(self) -> bool:
        return self.base.look(self.hidden("old")) is not None

    def restore(self, ready: Sequence[str]) -> None:
        """Give a replaced output its name back, if a run was stopped before it could publish the new one.

        Args:
            ready: files of that run, if it was publishing.
        """
        old = self.hidden("old")
        if self.base.made(old, stat.S_IFDIR, ours=False) is None or self.existing().folder is not None:
            return
        with translate_errors(self.base.path / old, "restore"):
            self.base.rename(old, self.out.name)  # an empty folder of that name goes
            self.base.sync()

    def begin(self, fresh: bool) -> None:
        """Make `work` usable. `fresh`: remove what an earlier run left; otherwise keep the files that are there."""
        name = self.hidden("partial")
        if fresh:
            self._remove(name)
        elif self._begun:
            return
        if self.base.made(name, stat.S_IFDIR) is None:
            self.disk.mkdir(self.base, name)
        self.work, self._begun = Entries(self._entered(self.base.enter(name))), True
        self.base.made(name, stat.S_IFDIR)  # what was entered is ours
        self.base.expect(name, self.work.folder.mark())

    def publish(self, existing: Existing, names: Sequence[str]) -> None:
        """Make these files of `work` appear; what they replace waits aside until `remove_old`.

        Raises:
            OutputError: what is there is not `existing`; nothing of it is lost, and the work is kept.
        """
        old, mine = self.hidden("old"), self.work.folder.mark()
        self._expect(existing)
        self._aside = existing.files
        if existing.folder is not None:
            self.disk.rename(self.base, self.out.name, old, existing.folder)
            self.base.sync()
        self.disk.rename(self.base, self.hidden("partial"), self.out.name, mine)
        self.base.sync()

    def shown(self) -> Entries:
        """After a publication: the output's files."""
        return self.work

    def remove_old(self) -> None:
        with translate_errors(self.base.path / self.hidden("old"), "remove"):
            if self._remove(self.hidden("old"), ours=False):
                self.base.sync()

    def discard(self, marks: dict[str, Mark]) -> None:
        """Remove the work. `marks`: its files; anything else stays, and the folder with it."""
        if self._begun:
            self.work.remove(marks)
            self.base.expect(self.hidden("partial"), self.work.folder.mark())
            self.disk.rmdir(self.base, self.hidden("partial"))

    def _remove(self, name: str, ours: bool = True) -> bool:
        if self.base.made(name, stat.S_IFDIR, ours) is None:
            return False
        with contextlib.closing(self.base.enter(name)) as folder:
            Entries(folder).empty(self.ours, self._left if ours else self._aside)
            self.base.expect(name, folder.mark())
        self.disk.rmdir(self.base, name)
        return True
