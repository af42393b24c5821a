"""A norm that is stored as value + 1, read as the value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import F32
from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.stored_codes import as_float
from streamconv.lazy import Bytes, np


@dataclass(frozen=True, slots=True)
class LessOne(SourceTensor):
    """What is stored less 1. float32 holds the difference exactly, of 16-bit values down to 2^-16, so that adding 1 gives them again.

    Attributes:
        stored: a tensor of one column; `dtype` is F32.
    """

    stored: SourceTensor | None = None

    @property
    def _own(self) -> SourceTensor:
        assert self.stored is not None
        return self.stored

    @property
    def stored_row_bytes(self) -> int:
        return self._own.stored_row_bytes

    @property
    def scratch_row_bytes(self) -> int:
        return self._own.stored_row_bytes

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        held = scratch[: (stop - start) * self._own.stored_row_bytes]
        self._own.read(shards, start, stop, held, scratch[:0])
        np.subtract(as_float(held, self._own.dtype.name), np.float32(1), out=out.view(np.float32))


def less_one(stored: SourceTensor) -> LessOne:
    """A norm that is stored as value + 1."""
    return LessOne(stored.name, F32, stored.shape, stored.pieces, stored.axis, stored)
