"""What is made of a span's rows: tasks, each encoded once whatever number of matrices take its bytes, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from streamconv.checkpoint.dtypes import DType
from streamconv.planning.plan import Destination, Matrix, RowRange
from streamconv.quants.base import Codec, FinishedReductions
from streamconv.quants.plain import Plain


class EncodeTask(NamedTuple):
    """Columns of a span's rows in a codec: two destinations with the same task get the same bytes."""

    cols: tuple[tuple[int, int], ...]
    codec: Codec

    @property
    def width(self) -> int:
        """Columns that are encoded."""
        return sum(stop - start for start, stop in self.cols)

    def bound(self, results: FinishedReductions, source: str) -> EncodeTask:
        """The task with the results of the reductions that its codec needs."""
        return self._replace(codec=self.codec.bind(results, source))

    def is_copy(self, dtype: DType) -> bool:
        """The stored bytes are the source's, column slices apart."""
        codec = self.codec
        return isinstance(codec, Plain) and codec.dtype == dtype and not codec.add_one and not codec.halved(dtype)

    def is_whole_copy(self, span: RowRange) -> bool:
        """The stored bytes are the rows as they were read: nothing to do."""
        return self.is_copy(span.source.dtype) and self.cols == ((0, span.source.cols),)

    def row_costs(self, span: RowRange) -> tuple[int, int]:
        """(bytes of output, bytes of working memory) that encoding one row takes."""
        if self.is_whole_copy(span):
            return 0, 0
        codec, dtype = self.codec, span.source.dtype
        align = codec.row_align
        out = -(-sum(part.nbytes(align) for part in codec.parts(align, self.width)) // align)
        if self.is_copy(dtype):
            return out, 0
        gathered = self.width * dtype.itemsize if len(self.cols) > 1 else 0
        if codec.kernel(dtype) is not None:
            return out, gathered
        return out, gathered + self.width * codec.torch_bytes_per_element + out


def encode_tasks(span: RowRange, matrices: Sequence[Matrix]) -> dict[EncodeTask, list[Destination]]:
    """The span's destinations grouped by what they need, in order."""
    found: dict[EncodeTask, list[Destination]] = {}
    for dest in span.dests:
        found.setdefault(EncodeTask(dest.cols, matrices[dest.matrix].codec), []).append(dest)
    return found
