"""The spans of a plan: what is read, in which order, and for which matrices."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, islice
from operator import add
from typing import NamedTuple

from streamconv.planning.plan import PLAIN_ROWS, Destination, RowOp, RowRange
from streamconv.planning.tables import Cols, Pool, Sources, Table
from streamconv.quants.base import Reduction


class Reducing(NamedTuple):
    """All rows of a source, by its number, are reduced.

    Attributes:
        before: number that the span which comes next would have if nothing were reduced.
    """

    before: int
    source: int
    rows: int
    reduction: Reduction


def _woven(column: array[int], order: Sequence[int], values: Iterable[int]) -> array[int]:
    """A column and further values in another order, in which none is the one they have."""
    return array(column.typecode, map([*column, *values].__getitem__, order)) if order else column


class SpanTable(Table[RowRange]):
    """Spans in the order in which they are read.

    Attributes:
        reductions: numbers of the spans that reduce.
        nbytes: bytes that all of them read from the checkpoint.
    """

    def __init__(self, sources: Sources, ops: Pool[RowOp] | None = None, spreads: Pool[Cols] | None = None) -> None:
        super().__init__()
        self.sources, self.reductions, self.nbytes = sources, array("I"), 0
        self._source, self._op, self._reduction = array("I"), array("I"), array("I")  # the last counted from 1
        self._start, self._stop, self._align = array("Q"), array("Q"), array("Q")
        self._first = array("I")  # destination
        self._matrix, self._cols, self._row = array("I"), array("I"), array("Q")  # of destinations
        self._ops, self._spreads = ops or Pool[RowOp](), spreads or Pool[Cols]()
        self._reductions: list[Reduction] = []
        self._passes: int | None = None

    def append(self, span: RowRange) -> None:
        self.add(self.sources.number(span.source), span.start, span.stop, span.op, span.align, span.reduce)
        for dest in span.dests:
            self.add_dest(dest.matrix, dest.row, dest.cols)

    def add(self, source: int, start: int, stop: int, op: RowOp, align: int, reduce: Reduction | None = None) -> None:
        """A span without destinations; `add_dest` adds them."""
        if reduce is not None:
            self.reductions.append(len(self))
            self._reductions.append(reduce)
        self.nbytes += (stop - start) * self.sources.rows(source).stored
        self._source.append(source)
        self._op.append(self._ops.number(op))
        self._reduction.append(0 if reduce is None else len(self._reductions))
        self._start.append(start)
        self._stop.append(stop)
        self._align.append(align)
        self._first.append(len(self._row))

    def take(
        self, source: array[int], start: array[int], stop: array[int], op: array[int], align: array[int], nbytes: int,
        reducing: Sequence[Reducing],
    ) -> None:  # fmt: skip
        """All spans, a column for each fact; the arrays may become those of the table. `take_dests` follows.

        Args:
            nbytes: that they read from the checkpoint.
            reducing: what is reduced before them.
        """
        before, rows = [at.before for at in reducing], [*self.sources.rows_of([at.source for at in reducing])]
        none = array("I", bytes(4 * len(source)))
        places = [*range(1, 2 * len(source), 2), *[2 * place for place in before]]
        order = sorted(range(len(places)), key=places.__getitem__) if before else []
        self._source = _woven(source, order, [at.source for at in reducing])
        self._start = _woven(start, order, [0] * len(reducing))
        self._stop = _woven(stop, order, [at.rows for at in reducing])
        self._op = _woven(op, order, [self._ops.number(PLAIN_ROWS)] * len(reducing))
        self._align = _woven(align, order, [each.align for each in rows])
        self._reduction = _woven(none, order, range(1, len(reducing) + 1))
        self._reductions = [at.reduction for at in reducing]
        self.reductions = array("I", map(add, before, count()))
        self.nbytes = nbytes + sum(at.rows * each.stored for at, each in zip(reducing, rows, strict=True))

    def take_dests(self, matrix: array[int], row: array[int], cols: array[int]) -> None:
        """The destinations of all spans but those that reduce, one for each, in order."""
        self._matrix, self._row, self._cols = matrix, row, cols
        first = array("I")
        for at, number in enumerate([*self.reductions, len(self._source)]):
            first.extend(range(len(first) - at, number - at))
            first.append(number - at)
        first.pop()
        self._first = first

    def add_dest(self, matrix: int, row: int, cols: Cols) -> None:
        """Another matrix that takes the rows of the last span."""
        self._matrix.append(matrix)
        self._cols.append(self._spreads.number(cols))
        self._row.append(row)

    def _of(self, number: int) -> range:
        """Where the destinations of a span are."""
        after = number + 1
        return range(self._first[number], self._first[after] if after < len(self._first) else len(self._row))

    def takers(self, number: int) -> Sequence[int]:
        """Numbers of the matrices that take the rows of a span."""
        own = self._of(number)
        return self._matrix[own.start : own.stop]

    def place(self, number: int) -> tuple[int, int]:
        """Where a span begins: number of its source, which rises through the files of the checkpoint, and row."""
        return self._source[number], self._start[number]

    def rows(self, number: int) -> tuple[int, int]:
        """The rows [start, stop) of a span."""
        return self._start[number], self._stop[number]

    def extents(self, ways: dict[tuple[RowOp, type], int]) -> Iterator[tuple[int, int, int, int, int]]:
        """Of each span the number of its source, its rows [start, stop), the rows that a tile holds a multiple of, and its way.

        Args:
            ways: number of what happens to rows; gets those that are new.
        """
        types, known = [type(None), *map(type, self._reductions)], dict[tuple[int, type], int]()
        for *extent, op, reduction in zip(self._source, self._start, self._stop, self._align, self._op, self._reduction, strict=True):
            way = known.get((op, types[reduction]))
            if way is None:
                way = known[op, types[reduction]] = ways.setdefault((self._ops.values[op], types[reduction]), len(ways))
            yield *extent, way

    def op(self, number: int) -> RowOp:
        return self._ops.values[self._op[number]]

    def reduction(self, number: int) -> Reduction | None:
        """What a span reduces to."""
        return self._reductions[self._reduction[number] - 1] if self._reduction[number] else None

    def dests(self, number: int) -> Iterator[tuple[int, int]]:
        """(matrix, its first row there) of those that take the rows of a span."""
        return ((self._matrix[at], self._row[at]) for at in self._of(number))

    def stored_row_bytes(self, number: int) -> int:
        """Bytes of the checkpoint that a row of a span is read from."""
        return self.sources.rows(self._source[number]).stored

    def bytes_of(self, number: int) -> int:
        """Bytes of the checkpoint that a span reads."""
        return (self._stop[number] - self._start[number]) * self.stored_row_bytes(number)

    def passes(self) -> int:
        """How often the rows of the most read source are read: once to write, and once for each reduction."""
        if self._passes is None:
            keys = [reduction.key for reduction in self._reductions]
            reduced = {(self._source[number], key) for number, key in zip(self.reductions, keys, strict=True)}
            counts = Counter(source for source, _ in reduced)
            written = {source for source, reduction in zip(self._source, self._reduction, strict=True) if counts and not reduction}
            self._passes = max((many + (source in written) for source, many in counts.items()), default=1)
        return self._passes

    def only(self, numbers: Sequence[int], matrix: Mapping[int, int]) -> SpanTable:
        """These spans, in their order.

        Args:
            matrix: number of a matrix here -> number that it has there.
        """
        table = SpanTable(self.sources)
        for number in numbers:
            span = self._make(number)
            table.append(replace(span, dests=tuple([replace(dest, matrix=matrix[dest.matrix]) for dest in span.dests])))
        return table

    def kinds(self, codec: Sequence[int]) -> Iterator[Hashable]:
        """Of each span what it is like: spans of one kind cost the same.

        Args:
            codec: of each matrix, by number.
        """
        cols, matrix = self._cols, self._matrix
        types = [None, *map(type, self._reductions)]
        after = islice(chain(self._first, [len(self._row)]), 1, None)
        columns = zip(self.sources.rows_of(self._source), self._op, self._align, self._reduction, self._first, after, strict=True)
        for rows, op, align, reduction, first, stop in columns:
            if stop - first == 1:  # nearly all
                yield rows, op, align, types[reduction], cols[first], codec[matrix[first]]
                continue
            tasks = tuple([(cols[at], codec[matrix[at]]) for at in range(first, stop)])
            yield rows, op, align, types[reduction], tasks

    def reducing(self) -> Iterator[RowRange]:
        """The spans that reduce."""
        return map(self._make, self.reductions)

    def alone(self) -> bool:
        """Every matrix gets all its rows from one span."""
        return len({*self._matrix}) == len(self._matrix)

    def in_row_order(self) -> bool:
        """Every matrix gets its rows one below the other."""
        if self.alone():
            return True
        following = array("Q", bytes(8 * (max(self._matrix, default=-1) + 1)))
        for number in range(len(self)):
            seen = -1
            for at in self._of(number):
                matrix, row = self._matrix[at], self._row[at]
                if row < following[matrix] or matrix == seen:
                    return False
                seen, following[matrix] = matrix, row + 1
        return True

    def __len__(self) -> int:
        return len(self._source)

    def _make(self, number: int) -> RowRange:
        spreads = self._spreads.values
        dests = tuple([Destination(self._matrix[at], self._row[at], spreads[self._cols[at]]) for at in self._of(number)])
        return RowRange(
            self.sources[self._source[number]],
            self._start[number],
            self._stop[number],
            self.op(number),
            dests,
            self._align[number],
            self.reduction(number),
        )
