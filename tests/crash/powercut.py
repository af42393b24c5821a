"""What a power cut may leave: recorded operations are replayed into a model of a disk with a cache.

The model promises only what POSIX does. Bytes are safe after fsync or fdatasync of their file; a name is safe after fsync
of its folder. Whatever is not safe is, as a random generator decides, kept, lost, or, for bytes, torn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.disks import Recording
from tests.crash.kills import Count
from tests.crash.world import State, World, digest, restore

STYLES = ("kept", "lost", "torn", "mixed")


@dataclass(slots=True, eq=False)
class File:
    safe: bytearray = field(default_factory=bytearray)
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        for change in self.pending:
            apply(self.safe, *change)
        self.pending.clear()

    def after(self, style: str, rng: random.Random) -> bytes:
        data = bytearray(self.safe)
        for kind, at, new in self.pending:
            fate = style if style != "mixed" else rng.choice(("kept", "lost", "torn"))
            if fate == "kept":
                apply(data, kind, at, new)
            elif fate == "torn" and kind == "write":
                # some sectors of it, and not in order
                for start in range(0, len(new), 512):
                    if rng.random() < 0.5:
                        apply(data, kind, at + start, new[start : start + rng.choice((1, 100, 512))])
            elif fate == "torn" and rng.random() < 0.5:
                apply(data, kind, at, new)
        return bytes(data)


def apply(data: bytearray, kind: str, at: int, new: bytes) -> None:
    if kind == "write":
        if len(data) < at + len(new):
            data.extend(bytes(at + len(new) - len(data)))
        data[at : at + len(new)] = new
    elif kind == "grow":
        data.extend(bytes(max(0, at - len(data))))
    else:
        del data[at:]
        data.extend(bytes(at - len(data)))


@dataclass(slots=True, eq=False)
class Folder:
    safe: dict[str, Any] = field(default_factory=dict)
    now: dict[str, Any] = field(default_factory=dict)
    pending: list[tuple[str, str, Any]] = field(default_factory=list)

    def do(self, change: tuple[str, str, Any]) -> None:
        rearrange(self.now, *change)
        self.pending.append(change)

    def sync(self) -> None:
        self.safe = dict(self.now)
        self.pending.clear()

    def after(self, style: str, rng: random.Random) -> dict[str, Any]:
        names = dict(self.safe)
        keep = rng.randint(0, len(self.pending))  # a journaling file system keeps changes of names in order
        for number, change in enumerate(self.pending):
            kept = {"kept": True, "lost": False, "torn": number < keep, "mixed": rng.random() < 0.5}[style]
            if kept:
                rearrange(names, *change)
        return names


def rearrange(names: dict[str, Any], kind: str, name: str, what: Any) -> None:
    """One change of a folder's names; one that needs a lost one is lost too."""
    if kind == "add":
        names[name] = what
    elif kind == "remove":
        names.pop(name, None)
    elif name in names:
        names[what] = names.pop(name)


class Model:
    """A disk with a cache, from what lies below a folder now."""

    def __init__(self, root: Path, state: State) -> None:
        self.root, self.top = root, Folder()
        self._open: dict[int, File | Folder] = {}
        for name in sorted(state):
            data = state[name]
            folder, last = self._parent(root / name)
            folder.safe[last] = folder.now[last] = Folder() if data is None else File(bytearray(data))

    def _parent(self, path: Path) -> tuple[Folder, str]:
        parts = path.relative_to(self.root).parts
        folder = self.top
        for part in parts[:-1]:
            folder = folder.now[part]
        return folder, parts[-1]

    def step(self, name: str, *args: Any) -> None:
        if name == "enter":
            folder = self.top
            for part in args[1].relative_to(self.root).parts:
                folder = folder.now[part]
            self._open[args[0]] = folder
        elif name == "open":
            folder, last = self._parent(args[1])
            if last not in folder.now:
                folder.do(("add", last, File()))
            self._open[args[0]] = folder.now[last]
        elif name in ("pwrite", "truncate"):
            target = self._open[args[0]]
            assert isinstance(target, File)
            data = args[2] if name == "pwrite" else b""
            target.pending.append(({"pwrite": "write", "truncate": "cut"}[name], args[1], data))
        elif name in ("sync", "sync_data"):
            self._open[args[0]].sync()
        elif name == "mkdir":
            folder, last = self._parent(args[0])
            folder.do(("add", last, Folder()))
        elif name in ("unlink", "rmdir"):
            folder, last = self._parent(args[0])
            folder.do(("remove", last, None))
        elif name == "rename":
            folder, last = self._parent(args[0])
            other, new = self._parent(args[1])
            assert folder is other, "renames stay in one folder"
            folder.do(("rename", last, new))
        else:
            raise AssertionError(name)

    def after(self, names: str, data: str, rng: random.Random) -> State:
        """What is on the disk after the power came back."""
        state: State = {}

        def walk(folder: Folder, prefix: str) -> None:
            for name, what in folder.after(names, rng).items():
                if isinstance(what, Folder):
                    state[prefix + name] = None
                    walk(what, f"{prefix}{name}/")
                else:
                    state[prefix + name] = what.after(data, rng)

        walk(self.top, "")
        return state


def cuts(world: World, wanted: int, seed: int = 1) -> Count:
    """`wanted` states after power cuts, of a run from the start and of resumes after earlier cuts; each is finished."""
    rng, count = random.Random(seed), Count()
    distinct: set[bytes] = set()
    begin = world.start
    plain = world.batch
    while count.cases < wanted:
        world.reset(begin)
        world.batch = rng.choice((0, 20_000, 60_000, 1 << 30, 1 << 30))
        disk = Recording()
        try:
            world.run(disk)
        except Exception as error:
            if "exists and is not empty" not in str(error):
                raise
        model, states = Model(world.place, begin), []
        for number in range(len(disk.log) + 1):
            for names in STYLES:
                for data in STYLES:
                    states.append((number, names, data))
        rng.shuffle(states)
        chosen = sorted(states[: min(len(states), wanted - count.cases, 200)])
        done, resumable = 0, []
        for number, names, data in chosen:
            while done < number:
                model.step(*disk.log[done])
                done += 1
            state = model.after(names, data, rng)
            distinct.add(digest(state))
            restore(world.place, state)
            problem = world.wrong_now()
            try:
                problem = problem or world.finish()
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            count.note(f"{number} operations, names {names}, data {data}", problem)
            if any("partial/" in name or "partial." in name for name in state):
                resumable.append(state)
        # next round: the power goes again while a resume is at work
        begin = rng.choice(resumable) if resumable and rng.random() < 0.7 else world.start
    world.batch = plain
    count.facts["distinct"] = len(distinct)
    return count
