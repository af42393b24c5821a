"""Collects matrices and what feeds them, then fixes offsets and turns feeds into spans.

A feed says: rows of a source become rows of a matrix. Feeds of one source are cut where the set of matrices changes, so
that every source row is read once and serves every rank that needs it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.header import build_header
from streamconv.errors import DataError
from streamconv.plan import (
    PLAIN_ROWS,
    Constant,
    Dest,
    Matrix,
    OutputFile,
    OutputTensor,
    PartPlace,
    RowOp,
    Source,
    Span,
    align_of,
)
from streamconv.quants import factors
from streamconv.quants.base import Encoding, Part, Reduction


@dataclass(slots=True)
class _Draft:
    file: int
    name: str
    rows: int
    cols: int
    encoding: Encoding
    parts: tuple[Part, ...]
    note: str
    filled: int = 0


@dataclass(frozen=True, slots=True)
class _Feed:
    start: int
    stop: int
    op: RowOp
    matrix: int
    row: int
    cols: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Fed:
    """Rows [start, stop) and columns of a source that a matrix was given."""

    source: Source
    start: int
    stop: int
    cols: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class _Fixed:
    file: int
    name: str
    dtype: DType
    shape: tuple[int, ...]
    data: bytes


@dataclass(slots=True)
class Builder:
    """Mutable while a target describes its checkpoint; `finish` freezes it."""

    files: int
    _drafts: list[_Draft] = field(default_factory=list)
    _feeds: dict[str, list[_Feed]] = field(default_factory=dict)
    _sources: dict[str, Source] = field(default_factory=dict)
    _fixed: list[_Fixed] = field(default_factory=list)
    _reductions: dict[str, list[tuple[Source, Reduction]]] = field(default_factory=dict)

    def matrix(
        self, file: int, name: str, rows: int, cols: int, encoding: Encoding, *, experts: int = 0, note: str = ""
    ) -> int:
        """Add a matrix [rows, cols], or [experts, rows, cols]; gives its number."""
        parts = encoding.parts(rows, cols, experts)
        self._drafts.append(_Draft(file, name, rows * max(experts, 1), cols, encoding, parts, note))
        return len(self._drafts) - 1

    def feed(
        self,
        matrix: int,
        source: Source | None,
        start: int,
        stop: int,
        *,
        cols: Sequence[tuple[int, int]] | None = None,
        op: RowOp = PLAIN_ROWS,
    ) -> None:
        """Source rows [start, stop) become the next rows of the matrix. A missing source was reported already."""
        if source is None or start >= stop:
            return
        draft = self._drafts[matrix]
        self._sources[source.name] = source
        feeds = self._feeds.setdefault(source.name, [])
        feeds.append(_Feed(start, stop, op, matrix, draft.filled, tuple(cols or ((0, source.cols),))))
        draft.filled += op.out_rows(stop - start)

    def reduce(self, source: Source | None, reduction: Reduction) -> None:
        """All rows of the source contribute to a reduction, before anything that needs it."""
        if source is not None:
            self._reductions.setdefault(reduction.key, []).append((source, reduction))

    def fed(self, sources: Container[str]) -> dict[int, list[Fed]]:
        """Matrix -> what it was given so far from these sources (by name), in the order of its rows."""
        found: dict[int, list[tuple[int, Fed]]] = {}
        for name, feeds in self._feeds.items():
            if name in sources:
                for feed in feeds:
                    taken = Fed(self._sources[name], feed.start, feed.stop, feed.cols)
                    found.setdefault(feed.matrix, []).append((feed.row, taken))
        return {
            matrix: [fed for _, fed in sorted(found[matrix], key=lambda pair: pair[0])] for matrix in sorted(found)
        }

    def place(self, matrix: int) -> tuple[int, str]:
        """File and name of a matrix."""
        return self._drafts[matrix].file, self._drafts[matrix].name

    def encoding(self, matrix: int) -> Encoding:
        return self._drafts[matrix].encoding

    def filled(self, matrix: int) -> int:
        """Rows given so far."""
        return self._drafts[matrix].filled

    def constant(self, file: int, name: str, dtype: DType, shape: tuple[int, ...], data: bytes) -> None:
        """Add a small tensor whose bytes are known.

        Raises:
            DataError: a factor that is not finite, or zero where an engine divides by it.
        """
        wrong = factors.problem(name, dtype, data, len(data) == dtype.itemsize)
        if wrong:
            raise DataError(wrong, hint="the source or the activation ranges hold a value that no scale can be made of")
        self._fixed.append(_Fixed(file, name, dtype, shape, data))

    def finish(self) -> tuple[list[OutputFile], list[Matrix], list[Span], list[Constant]]:
        entries: list[list[tuple[str, DType, tuple[int, ...]]]] = [[] for _ in range(self.files)]
        for draft in self._drafts:
            entries[draft.file].extend(
                (_tensor_name(draft.name, part.suffix), part.dtype, part.shape) for part in draft.parts
            )
        for fixed in self._fixed:
            entries[fixed.file].append((fixed.name, fixed.dtype, fixed.shape))
        files, places = [], []
        for number, listed in enumerate(entries):
            header, where = build_header(listed)
            tensors = [OutputTensor(name, dtype, shape, *where[name]) for name, dtype, shape in listed]
            tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
            size = max((tensor.end for tensor in tensors), default=len(header))
            files.append(OutputFile(f"rank{number}.safetensors", size, header, tuple(tensors)))
            places.append(where)
        matrices = [
            Matrix(
                draft.file,
                draft.name,
                draft.rows,
                draft.cols,
                draft.filled,
                draft.encoding,
                tuple(
                    PartPlace(name, places[draft.file][name][0], part.row_bytes)
                    for part in draft.parts
                    for name in (_tensor_name(draft.name, part.suffix),)
                ),
                draft.note,
            )
            for draft in self._drafts
        ]
        constants = [Constant(f.file, f.name, places[f.file][f.name][0], f.data) for f in self._fixed]
        spans = in_row_order([span for name, feeds in self._feeds.items() for span in self._cut(self._sources[name], feeds)])
        return files, matrices, self._after_reductions(spans), constants

    def _after_reductions(self, spans: list[Span]) -> list[Span]:
        """The spans, each reduction right before the first of them that needs it."""
        if not self._reductions:
            return spans
        ordered: list[Span] = []
        done: set[str] = set()

        def put(keys: tuple[str, ...]) -> None:
            for key in keys:
                if key not in done:
                    done.add(key)
                    for source, reduction in self._reductions[key]:
                        put(reduction.needs)
                        ordered.append(Span(source, 0, source.rows, PLAIN_ROWS, (), 1, reduction))

        for span in spans:
            for dest in span.dests:
                put(self._drafts[dest.matrix].encoding.needs)
            ordered.append(span)
        return ordered

    def _cut(self, source: Source, feeds: list[_Feed]) -> list[Span]:
        edges = sorted({feed.start for feed in feeds} | {feed.stop for feed in feeds})
        spans = []
        for start, stop in itertools.pairwise(edges):
            active = [feed for feed in feeds if feed.start <= start and stop <= feed.stop]
            if not active:
                continue
            op = active[0].op
            if any(feed.op != op for feed in active):
                raise AssertionError(f"{source.name}: two row operations on the same rows")
            dests = tuple([Dest(feed.matrix, feed.row + op.out_rows(start - feed.start), feed.cols) for feed in active])
            align = align_of({self._drafts[feed.matrix].encoding.row_align for feed in active}, op)
            spans.append(Span(source, start, stop, op, dests, align))
        return spans


def in_row_order(spans: list[Span]) -> list[Span]:
    """The spans so ordered that every matrix gets its rows in order, even where the source's do not come so.

    A matrix is hashed while it is written, and a worker waits for the rows before its own: an order that breaks this would wait for
    ever. Where matrices want the same rows in opposite orders, each gets spans of its own, and those rows are read again.
    """
    wanted: dict[int, list[tuple[int, int]]] = {}  # matrix -> (row, number of the span)
    for number, span in enumerate(spans):
        for dest in span.dests:
            wanted.setdefault(dest.matrix, []).append((dest.row, number))
    if all(one < other and at < then for rows in wanted.values() for (one, at), (other, then) in itertools.pairwise(rows)):
        return spans
    before, after = [0] * len(spans), [list[int]() for _ in spans]
    for rows in wanted.values():
        for (_, one), (_, other) in itertools.pairwise(sorted(rows)):
            before[other] += 1
            after[one].append(other)
    ready = [number for number, count in enumerate(before) if not count]
    ordered: list[Span] = []
    while ready:  # the first in the source's order of those that may come
        number = heapq.heappop(ready)
        ordered.append(spans[number])
        for other in after[number]:
            before[other] -= 1
            if not before[other]:
                heapq.heappush(ready, other)
    if len(ordered) == len(spans):
        return ordered
    single = [replace(span, dests=(dest,)) for span in spans for dest in span.dests]
    return sorted(single, key=lambda span: (span.dests[0].matrix, span.dests[0].row))


def _tensor_name(module: str, suffix: str) -> str:
    return f"{module}.{suffix}" if suffix else module
