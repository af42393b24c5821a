"""The matrices of a plan, what their tensors are called, and where these lie."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from math import prod
from typing import Protocol

from streamconv.memory import kept
from streamconv.planning.plan import Matrix, PartLocation
from streamconv.planning.tables import KEPT, Pool, Table
from streamconv.quants.base import Codec, Part


class Spelling(Hashable, Protocol):
    """What a target calls the tensors of a matrix, and the shapes that it records; hashable."""

    def ending(self, role: str) -> str:
        """What the tensor of a part with this role has after the module's name."""

    def shape(self, part: Part, rows: int, cols: int) -> tuple[int, ...]:
        """The recorded shape of a part of a matrix [rows, cols]."""


class ByRole:
    """The module's name and the role, the part's own shape."""

    def ending(self, role: str) -> str:
        return role and f".{role}"

    def shape(self, part: Part, rows: int, cols: int) -> tuple[int, ...]:
        return part.shape


BY_ROLE = ByRole()


@dataclass(frozen=True, slots=True)
class Named:
    """The module's name alone, with this shape."""

    recorded: tuple[int, ...]

    def ending(self, role: str) -> str:
        return ""

    def shape(self, part: Part, rows: int, cols: int) -> tuple[int, ...]:
        return self.recorded


@dataclass(frozen=True, slots=True)
class Form:
    """What matrices that differ in file and name alone share: [rows, cols], or [experts, rows, cols]."""

    rows: int
    cols: int
    codec: Codec
    experts: int = 0
    note: str = ""
    spelling: Spelling = BY_ROLE

    @property
    def all_rows(self) -> int:
        """Of all experts."""
        return self.rows * max(self.experts, 1)

    def parts(self) -> tuple[Part, ...]:
        """The tensors of such a matrix."""
        parts = self.codec.parts(self.rows, self.cols, self.experts)
        return tuple([replace(part, shape=self.spelling.shape(part, self.rows, self.cols)) for part in parts])


