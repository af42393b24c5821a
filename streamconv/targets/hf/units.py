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
    made: dict[tuple[str, tuple[tuple[str, _T], ...]], Kind[_T]] = {}
    for head, held in units.items():
        key = _NUMBER.sub("*", head), tuple(sorted(held, key=lambda pair: pair[0]) if len(held) > 1 else held)
        kind = made.get(key)
        if kind is None:
            made[key] = Kind([head], dict(held))
        else:
            kind.heads.append(head)
    return [*made.values()]
