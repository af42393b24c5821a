"""Somebody else changes the names that a run works with, between any two of its operations.

Whatever is swapped, nothing of theirs is lost, written to or moved out of reach, and nothing that is wrong looks finished.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from streamconv.errors import StreamconvError
from streamconv.run.fs import Disk
from streamconv.run.inside import Inside
from streamconv.run.place import Place
from tests.crash.disks import Counting, Intruding
from tests.crash.kills import Count
from tests.crash.world import State, World, snapshot

THEIRS = b"somebody's only copy"
Intrusion = Callable[[], None]


class Stage:
    """The names of a world, and things of somebody else beside them."""

    def __init__(self, world: World) -> None:
        self.world, self.victim = world, world.root / "victim"
        self.place = (Inside if world.mounted else Place)(world.out, Disk())

    def reset(self) -> None:
        for path in (self.victim, self.world.root / "place2", self.world.root / "taken"):
            shutil.rmtree(path, ignore_errors=True)
        if self.world.place.is_symlink():
            self.world.place.unlink()
        self.world.reset()
        for name in ("rank0.safetensors", "config.json", "streamconv.json", "own"):
            path = self.victim / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(THEIRS + name.encode())

    def intrusions(self) -> Iterator[tuple[str, Intrusion]]:
        """What may come up at every name: (what, how)."""
        out, hidden = self.world.out, self.place.hidden_paths()
        work = hidden[2] / "rank0.safetensors" if not self.world.mounted else hidden[2].with_name(hidden[2].name + ".rank0.safetensors")
        for path in (out, *hidden, work):
            if path == out and self.world.mounted:
                continue
            for what, make in self._things().items():
                yield f"{what} at {path.name}", lambda path=path, make=make: self._swap(path, make)  # type: ignore[misc]
        for path in (out / "own", out / "deep" / "config.json", out / "rank7.safetensors", out / "config.json"):
            yield f"{path.name} in the output", lambda path=path: self._put(path)  # type: ignore[misc]
        if not self.world.mounted:
            yield "another folder above", lambda: self._above(lambda place: place.mkdir())
            yield "a link above", lambda: self._above(lambda place: place.symlink_to(self.victim))

    def _things(self) -> dict[str, Callable[[Path], object]]:
        return {
            "link to a folder": lambda path: path.symlink_to(self.victim),
            "link to a file": lambda path: path.symlink_to(self.victim / "own"),
            "dangling link": lambda path: path.symlink_to(self.victim / "new"),
            "hard link": lambda path: path.hardlink_to(self.victim / "own"),
            "folder": lambda path: shutil.copytree(self.victim, path),
            "file": lambda path: path.write_bytes(THEIRS),
            "FIFO": lambda path: os.mkfifo(path),
            "nothing": lambda path: None,
        }

    def _swap(self, path: Path, make: Callable[[Path], object]) -> None:
        if os.path.lexists(path):
            taken = self.world.root / "taken"
            taken.mkdir(exist_ok=True)
            os.rename(path, taken / path.name)
        if path.parent.is_dir():
            make(path)

    def _put(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name("new")
        new.write_bytes(THEIRS)
        os.replace(new, path)

    def _above(self, make: Callable[[Path], object]) -> None:
        os.rename(self.world.place, self.world.root / "place2")
        make(self.world.place)


def held(root: Path) -> list[bytes]:
    """Contents of all files below a folder, no link followed."""
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                found.append(path.read_bytes())
    return found


def one(stage: Stage, k: int, intrude: Intrusion, replaceable: bool) -> str:
    """Run with an intrusion before operation k; gives what is wrong.

    Args:
        replaceable: it comes before the run looks at the output, and --force replaces it: a file of a checkpoint.
    """
    world = stage.world
    stage.reset()
    victim, theirs, late = snapshot(stage.victim), list[bytes](), False

    def act() -> None:
        nonlocal late
        late = all((world.out / name).is_file() and (world.out / name).read_bytes() == data for name, data in world.right.items())
        before = held(world.root).count(THEIRS)
        intrude()
        theirs.extend([THEIRS] * (held(world.root).count(THEIRS) - before))

    disk, ended, said = Intruding(k, act), False, ""
    try:
        world.run(disk)
        ended = True
    except StreamconvError as error:
        said = str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        leaked = len(disk.fds)
        disk.bury()
    if leaked:
        return f"{leaked} files are still open"
    if snapshot(stage.victim) != victim:
        return "the victim's folder changed"
    here = held(world.root)
    if here.count(THEIRS) < len(theirs) and not (ended and replaceable):
        return f"something of theirs is lost ({said or 'done'})"
    old: State = {name: data for name, data in world.start.items() if data is not None}
    if not late and any(data not in here for data in old.values()) and any(data not in here for data in world.right.values()):
        return f"the old output is lost ({said})"
    shown = {name: (world.out / name).read_bytes() if (world.out / name).is_file() else None for name in world.right}
    if ended and not late and shown != world.right:
        return "the run said it is done, and is not"
    before = {name: world.start.get(f"out/{name}") for name in world.right}
    if shown["config.json"] == world.right["config.json"] and shown not in (world.right, before) and not late:
        return "a folder that looks finished is not"
    return ""


def every_operation(world: World, step: int = 1) -> Count:
    """All k x intrusions; `step` > 1 takes only that part of the cases, all k among them."""
    count, stage = Count(), Stage(world)
    world.reset()
    counting = Counting()
    world.run(counting)
    last = counting.count
    looked = [number for number, name in enumerate(counting.names) if name == "open"][2]  # lock, journal of an earlier run, new journal
    for k in range(last):
        for number, (what, intrude) in enumerate(stage.intrusions()):
            if (number + k) % step == 0:
                replaceable = k < looked and world.force and what.endswith("in the output")
                count.note(f"k={k} of {last}, {what}", one(stage, k, intrude, replaceable))
    stage.reset()
    return count
