"""Puts the spans of several plans together: rows that more than one wants are read once, whatever each makes of them.

A plan's own spans have an order in which every matrix gets its rows one below the other, and reductions come before what needs them.
Merged reads keep that for every plan, but where two plans want the same rows in orders that exclude each other: matrices of one of them
then are `loose`, get their rows in any order, and are hashed when they are complete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise
from math import lcm
from typing import NamedTuple

from streamconv.checkpoint.rows import RowSource, SourceTensor
from streamconv.planning.plan import Plan, RowOp


class Share(NamedTuple):
    """A span of an output; source row i of it is row i + shift of the read."""

    output: int
    span: int
    shift: int


Owned = tuple[int, int]
"""(output, matrix)."""


class Read(NamedTuple):
    """Rows [start, stop), read once for the spans of all outputs that want them.

    Attributes:
        align: tiles are cut a multiple of so many rows from `start` on.
        shares: of one row operation, in the order of their rows.
        reader: one of them, whose source has all the rows.
    """

    start: int
    stop: int
    align: int
    shares: tuple[Share, ...]
    reader: Share

    @property
    def outputs(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(share.output for share in self.shares))


_ALL = 1 << 62
"""Rows, as many as there are."""
_FIELDS: dict[type, tuple[str, ...] | None] = {}
"""What makes a source, its names apart; None for what is no record."""


class _Interval(NamedTuple):
    """A span's rows [start, stop) as rows of a track."""

    start: int
    stop: int
    align: int
    share: Share
    rows: tuple[int, int]  # that its source has


def merge(plans: Sequence[Plan]) -> tuple[list[Read], set[Owned]]:
    """The reads of all plans together, and the loose matrices: (output, matrix)."""
    tracks = _tracks(plans)
    apart, loose = set[tuple[int, int]](), set[Owned]()
    while True:
        reads = sorted((read for track in tracks.values() for read in _reads(sorted(track), apart)), key=_first)
        above: dict[tuple[int, int], set[Owned]] = {}
        ordered, circles = _ordered(_before(plans, reads, above, loose))
        if not circles:
            return [reads[number] for number in ordered], loose
        for circle in circles:
            matrices = set[Owned]().union(*(above.get(pair, ()) for pair in circle))
            last = max((output for output, _ in matrices), default=None)
            loose |= {matrix for matrix in matrices if matrix[0] == last}
            if last is None:  # only reductions
                apart |= {share[:2] for pair in circle for share in reads[pair[0]].shares}


def _first(read: Read) -> tuple[tuple[int, int], int]:
    """Reads come in the order of the first plan, then in that of the next one."""
    return min(read.shares)[:2], read.start


def _tracks(plans: Sequence[Plan]) -> dict[Hashable, list[_Interval]]:
    """The spans of all plans by what their rows are compared by."""
    tracks: dict[Hashable, list[_Interval]] = {}
    numbers: dict[Hashable, int] = {}
    known: dict[Hashable, tuple[int, int, int]] = {}  # source -> number of its identity, shift, and rows; sources of several plans are one
    origins = {plan.spans.sources.origin for plan in plans}
    apart = len(origins) == 1 and None not in origins
    ways: dict[tuple[RowOp, type], int] = {}
    for output, plan in enumerate(plans):
        sources = plan.spans.sources
        for number, (source, start, stop, align, way) in enumerate(plan.spans.extents(ways)):
            place = sources.identity(source) or (output, source)
            if place not in known:
                # tensors of one checkpoint never overlap
                identity, shift = (place, 0) if apart else _identified(sources[source], (output, number))
                known[place] = numbers.setdefault(identity, len(numbers)), shift, _ALL if apart else sources[source].rows
            own, shift, rows = known[place]
            interval = _Interval(start + shift, stop + shift, align, Share(output, number, shift), (shift, shift + rows))
            tracks.setdefault((own, way), []).append(interval)
    return tracks


def _identified(source: RowSource, place: Hashable) -> tuple[Hashable, int]:
    """What tells rows from others, and by how much a source's are shifted there.

    Rows of plain tensors are known by where their bytes lie, whatever the tensor is called and wherever it begins.

    Args:
        place: of the span; what is read from nowhere is never shared.
    """
    size = source.cols * source.dtype.itemsize
    if isinstance(source, SourceTensor) and source.as_stored and len(source.pieces) == 1 and size:
        piece = source.pieces[0]
        return ("bytes", piece.shard, piece.begin % size, size, source.dtype), piece.begin // size
    return _identity(source) if source.pieces else place, 0


def _identity(value: object) -> Hashable:
    """A source without its names."""
    kind = type(value)
    if kind not in _FIELDS:
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else None
        _FIELDS[kind] = None if fields is None else tuple(each.name for each in fields if each.name not in ("name", "module"))
    names = _FIELDS[kind]
    return value if names is None else (type(value), *[_identity(getattr(value, name)) for name in names])


