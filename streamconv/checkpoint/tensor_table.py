"""The tensors of a source, kept small: a quarter of a million of them are a few numbers each, and records are made when asked for."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from streamconv.checkpoint.dtypes import DType


class TensorRecord(NamedTuple):
    """One tensor of the source; begin is an offset in the file of shard number `shard`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    shard: int
    begin: int
    nbytes: int


class TensorTable(Mapping[str, TensorRecord]):
    """Records by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._names: list[str] = []
        self._kinds: list[tuple[DType, tuple[int, ...], int]] = []
        self._numbers: dict[tuple[DType, tuple[int, ...]], int] = {}
        self._kind, self._shard, self._begin = array("I"), array("H"), array("Q")

    def add(self, name: str, dtype: DType, shape: tuple[int, ...], shard: int, begin: int) -> None:
        """A tensor whose name is new."""
        self._places[name] = len(self._names)
        self._names.append(name)
        self._kind.append(self._number(dtype, shape))
        self._shard.append(shard)
        self._begin.append(begin)

    def extend(
        self, names: list[str], forms: Iterable[tuple[DType, tuple[int, ...]]], form: Iterable[int], begins: Iterable[int], shard: int
    ) -> None:
        """All tensors of a file, whose names are new; columns as in `Header`."""
        kinds = [self._number(*each) for each in forms]
        self._places.update(zip(names, itertools.count(len(self._names))))
        self._names += names
        self._kind.extend(map(kinds.__getitem__, form))
        self._shard.extend([shard] * len(names))
        self._begin.extend(begins)

    def _number(self, dtype: DType, shape: tuple[int, ...]) -> int:
        kind = self._numbers.get((dtype, shape))
        if kind is None:
            kind = self._numbers[dtype, shape] = len(self._kinds)
            self._kinds.append((dtype, shape, dtype.itemsize * math.prod(shape)))
        return kind

    def take(self, record: TensorRecord, name: str) -> None:
        """A tensor of another table, under a name that is new."""
        self.add(name, record.dtype, record.shape, record.shard, record.begin)

    def holds_any(self, names: Iterable[str]) -> bool:
        """Whether one of these is here."""
        return not self._places.keys().isdisjoint(names)

    def place(self, name: str) -> int | None:
        """Number of a tensor, None if there is none of that name."""
        return self._places.get(name)

    def name(self, place: int) -> str:
        """Name of a tensor by its number."""
        return self._names[place]

    def shard(self, place: int) -> int:
        """Number of the file of a tensor by its number."""
        return self._shard[place]

    def at(self, place: int) -> TensorRecord:
        """The tensor with a number."""
        dtype, shape, nbytes = self._kinds[self._kind[place]]
        return TensorRecord(self._names[place], dtype, shape, self._shard[place], self._begin[place], nbytes)

    @property
    def kind_numbers(self) -> Sequence[int]:
        """Of each tensor a number; those with equal ones are of one dtype and shape."""
        return self._kind

    def kinds(self) -> list[tuple[DType, tuple[int, ...]]]:
        """What dtypes and shapes there are."""
        return list(self._numbers)

    def told(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names of dtypes, and shapes, of all tensors."""
        kinds = [(dtype.name, shape) for dtype, shape, _ in self._kinds]
        return dict(zip(self._names, map(kinds.__getitem__, self._kind), strict=True))

    def __getitem__(self, name: str) -> TensorRecord:
        return self.at(self._places[name])

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
