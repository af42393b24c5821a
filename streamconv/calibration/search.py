"""The search for the codes of the weights of one site: those that share an input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from streamconv.calibration import gptq
from streamconv.calibration.awq import prescale
from streamconv.calibration.gram import Gram
from streamconv.calibration.grid import NEAREST, Grid
from streamconv.calibration.tiers import rows_at_once
from streamconv.quants.int_group import RATIOS


class Found(NamedTuple):
    """What was found for a weight.

    Attributes:
        codes: int8 [N, K]; scales: float32 [N, K/g].
        losses: float32 [3]: mean square of the outputs, of their error after plain rounding, and of their error as chosen; the sum over
            outputs.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    losses: torch.Tensor


class Site(NamedTuple):
    """Attributes:
    found: module -> its codes.
    multiplier: of the input [K]; None for ones.
    unfactored: GPTQ had to be left out, because the Gram has no factorization.
    """

    found: dict[str, Found]
    multiplier: torch.Tensor | None = None
    unfactored: bool = False


def nearest(weight: torch.Tensor, grid: Grid) -> Found:
    """Plain rounding, where nothing is known of the inputs. `weight`: [N, K] in any float type."""
    scales, codes = [], []
    for rows in weight.split(rows_at_once(weight.shape[1], weight.device.type)):  # type: ignore[no-untyped-call]
        scales.append(grid.scales(grid.largest(rows.float()), NEAREST))
        codes.append(grid.codes(rows.float(), scales[-1]).to(torch.int8))
    return Found(torch.cat(codes), torch.cat(scales), torch.zeros(3))


def search(
    method: str,
    weights: Mapping[str, torch.Tensor],
    gram: Gram,
    grids: Mapping[str, Grid],
    stored: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Site:
    """The codes of all weights of a site.

    No output's error is above that of plain rounding, as far as the Gram tells: each row takes the best of plain rounding, of the
    clipped scales and, with "gptq", of GPTQ on these; a site whose multiplier makes one of its weights worse does without.

    Args:
        method: "clip", "awq" or "gptq".
        weights: module -> [N, K], finite, no wider than the grid's type.
        stored: see `awq.prescale`.
    """
    first = next(iter(grids.values()))
    multiplier = prescale(list(weights.values()), gram, first, stored) if method == "awq" else None
    known = gptq.factor(gram.moments) if method == "gptq" else None
    blocks = gram.blocks()
    unfactored = method == "gptq" and known is None
    weighed = {name: _weight(weight, gram, blocks, grids[name], multiplier, known) for name, weight in weights.items()}
    if multiplier is not None and any(float(one.losses[2]) > float(one.losses[1]) for one in weighed.values()):
        weighed = {name: _weight(weight, gram, blocks, grids[name], None, None) for name, weight in weights.items()}
        multiplier = None
    return Site(weighed, multiplier, unfactored)


def _weight(
    weight: torch.Tensor,
    gram: Gram,
    blocks: torch.Tensor,
    grid: Grid,
    multiplier: torch.Tensor | None,
    known: gptq.Factor | None,
) -> Found:
    codes, scales, totals = [], [], torch.zeros(3, dtype=torch.float64)
    inner = blocks if multiplier is None else blocks * _outer(multiplier, grid.group)
    for rows in weight.split(rows_at_once(weight.shape[1], weight.device.type)):  # type: ignore[no-untyped-call]
        values = rows.float()
        scaled = values if multiplier is None else values * (1.0 / multiplier)
        own = clipped(scaled, inner, grid)
        choices = [(grid.codes(scaled, own).to(torch.int8), own)]
        if known is not None:
            choices.append((gptq.rounded(scaled, own, grid, known).to(torch.int8), own))
        for ratio in (NEAREST, 1.0):
            plain = grid.scales(grid.largest(scaled), ratio)
            choices.append((grid.codes(scaled, plain).to(torch.int8), plain))
        factor = 1.0 if multiplier is None else multiplier
        losses = [gram.energies((grid.values(made.float(), step) - scaled) * factor) for made, step in choices]
        best, least = choices[0], losses[0]
        for choice, loss in zip(choices[1:], losses[1:], strict=True):
            better = loss < least
            least = torch.where(better, loss, least)
            best = (torch.where(better[:, None], choice[0], best[0]), torch.where(better[:, None], choice[1], best[1]))
        rtn = losses[-2]
        if multiplier is not None:
            plain = grid.scales(grid.largest(values), NEAREST)
            rtn = gram.energies(grid.values(grid.codes(values, plain), plain) - values)
        totals += torch.stack([gram.energies(values).double().sum(), rtn.double().sum(), least.double().sum()]).cpu()
        codes.append(best[0])
        scales.append(best[1])
    return Found(torch.cat(codes), torch.cat(scales), totals.float())


def _outer(multiplier: torch.Tensor, group: int) -> torch.Tensor:
    grouped = multiplier.reshape(-1, group)
    return grouped[:, :, None] * grouped[:, None, :]


def clipped(weight: torch.Tensor, blocks: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The scales of a weight, float32 [N, K/g].

    For each row and group the ratio minimizes eᵀ C e, with C the group's block of the Gram and e the rounding error; ties go to the
    larger ratio. All ratios are tried.

    Args:
        weight: float32 [N, K].
        blocks: [K/g, g, g].
    """
    rounded = []
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
        rounded.append(best)
    return torch.cat(rounded)
