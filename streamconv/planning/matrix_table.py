"""The matrices of a plan, what their tensors are called, and where these lie."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

from streamconv.planning.plan import Matrix, PartPlace
from streamconv.planning.tables import KEPT, Pool, Table
from streamconv.quants.base import Encoding, Part


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
        made._made, made._offset = lru_cache(KEPT)(made._make), array("Q", self._offset)
        made.data_starts = [0] * len(self.data_starts)
        for number in range(len(self)):
            for at in range(len(self.parts(number))):
                made._offset[self._first[number] + at] = begin(self._file[number], self.tensor(number, at))
        return made

    def only(self, numbers: Sequence[int]) -> MatrixTable:
        """These matrices at the same places, numbered from 0."""
        made = copy(self)
        made._made = lru_cache(KEPT)(made._make)
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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.bytes_of, range(len(self))))

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
