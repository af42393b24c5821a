"""What is made of a span's rows: tasks, each encoded once whatever number of matrices take its bytes, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from streamconv.checkpoint.dtypes import DType
from streamconv.planning.plan import Destination, Matrix, RowRange
from streamconv.quants.base import Codec, FinishedReductions, Kernel, Part
from streamconv.quants.plain import Plain


@dataclass(frozen=True)
class EncodeTask:
    """Columns of a span's rows in a codec: two destinations with the same task get the same bytes.

    Attributes:
        cols: source columns, as (begin, end) pairs joined side by side.
        dtype, total: stored type and all columns of the source.
    """

    cols: tuple[tuple[int, int], ...]
    codec: Codec
    dtype: DType
    total: int

    @cached_property
    def width(self) -> int:
        """Columns that are encoded."""
        return sum(stop - start for start, stop in self.cols)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What the codec makes of the least rows that it takes."""
        return self.codec.parts(self.codec.row_align, self.width)

    @cached_property
    def kernel(self) -> Kernel | None:
        """The fused CPU kernel; None for what takes none, and for what has none."""
        return None if self.is_copy else self.codec.kernel(self.dtype)

    @cached_property
    def is_copy(self) -> bool:
        """The stored bytes are the source's, column slices apart."""
        codec = self.codec
        return isinstance(codec, Plain) and codec.dtype == self.dtype and not codec.add_one and not codec.halved(self.dtype)

    @cached_property
    def is_whole_copy(self) -> bool:
        """The stored bytes are the rows as they were read: nothing to do."""
        return self.is_copy and self.cols == ((0, self.total),)

    @cached_property
    def row_costs(self) -> tuple[int, int]:
        """(bytes of output, bytes of working memory) that encoding one row takes."""
        if self.is_whole_copy:
            return 0, 0
        align = self.codec.row_align
        out = -(-sum(part.nbytes(align) for part in self.parts) // align)
        if self.is_copy:
            return out, 0
        gathered = self.width * self.dtype.itemsize if len(self.cols) > 1 else 0
        return out, gathered + (0 if self.kernel else self.width * self.codec.torch_bytes_per_element + out)

    def bound(self, results: FinishedReductions, source: str) -> EncodeTask:
        """The task with the results of the reductions that its codec needs."""
        codec = self.codec.bind(results, source)
        return self if codec is self.codec else replace(self, codec=codec)


def encode_tasks(span: RowRange, matrices: Sequence[Matrix]) -> dict[EncodeTask, list[Destination]]:
    """The span's destinations grouped by what they need, in order."""
    tasks: dict[EncodeTask, list[Destination]] = {}
    for dest in span.dests:
        task = EncodeTask(dest.cols, matrices[dest.matrix].codec, span.source.dtype, span.source.cols)
        tasks.setdefault(task, []).append(dest)
    return tasks
