"""A plan's matrices and spans, kept small: some dozens of bytes each, from which an object is made when it is asked for.

A quarter of a million tensors over a few ranks are a million of them, and as Python objects they would take a gigabyte.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar, overload

from streamconv.checkpoint.rows import NoSource, RowForm, RowSource, row_form
from streamconv.memory import kept

_T = TypeVar("_T")
_H = TypeVar("_H", bound=Hashable)
KEPT = 512
"""Objects that are kept after they were made: workers ask for the same ones again and again."""

_NOTHING = row_form(NoSource(""))

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
        known = self._numbers.get(value)
        if known is None:
            known = self._numbers[value] = len(self.values)
            self.values.append(value)
        self._last = value, known
        return known

    def numbers(self, values: Iterable[_H]) -> list[int]:
        """As `number`, for many of which most are new."""
        known, values_held, result = self._numbers, self.values, list[int]()
        for value in values:
            number = known.setdefault(value, len(values_held))
            if number == len(values_held):
                values_held.append(value)
            result.append(number)
        return result

    def close(self) -> None:
        """Nothing is added any more."""
        self._numbers.clear()


class Table(Sequence[_T]):
    """A sequence whose items are made by `_make`."""

    def __init__(self) -> None:
        self._made: Callable[[int], _T] = kept(self._item, KEPT)

    def _make(self, number: int) -> _T:
        raise NotImplementedError

    def _item(self, number: int) -> _T:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._make(number)

    @overload
    def __getitem__(self, number: int) -> _T: ...
    @overload
    def __getitem__(self, number: slice) -> list[_T]: ...
    def __getitem__(self, number: int | slice) -> _T | list[_T]:
        if isinstance(number, slice):
            return [self._made(at) for at in range(*number.indices(len(self)))]
        return self._made(number if number >= 0 else number + len(self))

    def __iter__(self) -> Iterator[_T]:
        return map(self._make, range(len(self)))


class Stored(Protocol):
    """The tensors of a source: by name, and by number without making them."""

    def place(self, name: str) -> int | None: ...
    def at(self, place: int) -> RowSource: ...
    def holds(self, place: int, source: RowSource) -> bool: ...
    def rows_of(self, place: int) -> RowForm: ...
    @property
    def alike(self) -> Sequence[int]:
        """Of each tensor a number; those with equal ones have equal `rows_of`."""

    @property
    def origin(self) -> Hashable:
        """Where they come from: of equal origins tensors with the same number are equal."""

    def __len__(self) -> int: ...


class Sources:
    """What rows are read from, by number: a tensor of the checkpoint has its own, anything else is kept."""

    def __init__(self, stored: Stored) -> None:
        self._stored, self._count = stored, len(stored)
        self._others: list[RowSource | str] = []  # a name stands for a `NoSource`
        self._rows: dict[int, RowForm] = {}
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
        if place is not None and self._stored.holds(place, source):
            return place
        return self._add(source.name, source)

    def _add(self, name: str, source: RowSource | str) -> int:
        self._others.append(source)
        number = self._numbers[name] = self._count + len(self._others) - 1
        return number

    def nothing(self, name: str) -> int:
        """The number of a `NoSource`, which is made when it is asked for."""
        known = self._numbers.get(name)
        return self._add(name, name) if known is None else known

    def known(self, name: str) -> int | None:
        """The number of a name, if there is one."""
        known = self._numbers.get(name)
        return self._stored.place(name) if known is None else known

    def __getitem__(self, number: int) -> RowSource:
        if number < self._count:
            return self._stored.at(number)
        source = self._others[number - self._count]
        return NoSource(source) if isinstance(source, str) else source

    @property
    def origin(self) -> Hashable:
        """As of the tensors, if each is one, or nothing; None if there are others."""
        return self._stored.origin if all(isinstance(other, str) for other in self._others) else None

    def identity(self, number: int) -> Hashable:
        """Equal for equal sources of several plans; None for what is not known by its number."""
        return (self._stored.origin, number) if number < self._count else None

    def rows(self, number: int) -> RowForm:
        """What its rows are like."""
        return next(self.rows_of((number,)))

    def rows_of(self, numbers: Iterable[int]) -> Iterator[RowForm]:
        """As `rows`, for many."""
        known, alike, count, stored = self._rows, self._stored.alike, self._count, self._stored
        for number in numbers:
            if number >= count:
                other = self._others[number - count]
                yield _NOTHING if isinstance(other, str) else row_form(other)
                continue
            form = known.get(alike[number])
            if form is None:
                form = known[alike[number]] = stored.rows_of(number)
            yield form
