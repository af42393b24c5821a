"""The units of a model, its layers and experts, by what they hold: what is true of one of a kind is true of thousands.

A tensor belongs to the last number in its name: `model.layers.3.mlp.experts.17.up_proj.weight` to `model.layers.3.mlp.experts.17`.
Codes, their scales, and the modules that engines join lie in one unit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

_T = TypeVar("_T")
_HEAD = re.compile(r"(?s)(.*\.\d+\.|)(.*)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(slots=True)
class Kind(Generic[_T]):
    """Units whose names differ in numbers alone, and that hold the same.

    Attributes:
        heads: what the names of each unit begin with, the last "." included; "" for what belongs to no unit.
        held: rest of a name -> what is told of the tensor.
    """

    heads: list[str]
    held: dict[str, _T]

    def one(self) -> dict[str, _T]:
        """The tensors of the first unit."""
        return {self.heads[0] + rest: told for rest, told in self.held.items()}


def kinds(tensors: Mapping[str, _T]) -> list[Kind[_T]]:
    """The kinds of units, in the order of their first tensors.

    Args:
        tensors: by name; what is told of them can be compared and hashed.
    """
    units: dict[str, list[tuple[str, _T]]] = {}
    head, unit, plain = "\0", list[tuple[str, _T]](), set[str]()
    for name, told in tensors.items():
        rest = name[len(head) :]
        if rest not in plain or not name.startswith(head):  # a file mostly holds units one after the other
            found = _HEAD.fullmatch(name)
            assert found is not None
            head, rest = found.groups()
            plain.add(rest)
            unit = units.setdefault(head, [])
        unit.append((rest, told))
    made: dict[tuple[str, frozenset[tuple[str, _T]]], Kind[_T]] = {}
    known: dict[tuple[str, tuple[tuple[str, _T], ...]], Kind[_T]] = {}  # the same by the order in which they hold it
    stars: dict[str, str] = {}
    for head, held in units.items():
        outer = head[: head.rfind(".", 0, -1) + 1]  # many units lie in one
        star = stars.get(outer)
        if star is None:
            star = stars[outer] = _NUMBER.sub("*", outer)
        key = star, tuple(held)
        kind = known.get(key)
        if kind is None:
            kind = known[key] = made.setdefault((star, frozenset(held)), Kind([], dict(held)))
        kind.heads.append(head)
    return [*made.values()]
