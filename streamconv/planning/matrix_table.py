"""The matrices of a plan, what their tensors are called, and where these lie."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, islice
from math import prod
from typing import Protocol

from streamconv.planning.plan import Matrix, PartLocation
from streamconv.planning.tables import KEPT, Pool, Table
from streamconv.quants.base import Codec, Part


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


@dataclass(frozen=True, slots=True)
class Named:
    """The module's name alone, with this shape."""

    recorded: tuple[int, ...]

    def name(self, module: str, role: str) -> str:
        return module

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
        self._parts: list[tuple[Part, ...]] = []  # of each form
        self._codec: list[int] = []  # the same
        self._row_align: list[int] = []  # the same
        self.data_starts: list[int] = []

    def form(self, form: Form) -> int:
        """Its number."""
        number = self._forms.number(form)
        if number == len(self._parts):
            self._parts.append(form.parts())
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
        """Matrices of a file that all their rows have a source for; gives their numbers. Keys as of `add`."""
        numbers = range(len(self), len(self) + len(names))
        self._file.extend([file] * len(names))
        self._form.extend(forms)
        self._filled.extend(rows)
        self._names.extend(self._modules.numbers(names))
        self._key.extend(self._keys.numbers(keys) if any(keys) else [self._keys.number("")] * len(names))
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

    def put(self, number: int, part: int, offset: int, position: int) -> None:
        """Where a part lies: byte of the file's data, and its place in the order of them."""
        self._offset[self._first[number] + part], self._position[self._first[number] + part] = offset, position

    def parts(self, number: int) -> tuple[Part, ...]:
        """The tensors of a matrix."""
        return self._parts[self._form[number]]

    def tensor(self, number: int, part: int) -> str:
        """The name of a part's tensor."""
        form = self._form[number]
        return self._forms.values[form].spelling.name(self.name(number), self._parts[form][part].role)

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
        for name in ("_file", "_form", "_filled", "_names", "_key"):
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

    def tensors(self, numbers: Iterable[int]) -> Iterator[tuple[str, Part, int, int]]:
        """Name, part, matrix and number of the part of every tensor of some matrices."""
        forms, modules = self._forms.values, self._modules.values
        for number in numbers:
            form, module = self._form[number], modules[self._names[number]]
            spelling = forms[form].spelling
            for at, part in enumerate(self._parts[form]):
                yield spelling.name(module, part.role), part, number, at

    def unfilled(self) -> Iterator[Matrix]:
        """Matrices that end in rows without a source."""
        wanted = [form.all_rows for form in self._forms.values]
        return (self._make(number) for number, form in enumerate(self._form) if self._filled[number] < wanted[form])

    def codec(self, number: int) -> Codec:
        codec, key = self._forms.values[self._form[number]].codec, self._keys.values[self._key[number]]
        return codec.keyed(key) if key else codec

    def needs(self, number: int) -> tuple[str, ...]:
        """Keys of the reductions that come before a matrix."""
        key = self._keys.values[self._key[number]]
        return (key,) if key else self._forms.values[self._form[number]].codec.needs

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
                form.spelling.name(name, part.role),
                start + self._offset[first + at],
                part.record_bytes,
                self._position[first + at],
                part.record_rows,
            )
            for at, part in enumerate(self.parts(number))
        )
        return Matrix(self._file[number], name, form.all_rows, form.cols, self._filled[number], self.codec(number), places, form.note)
