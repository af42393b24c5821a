"""Cuts reads into tiles: what is read at once, and what becomes of it in each output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from streamconv.planning.merge import Share
from streamconv.planning.reads import Reads
from streamconv.run.journal import TileRecord

JournalState = Mapping[int, Sequence[TileRecord]]
"""RowRange -> row ranges that an earlier run finished, ascending."""


@dataclass(frozen=True, slots=True)
class Task:
    """Rows [start, stop) of a read for a span of an output; `done` if an earlier run recorded just them as finished."""

    share: Share
    start: int
    stop: int
    done: TileRecord | None = None

    def rows(self) -> tuple[int, int]:
        """The rows [start, stop) as rows of the span's source."""
        return self.start - self.share.shift, self.stop - self.share.shift


@dataclass(frozen=True, slots=True)
class Tile:
    """Source rows that are read at once, for one task or more; a finished one is alone."""

    read: int
    tasks: tuple[Task, ...]

    @property
    def start(self) -> int:
        return min(task.start for task in self.tasks)

    @property
    def stop(self) -> int:
        return max(task.stop for task in self.tasks)


def tiles(reads: Reads, past: Sequence[JournalState], rows: Callable[[int], int]) -> Iterator[Tile]:
    """All tiles of all reads, in their order; in every output the rows of a span ascend.

    Args:
        rows: read -> source rows of a tile, a multiple of the read's `align`.
    """
    for number, read in enumerate(reads):
        shares = [(share, reads.plans[share.output].spans[share.span], past[share.output].get(share.span, ())) for share in read.shares]
        edges = {read.start, read.stop}
        for share, _, finished in shares:
            known = {row + share.shift for done in finished for row in (done.start, done.stop)}
            edges |= {row for row in known if read.start < row < read.stop and not (row - read.start) % read.align}
        for start, stop in pairwise(sorted(edges)):
            waiting: dict[int, list[Task]] = {output: [] for output in read.outputs}
            for share, span, finished in shares:
                begin, end = max(start, span.start + share.shift), min(stop, span.stop + share.shift)
                waiting[share.output] += _pieces(share, finished, begin, end)
            while any(waiting.values()):
                yield from cut(number, _leading(waiting, finished=False), rows(number))
                for task in _leading(waiting, finished=True):
                    yield Tile(number, (task,))


def cut(number: int, tasks: Sequence[Task], rows: int) -> Iterator[Tile]:
    """Tiles of at most `rows` source rows that cover tasks of one read."""
    for at in range(min((task.start for task in tasks), default=0), max((task.stop for task in tasks), default=0), rows):
        inside = [Task(task.share, max(task.start, at), min(task.stop, at + rows)) for task in tasks]
        if inside := [task for task in inside if task.start < task.stop]:
            yield Tile(number, tuple(inside))


def _leading(waiting: Mapping[int, list[Task]], finished: bool) -> list[Task]:
    """Take from each output the tasks that come first, as long as they are finished, or are not."""
    taken = []
    for tasks in waiting.values():
        while tasks and (tasks[0].done is not None) == finished:
            taken.append(tasks.pop(0))
    return taken


def _pieces(share: Share, finished: Sequence[TileRecord], start: int, stop: int) -> Iterator[Task]:
    """Rows [start, stop) of a read for one span, in their order; a finished range stands where it begins."""
    at = start
    for done in finished:
        first, last = done.start + share.shift, done.stop + share.shift
        if last <= at or first >= stop:
            continue
        if first > at:
            yield Task(share, at, first)
        if first >= at:
            yield Task(share, first, last, done)
        at = last
    if at < stop:
        yield Task(share, at, stop)
