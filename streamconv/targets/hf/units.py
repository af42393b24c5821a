"""Names and shapes of a model's tensors: the weights that they stand for, whatever these are stored as, and the units that hold them.

Units are layers and experts: what is true of one of a kind is true of thousands. A tensor belongs to the last number in its name:
`model.layers.3.mlp.experts.17.up_proj.weight` to `model.layers.3.mlp.experts.17`. Codes, their scales, and the modules that engines join
lie in one unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
        return {self.heads[0] + rest: value for rest, value in self.held.items()}


def kinds(tensors: Mapping[str, _T]) -> list[Kind[_T]]:
    """The kinds of units, in the order of their first tensors.

    Args:
        tensors: by name; what is told of them can be compared and hashed.
    """
    units: dict[str, list[tuple[str, _T]]] = {}
    head, unit, plain = "\0", list[tuple[str, _T]](), set[str]()
    for name, value in tensors.items():
        rest = name[len(head) :]
        if rest not in plain or not name.startswith(head):  # a file mostly holds units one after the other
            match = _HEAD.fullmatch(name)
            assert match is not None
            head, rest = match.groups()
            plain.add(rest)
            unit = units.setdefault(head, [])
        unit.append((rest, value))
    alike: dict[tuple[str, frozenset[tuple[str, _T]]], Kind[_T]] = {}
    known: dict[tuple[str, tuple[tuple[str, _T], ...]], Kind[_T]] = {}  # the same by the order in which they hold it
    stars: dict[str, str] = {}
    for head, values in units.items():
        outer = head[: head.rfind(".", 0, -1) + 1]  # many units lie in one
        star = stars.get(outer)
        if star is None:
            star = stars[outer] = _NUMBER.sub("*", outer)
        key = star, tuple(values)
        kind = known.get(key)
        if kind is None:
            kind = known[key] = alike.setdefault((star, frozenset(values)), Kind([], dict(values)))
        kind.heads.append(head)
    return [*alike.values()]


Entry = tuple[str, tuple[int, ...]]
"""Dtype and shape of a stored tensor."""
Tensors = Mapping[str, Entry]
Shape = tuple[int, ...]

_BESIDE = frozenset(
    ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_shape", "weight_zero", "weight_zero_point",
     "weight_g_idx", "input_scale", "input_global_scale", "input_zero_point", "activation_scale", "pre_quant_scale", "output_scale",
     "k_scale", "v_scale", "scales", "qzeros", "g_idx", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format"),
)  # fmt: skip
"""Last names of what stands beside codes."""


def weights(tensors: Tensors, bits: int | None = None) -> Iterator[tuple[str, Shape | None]]:
    """(name as an unquantized model has it, shape) of each weight, bias and buffer, in order; the shape is None where it does not show.

    Args:
        bits: of integers in words, as the config says.
    """
    for name, (dtype, shape) in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in _BESIDE or "quant_state" in leaf:
            continue
        if leaf == "weight_packed":
            yield f"{module}.weight", _packed(dtype, shape, bits)
        elif leaf == "qweight":
            yield f"{module}.weight", _words(shape, tensors.get(f"{module}.scales"), bits)
        elif leaf == "weight" and dtype == "U8":
            yield name, _bytes(shape, tensors.get(f"{module}.weight_scale"))
        elif name.endswith("_blocks") and len(shape) == 4:
            yield name.removesuffix("_blocks"), (shape[0], 32 * shape[2], shape[1])
        elif not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors):
            yield name, shape


def _packed(dtype: str, shape: Shape, bits: int | None) -> Shape | None:
    if len(shape) != 2:
        return None
    if dtype == "U8":
        return shape[0], 2 * shape[1]
    return (shape[0], shape[1] * 32 // bits) if bits and shape[1] * 32 % bits == 0 else None


def _words(shape: Shape, scales: Entry | None, bits: int | None) -> Shape | None:
    """GPTQ packs along the input features, AutoAWQ along the output features."""
    if len(shape) != 2 or scales is None or len(scales[1]) != 2 or not bits:
        return None
    n = scales[1][1]
    return (n, shape[0] * 32 // bits) if shape[1] == n else (n, shape[0])


def _bytes(shape: Shape, scale: Entry | None) -> Shape | None:
    """Two FP4 codes in a byte along the input features; ModelOpt's INT4, with float scales, along the output features."""
    if len(shape) != 2 or scale is None:
        return None
    return (2 * shape[0], shape[1]) if scale[0] == "F32" else (shape[0], 2 * shape[1])
