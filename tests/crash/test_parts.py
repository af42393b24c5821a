"""One output in parts: the bytes of a single run, whoever does them, however they die, however often they are told to."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamconv import api
from streamconv.errors import LockedError, OutputError, ResumeError
from streamconv.options import Resources
from streamconv.publishing import finish
from streamconv.run import presence
from streamconv.run.fs import Disk, Folder, hidden
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.crash import kills, powercut, turns
from tests.crash.disks import Counting, Killed, Killing, Tapped
from tests.crash.world import World, fast_folder, no_thread, restore, snapshot, write_model

PARTS = 3


class InParts(World):
    """A World whose right output comes from a single run, and which runs in parts from then on."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.sharing: dict[str, Any] = {}
        super().__init__(root, **settings)
        self.sharing = {"parts": PARTS, "wait": 0.0}

    def run(self, disk: Disk | None = None, **resources: Any) -> api.Report:
        disk = disk or Counting()
        if isinstance(disk, Tapped):
            disk.mounted = self.mounted
        asked = {"memory_budget": 4 << 30, "workers": 1, "device": "cpu", "tile_rows": self.tile_rows} | self.sharing | resources
        with no_thread(self.batch):
            return api.convert(self.model, self.out, self.options, Resources(**asked), force=self.force, disk=disk)


@pytest.fixture
def make() -> Iterator[Callable[..., InParts]]:
    roots = []

    def build(**settings: Any) -> InParts:
        roots.append(fast_folder())
        return InParts(roots[-1], **({"tile_rows": 1000} | settings))

    yield build
    for root in roots:
        shutil.rmtree(root)


def _kill_everywhere(world: InParts, depth: int, step: int) -> None:
    count = kills.real_kills(world, depth=depth, stop=kills.raised, step=step)
    assert not count.wrong, "\n".join(count.wrong[:10])
    assert count.cases >= 100 // step


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"replaced": True}, {"mounted": True}], ids=["new", "replaced", "mounted"])
def test_killed_at_every_operation(make: Callable[..., InParts], settings: dict[str, Any]) -> None:
    _kill_everywhere(make(**settings), depth=2, step=1)


@pytest.mark.parametrize("settings", [{"replaced": True}, {"mounted": True, "replaced": True}], ids=["replaced", "mounted"])
def test_killed_at_some_operations(make: Callable[..., InParts], settings: dict[str, Any]) -> None:
    _kill_everywhere(make(**settings), depth=1, step=23)


@pytest.mark.parametrize("settings", [{"replaced": True}, {"mounted": True}], ids=["replaced", "mounted"])
def test_two_at_once_and_one_killed(make: Callable[..., InParts], settings: dict[str, Any]) -> None:
    """Two Disks take turns, operation by operation: whoever lives ends well, with the output in its place."""
    _two_at_once(make(**settings), 12)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"replaced": True}, {"mounted": True}, {"tile_rows": 16}], ids=str)
def test_two_at_once_anywhere(make: Callable[..., InParts], settings: dict[str, Any]) -> None:
    _two_at_once(make(**settings), 150)


def _two_at_once(world: InParts, cases: int) -> None:
    count = turns.many(world, cases)
    assert not count.wrong, "\n".join(count.wrong[:10])
    assert count.facts["changes of turns"] >= 5 * cases


@pytest.mark.parametrize("settings", [{"replaced": True}, {"mounted": True}], ids=["replaced", "mounted"])
def test_power_cuts(make: Callable[..., InParts], settings: dict[str, Any]) -> None:
    """While parts are begun, done and published, by one worker and by those that go on after earlier cuts."""
    count = powercut.cuts(make(**settings), 50)
    assert not count.wrong, "\n".join(count.wrong[:10])
    assert count.cases == 50


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"replaced": True}, {"mounted": True, "replaced": True}], ids=["new", "replaced", "both"])
def test_many_power_cuts(make: Callable[..., InParts], settings: dict[str, Any]) -> None:
    count = powercut.cuts(make(**settings), 2000)
    assert not count.wrong, "\n".join(count.wrong[:10])


def test_power_cuts_while_somebody_publishes(make: Callable[..., InParts]) -> None:
    """All parts are done by workers that publish nothing; the power goes while `finalize` puts them in place."""
    world = make(replaced=True)
    world.reset()
    for part in range(PARTS):
        world.run(part=part, no_lock=True)
    world.start = snapshot(world.place)
    again = world.run

    def publishing(disk: Disk | None = None, **resources: Any) -> Any:
        return finish(world.out, disk=disk) if disk is not None else again(**resources)

    world.run = publishing  # type: ignore[method-assign, assignment]
    count = powercut.cuts(world, 40)
    assert not count.wrong, "\n".join(count.wrong[:10])


def test_one_after_the_other_and_once_more(make: Callable[..., InParts]) -> None:
    world = make()
    world.reset()
    for part in (2, 0, 2):
        told = world.run(part=part)
        assert not told.published and not world.out.exists()
    assert world.run(part=1).published and not world.wrong_end()
    late = world.run()  # a requeued task
    assert late.published and late.parts == () and not world.wrong_end()


def test_another_source_of_the_same_shapes_is_not_this_output(make: Callable[..., InParts]) -> None:
    world = make()
    world.model = write_model(world.root / "other", seed=9)
    with pytest.raises(OutputError, match="exists and is not empty"):
        restore(world.out, world.right)
        world.run()


