"""What is read, for the plans of all outputs of a run: rows that several of them want are read once."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence

from streamconv.checkpoint.rows import RowSource
from streamconv.memory import without_collection
from streamconv.planning.merge import Owned, Read, Share, merge
from streamconv.planning.plan import Plan, RowRange


class Reads:
    """The reads of some plans, in an order in which every matrix that is not loose gets its rows one below the other.

    Attributes:
        nbytes: of the checkpoint that all of them read, all passes together.
        loose: of each plan the matrices that get their rows in any order.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = tuple(plans)
        self._merged: list[Read] | None = None  # one plan reads what its spans say
        loose = set[Owned]()
        if len(plans) > 1:
            with without_collection():
                self._merged, loose = merge(self.plans)
        self.loose = [{matrix for output, matrix in loose if output == number} for number in range(len(plans))]
        if self._merged is None:
            self.nbytes = sum(plan.bytes_read for plan in plans)
        else:
            self.nbytes = sum(map(self.bytes_of, range(len(self._merged))))

    def _span(self, share: Share) -> RowRange:
        return self.plans[share.output].spans[share.span]

    def __len__(self) -> int:
        return sum(len(plan.spans) for plan in self.plans) if self._merged is None else len(self._merged)

    def __iter__(self) -> Iterator[Read]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Read:
        if self._merged is not None:
            return self._merged[number]
        span = self.plans[0].spans[number]
        share = Share(0, number, 0)
        return Read(span.start, span.stop, span.align, (share,), share)

    def reader(self, number: int) -> RowRange:
        """A span whose source has all rows of a read."""
        return self._span(self[number].reader)

    def bytes_of(self, number: int) -> int:
        """Bytes of the checkpoint that a read reads."""
        if self._merged is None:
            return self.plans[0].spans.bytes_of(number)
        read = self._merged[number]
        return (read.stop - read.start) * self.plans[read.reader.output].spans.stored_row_bytes(read.reader.span)

    def source(self, number: int) -> RowSource:
        """What a read reads."""
        return self.reader(number).source

    def spans(self) -> Iterator[tuple[Plan, RowRange]]:
        """Every span of every plan."""
        return ((plan, span) for plan in self.plans for span in plan.spans)

    def kinds(self) -> Iterator[Hashable]:
        """Of each read what it is like: reads of one kind cost the same."""
        own = (plan.spans.kinds(plan.matrices.codecs()) for plan in self.plans)
        if self._merged is None:
            return next(own)
        numbers: dict[Hashable, int] = {}
        known = [array("I", [numbers.setdefault(kind, len(numbers)) for kind in kinds]) for kinds in own]
        return ((read.align, *((s.output, known[s.output][s.span]) for s in read.shares)) for read in self._merged)
