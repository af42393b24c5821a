"""Cuts reads into tiles: what is read at once, and what becomes of it in each output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from streamconv.planning.reads import Read, Reads
from streamconv.run.journal import Done

Past = Mapping[int, Sequence[Done]]
"""Span -> row ranges that an earlier run finished, ascending."""


@dataclass(frozen=True, slots=True)
class Task:
    """Rows [start, stop) of a span of an output; `done` if an earlier run recorded just them as finished."""

    output: int
    span: int
    start: int
    stop: int
    done: Done | None = None


@dataclass(frozen=True, slots=True)
class Tile:
    """Source rows that are read at once, for one task or more; a finished one is alone.

    Attributes:
        read: number of the read.
    """

    read: int
    tasks: tuple[Task, ...]

    @property
    def start(self) -> int:
        return min(task.start for task in self.tasks)

    @property
    def stop(self) -> int:
        return max(task.stop for task in self.tasks)


def tiles(reads: Reads, past: Sequence[Past], rows: Callable[[int], int]) -> Iterator[Tile]:
    """All tiles of all reads, in their order; in every output the rows of a span ascend.

    Args:
        past: of each output.
        rows: read -> source rows of a tile, a multiple of the read's `align`.
    """
    for number, read in enumerate(reads):
        known = [(output, done) for output, span in read.spans for done in past[output].get(span, ()) if _within(done, read)]
        edges = {read.start, read.stop}
        edges |= {row for _, done in known for row in (done.start, done.stop) if not (row - read.start) % read.align}
        for start, stop in pairwise(sorted(edges)):
            waiting = {output: list(_pieces(reads, read, output, past[output], start, stop)) for output, _ in read.spans}
            while any(waiting.values()):
                yield from cut(number, _leading(waiting, finished=False), rows(number))
                for task in _leading(waiting, finished=True):
                    yield Tile(number, (task,))


def cut(number: int, tasks: Sequence[Task], rows: int) -> Iterator[Tile]:
    """Tiles of at most `rows` source rows that cover tasks of one read."""
    for at in range(min((task.start for task in tasks), default=0), max((task.stop for task in tasks), default=0), rows):
        inside = [Task(task.output, task.span, max(task.start, at), min(task.stop, at + rows)) for task in tasks]
        if inside := [task for task in inside if task.start < task.stop]:
            yield Tile(number, tuple(inside))


def _within(done: Done, read: Read) -> bool:
    return read.start <= done.start < read.stop


def _leading(waiting: Mapping[int, list[Task]], finished: bool) -> list[Task]:
    """Take from each output the tasks that come first, as long as they are finished, or are not."""
    taken = []
    for tasks in waiting.values():
        while tasks and (tasks[0].done is not None) == finished:
            taken.append(tasks.pop(0))
    return taken


def _pieces(reads: Reads, read: Read, output: int, past: Past, start: int, stop: int) -> Iterator[Task]:
    """What an output makes of rows [start, stop) of a read, in their order; a finished range stands where it begins."""
    for wanting, number in read.spans:
        if wanting != output:
            continue
        span = reads.plans[output].spans[number]
        at, end = max(span.start, start), min(span.stop, stop)
        for done in past.get(number, ()):
            if done.stop <= at or done.start >= end:
                continue
            if done.start > at:
                yield Task(output, number, at, done.start)
            if done.start >= at:
                yield Task(output, number, done.start, done.stop, done)
            at = done.stop
        if at < end:
            yield Task(output, number, at, end)
