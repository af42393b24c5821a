"""The spans of a plan: what is read, in which order, and for which matrices."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

from streamconv.planning.plan import Destination, RowOp, RowRange
from streamconv.planning.tables import Cols, Pool, Sources, Table
from streamconv.quants.base import Reduction


class SpanTable(Table[RowRange]):
    """Spans in the order in which they are read.

    Attributes:
        reductions: numbers of the spans that reduce.
        nbytes: bytes that all of them read from the checkpoint.
    """

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self.sources, self.reductions, self.nbytes = sources, array("I"), 0
        self._short, self._long = array("I"), array("Q")  # source, op, reduction + 1, first destination; start, stop, align
        self._dests, self._row = array("I"), array("Q")  # matrix, cols
        self._ops, self._spreads = Pool[RowOp](), Pool[Cols]()
        self._reductions: list[Reduction] = []

    def append(self, span: RowRange) -> None:
        self.add(self.sources.number(span.source), span.start, span.stop, span.op, span.align, span.reduce)
        for dest in span.dests:
            self.add_dest(dest.matrix, dest.row, dest.cols)

    def add(self, source: int, start: int, stop: int, op: RowOp, align: int, reduce: Reduction | None = None) -> None:
        """A span without destinations; `add_dest` adds them."""
        if reduce is not None:
            self.reductions.append(len(self))
            self._reductions.append(reduce)
        self.nbytes += (stop - start) * self.sources.stored_row_bytes(source)
        reduction = 0 if reduce is None else len(self._reductions)
        self._short.extend((source, self._ops.number(op), reduction, len(self._row)))
        self._long.extend((start, stop, align))

    def add_dest(self, matrix: int, row: int, cols: Cols) -> None:
        """Another matrix that takes the rows of the last span."""
        self._dests.extend((matrix, self._spreads.number(cols)))
        self._row.append(row)

    def take(self, other: SpanTable, number: int) -> None:
        """A span that writes, of another table over the same sources."""
        source, op, _ = other._short[4 * number : 4 * number + 3]
        start, stop, align = other._long[3 * number : 3 * number + 3]
        self.add(source, start, stop, other._ops.values[op], align)
        for at in other._of(number):
            self.add_dest(other._dests[2 * at], other._row[at], other._spreads.values[other._dests[2 * at + 1]])

    def _of(self, number: int) -> range:
        """Where the destinations of a span are."""
        after = 4 * number + 7
        return range(self._short[4 * number + 3], self._short[after] if after < len(self._short) else len(self._row))

    def takers(self, number: int) -> list[int]:
        """Numbers of the matrices that take the rows of a span."""
        return [self._dests[2 * at] for at in self._of(number)]

    def place(self, number: int) -> tuple[int, int]:
        """Where a span begins: number of its source, which rises through the files of the checkpoint, and row."""
        return self._short[4 * number], self._long[3 * number]

    def stored_row_bytes(self, number: int) -> int:
        """Bytes of the checkpoint that a row of a span is read from."""
        return self.sources.stored_row_bytes(self._short[4 * number])

    def bytes_of(self, number: int) -> int:
        """Bytes of the checkpoint that a span reads."""
        start, stop = self._long[3 * number : 3 * number + 2]
        return (stop - start) * self.stored_row_bytes(number)

    def passes(self) -> int:
        """How often the rows of the most read source are read: once to write, and once for each reduction."""
        if not self._reductions:
            return 1
        keys = ["", *(reduction.key for reduction in self._reductions)]
        counts = Counter(source for source, _ in {(s, keys[r]) for s, r in zip(self._short[::4], self._short[2::4], strict=True)})
        return max(counts.values(), default=1)

    def only(self, numbers: Sequence[int], matrix: Mapping[int, int]) -> SpanTable:
        """These spans, in their order.

        Args:
            matrix: number of a matrix here -> number that it has there.
        """
        made = SpanTable(self.sources)
        for number in numbers:
            span = self._make(number)
            made.append(replace(span, dests=tuple([replace(dest, matrix=matrix[dest.matrix]) for dest in span.dests])))
        return made

    def kind(self, number: int, encoding: Callable[[int], int]) -> Hashable:
        """Spans of one kind cost the same.

        Args:
            encoding: number of a matrix's encoding.
        """
        reduction = self._short[4 * number + 2]
        reduce = type(self._reductions[reduction - 1]) if reduction else None
        wanted = tuple([(self._dests[2 * at + 1], encoding(self._dests[2 * at])) for at in self._of(number)])
        return (self.sources.kind(self._short[4 * number]), self._short[4 * number + 1], self._long[3 * number + 2], reduce, wanted)

    def reducing(self) -> Iterator[RowRange]:
        """The spans that reduce."""
        return map(self._make, self.reductions)

    def in_row_order(self) -> bool:
        """Every matrix gets its rows one below the other."""
        following = array("Q", bytes(8 * (max(self._dests[::2], default=-1) + 1)))
        for number in range(len(self)):
            seen = -1
            for at in self._of(number):
                matrix, row = self._dests[2 * at], self._row[at]
                if row < following[matrix] or matrix == seen:
                    return False
                seen, following[matrix] = matrix, row + 1
        return True

    def __len__(self) -> int:
        return len(self._short) // 4

    def _make(self, number: int) -> RowRange:
        source, op, reduction = self._short[4 * number : 4 * number + 3]
        start, stop, align = self._long[3 * number : 3 * number + 3]
        spreads = self._spreads.values
        dests = tuple([Destination(self._dests[2 * at], self._row[at], spreads[self._dests[2 * at + 1]]) for at in self._of(number)])
        reduce = self._reductions[reduction - 1] if reduction else None
        return RowRange(self.sources[source], start, stop, self._ops.values[op], dests, align, reduce)
