"""What is read, for the plans of all outputs of a run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from streamconv.checkpoint.rows import RowSource
from streamconv.planning.plan import Plan, Span


@dataclass(frozen=True, slots=True)
class Read:
    """Source rows [start, stop), read once for the spans of all outputs that want them.

    Attributes:
        align: tiles are cut a multiple of so many rows from `start` on.
        spans: (output, number of a span of its plan), all of one source and one row operation; of an output in the order of its rows.
    """

    start: int
    stop: int
    align: int
    spans: tuple[tuple[int, int], ...]


class Reads:
    """The reads of some plans, in an order in which every matrix gets its rows one below the other.

    Attributes:
        nbytes: of the checkpoint that all of them read.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = tuple(plans)
        self.nbytes = sum(plan.bytes_read for plan in plans)
        self._ends = list(accumulate(len(plan.spans) for plan in plans))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Read]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Read:
        output, at = self._place(number)
        span = self.plans[output].spans[at]
        return Read(span.start, span.stop, span.align, ((output, at),))

    def _place(self, number: int) -> tuple[int, int]:
        output = bisect_right(self._ends, number)
        return output, number - (self._ends[output - 1] if output else 0)

    def source(self, number: int) -> RowSource:
        """What a read reads."""
        output, at = self[number].spans[0]
        return self.plans[output].spans[at].source

    def spans(self) -> Iterator[tuple[Plan, Span]]:
        """Every span of every plan."""
        return ((plan, span) for plan in self.plans for span in plan.spans)

    def kind(self, number: int) -> Hashable:
        """Reads of one kind cost the same."""
        output, at = self._place(number)
        plan = self.plans[output]
        return output, plan.spans.kind(at, plan.matrices.encoding_number)
