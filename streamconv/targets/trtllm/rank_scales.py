"""Scales that stand beside the codes of rank files, as those of the weights which the ranks were cut from."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from streamconv.checkpoint.dtypes import F8_E4M3, F32
from streamconv.checkpoint.header_parse import Header, TensorEntry
from streamconv.checkpoint.rows import Extent, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.strided_rows import Strided
from streamconv.errors import RefusedError, TensorError, printable
from streamconv.lazy import Bytes, np
from streamconv.planning.plan import Matrix
from streamconv.targets.trtllm.scalars import is_scale


class Block(NamedTuple):
    """Rows [start, stop) and columns [left, right) of a tensor are those from `row` on of a matrix.

    Attributes:
        twice: rows of a head that is stored once for two equal ones; 0 for none.
    """

    start: int
    stop: int
    left: int
    right: int
    matrix: int
    row: int
    twice: int


Held = Sequence[tuple[Block, Matrix]]
"""The blocks that make up a weight, each with its matrix."""


def _entries(held: Held, stored: str, headers: Sequence[Header]) -> Iterator[tuple[Block, int, TensorEntry]]:
    """(block, file, tensor of that last name beside its matrix)."""
    for block, matrix in held:
        entry = headers[matrix.file].tensors.get(f"{matrix.name}.{stored}")
        if entry is None:
            raise TensorError(f"rank{matrix.file}.safetensors: {matrix.name}.{stored} is missing, which its codes need")
        yield block, matrix.file, entry


def groups(name: str, stored: str, held: Held, axis: int, headers: Sequence[Header]) -> Strided:
    """Scales or zeros [groups, N]: a rank has all groups of its channels, or its groups of all channels.

    Args:
        stored: last part of their name there.
    """
    pieces, strides, kind = list[Extent](), list[int](), F8_E4M3
    for block, file, entry in _entries(held, stored, headers):
        (count, channels), kind = entry.shape, entry.dtype
        item = kind.itemsize
        pieces.append(Extent(file, entry.begin + block.row * item, count, block.stop - block.start))
        strides.append(channels * item)
    rows = sum(piece.rows for piece in pieces) if axis else pieces[0].rows
    cols = pieces[0].cols if axis else sum(piece.cols for piece in pieces)
    return Strided(name, kind, (rows, cols), tuple(pieces), 1 - axis, tuple(strides))


def by_channel(name: str, held: Held, axis: int, headers: Sequence[Header]) -> SourceTensor:
    """Scales [N, groups] of W4A16_AWQ."""
    pieces, kind = list[Extent](), F32
    for block, file, entry in _entries(held, "weights_scaling_factor", headers):
        count, kind = entry.shape[1], entry.dtype
        pieces.append(Extent(file, entry.begin + block.row * count * kind.itemsize, block.stop - block.start, count))
    rows = pieces[0].rows if axis else sum(piece.rows for piece in pieces)
    cols = sum(piece.cols for piece in pieces) if axis else pieces[0].cols
    return SourceTensor(name, kind, (rows, cols), tuple(pieces), axis)


def by_input(name: str, held: Held, axis: int, headers: Sequence[Header]) -> SourceTensor:
    """What each input is multiplied by before it meets the weights, [K]."""
    found = list(_entries(held if axis else held[:1], "prequant_scaling_factor", headers))
    pieces = tuple(Extent(file, entry.begin, entry.shape[-1], 1) for _, file, entry in found)
    return SourceTensor(name, found[0][2].dtype, (sum(piece.rows for piece in pieces),), pieces)


@dataclass(frozen=True, slots=True)
class Steps(SourceTensor):
    """A column of a few float32 numbers, each for many rows.

    Attributes:
        steps: (rows, number), one above the other.
    """

    steps: tuple[tuple[int, float], ...] = ()

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        first, to = 0, out.view(np.float32)
        for rows, number in self.steps:
            to[max(first - start, 0) : max(first + rows - start, 0)] = number
            first += rows

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        """Nothing is read."""


def scalar(name: str, stored: str, held: Held, axis: int, headers: Sequence[Header], shards: Sequence[Shard]) -> SourceTensor:
    """The scale of a whole weight [1]; of rows [N, 1] where it is made of matrices with scales of their own.

    Raises:
        TensorError: it is no scale. RefusedError: ranks have other scales for the same rows.
    """
    found = list[tuple[Block, float]]()
    pieces = list[Extent]()
    for block, file, entry in _entries(held, stored, headers):
        with shards[file].window(entry.begin, entry.begin + 4) as data:
            value = float(struct.unpack("<f", bytes(data))[0])
        if not is_scale(value):
            raise TensorError(f"rank{file}.safetensors: {printable(entry.name)} is {value:g}, no scale")
        found.append((block, value))
        pieces.append(Extent(file, entry.begin, 1, 1))
    if len({value for _, value in found}) == 1:
        return SourceTensor(name, F32, (1,), (pieces[0],))
    if axis:
        raise RefusedError([f"{printable(name)}: the ranks have scales of their own for parts of the same rows, which is not read back"])
    steps = tuple((block.stop - block.start, value) for block, value in found)
    return Steps(name, F32, (sum(rows for rows, _ in steps), 1), tuple(pieces), 0, steps)

