"""Two workers at once on one output, each with a Disk of its own: one operation at a time, in an order that repeats; one is killed."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from streamconv import in_parts, publishing
from streamconv.api import Report
from streamconv.run import lock
from tests.crash.disks import Killed, Tapped
from tests.crash.kills import Count, operations
from tests.crash.world import World, no_thread, snapshot


class Turns:
    """Whose turn it is: a run of operations each, of random lengths; a worker that waits gives its turn away.

    Args:
        seed: of the order.
        victim, at: the worker that is killed, instead of its operation `at`; -1 takes the one that gives the output its name, and `at`
            counts from there.
    """

    def __init__(self, seed: int, victim: int, at: int) -> None:
        self.random, self.victim, self.at = random.Random(seed), victim, at
        self.changed = threading.Condition()
        self.alive, self.turn, self.left = {0, 1}, 0, 0
        self.order: list[int] = []

    def take(self, worker: int) -> None:
        """Wait for a turn of this worker; some thread of it goes on until its next operation."""
        with self.changed:
            if not self.left:
                self._next()
            if not self.changed.wait_for(lambda: self.turn == worker or worker not in self.alive, 60):
                raise RuntimeError("no turn in a minute")
            self.left -= 1
            self.order.append(worker)

    def _next(self) -> None:
        if self.alive:
            self.turn = self.random.choice(sorted(self.alive))
            self.left = int(self.random.expovariate(0.1)) + 1
        self.changed.notify_all()

    def leave(self, worker: int) -> None:
        with self.changed:
            self.alive.discard(worker)
            self._next()


class Alternating(Tapped):
    """The disk of one of the two."""

    def __init__(self, turns: Turns, worker: int) -> None:
        super().__init__()
        self.turns, self.worker, self.dead = turns, worker, False

    def act(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        self.turns.take(self.worker)
        if self.dead or (self.worker == self.turns.victim and self.number >= self.turns.at):
            self.dead = True
            raise Killed
        done = do(*args)
        if self.turns.victim < 0 and name == "rename" and args[2] in ("out", "config.json"):  # the last one of a mounted output
            self.turns.victim, self.turns.at = self.worker, self.number + 1 + self.turns.at
        return done


@contextlib.contextmanager
def _sleeping(turns: Turns) -> Iterator[threading.local]:
    """Who sleeps gives its turn away, and is asked again at once."""
    mine = threading.local()

    def sleep(_: float) -> None:
        turns.take(mine.worker)
        turns.left = 0

    clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    with contextlib.ExitStack() as patched:
        for module in (in_parts, publishing, lock):
            patched.enter_context(mock.patch.object(module, "time", clock))
        yield mine


def together(world: World, seed: int, victim: int, at: int) -> tuple[str, int]:
    """Two workers, one of them killed instead of operation `at`; what is wrong, and how often turns changed."""
    turns = Turns(seed, victim, at)
    disks = [Alternating(turns, worker) for worker in (0, 1)]
    reports: dict[int, Report] = {}
    wrong: list[str] = []
    with no_thread(world.batch), _sleeping(turns) as mine:

        def work(worker: int) -> None:
            mine.worker = worker
            try:
                reports[worker] = world.run(disks[worker], wait=60.0)
            except Killed:
                disks[worker].bury()
            except BaseException as error:
                wrong.append(f"worker {worker}: {type(error).__name__}: {error}")
            finally:
                turns.leave(worker)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    wrong += [f"worker {worker} left before the output was there" for worker, told in reports.items() if not told.published]
    changes = sum(one != other for one, other in zip(turns.order, turns.order[1:], strict=False))
    return "; ".join(wrong) or world.wrong_now() or _twice(world), changes


def _twice(world: World) -> str:
    """The output is there; the same command once more finds nothing to do but, after a kill, names to remove."""
    if {name: data for name, data in snapshot(world.out).items() if not name.startswith(".streamconv-")} != world.right:
        return "other bytes"
    return world.finish()


def many(world: World, cases: int) -> Count:
    """Kill one of two at operations spread over all of a run, and one that has published, each in an order of turns of its own."""
    count, longest = Count(), operations(world)
    kills = [(case % 2, case * longest // cases) for case in range(cases)] + [(-1, case % 24) for case in range(cases)]
    changes = 0
    for seed, (victim, at) in enumerate(kills):
        world.reset()
        problem, changed = together(world, seed, victim, at)
        changes += changed
        count.note(f"seed {seed}, worker {victim} at {at}", problem)
    count.facts["changes of turns"] = changes
    return count
