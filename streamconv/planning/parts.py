"""A plan cut into parts that can be done apart, by any machine and in any order.

A matrix is never cut: its hash runs front to back, so it has one owner. What shares source bytes, or a reduction, stays together: a unit.
Units are dealt out in the order in which the source holds them, as neighbouring runs of about equal bytes read and written: each byte is
read by one part, and a part needs few source files. (Cut by output file, every part reads nearly all of the source; dealt out by size,
every part needs nearly every source file; in the order of the output's names, a fifth more of them.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from streamconv.errors import UsageError
from streamconv.planning.plan import Constant, Plan

MOST = 4096
"""Parts of a plan; a folder with some files for each is still listed in no time."""
_CLOSE = 256
"""A part is full when less than one of so many shares of it is missing."""
_NEAR = 6
"""What does not fit is passed over, up to one of so many shares."""


@dataclass(frozen=True, slots=True)
class Part:
    """What is done apart.

    Attributes:
        matrices, spans: their numbers in the plan, ascending.
        read, written: bytes of the source and of the output's tensors.
        alone: it is one unit.
    """

    matrices: tuple[int, ...] = ()
    spans: tuple[int, ...] = ()
    constants: tuple[Constant, ...] = ()
    read: int = 0
    written: int = 0
    alone: bool = False

    @property
    def moved(self) -> int:
        return self.read + self.written

    def of(self, plan: Plan) -> Plan:
        """The plan of this part alone; all files and places are those of the whole."""
        numbers = {number: at for at, number in enumerate(self.matrices)}
        spans = plan.spans.only(self.spans, numbers)
        return replace(plan, matrices=plan.matrices.only(self.matrices), spans=spans, constants=self.constants)

    def extents(self, plan: Plan) -> list[list[tuple[int, int]]]:
        """For each file the byte ranges [begin, end) that this part writes: ascending, with a gap between any two."""
        by_file: list[list[tuple[int, int]]] = [[] for _ in plan.files]
        for number in self.matrices:
            matrix = plan.matrices[number]
            by_file[matrix.file] += [place.extent(0, matrix.rows) for place in matrix.places]
        for constant in self.constants:
            by_file[constant.file].append((constant.offset, constant.offset + len(constant.data)))
        return [_joined(ranges) for ranges in by_file]

    def shards(self, plan: Plan) -> set[int]:
        """Numbers of the source files that it reads."""
        return {piece.shard for number in self.spans for piece in plan.spans[number].source.pieces}


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if joined and joined[-1][1] == begin:
            joined[-1] = joined[-1][0], end
        elif begin < end:
            joined.append((begin, end))
    return joined


def cut(plan: Plan, count: int) -> list[Part]:
    """Exactly `count` parts; units that are larger than the mean come first, each alone. Parts may be empty.

    Raises:
        UsageError: no such number of parts.
    """
    if not 1 <= count <= MOST:
        raise UsageError(f"--parts {count} is not between 1 and {MOST}")
    if count == 1:
        matrices, spans = tuple(range(len(plan.matrices))), tuple(range(len(plan.spans)))
        written = sum(map(plan.matrices.bytes_of, matrices))
        return [Part(matrices, spans, plan.constants, plan.bytes_read, written)]
    units, alone = _units(plan), list[Part]()
    left = sum(unit.moved for unit in units)
    for unit in sorted(units, key=lambda unit: unit.moved, reverse=True):
        if len(alone) + 1 >= count or unit.moved * (count - len(alone)) <= left:
            break
        alone.append(unit)
        left -= unit.moved
    lonely = set(map(id, alone))
    parts = alone + [_together(run) for run in _runs([unit for unit in units if id(unit) not in lonely], count - len(alone))]
    parts[-1] = replace(parts[-1], constants=plan.constants)
    return parts


def _runs(units: Sequence[Part], count: int) -> Iterator[list[Part]]:
    """Neighbours, as many as make an equal share; what would be too much is left to the next run, and smaller ones close by fill up."""
    left, waiting, following = sum(unit.moved for unit in units), list[Part](), iter(units)
    for runs in range(count, 0, -1):
        share, taken, passed = left / runs, list[Part](), list[Part]()
        room = share
        for unit in chain(waiting, following):
            if runs == 1 or unit.moved <= room or (not taken and not passed and unit.moved < 2 * room):
                taken.append(unit)
                room -= unit.moved
            else:
                passed.append(unit)
            if runs > 1 and (room <= share / _CLOSE or sum(unit.moved for unit in passed) > share / _NEAR):
                break
        seen = len(taken) + len(passed)
        waiting = passed + waiting[seen:]
        left -= sum(unit.moved for unit in taken)
        yield taken


def _together(units: Sequence[Part]) -> Part:
    matrices = sorted(number for unit in units for number in unit.matrices)
    spans = sorted(number for unit in units for number in unit.spans)
    return Part(tuple(matrices), tuple(spans), (), sum(unit.read for unit in units), sum(unit.written for unit in units))


def _units(plan: Plan) -> list[Part]:
    """The smallest parts there can be, in the order in which the source holds what they read."""
    spans, matrices = plan.spans, plan.matrices
    keys: dict[str, int] = {}
    above = list(range(len(matrices)))  # union-find over matrices, then keys of reductions

    def key(name: str) -> int:
        if name not in keys:
            keys[name] = len(above)
            above.append(keys[name])
        return keys[name]

    def top(node: int) -> int:
        while above[node] != node:
            above[node] = above[above[node]]
            node = above[node]
        return node

    def join(nodes: Sequence[int]) -> None:
        for node in nodes[1:]:
            above[top(node)] = top(nodes[0])

    reducing = {}
    for number, span in zip(spans.reductions, spans.reducing(), strict=True):
        assert span.reduce is not None
        reducing[number] = key(span.reduce.key)
        join([reducing[number], *map(key, span.reduce.needs)])
    for number in range(len(matrices)):
        join([number, *map(key, matrices.codec(number).needs)])
    takers = [spans.takers(number) if number not in reducing else [reducing[number]] for number in range(len(spans))]
    for nodes in takers:
        join(nodes)
    units: dict[int, tuple[list[int], list[int]]] = {}
    for number in range(len(matrices)):
        units.setdefault(top(number), ([], []))[0].append(number)
    for number, nodes in enumerate(takers):
        units.setdefault(top(nodes[0]), ([], []))[1].append(number)
    return [
        Part(tuple(own), tuple(read), (), sum(map(spans.bytes_of, read)), sum(map(matrices.bytes_of, own)), alone=True)
        for own, read in sorted(units.values(), key=lambda unit: min(map(spans.place, unit[1]), default=(-1, 0)))
    ]
