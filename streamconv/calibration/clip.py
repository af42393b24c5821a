"""Group scales by search: the share of a group's maximum with the smallest output error over the group's own inputs."""

from __future__ import annotations

import torch

from streamconv.calibration.grid import Grid
from streamconv.calibration.tiers import rows_at_once
from streamconv.quants.int_group import RATIOS


def clipped(weight: torch.Tensor, blocks: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The scales of a weight, float32 [N, K/g].

    For each row and group the ratio minimizes eᵀ C e, with C the group's block of the Gram and e the rounding error; ties go to the
    larger ratio. All ratios are tried.

    Args:
        weight: float32 [N, K].
        blocks: [K/g, g, g].
    """
    made = []
    for rows in weight.split(max(64, rows_at_once(weight.shape[1], weight.device.type) // 2)):  # type: ignore[no-untyped-call]
        largest = grid.largest(rows)
        best = grid.scales(largest, RATIOS[0])
        least = torch.full_like(largest, float("inf"))
        for ratio in RATIOS:
            scales = grid.scales(largest, ratio)
            error = (grid.values(grid.codes(rows, scales), scales) - rows).reshape(*scales.shape, grid.group).transpose(0, 1)
            loss = ((error @ blocks) * error).sum(2).T
            better = loss < least
            best, least = torch.where(better, scales, best), torch.where(better, loss, least)
        made.append(best)
    return torch.cat(made)
