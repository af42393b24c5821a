"""Scales, and what else stands beside codes, that --quant keep copies: what `verify` would refuse is refused when it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from streamconv.checkpoint.rows import Derived, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import CheckpointError, printable
from streamconv.lazy import Bytes


@dataclass(frozen=True, slots=True)
class CheckedValues(Derived):
    """A tensor as `stored` reads it.

    Attributes:
        wrong: what of its bytes cannot be, in words; "" if all is well.
        whole: only all of them together can be judged: an order, a shape.
    """

    wrong: Callable[[bytes], str] = field(kw_only=True)
    whole: bool = field(kw_only=True)

    @property
    def row_align(self) -> int:
        return self.rows if self.whole else self.stored.row_align

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        """Rows [start, stop).

        Raises:
            CheckpointError: they hold what no engine computes with.
        """
        self.stored.read(shards, start, stop, out, scratch)
        odd = self.wrong(out[: (stop - start) * self.cols * self.dtype.itemsize].tobytes())
        if odd:
            file = printable(shards[self.pieces[0].shard].path.name)
            told = f"{file}: {printable(self.name)} holds {odd}"
            hint = "--quant none decodes a scale of 0 and any order; all else is damage: make the checkpoint again"
            raise CheckpointError(told, hint=hint)

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        self.stored.drop_page_cache(shards, start, stop)


def checked(tensor: SourceTensor, wrong: Callable[[bytes], str], whole: bool) -> CheckedValues:
    """The tensor, refused if its bytes are wrong."""
    own = (tensor.name, tensor.dtype, tensor.shape, tensor.pieces, tensor.axis)
    return CheckedValues(*own, stored=tensor, wrong=wrong, whole=whole)
