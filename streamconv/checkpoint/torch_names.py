"""The names that torch.save writes into the pickle of a state dict, and what each of them builds here: a record.

ValueError and TypeError mean arguments that torch never writes; the caller says where.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from streamconv.checkpoint.dtypes import BY_TORCH_NAME, DType


class Storage(NamedTuple):
    """A file `data/<key>` seen as elements; `dtype` is None for an untyped one, whose elements are bytes."""

    dtype: DType | None
    key: str
    numel: int


class TensorView(NamedTuple):
    """A tensor as the pickle describes it, unchecked; offset and strides count elements."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Name(NamedTuple):
    """A global that may be named: a function of ours, or a type that only tells a dtype."""

    name: str
    build: Callable[[tuple[Any, ...]], Any] | None = None
    dtype: DType | None = None
    storage: bool = False


_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
}
_MOST_DIMENSIONS = 16


@functools.lru_cache(64)
def allowed(module: str, name: str) -> Name | None:
    """What the global module.name stands for, or None if weights have no use for it."""
    if module == "torch._utils" and name in _BUILDERS:
        return Name(name, _BUILDERS[name])
    if (module, name) == ("collections", "OrderedDict"):
        return Name(name, _ordered_dict)
    if (module, name) == ("torch", "Size"):
        return Name(name, _size)
    if module in ("torch", "torch.storage", "torch.cuda"):
        if name.endswith("Storage") and name[:-7] in _STORAGES:
            return Name(name, dtype=BY_TORCH_NAME[_STORAGES[name[:-7]]], storage=True)
        if name == "UntypedStorage":
            return Name(name, storage=True)
        if module == "torch" and name in BY_TORCH_NAME:
            return Name(name, dtype=BY_TORCH_NAME[name])
    return None


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise ValueError
    return {}


def _size(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    (sizes,) = arguments
    if type(sizes) not in (list, tuple):  # a text of 16 MB must not become a tuple of letters
        raise TypeError
    return _whole(tuple(sizes))


def _whole(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > _MOST_DIMENSIONS:
        raise TypeError
    if any(type(value) is not int or not 0 <= value < 1 << 63 for value in values):
        raise ValueError
    return values


def _tensor(arguments: tuple[Any, ...], typed: bool = False) -> TensorView:
    """(storage, offset, shape, strides, requires_grad, backward hooks[, metadata]); `typed`: the younger dtypes, named before metadata."""
    storage, offset, shape, strides, _, _, *more = arguments
    kind = more.pop(0) if typed else storage
    if len(more) > 1 or any(more):
        raise ValueError  # metadata may say that the values are to be negated
    if not isinstance(storage, Storage) or not isinstance(kind, Name if typed else Storage) or kind.dtype is None:
        raise TypeError
    if isinstance(kind, Name) and kind.storage:
        raise TypeError
    return TensorView(storage, kind.dtype, _whole((offset,))[0], _whole(shape), _whole(strides))


def _parameter(arguments: tuple[Any, ...]) -> TensorView:
    data, _, _ = arguments
    if not isinstance(data, TensorView):
        raise TypeError
    return data


_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": functools.partial(_tensor, typed=True),
    "_rebuild_parameter": _parameter,
}
