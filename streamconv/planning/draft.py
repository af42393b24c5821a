"""Collects matrices and what feeds them, then fixes offsets and turns feeds into spans.

A feed says: rows of a source become rows of a matrix. Feeds of one source are cut where the set of matrices changes, so
that every source row is read once and serves every rank that needs it.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import lcm
from operator import mul, sub
from typing import NamedTuple, cast

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.rows import RowSource
from streamconv.errors import DataError
from streamconv.memory import check_room
from streamconv.planning.file_layout import Fixed, layout
from streamconv.planning.matrix_table import BY_ROLE, Form, MatrixTable, Spelling
from streamconv.planning.plan import PLAIN_ROWS, Constant, OutputFile, RowOp, RowRange, SideFile, align_of
from streamconv.planning.row_order import in_row_order
from streamconv.planning.span_table import Reducing, SpanTable
from streamconv.planning.tables import Cols, Pool, Sources, Stored
from streamconv.quants import factors
from streamconv.quants.base import Codec, Reduction


class _Feed(NamedTuple):
    start: int
    stop: int
    op: RowOp
    matrix: int
    row: int
    cols: Cols


@dataclass(frozen=True, slots=True)
class Fed:
    """Rows [start, stop) and columns of a source that a matrix was given."""

    source: RowSource
    start: int
    stop: int
    cols: Cols


_LAYOUT_TAKES = 450
"""Bytes of memory for each matrix: its names to be sorted, its entry in a header, twice at the end."""
_END = 0xFFFFFFFF
"""No further feed of a source."""


class _Feeds:
    """Feeds in the order in which they come, a column for each fact; those of a source are chained when they are asked for."""

    def __init__(self) -> None:
        self.source, self.matrix, self.op, self.cols = array("I"), array("I"), array("I"), array("I")
        self.start, self.stop, self.row = array("Q"), array("Q"), array("Q")
        self.ops, self.spreads = Pool[RowOp](), Pool[Cols]()
        self._head, self._tail = array("I"), array("I")  # by source
        self._next = array("I")

    def add(self, source: int, start: int, stop: int, op: RowOp, matrix: int, row: int, cols: Cols) -> None:
        """Another feed of the source with a number."""
        self.source.append(source)
        self.start.append(start)
        self.stop.append(stop)
        self.op.append(self.ops.number(op))
        self.matrix.append(matrix)
        self.row.append(row)
        self.cols.append(self.spreads.number(cols))

    def extend(self, sources: Iterable[int], rows: Sequence[int], matrices: Iterable[int], cols: Iterable[int]) -> None:
        """All rows of sources, each for a matrix of its own; columns by their numbers."""
        self.source.extend(sources)
        self.start.extend(array("Q", bytes(8 * len(rows))))
        self.stop.extend(rows)
        self.op.extend(array("I", [self.ops.number(PLAIN_ROWS)]) * len(rows))
        self.matrix.extend(matrices)
        self.row.extend(array("Q", bytes(8 * len(rows))))
        self.cols.extend(cols)

    def of(self, source: int) -> list[_Feed]:
        """The feeds of a source, by its number."""
        self._chain()
        at, feeds = self._head[source] if source < len(self._head) else _END, list[_Feed]()
        while at != _END:
            op, cols = self.ops.values[self.op[at]], self.spreads.values[self.cols[at]]
            feeds.append(_Feed(self.start[at], self.stop[at], op, self.matrix[at], self.row[at], cols))
            at = self._next[at]
        return feeds

    def order(self) -> Iterator[int]:
        """The sources, in the order of their first feeds."""
        self._chain()
        return (source for at, source in enumerate(self.source) if self._head[source] == at)

    def alone(self) -> bool:
        """Every source has one feed."""
        seen = bytearray(max(self.source, default=-1) + 1)
        for source in self.source:
            seen[source] = 1
        return sum(seen) == len(self.source)

    def _chain(self) -> None:
        if len(self._next) == len(self.source):
            return
        head, tail, following = self._head, self._tail, self._next
        more = [_END] * (max(self.source) + 1 - len(head))
        head.extend(more)
        tail.extend(more)
        for at, source in enumerate(self.source[len(following) :], len(following)):
            if head[source] == _END:
                head[source] = at
            else:
                following[tail[source]] = at
            tail[source] = at
            following.append(_END)


class Draft:
    """Mutable while a target describes its output; `finish` freezes it.

    Attributes:
        side_files: everything of the output that is no tensor file; the last one makes it a checkpoint.
        warnings: things the user should know, one line each.
        decisions: module -> how it is stored and why, for the plan's table.
    """

    def __init__(self, stored: Stored) -> None:
        self.side_files: list[SideFile] = []
        self.warnings: list[str] = []
        self.decisions: dict[str, str] = {}
        self._files: list[tuple[str, Mapping[str, str] | None]] = []
        self._sources = Sources(stored)
        self._matrices = MatrixTable()
        self._feeds = _Feeds()
        self._fixed: list[Fixed] = []
        self._reductions: dict[str, list[tuple[int, int, Reduction]]] = {}
        self._reduced = set[str]()  # keys of those whose spans are there

    def file(self, name: str, metadata: Mapping[str, str] | None = None) -> int:
        """Add a safetensors file; gives its number."""
        self._files.append((name, metadata))
        return len(self._files) - 1

    def matrix(
        self,
        file: int,
        name: str,
        rows: int,
        cols: int,
        codec: Codec,
        *,
        experts: int = 0,
        note: str = "",
        spelling: Spelling = BY_ROLE,
    ) -> int:
        """Add a matrix [rows, cols], or [experts, rows, cols]; gives its number."""
        return self._matrices.add(file, name, self._matrices.form(Form(rows, cols, codec, experts, note, spelling)))

    def form(self, rows: int, cols: int, codec: Codec, spelling: Spelling) -> int:
        """What many matrices share; gives its number."""
        return self._matrices.form(Form(rows, cols, codec, spelling=spelling))

    def wholes(
        self, file: int, names: Sequence[str], forms: Sequence[int], sources: Sequence[int], rows: Sequence[int], keys: Sequence[str] = ()
    ) -> None:
        """Add matrices of a file that take all rows and columns of a source each; columns of equal length.

        Args:
            forms, sources: their numbers.
            keys: of the reductions that are needed, where the codec of a form leaves it open.
        """
        matrices: Iterable[int] = self._matrices.extend(file, names, forms, rows, keys)
        cols = {form: self._feeds.spreads.number(((0, self._matrices.cols(form)),)) for form in set(forms)}
        if not all(rows):
            fed = [each for each in zip(sources, rows, matrices, forms, strict=True) if each[1]]
            sources, rows, matrices, forms = [[*column] for column in zip(*fed, strict=True)] or [[]] * 4
        self._feeds.extend(sources, rows, matrices, map(cols.__getitem__, forms))

    @property
    def files(self) -> list[str]:
        """Names of the files, by number."""
        return [name for name, _ in self._files]

    def places(self) -> dict[str, int]:
        """Tensor -> number of its file, of all that is described so far."""
        files = {one.name: one.file for one in self._fixed}
        for file, numbers in enumerate(self._matrices.held(len(self._files))[0]):
            files.update(dict.fromkeys(self._matrices.tensors(numbers)[0], file))
        return files

    def tensor_bytes(self) -> int:
        """Bytes of all tensors described so far."""
        return self._matrices.recorded_bytes() + sum(len(fixed.data) for fixed in self._fixed)

    def feed(
        self,
        matrix: int,
        source: RowSource | None,
        start: int,
        stop: int,
        *,
        cols: Sequence[tuple[int, int]] | None = None,
        op: RowOp = PLAIN_ROWS,
    ) -> None:
        """Source rows [start, stop) become the next rows of the matrix. A missing source was reported already."""
        if source is None or start >= stop:
            return
        row = self._matrices.fill(matrix, op.out_rows(stop - start))
        self._feeds.add(self._sources.number(source), start, stop, op, matrix, row, tuple(cols or ((0, source.cols),)))

    def source(self, source: RowSource) -> int:
        """Its number; a tensor of the source has its own."""
        return self._sources.number(source)

    def nothing(self, name: str) -> int:
        """The number of a `NoSource`."""
        return self._sources.nothing(name)

    def reduce(self, source: RowSource | None, reduction: Reduction) -> None:
        """All rows of the source contribute to a reduction, before anything that needs it."""
        if source is not None:
            self.reduce_whole(self._sources.number(source), source.rows, reduction)

    def reduce_whole(self, source: int, rows: int, reduction: Reduction) -> None:
        """As `reduce`, for the source with a number and all of its rows."""
        self._reductions.setdefault(reduction.key, []).append((source, rows, reduction))

    def fed(self, sources: Iterable[str]) -> dict[int, list[Fed]]:
        """Matrix -> what it was given so far from these sources (by name), in the order of its rows."""
        spans: dict[int, list[tuple[int, Fed]]] = {}
        for name in sources:
            number = self._sources.known(name)
            for feed in self._feeds.of(number) if number is not None else ():
                taken = Fed(self._sources[cast(int, number)], feed.start, feed.stop, feed.cols)
                spans.setdefault(feed.matrix, []).append((feed.row, taken))
        return {matrix: [fed for _, fed in sorted(spans[matrix], key=lambda pair: pair[0])] for matrix in sorted(spans)}

    def place(self, matrix: int) -> tuple[int, str]:
        """File and name of a matrix."""
        return self._matrices.file(matrix), self._matrices.name(matrix)

    def codec(self, matrix: int) -> Codec:
        return self._matrices.codec(matrix)

    def filled(self, matrix: int) -> int:
        """Rows given so far."""
        return self._matrices.filled(matrix)

    def side_file(self, name: str, data: bytes) -> None:
        self.side_files.append(SideFile(name, len(data), data))

    def constant(self, file: int, name: str, dtype: DType, shape: tuple[int, ...], data: bytes) -> None:
        """Add a small tensor whose bytes are known.

        Raises:
            DataError: a factor that is not finite, or zero where an engine divides by it.
        """
        wrong = factors.problem(name, dtype, data, len(data) == dtype.itemsize)
        if wrong:
            raise DataError(wrong, hint="the source or the activation ranges hold a value that no scale can be made of")
        self._fixed.append(Fixed(file, name, dtype, shape, data))

    def finish(self) -> tuple[list[OutputFile], MatrixTable, SpanTable, list[Constant]]:
        """The plan's parts.

        Raises:
            RefusedError: a rank file would hold more than a reader takes.
        """
        check_room(_LAYOUT_TAKES * len(self._matrices), "laying out the files")
        self._matrices.complete()
        files, constants = layout(self._files, self._matrices, self._fixed)
        spans, feeds = SpanTable(self._sources, self._feeds.ops, self._feeds.spreads), self._feeds
        if feeds.alone():
            ops, rows = feeds.ops.values, [*self._sources.rows_of(feeds.source)]
            nbytes = sum(map(mul, map(sub, feeds.stop, feeds.start), [each.stored for each in rows]))
            align = cache(lambda encoded, read, op: _align(encoded, read, ops[op]))
            aligns = array("Q", map(align, self._matrices.row_aligns(feeds.matrix), [each.align for each in rows], feeds.op))
            needing = self._matrices.needing(feeds.matrix) if self._reductions else ()
            reducing = [Reducing(at, *each) for at, keys in needing for each in self._wanted(keys)]
            spans.take(feeds.source, feeds.start, feeds.stop, feeds.op, aligns, nbytes, reducing)
            spans.take_dests(feeds.matrix, feeds.row, feeds.cols)
        else:
            for source in feeds.order():
                self._cut(spans, source, feeds.of(source))
        if not spans.in_row_order():
            spans = self._table(in_row_order([span for span in spans if span.reduce is None]))
        return files, self._matrices, spans, constants

    def _table(self, spans: Iterable[RowRange]) -> SpanTable:
        table = SpanTable(self._sources)
        self._reduced.clear()
        for span in spans:
            for dest in span.dests:
                self._before(table, dest.matrix)
            table.append(span)
        return table

    def _before(self, spans: SpanTable, matrix: int) -> None:
        """Each reduction comes right before the first span that needs it."""
        for number, rows, reduction in self._wanted(self._matrices.needs(matrix)) if self._reductions else ():
            spans.add(number, 0, rows, PLAIN_ROWS, self._sources.rows(number).align, reduction)

    def _wanted(self, keys: Iterable[str]) -> Iterator[tuple[int, int, Reduction]]:
        """What of these reductions, and of those that they need, is not there yet."""
        for key in keys:
            if key not in self._reduced:
                self._reduced.add(key)
                for number, rows, reduction in self._reductions[key]:
                    if reduction.needs:
                        yield from self._wanted(reduction.needs)
                    yield number, rows, reduction

    def _cut(self, spans: SpanTable, source: int, feeds: list[_Feed]) -> None:
        """The spans of a source, by its number."""
        if len(feeds) == 1:
            feed = feeds[0]
            self._before(spans, feed.matrix)
            align = _align(self._matrices.row_align(feed.matrix), self._sources.rows(source).align, feed.op)
            spans.add(source, feed.start, feed.stop, feed.op, align)
            spans.add_dest(feed.matrix, feed.row, feed.cols)
            return
        edges = sorted({feed.start for feed in feeds} | {feed.stop for feed in feeds})
        for start, stop in itertools.pairwise(edges):
            active = [feed for feed in feeds if feed.start <= start and stop <= feed.stop]
            if not active:
                continue
            op = active[0].op
            if any(feed.op != op for feed in active):
                raise AssertionError(f"{self._sources[source].name}: two row operations on the same rows")
            for feed in active:
                self._before(spans, feed.matrix)
            align = align_of({self._sources.rows(source).align, *(self._matrices.row_align(feed.matrix) for feed in active)}, op)
            spans.add(source, start, stop, op, align)
            for feed in active:
                spans.add_dest(feed.matrix, feed.row + op.out_rows(start - feed.start), feed.cols)


def _align(encoded: int, read: int, op: RowOp) -> int:
    """Source rows that a tile holds a multiple of, by what the codec and the source want."""
    return lcm(encoded, read) if op is PLAIN_ROWS else align_of((encoded, read), op)
