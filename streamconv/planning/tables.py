"""A plan's matrices and spans, kept small: some dozens of bytes each, from which an object is made when it is asked for.

A quarter of a million tensors over a few ranks are a million of them, and as Python objects they would take a gigabyte.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from typing import Generic, Protocol, TypeVar, overload

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.rows import RowSource, SourceTensor
from streamconv.planning.plan import Dest, Matrix, PartPlace, RowOp, Span
from streamconv.quants.base import Encoding, Part, Reduction

_T = TypeVar("_T")
_H = TypeVar("_H", bound=Hashable)
_KEPT = 512
"""Objects that are kept after they were made: workers ask for the same ones again and again."""

Cols = tuple[tuple[int, int], ...]


class Pool(Generic[_H]):
    """Equal values, kept once and known by a number."""

    def __init__(self) -> None:
        self.values: list[_H] = []
        self._numbers: dict[_H, int] = {}
        self._last: tuple[_H | None, int] = None, 0

    def number(self, value: _H) -> int:
        if value is self._last[0]:  # hashing a value takes longer
            return self._last[1]
        found = self._numbers.get(value)
        if found is None:
            found = self._numbers[value] = len(self.values)
            self.values.append(value)
        self._last = value, found
        return found

    def close(self) -> None:
        """Nothing is added any more."""
        self._numbers.clear()


class Table(Sequence[_T]):
    """A sequence whose items are made by `_make`."""

    def __init__(self) -> None:
        self._made: Callable[[int], _T] = lru_cache(_KEPT)(self._make)

    def _make(self, number: int) -> _T:
        raise NotImplementedError

    @overload
    def __getitem__(self, number: int) -> _T: ...
    @overload
    def __getitem__(self, number: slice) -> list[_T]: ...
    def __getitem__(self, number: int | slice) -> _T | list[_T]:
        if isinstance(number, slice):
            return [self._made(at) for at in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self._made(number % len(self))

    def __iter__(self) -> Iterator[_T]:
        return map(self._make, range(len(self)))


class Stored(Protocol):
    """The tensors of a source: by name, and by number without making them."""

    def place(self, name: str) -> int | None: ...
    def at(self, place: int) -> SourceTensor: ...
    def kind(self, place: int) -> tuple[DType, int]: ...
    def row_bytes(self, place: int) -> int: ...
    def __len__(self) -> int: ...


class Sources:
    """What rows are read from, by number: a tensor of the checkpoint has its own, anything else is kept."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._others: dict[int, RowSource] = {}
        self._numbers: dict[str, int] = {}
        self._last: tuple[RowSource | None, int] = None, 0

    def number(self, source: RowSource) -> int:
        """Its number; sources of one name are one."""
        if self._last[0] is not source:
            self._last = source, self._find(source)
        return self._last[1]

    def _find(self, source: RowSource) -> int:
        known = self._numbers.get(source.name) if self._numbers else None
        if known is not None:
            return known
        place = self._stored.place(source.name)
        if place is not None and type(source) is SourceTensor:
            stored = self._stored.at(place)
            if source is stored or source == stored:
                return place
        known = self._numbers[source.name] = len(self._stored) + len(self._others)
        self._others[known] = source
        return known

    def known(self, name: str) -> int | None:
        """The number of a name, if there is one."""
        known = self._numbers.get(name)
        return self._stored.place(name) if known is None else known

    def __getitem__(self, number: int) -> RowSource:
        return self._stored.at(number) if number < len(self._stored) else self._others[number]

    def kind(self, number: int) -> tuple[DType, int]:
        """Dtype and columns."""
        if number < len(self._stored):
            return self._stored.kind(number)
        return self._others[number].dtype, self._others[number].cols

    def row_align(self, number: int) -> int:
        """Rows that are read together."""
        other = self._others.get(number)
        return 1 if other is None else other.row_align

    def stored_row_bytes(self, number: int) -> int:
        """Bytes of the checkpoint that a row is read from; 0 for what is computed."""
        return self._stored.row_bytes(number) if number < len(self._stored) else self._others[number].stored_row_bytes