class MatrixTable(Table[Matrix]):
    """Matrices by number. Once `complete`, their tensors get their places in the files.

    Attributes:
        data_starts: for each file the offset of its first data byte.
    """

    def __init__(self) -> None:
        super().__init__()
        self._file, self._form, self._filled, self._names, self._key = array("H"), array("I"), array("Q"), array("I"), array("I")
        self._first, self._offset, self._position = array("I", [0]), array("Q"), array("I")
        self._modules, self._keys, self._forms, self._codecs = Pool[str](), Pool[str](), Pool[Form](), Pool[Codec]()
        self._keys.number("")
        self._parts: list[tuple[Part, ...]] = []  # of each form
        self._endings: list[list[str]] = []  # the same
        self._codec: list[int] = []  # the same
        self._row_align: list[int] = []  # the same
        self.data_starts: list[int] = []

    def form(self, form: Form) -> int:
        """Its number."""
        number = self._forms.number(form)
        if number == len(self._parts):
            self._parts.append(form.parts())
            self._endings.append([form.spelling.ending(part.role) for part in self._parts[-1]])
            self._codec.append(self._codecs.number(form.codec.keyed("")))
            self._row_align.append(form.codec.row_align)
        return number

    def cols(self, form: int) -> int:
        """Columns of the matrices of a form."""
        return self._forms.values[form].cols

    def add(self, file: int, name: str, form: int, key: str = "") -> int:
        """A matrix of the form with a number; gives its own.

        Args:
            key: of the codec, if the form leaves it open.
        """
        self._key.append(self._keys.number(key))
        self._file.append(file)
        self._form.append(form)
        self._filled.append(0)
        self._names.append(self._modules.number(name))
        self._first.append(self._first[-1] + len(self._parts[form]))
        return len(self._form) - 1

    def extend(self, file: int, names: Sequence[str], forms: Sequence[int], rows: Sequence[int], keys: Sequence[str]) -> range:
        """Matrices of new names that all their rows have a source for; gives their numbers. Keys as of `add`."""
        numbers = range(len(self), len(self) + len(names))
        self._file.extend([file] * len(names))
        self._form.extend(forms)
        self._filled.extend(rows)
        self._names.extend(range(len(self._modules.values), len(self._modules.values) + len(names)))
        self._modules.values.extend(names)
        self._key.extend(self._keys.numbers(keys) if any(keys) else [0] * len(names))
        self._first.extend(islice(accumulate([len(self._parts[form]) for form in forms], initial=self._first[-1]), 1, None))
        return numbers

    def fill(self, number: int, rows: int) -> int:
        """More rows have a source; gives how many had one before."""
        before = self._filled[number]
        self._filled[number] = before + rows
        return before

    def complete(self) -> None:
        """No matrix follows; `put` may place their tensors."""
        self._offset, self._position = array("Q", bytes(8 * self._first[-1])), array("I", bytes(4 * self._first[-1]))
        self._modules.close()
        self._keys.close()
        self._forms.close()
        self._codecs.close()

    def put(self, tensors: Sequence[int], order: Iterable[int], offsets: Iterable[int]) -> None:
        """Where the tensors of a file lie, as `tensors` numbers them.

        Args:
            order: place in `tensors` of each tensor of the file, in the order of its data; of others the end of `tensors` or more.
            offsets: where each begins, counted from the first data byte.
        """
        for position, (at, offset) in enumerate(zip(order, offsets, strict=True)):
            if at < len(tensors):
                self._offset[tensors[at]], self._position[tensors[at]] = offset, position

    def parts(self, number: int) -> tuple[Part, ...]:
        """The tensors of a matrix."""
        return self._parts[self._form[number]]

    def tensor(self, number: int, part: int) -> str:
        """The name of a part's tensor."""
        return self.name(number) + self._endings[self._form[number]][part]

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
        table = copy(self)
        table._made, table._offset = kept(table._item, KEPT), array("Q", self._offset)
        table.data_starts = [0] * len(self.data_starts)
        for number in range(len(self)):
            for at in range(len(self.parts(number))):
                table._offset[self._first[number] + at] = begin(self._file[number], self.tensor(number, at))
        return table

    def only(self, numbers: Sequence[int]) -> MatrixTable:
        """These matrices at the same places, numbered from 0."""
        table = copy(self)
        table._made = kept(table._item, KEPT)
        for name in ("_file", "_form", "_filled", "_names", "_key"):
            column: array[int] = getattr(self, name)
            setattr(table, name, array(column.typecode, [column[number] for number in numbers]))
        table._first, table._offset, table._position = array("I", [0]), array("Q"), array("I")
        for number in numbers:
            own = slice(self._first[number], self._first[number + 1])
            table._offset.extend(self._offset[own])
            table._position.extend(self._position[own])
            table._first.append(len(table._offset))
        return table

    def bytes_of(self, number: int) -> int:
        """Bytes of all tensors of a matrix."""
        rows = self._forms.values[self._form[number]].all_rows
        return sum(part.nbytes(rows) for part in self.parts(number))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.bytes_of, range(len(self))))

    def recorded_bytes(self) -> int:
        """Bytes of all tensors, in the shapes that are recorded."""
        counts = Counter(self._form)
        return sum(counts[at] * part.dtype.itemsize * prod(part.shape) for at, parts in enumerate(self._parts) for part in parts)

    def tensors(self, numbers: Sequence[int]) -> tuple[list[str], list[Part], list[int]]:
        """Name, part and number of every tensor of some matrices, a column for each."""
        first, parts, endings, modules = self._first, self._parts, self._endings, self._modules.values
        forms = [self._form[number] for number in numbers]
        named = zip([modules[self._names[number]] for number in numbers], forms, strict=True)
        names = [module + ending for module, form in named for ending in endings[form]]
        tensors = [tensor for number in numbers for tensor in range(first[number], first[number + 1])]
        return names, [part for form in forms for part in parts[form]], tensors

    def held(self, files: int) -> tuple[list[array[int]], list[int]]:
        """The matrices of each file, and how many tensors it has of them."""
        numbers = [array("I") for _ in range(files)]
        for number, file in enumerate(self._file):
            numbers[file].append(number)
        counts = [0] * files
        for (file, form), many in Counter(zip(self._file, self._form, strict=True)).items():
            counts[file] += many * len(self._parts[form])
        return numbers, counts

    def unfilled(self) -> Iterator[Matrix]:
        """Matrices that end in rows without a source."""
        rows = [form.all_rows for form in self._forms.values]
        return (self._make(number) for number, form in enumerate(self._form) if self._filled[number] < rows[form])

    def codec(self, number: int) -> Codec:
        codec, key = self._forms.values[self._form[number]].codec, self._keys.values[self._key[number]]
        return codec.keyed(key) if key else codec

    def needs(self, number: int) -> tuple[str, ...]:
        """Keys of the reductions that come before a matrix."""
        key = self._keys.values[self._key[number]]
        return (key,) if key else self._forms.values[self._form[number]].codec.needs

    def needing(self, numbers: Iterable[int]) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Place among these matrices, and keys that it needs, of each that does not need the same as one before it."""
        seen = set[tuple[int, int]]()
        for at, number in enumerate(numbers):
            key = self._key[number]
            own = key, 0 if key else self._form[number]
            if own not in seen:
                seen.add(own)
                yield at, self.needs(number)

    def row_align(self, number: int) -> int:
        """Rows of a tile of the codec."""
        return self._row_align[self._form[number]]

    def row_aligns(self, numbers: Iterable[int]) -> Iterator[int]:
        """As `row_align`, for many."""
        aligns, forms = self._row_align, self._form
        return (aligns[forms[number]] for number in numbers)

    def codecs(self) -> Sequence[int]:
        """A number for the codec of each matrix; codecs that work alike have equal ones."""
        return array("I", map(self._codec.__getitem__, self._form))

    def __len__(self) -> int:
        return len(self._form)

    def _make(self, number: int) -> Matrix:
        name, first, start = self.name(number), self._first[number], self.data_starts[self._file[number]]
        form = self._forms.values[self._form[number]]
        places = tuple(
            PartLocation(
                self.tensor(number, at),
                start + self._offset[first + at],
                part.record_bytes,
                self._position[first + at],
                part.record_rows,
            )
            for at, part in enumerate(self.parts(number))
        )
        return Matrix(self._file[number], name, form.all_rows, form.cols, self._filled[number], self.codec(number), places, form.note)
