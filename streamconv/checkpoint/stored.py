"""The stored bytes of a selection as a numpy array: a view of the file where they lie in one piece, a copy where they do not.

An array here holds the unsigned integers of `DType.storage`; what they mean is up to the caller.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.rows import Extent, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import UsageError
from streamconv.lazy import Array, np

Chosen = tuple[range | int, ...]
"""For each dimension as it is stored the elements that are meant; an int takes the dimension away."""


class SelectionError(UsageError, IndexError):
    """An index that a tensor does not have. As an IndexError it also ends Python's own loops."""


def everything(sizes: tuple[int, ...]) -> Chosen:
    return tuple(range(size) for size in sizes)


def shape_of(chosen: Chosen) -> tuple[int, ...]:
    return tuple(len(part) for part in chosen if isinstance(part, range))


def select(chosen: Chosen, key: Any, name: str) -> Chosen:
    """`chosen[key]`, with the meaning that numpy gives to ints, slices and one Ellipsis.

    Raises:
        SelectionError: too many indices, one outside of its dimension, or something else than ints, slices and Ellipsis.
    """
    keys = list(key) if isinstance(key, tuple) else [key]
    shape = shape_of(chosen)
    dots = [at for at, one in enumerate(keys) if one is Ellipsis]
    if len(dots) > 1 or len(keys) - len(dots) > len(shape):
        raise SelectionError(f"{name}: {len(keys)} indices for the shape {list(shape)}")
    missing = [slice(None)] * (len(shape) - len(keys) + len(dots))
    keys[dots[0] if dots else len(keys) : dots[0] + 1 if dots else len(keys)] = missing
    given = iter(keys)
    return tuple(_one(part, next(given), name) if isinstance(part, range) else part for part in chosen)


def _one(part: range, key: Any, name: str) -> range | int:
    try:
        if isinstance(key, bool):
            raise TypeError  # elsewhere it means a mask
        return part[key] if isinstance(key, slice) else part[operator.index(key)]
    except IndexError:
        raise SelectionError(f"{name}: index {key} is outside of a dimension of {len(part)}") from None
    except (TypeError, ValueError) as error:
        reason = f": {error}" if isinstance(key, slice) else ""
        hint = "ints, slices and ... are; take numpy() or torch() first for a mask or a list"
        raise SelectionError(f"{name}: {type(key).__name__} is no index of a lazy tensor{reason}", hint=hint) from None


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in its files."""

    tensor: SourceTensor
    shards: tuple[Shard, ...]

    @property
    def dtype(self) -> DType:
        return self.tensor.dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read(self, chosen: Chosen) -> Array:
        """The chosen elements; their memory is a view of the file, or fresh.

        Raises:
            CheckpointError: the file changed or cannot be read. HubError: the Hub did not give it.
        """
        if 0 in shape_of(chosen):
            return np.empty(shape_of(chosen), self.dtype.storage)
        if not self.tensor.as_stored:
            return self._copied(chosen)
        if self.tensor.axis == 0:
            return self._viewed(self.tensor.pieces, self.sizes, chosen)
        rows, cols = chosen
        low, high = _ends(cols)
        parts, at = [], 0
        for piece in self.tensor.pieces:
            here = range(max(low - at, 0), min(high + 1 - at, piece.cols))
            if here:
                parts.append(self._viewed((piece,), (piece.rows, piece.cols), (rows, here)))
            at += piece.cols
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        columns: Array = joined[..., :: cols.step] if isinstance(cols, range) else joined[..., 0]
        return columns

    def _viewed(self, pieces: tuple[Extent, ...], sizes: tuple[int, ...], chosen: Chosen) -> Array:
        """Of a row-major tensor whose bytes lie in pieces one after the other."""
        unit = self.dtype.itemsize
        steps = [math.prod(sizes[at + 1 :]) for at in range(len(sizes))]
        ends = [_ends(part) for part in chosen]
        first, last = (sum(end[which] * step for end, step in zip(ends, steps, strict=True)) for which in (0, 1))
        origin = sum((part[0] if isinstance(part, range) else part) * step for part, step in zip(chosen, steps, strict=True))
        strides = [part.step * step * unit for part, step in zip(chosen, steps, strict=True) if isinstance(part, range)]
        begin, end, data, at = first * unit, (last + 1) * unit, list[memoryview](), 0
        for piece in pieces:
            nbytes = piece.rows * piece.cols * unit
            low, high = max(begin - at, 0), min(end - at, nbytes)
            if low < high:
                data.append(self.shards[piece.shard].view(piece.begin + low, piece.begin + high))
            at += nbytes
        joined = data[0] if len(data) == 1 else memoryview(bytearray().join(data))
        return np.ndarray(shape_of(chosen), self.dtype.storage, joined, (origin - first) * unit, strides)

    def _copied(self, chosen: Chosen) -> Array:
        """Of the rows from the first to the last that are chosen, a copy."""
        tensor, align = self.tensor, self.tensor.row_align
        first, last = _ends(chosen[0])
        first, last = first // align * align, min(-(-(last + 1) // align) * align, tensor.rows)
        out = np.empty((last - first) * tensor.cols * tensor.dtype.itemsize, np.uint8)
        tensor.read(self.shards, first, last, out, np.empty((last - first) * tensor.scratch_row_bytes, np.uint8))
        rows = out.view(tensor.dtype.storage).reshape(last - first, *tensor.shape[1:])
        part = chosen[0]
        moved = part - first if isinstance(part, int) else range(part.start - first, part.stop - first, part.step)
        return np.asarray(rows[tuple(_key(at) for at in (moved, *chosen[1:]))])


def _ends(part: range | int) -> tuple[int, int]:
    """The smallest and the largest element."""
    return (min(part[0], part[-1]), max(part[0], part[-1])) if isinstance(part, range) else (part, part)


def _key(part: range | int) -> slice | int:
    """A slice that runs backwards to the first element has no end."""
    return part if isinstance(part, int) else slice(part.start, None if part.stop < 0 else part.stop, part.step)