class SpanTable(Table[Span]):
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

    def append(self, span: Span) -> None:
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

    def bytes_of(self, number: int) -> int:
        """Bytes of the checkpoint that a span reads."""
        start, stop = self._long[3 * number : 3 * number + 2]
        return (stop - start) * self.sources.stored_row_bytes(self._short[4 * number])

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
        source, op, reduction = self._short[4 * number : 4 * number + 3]
        reduce = type(self._reductions[reduction - 1]) if reduction else None
        wanted = tuple([(self._dests[2 * at + 1], encoding(self._dests[2 * at])) for at in self._of(number)])
        return (self.sources.kind(source), op, self._long[3 * number + 2], reduce, wanted)

    def reducing(self) -> Iterator[Span]:
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

    def _make(self, number: int) -> Span:
        source, op, reduction = self._short[4 * number : 4 * number + 3]
        start, stop, align = self._long[3 * number : 3 * number + 3]
        spreads = self._spreads.values
        dests = tuple([Dest(self._dests[2 * at], self._row[at], spreads[self._dests[2 * at + 1]]) for at in self._of(number)])
        reduce = self._reductions[reduction - 1] if reduction else None
        return Span(self.sources[source], start, stop, self._ops.values[op], dests, align, reduce)


class Spelling(Hashable, Protocol):
    """What a target calls the tensors of a matrix, and the shapes that it records; hashable."""

    def name(self, module: str, role: str) -> str:
        """The tensor of a part with this role."""

    def shape(self, part: Part, rows: int, cols: int) -> tuple[int, ...]:
        """The recorded shape of a part of a matrix [rows, cols]."""


class ByRole:
    """The module's name and the role, the part's own shape."""

    def name(self, module: str, role: str) -> str:
        return f"{module}.{role}" if role else module

    def shape(self, part: Part, rows: int, cols: int) -> tuple[int, ...]:
        return part.shape


BY_ROLE = ByRole()


