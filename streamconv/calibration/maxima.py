"""Running maxima of a layer's linear modules."""

from __future__ import annotations

import functools
from typing import Any

import torch

_LEAST_WEIGHT = 1e-8
"""Floor of a row's weight maximum (quantization spec §6.3)."""


class Maxima:
    """The largest absolute input and output of each channel that goes through a layer's linear modules.

    They are kept in the activation type and on its device, in buffers that stay where they are: a captured graph goes on filling them.

    Args:
        layer: its linear modules are watched from now on.
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        self._linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        self._found: dict[str, torch.Tensor] = {}
        for name, module in self._linears.items():
            for end, channels in (("x", module.in_features), ("y", module.out_features)):
                self._found[f"{name}.{end}"] = module.weight.new_zeros(channels)
            module.register_forward_hook(functools.partial(self._keep, name))

    def _keep(self, name: str, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        for end, values in (("x", inputs[0]), ("y", output)):
            kept = self._found[f"{name}.{end}"]
            torch.maximum(kept, _largest(values.detach().reshape(-1, values.shape[-1]), 0), out=kept)

    def clear(self) -> None:
        """Begin anew, for another layer's weights."""
        for values in self._found.values():
            values.zero_()

    def told(self, prefix: str) -> dict[str, torch.Tensor]:
        """`{prefix}{module}.x` [in], `.y` [out] and `.w` [out], float32, on the CPU."""
        told = {prefix + name: values.to("cpu", torch.float32, copy=True) for name, values in self._found.items()}
        for name, module in self._linears.items():
            told[f"{prefix}{name}.w"] = _largest(module.weight.detach(), 1).float().clip(min=_LEAST_WEIGHT).cpu()
        return told


def _largest(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Largest absolute value along a dimension, NaN if there is one: exact, and without a copy of the values."""
    made: torch.Tensor
    if values.is_cuda:  # one launch
        made = torch.linalg.vector_norm(values, float("inf"), dim=dim)
    else:  # ten times faster than the norm there
        made = torch.maximum(values.amax(dim), -values.amin(dim)).abs()
    return made
