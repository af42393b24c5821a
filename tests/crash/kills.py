"""Kill a conversion at every write-side operation, and the resume of what is left, and the resume of that."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from streamconv.errors import OutputError
from tests.crash.disks import Counting, Killed, Killing, Watched
from tests.crash.world import State, World, digest, snapshot


@dataclass(slots=True)
class Count:
    """Figures of a series.

    Attributes:
        cases: what was tried.
        wrong: what went wrong, one line each.
        facts: other figures.
    """

    cases: int = 0
    wrong: list[str] = field(default_factory=list)
    facts: dict[str, int] = field(default_factory=dict)

    def note(self, where: str, problem: str) -> None:
        self.cases += 1
        if problem:
            self.wrong.append(f"{where}: {problem}")


def every_state(world: World, depth: int | None = None, progress: Callable[[Count], None] = lambda _: None) -> Count:
    """Kill at every operation and in the middle of every write, at any depth.

    A killed process leaves the disk as it was before the operation it did not do. So one watched run from a state gives
    the states that killing it anywhere leaves; states that are already known need no second look. When no new state
    comes up, every sequence of kills, however long, has been covered.

    Args:
        depth: stop after so many kills in a row; None goes on until nothing new comes up.
    """
    count = Count()
    world.reset()
    known: set[bytes] = {digest(snapshot(world.place))}
    level: list[State] = [snapshot(world.place)]
    kills = 0
    while level and (depth is None or kills <= depth):
        following: list[State] = []
        for state in level:
            found, moments, problem = _watched(world, state, known)
            following += found
            count.facts["moments"] = count.facts.get("moments", 0) + moments
            count.note(f"after {kills} kills", problem)
            progress(count)
        level, kills = following, kills + 1
    count.facts |= {"states": len(known), "depth": kills - 1, "closed": int(not level)}
    return count


def _watched(world: World, state: State, known: set[bytes]) -> tuple[list[State], int, str]:
    """Run from a state to the end; gives the new states on the way, the moments looked at, and what is wrong."""
    found: list[State] = []
    moments, wrong = 0, ""

    def look() -> None:
        nonlocal moments, wrong
        moments += 1
        here = snapshot(world.place)
        mark = digest(here)
        if mark not in known:
            known.add(mark)
            found.append(here)
            wrong = wrong or world.wrong_now()

    world.reset(state)
    try:
        world.run(Watched(look))
    except Exception as error:
        if "exists and is not empty" not in str(error):
            return found, moments, f"{type(error).__name__}: {error}"
    return found, moments, wrong or world.wrong_end()


def operations(world: World) -> int:
    """How many operations a run from the start takes."""
    world.reset()
    disk = Counting()
    world.run(disk)
    return disk.count


def raised(world: World, k: int) -> bool:
    """Stop in this process at operation k; False if the run ended before."""

    def die() -> None:
        raise Killed

    disk = Killing(k, die)
    try:
        world.run(disk)
    except Killed:
        disk.bury()
        return True
    except OutputError as error:
        if "exists and is not empty" not in str(error):
            raise
    return False


def killed(world: World, k: int) -> bool:
    """SIGKILL a child at operation k; False if it ended before."""
    pid = os.fork()
    if pid == 0:
        try:
            world.run(Killing(k, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def real_kills(world: World, depth: int, stop: Callable[[World, int], bool] = killed, step: int = 1) -> Count:
    """Every k, `depth` kills in a row at the operations k, k/2, k/3 ... of each run."""
    count = Count()
    for k in range(0, operations(world), step):
        world.reset()
        for again in range(depth):
            if not stop(world, k // (again + 1)):
                break
            if wrong := world.wrong_now():
                count.wrong.append(f"k={k}: {wrong}")
        count.note(f"k={k}", world.finish())
    return count
