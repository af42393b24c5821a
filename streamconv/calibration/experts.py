"""Experts that transformers stacks in one tensor, as linear modules of their own: what is measured is measured for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch


class Expert(torch.nn.Module):
    """One expert: gate, up and down projection."""

    def __init__(self, hidden: int, width: int, like: torch.Tensor) -> None:
        super().__init__()
        facts: dict[str, Any] = {"bias": False, "dtype": like.dtype, "device": like.device}
        self.gate_proj = torch.nn.Linear(hidden, width, **facts)
        self.up_proj = torch.nn.Linear(hidden, width, **facts)
        self.down_proj = torch.nn.Linear(width, hidden, **facts)


class Experts(torch.nn.ModuleList):
    """In the place of transformers' stacked experts: the same sum over the experts that the router chose.

    Args:
        stacked: transformers' module, with `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].
    """

    def __init__(self, stacked: Any) -> None:
        count, _, hidden = stacked.gate_up_proj.shape
        super().__init__(Expert(hidden, stacked.down_proj.shape[2], stacked.gate_up_proj) for _ in range(count))
        self.act: Any = stacked.act_fn

    def forward(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Tokens [n, H], experts of each token [n, k] and their weights [n, k] -> [n, H]."""
        out, act = torch.zeros_like(states), cast(Callable[[torch.Tensor], torch.Tensor], self.act)
        for number, expert in enumerate(cast(Iterable[Expert], self)):
            token, rank = torch.where(chosen == number)
            if not len(token):
                continue
            mine = states[token]
            made = expert.down_proj(act(expert.gate_proj(mine)) * expert.up_proj(mine))
            out.index_add_(0, token, (made * weights[token, rank, None]).to(out.dtype))
        return out


def unstacked(layer: torch.nn.Module) -> None:
    """Replace the stacked experts of a layer, if it has some."""
    for name, module in list(layer.named_modules()):
        stacks = [getattr(module, part, None) for part in ("gate_up_proj", "down_proj")]
        if all(isinstance(stack, torch.nn.Parameter) and stack.dim() == 3 for stack in stacks):
            above, _, last = name.rpartition(".")
            setattr(layer.get_submodule(above), last, Experts(module))
