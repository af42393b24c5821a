"""Queries, keys and values in one linear module, for each KV head its query heads, its key head, its value head (InternLM2), in a layer of
transformers that has three: what is measured is measured for the matrix that the source has.
"""

from __future__ import annotations

from typing import Any

import torch

from streamconv.calibration.names import GROUPED


class _Queries(torch.nn.Module):
    """Called first: all of the matrix; the other two take their parts of it.

    Args:
        heads: query heads of a KV head.
    """

    def __init__(self, like: torch.nn.Linear, rows: int, heads: int, size: int) -> None:
        super().__init__()
        facts: dict[str, Any] = {"bias": False, "dtype": like.weight.dtype, "device": like.weight.device}
        self.add_module(GROUPED, torch.nn.Linear(like.in_features, rows, **facts))
        self._heads, self._size = heads, size
        self.parts: tuple[torch.Tensor, ...] = ()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., query heads * D]."""
        made: torch.Tensor = self.get_submodule(GROUPED)(states)
        each = made.reshape(*made.shape[:-1], -1, self._heads + 2, self._size)
        self.parts = tuple(part.flatten(-3) for part in torch.split(each, [self._heads, 1, 1], -2))
        return self.parts[0]


class _Part(torch.nn.Module):
    """Keys or values of what the queries made."""

    def __init__(self, whole: _Queries, number: int) -> None:
        super().__init__()
        self._whole, self._number = [whole], number  # in a list: it is no module of this one

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., KV heads * D]."""
        return self._whole[0].parts[self._number]


def group(layer: torch.nn.Module, heads: int, size: int) -> None:
    """Replace the three projections of a layer's attention.

    Args:
        heads: query heads of a KV head.
    """
    attention: Any = layer.get_submodule("self_attn")
    rows = sum(getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj"))
    whole = _Queries(attention.q_proj, rows, heads, size)
    attention.q_proj, attention.k_proj, attention.v_proj = whole, _Part(whole, 1), _Part(whole, 2)