class MatrixTable(Table[Matrix]):
    """Matrices by number. Once `complete`, their tensors get their places in the files.

    Attributes:
        data_starts: for each file the offset of its first data byte.
    """

    def __init__(self) -> None:
        super().__init__()
        self._file, self._rows, self._cols, self._filled = array("H"), array("Q"), array("Q"), array("Q")
        self._encoding, self._note, self._experts = array("I"), array("I"), array("I")
        self._names, self._first = array("I"), array("I", [0])
        self._modules, self._encodings, self._notes = Pool[str](), Pool[Encoding](), Pool[str]()
        self._offset, self._position = array("Q"), array("I")
        self._spelling, self._spellings = array("I"), Pool[Spelling]()
        self.data_starts: list[int] = []
        self._known: dict[tuple[int, int, int, int, int], tuple[Part, ...]] = {}

    def add(
        self, file: int, name: str, rows: int, cols: int, encoding: Encoding, experts: int, note: str, spelling: Spelling = BY_ROLE
    ) -> int:
        """A matrix [rows, cols], or [experts, rows, cols]; gives its number."""
        self._spelling.append(self._spellings.number(spelling))
        self._file.append(file)
        self._names.append(self._modules.number(name))
        self._rows.append(rows * max(experts, 1))
        self._cols.append(cols)
        self._filled.append(0)
        self._experts.append(experts)
        self._encoding.append(self._encodings.number(encoding))
        self._note.append(self._notes.number(note))
        self._first.append(self._first[-1] + len(self.parts(len(self) - 1)))
        return len(self) - 1

    def fill(self, number: int, rows: int) -> int:
        """More rows have a source; gives how many had one before."""
        before = self._filled[number]
        self._filled[number] = before + rows
        return before

    def complete(self) -> None:
        """No matrix follows; `put` may place their tensors."""
        self._offset, self._position = array("Q", bytes(8 * self._first[-1])), array("I", bytes(4 * self._first[-1]))
        self._modules.close()

    def put(self, number: int, part: int, offset: int, position: int) -> None:
        """Where a part lies: byte of the file's data, and its place in the order of them."""
        self._offset[self._first[number] + part], self._position[self._first[number] + part] = offset, position

    def parts(self, number: int) -> tuple[Part, ...]:
        """The tensors of a matrix."""
        key = self._encoding[number], self._rows[number], self._cols[number], self._experts[number], self._spelling[number]
        if key not in self._known:
            rows, cols, spelling = key[1] // max(key[3], 1), key[2], self._spellings.values[key[4]]
            parts = self.encoding(number).parts(rows, cols, key[3])
            self._known[key] = tuple([replace(part, shape=spelling.shape(part, rows, cols)) for part in parts])
        return self._known[key]

    def tensor(self, number: int, part: int) -> str:
        """The name of a part's tensor."""
        return self._spellings.values[self._spelling[number]].name(self.name(number), self.parts(number)[part].role)

    def name(self, number: int) -> str:
        return self._modules.values[self._names[number]]

    def file(self, number: int) -> int:
        return self._file[number]

    def filled(self, number: int) -> int:
        return self._filled[number]

    def moved(self, begin: Callable[[int, str], int]) -> MatrixTable:
        """The same matrices at other places.

        Args:
            begin: first byte of a tensor, by file and name.
        """
        made = copy(self)
        made._made, made._offset = lru_cache(_KEPT)(made._make), array("Q", self._offset)
        made.data_starts = [0] * len(self.data_starts)
        for number in range(len(self)):
            for at in range(len(self.parts(number))):
                made._offset[self._first[number] + at] = begin(self._file[number], self.tensor(number, at))
        return made

    def only(self, numbers: Sequence[int]) -> MatrixTable:
        """These matrices at the same places, numbered from 0."""
        made = copy(self)
        made._made = lru_cache(_KEPT)(made._make)
        for name in ("_file", "_rows", "_cols", "_filled", "_encoding", "_note", "_experts", "_names", "_spelling"):
            held: array[int] = getattr(self, name)
            setattr(made, name, array(held.typecode, [held[number] for number in numbers]))
        made._first, made._offset, made._position = array("I", [0]), array("Q"), array("I")
        for number in numbers:
            own = slice(self._first[number], self._first[number + 1])
            made._offset.extend(self._offset[own])
            made._position.extend(self._position[own])
            made._first.append(len(made._offset))
        return made

    def bytes_of(self, number: int) -> int:
        """Bytes of all tensors of a matrix."""
        return sum(part.nbytes(self._rows[number]) for part in self.parts(number))

    def unfilled(self) -> Iterator[Matrix]:
        """Matrices that end in rows without a source."""
        return (self._make(number) for number in range(len(self)) if self._filled[number] < self._rows[number])

    def encoding(self, number: int) -> Encoding:
        return self._encodings.values[self._encoding[number]]

    def encoding_number(self, number: int) -> int:
        """Equal encodings have equal numbers."""
        return self._encoding[number]

    def __len__(self) -> int:
        return len(self._note)

    def _make(self, number: int) -> Matrix:
        name, first, start = self.name(number), self._first[number], self.data_starts[self._file[number]]
        spelling = self._spellings.values[self._spelling[number]]
        places = tuple(
            PartPlace(
                spelling.name(name, part.role),
                start + self._offset[first + at],
                part.record_bytes,
                self._position[first + at],
                part.record_rows,
            )
            for at, part in enumerate(self.parts(number))
        )
        rows, cols, filled = self._rows[number], self._cols[number], self._filled[number]
        return Matrix(self._file[number], name, rows, cols, filled, self.encoding(number), places, self._notes.values[self._note[number]])
