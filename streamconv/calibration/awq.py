"""AWQ: the channel scales that a site's weights are multiplied with before they are rounded, and its input is divided by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from streamconv.calibration.gram import Gram
from streamconv.calibration.grid import Grid
from streamconv.calibration.tiers import rows_at_once

_STEPS = 20
_SPREAD = 1e3
"""The largest scale is at most so many times the smallest: outputs that a loss of linear layers does not see may go wrong beyond."""
_LARGEST_F16 = 2.0**6
"""Of the multiplier of an input in float16."""
_ROWS = 256
"""Rows of each weight that a search on the CPU looks at, evenly spread."""


def prescale(
    weights: Sequence[torch.Tensor], gram: Gram, grid: Grid, stored: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor | None:
    """The multiplier p of the input [K], float32, as it is stored; None if no candidate is better than ones.

    Candidates are s = m^a / w^(1 - a) for a = 0, 1/20, ..., 1, with m the mean magnitude of the inputs and w that of the weights in
    their groups; p = 1 / s. The loss is that of all weights together, without clipping.

    Args:
        weights: [N, K] of all that share the input.
        stored: s -> p, if it is not a vector in the grid's type.
    """
    device = weights[0].device
    step = [max(1, len(weight) // _ROWS) if device.type == "cpu" else 1 for weight in weights]
    chosen = [weight[::each] for weight, each in zip(weights, step, strict=True)]
    share = _share(weights, grid)
    mean = gram.absolute.clone()
    alive = mean > 0
    if not bool(alive.any()):
        return None
    mean = torch.where(alive, mean, mean[alive].amin())
    best, least = None, _loss(chosen, None, gram, grid)
    for number in range(_STEPS + 1):
        alpha = number / _STEPS
        scale = (mean.pow(alpha) / share.pow(1 - alpha).clamp(min=1e-30)).clamp(1e-4, 1e4)
        scale = scale / (scale.amax() * scale.amin()).sqrt()
        multiplier = multiplier_of(scale, grid) if stored is None else stored(_limited(scale))
        loss = _loss(chosen, multiplier, gram, grid)
        if loss < least:
            best, least = multiplier, loss
    return best


def multiplier_of(scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """1 / s as it is stored: the weights are made from the rounded number, so that rounding it costs nothing."""
    multiplier = 1.0 / _limited(scale)
    if grid.dtype == torch.float16:
        multiplier = multiplier.clamp(max=_LARGEST_F16)
    return multiplier.to(grid.dtype).float()


def _limited(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(_SPREAD**-0.5, _SPREAD**0.5)


def _share(weights: Sequence[torch.Tensor], grid: Grid) -> torch.Tensor:
    """Mean over all rows of the magnitude of a weight within its group [K]."""
    total, count = torch.zeros(weights[0].shape[1], device=weights[0].device), 0
    for weight in weights:
        for rows in weight.split(1024):  # type: ignore[no-untyped-call]
            values = rows.float().abs()
            grouped = values.reshape(len(values), -1, grid.group)
            total += (grouped / grouped.amax(2, keepdim=True).clamp(min=1e-30)).sum(0).reshape(-1)
            count += len(values)
    return total / count


def _loss(weights: Sequence[torch.Tensor], multiplier: torch.Tensor | None, gram: Gram, grid: Grid) -> float:
    """Of plain rounding, in the sum over outputs; infinite if it is no number."""
    total = 0.0
    for weight in weights:
        losses = []
        for rows in weight.split(rows_at_once(weight.shape[1], weight.device.type)):  # type: ignore[no-untyped-call]
            scaled = rows.float() if multiplier is None else rows.float() * (1.0 / multiplier)
            scales = grid.scales(grid.largest(scaled), 1.0)
            error = grid.values(grid.codes(scaled, scales), scales) - scaled
            losses.append(gram.energies(error if multiplier is None else error * multiplier))
        total += float(torch.cat(losses).double().sum())
    return total if total == total else float("inf")
