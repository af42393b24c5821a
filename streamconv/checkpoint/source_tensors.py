"""The tensors of a source as matrices to read rows from, made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.rows import RowForm, SourceTensor, row_form, tensor_at
from streamconv.memory import kept

_KEPT = 64
"""Tensors that are kept after they were made: whoever plans asks for one several times."""


class SourceTensors(Mapping[str, SourceTensor]):
    """By name, and by number as in the index."""

    def __init__(self, index: Index) -> None:
        self._table, self._views = index.tensors, index.assembled or index.views
        self.at: Callable[[int], SourceTensor] = kept(self._make, _KEPT)

    def place(self, name: str) -> int | None:
        """Number of a tensor, None if there is none of that name."""
        return self._table.place(name)

    def _make(self, place: int) -> SourceTensor:
        """The tensor with a number."""
        name, dtype, shape, shard, begin, _ = self._table.at(place)
        return self._views[name] if name in self._views else tensor_at(name, dtype, shape, shard, begin)

    def rows_of(self, place: int) -> RowForm:
        """What the rows of a tensor are like, by its number."""
        return row_form(self.at(place))

    @property
    def alike(self) -> Sequence[int]:
        """Of each tensor a number; those with equal ones have equal `rows_of`."""
        return range(len(self)) if self._views else self._table.kind_numbers

    @property
    def origin(self) -> Hashable:
        """Of equal origins tensors with the same number are equal."""
        return id(self._table)

    def holds(self, place: int, source: object) -> bool:
        """Whether a source is the tensor with a number, as it is stored."""
        return type(source) is SourceTensor and source == self.at(place)

    def __getitem__(self, name: str) -> SourceTensor:
        place = self._table.place(name)
        if place is None:
            raise KeyError(name)
        return self.at(place)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


class Changed(MutableMapping[str, SourceTensor]):
    """Tensors of which some are taken away and others put in; only these are kept."""

    def __init__(self, tensors: Mapping[str, SourceTensor]) -> None:
        self._tensors, self._put, self._taken = tensors, dict[str, SourceTensor](), set[str]()

    def __getitem__(self, name: str) -> SourceTensor:
        if name in self._taken:
            raise KeyError(name)
        return self._put[name] if name in self._put else self._tensors[name]

    def __setitem__(self, name: str, tensor: SourceTensor) -> None:
        self._put[name] = tensor
        self._taken.discard(name)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._put.pop(name, None)
        self._taken.add(name)

    def __contains__(self, name: object) -> bool:
        return name in self._put or (name in self._tensors and name not in self._taken)

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._tensors if name not in self._taken)
        yield from (name for name in self._put if name not in self._tensors)

    def __len__(self) -> int:
        return sum(1 for _ in self)
