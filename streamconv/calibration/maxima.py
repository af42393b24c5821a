"""Activation ranges: running maxima of a layer's linear modules."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streamconv.errors import DataError, printable

if TYPE_CHECKING:
    from streamconv.calibration.layers import OneLayer
    from streamconv.calibration.scratch import Scratch
    from streamconv.checkpoint.model_config import ModelConfig

_LEAST_WEIGHT = 1e-8
"""Floor of a row's weight maximum."""


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

    def told(self, called: Callable[[str], str]) -> dict[str, torch.Tensor]:
        """`M.x` [in], `M.y` [out] and `M.w` [out] of every module M, float32, on the CPU.

        Args:
            called: name of a module in the layer -> the name of it in the file.
        """
        vectors = {}
        for name, module in self._linears.items():
            for end in "xy":
                vectors[f"{called(name)}.{end}"] = self._found[f"{name}.{end}"].to("cpu", torch.float32, copy=True)
            vectors[f"{called(name)}.w"] = _largest(module.weight.detach(), 1).float().clip(min=_LEAST_WEIGHT).cpu()
        return vectors


class RangesWork:
    """Measures activation ranges; see `work.Work`. `kind`: the computing type, for messages."""

    name = "activation ranges"
    smaller = ""
    asked: Any = None
    captured = True

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def holds(self, path: Path) -> str | None:
        from streamconv.checkpoint.header import read_header

        return None if all(name.endswith((".x", ".y", ".w")) for name in read_header(path).tensors) else self.name

    def extra(self, facts: ModelConfig) -> int:
        return 0

    def kept(self, rows: int, cols: int) -> int:
        return 2 * 4 * (2 * rows + cols)  # once more while they are written

    def open(self, layer: OneLayer, scratch: Scratch, tokens: int, facts: dict[str, Any]) -> None:
        """Nothing is needed."""

    def watch(self, layer: torch.nn.Module) -> None:
        self._maxima = Maxima(layer)

    def passes(self, layer: OneLayer) -> Sequence[Callable[[], None]]:
        return [self._maxima.clear]

    def finish(self, layer: OneLayer) -> dict[str, torch.Tensor]:
        ranges = self._maxima.told(lambda name: layer.places[f"{name}.weight"].module)
        odd = [name for name, values in ranges.items() if not bool(values.isfinite().all())]
        if odd:
            half = self._kind == "float16"
            hint = "computing in another type may help: --dtype bfloat16 or float32" if half else "are the weights sound?"
            raise DataError(f"{printable(odd[0])} (and {len(odd) - 1} more): the measured range is NaN or infinite", hint=hint)
        return ranges

    def notes(self, results: dict[str, torch.Tensor]) -> list[str]:
        return []

    def write(self, results: dict[str, torch.Tensor], new: Path, facts: dict[str, Any]) -> int:
        from safetensors.torch import save_file

        # one entry: the stock writer leaves the order of several to chance
        save_file({name: results[name] for name in sorted(results)}, new, metadata={"calibration": json.dumps(facts)})
        return len(results)


def _largest(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Largest absolute value along a dimension, NaN if there is one: exact, and without a copy of the values."""
    maxima: torch.Tensor
    if values.is_cuda:  # one launch
        maxima = torch.linalg.vector_norm(values, float("inf"), dim=dim)
    else:  # ten times faster than the norm there
        maxima = torch.maximum(values.amax(dim), -values.amin(dim)).abs()
    return maxima
