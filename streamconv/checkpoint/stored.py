"""The stored bytes of a selection as a numpy array: a view of the file where they lie in one piece, a copy where they do not.

An array here holds the unsigned integers of `DType.storage`; what they mean is up to the caller.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, Protocol

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.rows import SourceTensor
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
        told = f": {error}" if isinstance(key, slice) else ""
        hint = "ints, slices and ... are; take numpy() or torch() first for a mask or a list"
        raise SelectionError(f"{name}: {type(key).__name__} is no index of a lazy tensor{told}", hint=hint) from None


class Stored(Protocol):
    """A tensor in its files."""

    @property
    def dtype(self) -> DType: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...
    def read(self, chosen: Chosen) -> Array:
        """The chosen elements; its memory is a view of the file, or fresh.

        Raises:
            CheckpointError: the file changed or cannot be read. HubError: the Hub did not give it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """A row-major tensor whose bytes lie in one place, or in several one after the other: (shard, begin, nbytes)."""

    dtype: DType
    sizes: tuple[int, ...]
    places: tuple[tuple[Shard, int, int], ...]

    def read(self, chosen: Chosen) -> Array:
        shape, unit = shape_of(chosen), self.dtype.itemsize
        if 0 in shape:
            return np.empty(shape, self.dtype.storage)
        steps = [math.prod(self.sizes[at + 1 :]) for at in range(len(self.sizes))]
        parts = [part if isinstance(part, range) else range(part, part + 1) for part in chosen]
        origin = sum(part[0] * step for part, step in zip(parts, steps, strict=True))
        first = sum(min(part[0], part[-1]) * step for part, step in zip(parts, steps, strict=True))
        last = sum(max(part[0], part[-1]) * step for part, step in zip(parts, steps, strict=True))
        strides = [part.step * step * unit for part, step in zip(chosen, steps, strict=True) if isinstance(part, range)]
        data = self._bytes(first * unit, (last + 1) * unit)
        return np.ndarray(shape, self.dtype.storage, data, (origin - first) * unit, strides)

    def _bytes(self, begin: int, end: int) -> memoryview:
        held, at = [], 0
        for shard, place, nbytes in self.places:
            low, high = max(begin - at, 0), min(end - at, nbytes)
            if low < high:
                held.append(shard.view(place + low, place + high))
            at += nbytes
        return held[0] if len(held) == 1 else memoryview(bytearray().join(held))


@dataclass(frozen=True, slots=True)
class Columns:
    """A matrix whose files hold some columns each, side by side."""

    dtype: DType
    sizes: tuple[int, ...]
    parts: tuple[Rows, ...]

    def read(self, chosen: Chosen) -> Array:
        rows, cols = chosen
        wanted = cols if isinstance(cols, range) else range(cols, cols + 1)
        if not wanted:
            return np.empty(shape_of(chosen), self.dtype.storage)
        low, high = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1]) + 1
        held, at = [], 0
        for part in self.parts:
            width = part.sizes[1]
            here = range(max(low - at, 0), min(high - at, width))
            if here:
                held.append(part.read((rows, here)))
            at += width
        joined = held[0] if len(held) == 1 else np.concatenate(held, axis=-1)
        found: Array = joined[..., :: wanted.step]
        return found if isinstance(cols, range) else found[..., 0]


@dataclass(frozen=True, slots=True)
class Viewed:
    """A tensor that its files hold cut or joined; reading copies the rows from the first to the last that are chosen."""

    view: SourceTensor
    shards: tuple[Shard, ...]

    @property
    def dtype(self) -> DType:
        return self.view.dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.view.shape

    def read(self, chosen: Chosen) -> Array:
        view, align = self.view, self.view.row_align
        rows = [part if isinstance(part, range) else range(part, part + 1) for part in chosen[:1]] or [range(1)]
        if 0 in shape_of(chosen):
            return np.empty(shape_of(chosen), view.dtype.storage)
        first, last = sorted((rows[0][0], rows[0][-1]))
        first, last = first // align * align, min(-(-(last + 1) // align) * align, view.rows)
        out = np.empty((last - first) * view.cols * view.dtype.itemsize, np.uint8)
        scratch = np.empty((last - first) * view.scratch_row_bytes, np.uint8)
        view.read(self.shards, first, last, out, scratch)
        held = out.view(view.dtype.storage).reshape(last - first, *view.shape[1:])
        part = chosen[0]
        moved = part - first if isinstance(part, int) else slice(part.start - first, _end(part.stop - first), part.step)
        others = (at if isinstance(at, int) else slice(at.start, _end(at.stop), at.step) for at in chosen[1:])
        return np.asarray(held[(moved, *others)])


def _end(stop: int) -> int | None:
    """The end of a slice that runs backwards to the first element."""
    return None if stop < 0 else stop


def stored(index: Index, name: str) -> Stored:
    """Where a tensor of an index lies, of a Meta checkpoint in all its files."""
    if name in index.views:
        return Viewed(index.views[name], index.shards)
    whole = index.assembled[name] if index.assembled is not None else None
    if whole is None:
        record = index.tensors[name]
        return Rows(record.dtype, record.shape, ((index.shards[record.shard], record.begin, record.nbytes),))
    unit = whole.dtype.itemsize
    places = [(index.shards[block.shard], block.begin, block.rows * block.cols * unit) for block in whole.blocks]
    if whole.axis == 0:
        return Rows(whole.dtype, whole.shape, tuple(places))
    parts = (Rows(whole.dtype, (block.rows, block.cols), (place,)) for block, place in zip(whole.blocks, places, strict=True))
    return Columns(whole.dtype, whole.shape, tuple(parts))
