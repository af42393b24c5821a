"""Which tensor of the source fills which parameter of transformers' layer, as the family tables tell.

Most sources have transformers' own names. Others have the same tensors under names of their own (Exaone is Llama), or experts one by one
where transformers stacks them, or the other way round.
"""

from __future__ import annotations

from typing import NamedTuple

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.tensor_table import TensorRecord
from streamconv.errors import TensorError, printable
from streamconv.families import Family, all_families
from streamconv.families.matching import example, match

EXPERT_ROLES = {"gate_proj": "expert_gate", "up_proj": "expert_up", "down_proj": "expert_down"}
"""Linear modules of an `Expert` -> their roles."""
GROUPED = "grouped"
"""The linear module of a layer that makes queries, keys and values at once, KV head by KV head."""
_STACKED = {"expert_gate": ("experts_gate_up", 0), "expert_up": ("experts_gate_up", 1), "expert_down": ("experts_down", 0)}
"""Role -> the role of the tensor that stacks it, and which half of an expert's rows it is there."""


class Place(NamedTuple):
    """Rows of a source tensor, leading dimensions flattened into rows.

    Attributes:
        module: what ranges and codes of it are called: the tensor's name without ".weight".
        role: in the family table; empty for what the table does not know.
    """

    record: TensorRecord
    start: int
    rows: int
    module: str
    role: str


class Names:
    """Places of parameters. `built`: the architecture that transformers runs it as."""

    def __init__(self, index: Index, family: Family, built: str) -> None:
        self._index, self._family = index, family
        self._found, _ = match(family, index.tensors)
        self._roles = {name: key for key, name in self._found.items()}
        self._built = next((other for other in all_families() if built in other.architectures), family)

    def embedding(self) -> str:
        """Name of the token embedding."""
        return self._found.get(("embedding", -1, -1), "model.embed_tokens.weight")

    def layers(self) -> dict[int, list[str]]:
        """Names of the tensors of each layer."""
        by_layer: dict[int, list[str]] = {}
        for (_, layer, _), name in self._found.items():
            if layer >= 0:
                by_layer.setdefault(layer, []).append(name)
        return by_layer

    def known(self, name: str) -> bool:
        """Whether a tensor lies where this family keeps its layers."""
        heads = {pattern.split("{")[0] for patterns in self._family.tensors.values() for pattern in patterns if "{" in pattern}
        return name.startswith(tuple(heads))

    def place(self, layer: int, parameter: str, shape: tuple[int, ...]) -> Place:
        """Where the parameter of a layer comes from.

        Args:
            parameter: its name inside the layer.

        Raises:
            TensorError: the source lacks it, or has it in another shape.
        """
        module, _, leaf = parameter.rpartition(".")
        stem, _, last = module.rpartition(".")
        before, _, expert = stem.rpartition(".")
        if before.endswith("experts") and expert.isdecimal() and last in EXPERT_ROLES and leaf == "weight":
            return self._expert(layer, int(expert), last, shape)
        full = f"model.layers.{layer}.{parameter}"
        name = full if last != GROUPED else self._found.get(("qkv_grouped", layer, -1), full)
        if name not in self._index.tensors:
            keys, _ = match(self._built, [full])
            name = next((self._found[key] for key in keys if key in self._found), full)
        return self._whole(name, shape, self._roles.get(name, ("", -1, -1))[0])

    def _whole(self, name: str, shape: tuple[int, ...], role: str) -> Place:
        record = self._index.tensors.get(name)
        if record is None:
            raise TensorError(f"missing tensor {printable(name)}")
        if record.shape != shape:
            raise TensorError(f"{printable(name)}: shape {list(record.shape)}, not {list(shape)}")
        return Place(record, 0, shape[0], name.removesuffix(".weight"), role)

    def _expert(self, layer: int, expert: int, last: str, shape: tuple[int, ...]) -> Place:
        role = EXPERT_ROLES[last]
        single = self._found.get((role, layer, expert))
        if single is not None:
            return self._whole(single, shape, role)
        stacked, half = _STACKED[role]
        name = self._found.get((stacked, layer, -1))
        record = self._index.tensors.get(name) if name is not None else None
        if name is None or record is None:
            raise TensorError(f"missing tensor {printable(example(self._family, role, layer, expert))}")
        each = record.shape[1] if len(record.shape) == 3 else 0
        if record.shape[2:] != shape[1:] or expert >= record.shape[0] or each != shape[0] * (2 if stacked == "experts_gate_up" else 1):
            raise TensorError(f"{printable(name)}: shape {list(record.shape)} does not hold experts {list(shape)}")
        return Place(record, expert * each + half * shape[0], shape[0], f"{name.rpartition('.')[0]}.{expert}.{last}", role)