def test_a_dead_workers_part_is_resumed(make: Callable[..., InParts]) -> None:
    """Killed in the middle of a part; the next worker believes the tiles whose bytes are all in place."""
    world = make(tile_rows=8)
    world.reset()
    disk = Counting()
    world.run(disk)
    resumed = 0
    for tenths in (3, 4, 5):

        def die() -> None:
            raise Killed

        world.reset()
        killing = Killing(disk.count * tenths // 10, die)
        with pytest.raises(Killed):
            world.run(killing)
        killing.bury()
        resumed += world.run().resumed
        assert not world.wrong_end()
    assert resumed >= 10


def test_other_work_is_refused_with_what_differs(make: Callable[..., InParts]) -> None:
    world = make()
    world.reset()
    world.run(part=0)
    with pytest.raises(ResumeError, match="--parts was 3, is 4"):
        world.run(parts=4)
    asked = Resources(workers=1, device="cpu", parts=PARTS, memory_budget=4 << 30)
    with pytest.raises(ResumeError, match="tp_size was 1, is 2"):
        api.convert(world.model, world.out, TensorRTLLM(quant="none", tp_size=2), asked)
    with pytest.raises(ResumeError, match="was begun in parts"):
        world.run(parts=None)
    world.force = True
    assert world.run(parts=4).published and not world.wrong_end()


def test_work_without_parts_is_not_joined(make: Callable[..., InParts]) -> None:
    world = make(tile_rows=8)
    world.reset()

    def die() -> None:
        raise Killed

    disk = Killing(40, die)
    with pytest.raises(Killed):
        world.run(disk, parts=None)
    disk.bury()
    with pytest.raises(ResumeError, match="was begun without --parts"):
        world.run()
    world.force = True
    assert world.run().published and not world.wrong_end()


def test_a_lost_file_is_not_made_again(make: Callable[..., InParts]) -> None:
    """Zeros in the place of what a part has written would be published."""
    world = make()
    world.reset()
    world.run(part=0)
    (hidden(world.out, "partial") / "rank0.safetensors").unlink()
    with pytest.raises(OutputError, match="is gone"):
        world.run()


def _child(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    return pid


def test_workers_at_once_and_killed(make: Callable[..., InParts]) -> None:
    """Three at a time, one killed at a random moment: the others do its part, and one of them publishes."""
    world = make(tile_rows=16)
    for round_ in range(2):
        world.reset()
        children = [_child(lambda: world.run(wait=200.0)) for _ in range(3)]
        time.sleep(0.1 + 0.2 * round_)
        os.kill(children[0], signal.SIGKILL)
        ends = [os.waitpid(child, 0)[1] for child in children]
        assert ends[1:] == [0, 0]
        assert not world.wrong_end()


def test_held_parts_are_waited_for(make: Callable[..., InParts]) -> None:
    world = make()
    world.reset()
    world.run(part=0)
    child = _child(lambda: world.run(_Stopping(), part=1))
    os.waitpid(child, os.WUNTRACED)
    try:
        with pytest.raises(LockedError, match=f"of 3 parts 1 are held by process {child} on .*nothing went on for 0 s"):
            world.run()
        with pytest.raises(LockedError, match="is being written in parts"):
            world.force = True
            world.run(parts=5)
        world.force = False
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert world.run().published and not world.wrong_end()


class _Stopping(Counting):
    """The process stops before it syncs what it wrote of a part."""

    def act(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        if name == "sync" and self.names.count("lock_range") > 2:  # those of the worker itself, of its part, and of its pages
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().act(name, do, *args)


def test_private_parts(make: Callable[..., InParts]) -> None:
    world = make()
    world.reset()
    world.sharing["private_parts"] = True
    world.run(part=0)
    written = (hidden(world.out, "partial") / "rank0.safetensors").read_bytes()
    assert written == bytes(len(written)), "nothing is written in place"
    assert world.run().published and not world.wrong_end()
    assert snapshot(world.out) == world.right


class _Unseen(Counting):
    """A disk whose locks no other machine sees."""

    def lock_range(self, fd: int, begin: int, end: int) -> None:
        pass


def test_locks_that_do_not_reach_other_machines(make: Callable[..., InParts], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "BEAT", 0.05)
    world = make()
    world.reset()
    world.run(part=0)
    with contextlib.closing(Folder.at(_Unseen(), hidden(world.out, "parts"))) as folder:
        other = presence.Presence(folder, "aa", host="elsewhere")

        def sleep(_: float) -> None:
            """Until the other one has shown that it lives, however busy this machine is."""
            until = other._beats + 2
            while other._beats < until and not other._over.is_set():
                time.sleep(0.01)

        monkeypatch.setattr(presence, "time", SimpleNamespace(sleep=sleep))
        with pytest.raises(OutputError, match=r"worker is at work on elsewhere-.*do not reach other machines.*--part K/N"):
            world.run()
        assert not world.run(part=1).published, "a part of its own needs no locks"
        other.close()
        monkeypatch.setattr(presence, "BEAT", 1000.0)
        dead = presence.Presence(folder, "bb", host="elsewhere")
        assert world.run().published, "what a dead worker left is removed"
        dead.close()
    assert not world.wrong_end()


def test_two_publish_at_once(make: Callable[..., InParts]) -> None:
    """All parts are done, and nobody has published: of four who come at once one does."""
    world = make()
    for _ in range(2):
        world.reset()
        for part in range(PARTS):
            world.run(part=part, no_lock=True)
        assert not world.out.exists()
        children = [_child(lambda: world.run(wait=200.0)) for _ in range(2)] + [_child(lambda: finish(world.out)) for _ in range(2)]
        ends = [os.waitpid(child, 0)[1] for child in children]
        assert ends == [0, 0, 0, 0]
        assert not world.wrong_end()