def _reads(track: list[_Interval], apart: set[tuple[int, int]]) -> Iterator[Read]:
    """The reads of a track's intervals, which ascend."""
    together, end = list[_Interval](), 0
    for interval in track:
        if interval.share[:2] in apart:
            yield _alone(interval)
            continue
        if interval.start >= end:
            yield from _cut(together)
            together = []
        together.append(interval)
        end = max(end, interval.stop)
    yield from _cut(together)


def _alone(interval: _Interval) -> Read:
    return Read(interval.start, interval.stop, interval.align, (interval.share,), interval.share)


def _cut(together: list[_Interval]) -> Iterator[Read]:
    """Reads of intervals that overlap, cut where the outputs that want the rows change, and every output allows it."""
    if len(together) == 1:
        yield _alone(together[0])
        return
    if len({read[:2] for read in together}) == 1 and len({read.share.output for read in together}) == len(together):  # nearly all
        start, stop, _, share, _ = together[0]
        yield Read(start, stop, lcm(*(read.align for read in together)), tuple([read.share for read in together]), share)
        return
    edges = sorted({edge for read in together for edge in read[:2]})
    edges = [at for at in edges if all((at - read.start) % read.align == 0 for read in together if read.start < at < read.stop)]
    for start, stop in pairwise(edges):
        inside = [read for read in together if read.start < stop and start < read.stop]
        readers = [read for read in inside if read.rows[0] <= start and stop <= read.rows[1]]
        by_output = pairwise(sorted(inside, key=lambda read: read.share.output))
        once = all(one.stop <= other.start for one, other in by_output if one.share.output == other.share.output)
        even = all((read.start - start) % read.align == 0 for read in inside if read.start > start)
        if len(inside) == 1 or (readers and once and even):
            yield Read(start, stop, lcm(*(read.align for read in inside)), tuple(read.share for read in inside), readers[0].share)
        else:
            yield from (_alone(read._replace(start=max(read.start, start), stop=min(read.stop, stop))) for read in inside)


def _before(plans: Sequence[Plan], reads: Sequence[Read], above: dict[tuple[int, int], set[Owned]], loose: set[Owned]) -> list[list[int]]:
    """For each read those that come before it: rows of its matrices above its own, and reductions that it needs.

    Args:
        above: gets (read, a read below it) -> their matrices.
    """
    before: list[list[int]] = [[] for _ in reads]
    reducing: dict[tuple[int, str], list[int]] = {}
    once = [plan.spans.alone() for plan in plans]
    rows: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # (output, matrix) -> (row, read, row of it)
    for number, read in enumerate(reads):
        for output, at, shift in read.shares:
            spans = plans[output].spans
            if (reduction := spans.reduction(at)) is not None:
                reducing.setdefault((output, reduction.key), []).append(number)
            start, stop = spans.rows(at)
            at_row = max(read.start, start + shift)
            if once[output] and read.stop - at_row == stop - start:
                continue  # its matrices get no other rows
            skipped = spans.op(at).out_rows(at_row - shift - start)
            for matrix, row in spans.dests(at):
                rows.setdefault((output, matrix), []).append((row + skipped, number, at_row))
    for owned, placed in rows.items():
        for (_, one, first), (_, other, then) in pairwise(sorted(placed) if owned not in loose and len(placed) > 1 else ()):
            if one != other or then <= first:  # the rows of a read ascend
                before[other].append(one)
                above.setdefault((one, other), set()).add(owned)
    for number, read in enumerate(reads):
        for output, at, _ in read.shares:
            spans = plans[output].spans
            needs = {key for matrix in spans.takers(at) for key in plans[output].matrices.needs(matrix)}
            reduction = spans.reduction(at)
            for key in needs | set(reduction.needs if reduction is not None else ()):
                before[number] += reducing.get((output, key), [])
    return before


def _ordered(before: list[list[int]]) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Numbers in their order, each after all that come before it; and circles: pairs of which the first comes before the second."""
    state, order, circles = bytearray(len(before)), list[int](), list[list[tuple[int, int]]]()
    for root in range(len(before)):
        stack = [] if state[root] else [(root, iter(before[root]))]
        state[root] = state[root] or 1
        while stack:
            number, others = stack[-1]
            following = next((other for other in others if state[other] != 2), None)
            if following is None:
                stack.pop()
                state[number] = 2
                order.append(number)
            elif state[following] == 1:
                path = [node for node, _ in stack]
                path = [*path[path.index(following) :], following]
                circles.append([(one, other) for other, one in pairwise(path)])
            else:
                state[following] = 1
                stack.append((following, iter(before[following])))
    return order, circles
