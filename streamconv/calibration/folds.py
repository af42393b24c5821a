"""Where AWQ's pre-scales go in a Hugging Face directory, whose linear layers have no place for them: into the norm before the layers, or
into the rows of the one linear layer whose outputs are their inputs.

    q, k, v           the norm before attention
    gate, up          the norm before the MLP; not before experts, whose router reads the norm as well
    attention output  rows of v, the same for all query heads of a KV head
    down              rows of up, in which the MLP is linear
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from streamconv.calibration.layers import read_rows
from streamconv.calibration.tiers import SITES

if TYPE_CHECKING:
    from streamconv.calibration.names import Place
    from streamconv.checkpoint.index import Index

Fold = Literal["", "norms", "all"]
"""What is folded: nothing (TensorRT-LLM), what norms take (ModelOpt, which stores the rest), everything (compressed-tensors)."""

_ATTENTION, _MLP = ("input_norm",), ("pre_ffn_norm", "post_norm")
_NORMS = {"qkv": _ATTENTION, "qkv_grouped": _ATTENTION, "mlp": _MLP, "gate_up": _MLP}
"""Site -> roles of its norm; the first that a layer has."""
_ROWS = {"o": ("v", "qkv"), "down": ("up", "gate_up"), "expert_down": ("expert_up",)}
"""Site -> roles of the linear layer that makes its inputs, in its last rows."""
_BIASES = ("v_bias", "up_bias")


class Norm(NamedTuple):
    """Attributes:
    parameter: its name in the layer.
    weight: [K], as the source holds it.
    added: what is added to it where it is used: 1 in Gemma.
    """

    parameter: str
    weight: torch.Tensor
    added: float = 0.0

    def multiplier(self, scale: torch.Tensor) -> torch.Tensor:
        """What the inputs are multiplied by once 1 / s is in the norm, rounded to its type: the weights are made for that."""
        effective = self._effective(scale)
        factors = (self.folded(1.0 / scale).to(effective) + self.added) / effective
        return torch.where(factors.isfinite() & (factors != 0), factors, 1.0 / scale)

    def folded(self, multiplier: torch.Tensor) -> torch.Tensor:
        """The norm [K] with a multiplier in it, in its own type."""
        return (self._effective(multiplier) * multiplier - self.added).to(self.weight.dtype)

    def _effective(self, like: torch.Tensor) -> torch.Tensor:
        return self.weight.to(like) + self.added


class Rows(NamedTuple):
    """Attributes:
    parameter: the weight, in the layer, whose last rows make the inputs.
    heads: the inputs are [KV heads, query heads of each, size]; one row makes that of all query heads of a KV head.
    """

    parameter: str
    heads: tuple[int, int, int]

    def multiplier(self, scale: torch.Tensor) -> torch.Tensor:
        """The geometric mean of 1 / s over the inputs that one row makes."""
        mean = scale.log().reshape(self.heads).mean(1, keepdim=True)
        return (-mean).exp().expand(self.heads).reshape(-1)

    def factors(self, multiplier: torch.Tensor) -> torch.Tensor:
        """Of the last rows."""
        return multiplier.reshape(self.heads)[:, 0].reshape(-1)


class Folds:
    """The folds of a layer, and what they make of it.

    Args:
        places: parameter of the layer -> where it comes from.
        heads: KV heads, query heads of each, head size.
        added: see `Norm`.
    """

    def __init__(self, kind: Fold, places: Mapping[str, Place], heads: tuple[int, int, int], added: float) -> None:
        self._kind, self._places, self._heads, self._added = kind, places, heads, added
        self._roles = {place.role: name for name, place in places.items()}
        self._factors: dict[str, torch.Tensor] = {}
        self._norms: dict[str, torch.Tensor] = {}

    def stores(self, role: str) -> bool:
        """Whether a layer of this role has a pre-scale of its own."""
        return not self._kind or (self._kind == "norms" and role in ("o", "down"))

    def of(self, role: str, module: str, inputs: int, index: Index) -> Norm | Rows | None:
        """Where the pre-scale of a site goes; None if nothing can take it. `inputs`: K."""
        name = self._norm(role)
        if name is not None:
            place = self._places[name]
            return Norm(name, read_rows(index, place.record, place.start, place.start + place.rows), self._added)
        if self._kind != "all":
            return None
        if role == "expert_down":
            return Rows(f"{module.rpartition('.')[0]}.up_proj.weight", (inputs, 1, 1))
        name = next((self._roles[other] for other in _ROWS.get(role, ()) if other in self._roles), None)
        return None if name is None else Rows(name, self._heads if role == "o" else (inputs, 1, 1))

    def _norm(self, role: str) -> str | None:
        """The norm whose readers are all of one site; that before experts has the router, too."""
        roles = () if role.startswith("expert") else _NORMS.get(SITES.get(role, role), ())
        return next((self._roles[name] for name in roles if name in self._roles), None)

    def take(self, into: Norm | Rows, multiplier: torch.Tensor) -> None:
        """Fold a multiplier."""
        if isinstance(into, Norm):
            self._norms[into.parameter] = into.folded(multiplier.cpu())
        else:
            self._factors[into.parameter] = into.factors(multiplier).cpu()

    def rows(self) -> Mapping[str, torch.Tensor]:
        """Weight -> factors of its last rows."""
        return self._factors

    def others(self) -> dict[str, Place]:
        """Parameters beside the linear weights that folds may change, by name."""
        norms = {self._norm(role) for role in self._roles if self._kind}
        return {name: place for name, place in self._places.items() if name in norms or (self._kind == "all" and place.role in _BIASES)}

    def values(self, name: str, index: Index) -> torch.Tensor:
        """One of `others` as the folds make it, in its own type."""
        if name in self._norms:
            return self._norms[name]
        place = self._places[name]
        values, factors = read_rows(index, place.record, place.start, place.start + place.rows), self._factors.get(_weight(name))
        return values if factors is None else (values.double() * factors).to(values.dtype)


def _weight(bias: str) -> str:
    return f"{bias.rpartition('.')[0]}.weight"
