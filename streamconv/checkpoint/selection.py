"""Which elements of a tensor are meant, before any is read: basic indexing, composed without arrays."""

from __future__ import annotations

import operator
from typing import Any

from streamconv.errors import UsageError

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
