"""Find the source tensor of every role, check its shape, and collect everything that is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from streamconv.checkpoint.index import nearest
from streamconv.checkpoint.rows import PackedTensor, SourceTensor
from streamconv.errors import TensorError, printable
from streamconv.families.base import Family
from streamconv.families.matching import Key, example, match
from streamconv.natural import natural

_NEAREST = 10
"""Missing tensors for which a similar name is looked for, which takes a while."""
_ENOUGH = 1000

_ATTENTION = {"q", "k", "v", "o", "qkv", "qkv_grouped"}
_MLP = {"gate", "up", "down", "gate_up"}
LINEAR = frozenset(_ATTENTION | _MLP | {"expert_gate", "expert_up", "expert_down", "experts_gate_up", "experts_down"})
"""TensorLookup of the matrices that a quantization encodes."""
MODULES = {
    "attention.qkv": ("q", "k", "v", "qkv", "qkv_grouped"),
    "attention.dense": ("o",),
    "mlp.fc": ("gate", "gate_up"),
    "mlp.gate": ("up",),
    "mlp.proj": ("down",),
}
"""Module of a layer -> the roles that fill it."""
SCALE, ZERO = "_scale", "_zero"
"""What is put after the name of a weight that is stored as codes: the names of its scales and zeros."""


@dataclass(slots=True)
class TensorLookup:
    """Source tensors by role. Asking for one marks it used; what is never used is reported.

    Attributes:
        packing: how linear layers must be packed (a --quant that takes quantized sources over), None for float.
    """

    family: Family
    tensors: Mapping[str, SourceTensor]
    packing: tuple[str, ...] | None = None
    found: dict[Key, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    _unmatched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.found, self._unmatched = match(self.family, self.tensors)

    def has(self, role: str, layer: int = -1) -> bool:
        return (role, layer, -1) in self.found

    def require(self, role: str, shape: tuple[int, ...], layer: int = -1, expert: int = -1) -> SourceTensor | None:
        """The tensor of a role. Missing or of another shape: None, and a line in `problems`."""
        name = self.found.get((role, layer, expert))
        if name is None:
            name_expected = example(self.family, role, layer, expert) if role in self.family.tensors else role
            near = nearest(name_expected, self._unmatched[:2000]) if len(self.problems) < _NEAREST else None
            self.problems.append(f"missing tensor {name_expected}" + (f" (nearest name: {printable(near)})" if near else ""))
            if len(self.problems) > _ENOUGH:  # another model than the config's: no need to go through all of it
                raise TensorError(self.problems)
            return None
        tensor = self.tensors[name]
        self.used.add(name)
        if tensor.shape != shape:
            self.problems.append(
                f"{printable(name)} has shape {list(tensor.shape)}, expected {list(shape)} from config.json",
            )
            return None
        if self.packing is not None and (role in LINEAR) != isinstance(tensor, PackedTensor):
            what = ("not quantized", "must be") if role in LINEAR else ("quantized", "must not be")
            self.problems.append(f"{printable(tensor.name)} is {what[0]}, for this --quant it {what[1]}")
            return None
        if isinstance(tensor, PackedTensor):
            if self.packing is None or tensor.packing not in self.packing:
                hint = "--quant int4_awq" if tensor.packing == "modelopt" else f"--quant int{tensor.bits}_gptq"
                self.problems.append(f"{printable(tensor.name)} is quantized already: {hint} takes it over")
                return None
            return tensor
        if not tensor.dtype.is_float or tensor.dtype.itemsize == 8:
            self.problems.append(f"{printable(name)}: dtype {tensor.dtype} is not a weight type (F32, F16, BF16)")
            return None
        return tensor

    def ignore_role(self, role: str) -> None:
        """Nothing of this role is needed (a tied lm_head that the embedding replaces)."""
        self.used.update(name for key, name in self.found.items() if key[0] == role)

    def unused(self) -> list[str]:
        """Names that nothing asked for."""
        return self._unmatched + [name for name in self.found.values() if name not in self.used]

    def ignore(self, names: Collection[str]) -> None:
        """These are not needed, and that is known to be right."""
        self.used.update(names)
        self._unmatched = [name for name in self._unmatched if name not in names]

    def reject_unused(self) -> None:
        """Report what is left over.

        Raises:
            TensorError: anything is missing, unexpected or of the wrong shape; all of it is listed.
        """
        unexpected = sorted(self.unused(), key=natural)
        self.problems += [f"unexpected tensor {printable(name)}: {self.family.name} has no place for it" for name in unexpected]
        if self.problems:
            raise TensorError(list(dict.fromkeys(self.problems)))
