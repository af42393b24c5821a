"""Queries and keys of Meta's checkpoints, read in the order of Hugging Face.

Rotary embedding turns pairs of a head's outputs: Meta stores a pair as neighbours, Hugging Face its first ones in the upper half of the
head and its second ones in the lower (`permute` of transformers' convert_llama_weights_to_hf.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.lazy import Bytes


@dataclass(frozen=True, slots=True)
class RotaryRows(SourceTensor):
    """A matrix [heads * head, K] whose pairs of rows are neighbours in the files.

    Attributes:
        head: rows of a head, even; whole heads are read.
    """

    head: int = 2

    @property
    def row_align(self) -> int:
        return self.head

    @property
    def scratch_row_bytes(self) -> int:
        return self.stored_row_bytes

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        held = scratch[: (stop - start) * self.stored_row_bytes]
        SourceTensor.read(self, shards, start, stop, held, scratch[:0])
        heads, half, row = (stop - start) // self.head, self.head // 2, self.stored_row_bytes
        out.reshape(heads, 2, half, row)[:] = held.reshape(heads, half, 2, row).swapaxes(1, 2)
