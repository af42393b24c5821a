"""The weights of a source, whatever they are stored as, kept small: some numbers each, from which a weight is made when it is asked for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

from streamconv.checkpoint.dtypes import FLOATS, DType
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.rows import RowForm, RowSource, SourceTensor, row_form
from streamconv.memory import kept
from streamconv.targets.hf.sources import READ, Reader, Weight, reader
from streamconv.targets.hf.units import Entry, Kind, kinds

_KEPT = 64
"""Weights that are kept after they were made."""


class Form:
    """What weights that differ in name and place alone share."""

    def __init__(self, weight: Weight, shape: tuple[int, ...] | None = None) -> None:
        self.dtype, self.rows, self.cols = weight.dtype, weight.rows, weight.cols
        self.shape = weight.shape if shape is None else shape
        self.nbytes, self.rows_like = weight.nbytes, row_form(weight)
        self.decoded = not isinstance(weight, SourceTensor)
        self.linear = len(self.shape) == 2 and self.dtype.name in FLOATS


class Apart(NamedTuple):
    """A weight that is only a part of a tensor, and the number of its file."""

    weight: Weight
    file: int
    form: Form


class Stored:
    """What a source holds: by name, and by number for a plan (see `planning.tables.Stored`).

    Attributes:
        order: weight -> number of its tensor, or of its codes; what is only a part of one has none.
        dropped: names of the tensors that are left out: scales of what is decoded.
    """

    # Units of one kind are alike: what the first one's weights are is worked out, the others are made when they are asked for.

    def __init__(self, reader: Reader, units: Sequence[Kind[Entry]]) -> None:
        self._reader, self._table = reader, reader.index.tensors
        self._forms: list[Form] = []
        self._form = array("I", bytes(4 * len(self._table)))  # by number; 0 for what is left out
        self._made: dict[int, Weight] = {}
        self.at: Callable[[int], Weight] = kept(self._make, _KEPT)
        self.order: dict[str, int | Apart] = {}
        self.dropped: list[str] = []
        self._apart: dict[Hashable, Form] = {}
        self._kinds: list[Kind[Form]] = []
        renamed: dict[int, tuple[int, str]] = {}  # form -> letters of a tensor's name that are cut off, and what comes in their place
        for kind in units:
            alike = [Kind([head], kind.held) for head in kind.heads] if reader.index.views else [kind]
            for each in alike:
                self._add(each, renamed)
        for number, (name, form) in enumerate(zip(self._table, self._form, strict=True)):
            if not form:
                self.dropped.append(name)
            elif form in renamed:
                cut, ending = renamed[form]
                self.order[name[: len(name) - cut] + ending] = number
            else:
                self.order[name] = number

    def _add(self, kind: Kind[Entry], renamed: dict[int, tuple[int, str]]) -> None:
        first, reads = kind.heads[0], any(rest.rpartition(".")[2] in READ for rest in kind.held)
        forms = dict[str, Form]()
        for rest in kind.held:
            weight = self._reader.weight(first + rest)
            if weight is None:
                continue
            self._forms.append(Form(weight[1]))
            form = len(self._forms)
            forms[weight[0][len(first) :]] = self._forms[-1]
            if weight[0] != first + rest:
                renamed[form] = len(rest), weight[0][len(first) :]
            for head in kind.heads:
                number = cast(int, self._table.place(head + rest))
                self._form[number] = form
                if reads:
                    self._made[number] = self._read(head + rest)
        self._kinds.append(Kind(kind.heads, forms))

    def put(self, name: str, weight: Weight, shape: tuple[int, ...], file: int) -> None:
        """A part of a tensor, with the shape that it is recorded with."""
        form = Form(weight, shape)
        alike = *name.split(".")[-2:-1], shape, form.rows, form.rows_like, form.decoded
        self.order[name] = Apart(weight, file, self._apart.setdefault(alike, form))

    def take(self, name: str) -> tuple[Weight, int]:
        """A weight that is there no more, and the number of its file."""
        whole, file = self.weights[name], self.file(name)
        del self.order[name]
        return whole, file

    def kinds(self) -> list[Kind[Form]]:
        """The units by what they hold; what was taken is held still."""
        return self._kinds + kinds({name: entry.form for name, entry in self.order.items() if not isinstance(entry, int)})

    def form(self, name: str) -> Form:
        """What a weight is, but for its place."""
        entry = self.order[name]
        return self._forms[self._form[entry] - 1] if isinstance(entry, int) else entry.form

    def forms_of(self, names: Iterable[str]) -> list[Form]:
        """As `form`, of many."""
        forms, numbers = self._forms, self._form
        entries = [*map(self.order.__getitem__, names)]
        return [forms[numbers[entry] - 1] if isinstance(entry, int) else entry.form for entry in entries]

    def file(self, name: str) -> int:
        """Number of the shard that holds a weight, or its codes."""
        entry = self.order[name]
        if not isinstance(entry, int):
            return entry.file
        return self._reader.index.views[name].pieces[0].shard if name in self._reader.index.views else self._table.shard(entry)

    @property
    def weights(self) -> Mapping[str, Weight]:
        """Where the rows of each come from."""
        return _Weights(self)

    def forms(self) -> Iterator[Form]:
        """What each weight is, in their order."""
        return iter(self.forms_of(self.order))

    def files(self) -> Iterator[int]:
        """As `file`, of each weight in their order."""
        if self._reader.index.views:
            return map(self.file, self.order)
        shard = self._table.shard
        return (shard(entry) if isinstance(entry, int) else entry.file for entry in self.order.values())

    @property
    def decoded(self) -> int:
        """How many weights are decoded."""
        return sum(form.decoded for form in self.forms())

    # ---- by number

    def place(self, name: str) -> int | None:
        entry = self.order.get(name)
        return entry if isinstance(entry, int) else None

    def holds(self, place: int, source: RowSource) -> bool:
        return source is (own := self.at(place)) or source == own

    @property
    def origin(self) -> Hashable:
        return id(self._reader.index), self._reader.into, self._reader.sound

    @property
    def alike(self) -> Sequence[int]:
        return self._form

    def rows_of(self, place: int) -> RowForm:
        return self._forms[self._form[place] - 1].rows_like

    def __len__(self) -> int:
        return len(self._form)

    def _make(self, place: int) -> Weight:
        weight = self._made.get(place)
        return self._read(self._table.name(place)) if weight is None else weight

    def _read(self, tensor: str) -> Weight:
        weight = self._reader.weight(tensor)
        assert weight is not None
        return weight[1]


class _Weights(Mapping[str, Weight]):
    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Weight:
        entry = self._stored.order[name]
        return self._stored.at(entry) if isinstance(entry, int) else entry.weight

    def __contains__(self, name: object) -> bool:
        return name in self._stored.order

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.order)

    def __len__(self) -> int:
        return len(self._stored.order)


def stored_weights(index: Index, into: DType, units: Sequence[Kind[Entry]] | None = None, sound: bool = False) -> Stored:
    """Every tensor of the source; codes of quantized weights as floats of type `into`.

    Args:
        units: the tensors, where that is known already.
        sound: scales that are NaN or infinite are refused when they are read.

    Raises:
        CheckpointError: codes without scales, or in a form that is not read.
    """
    return Stored(reader(index, into, sound), kinds(index.tensors.told()) if units is None else units)
