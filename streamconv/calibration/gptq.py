"""GPTQ with static order: columns are rounded from the largest input to the smallest, each one's error is made up for by the rest.

The scales are fixed beforehand and stay with their own groups, so the codes lie as any others: no g_idx.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from streamconv.calibration.grid import Grid
from streamconv.calibration.tiers import DOUBLE, rows_at_once

DAMPING = (0.01, 0.04, 0.16, 0.64, 1.0)
"""Shares of the mean diagonal that are added to it; the next one is taken where the Cholesky factorization fails."""
_BLOCK = 128


class Factor(NamedTuple):
    """Attributes:
    order: columns in the order in which they are rounded.
    upper: float32 [K, K] with (H + damping)⁻¹ = upperᵀ upper, in that order.
    """

    order: torch.Tensor
    upper: torch.Tensor


def factor(moments: torch.Tensor) -> Factor | None:
    """What GPTQ needs of a full Gram; None if it has no factorization.

    A dead channel counts as 1 on the diagonal, so nothing is made up for through it.
    """
    size, device = len(moments), moments.device
    diagonal = moments.diagonal().clone()
    dead = diagonal <= 0
    order = torch.argsort(torch.where(dead, 1.0, diagonal), descending=True, stable=True)
    kind = torch.float64 if device.type == "cpu" and size <= DOUBLE else torch.float32
    turned = order.flip(0)
    mean = torch.where(dead, 1.0, diagonal).to(kind).mean()
    for damping in DAMPING:
        # upper = J L⁻¹ J for H reversed by J = L Lᵀ: one factorization, and no inverse of the inverse
        hessian = moments[turned].to(kind)[:, turned]
        hessian.diagonal().copy_(torch.where(dead, 1.0, diagonal)[turned].to(kind) + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        del hessian
        if int(failed) == 0:
            upper = torch.eye(size, dtype=kind, device=device).T  # columns lie together: solved in place
            torch.linalg.solve_triangular(lower, upper, upper=False, out=upper)
            del lower
            least, most = upper.aminmax()  # NaN in both if there is one; no matrix of its own as isfinite makes
            if bool(least.isfinite()) and bool(most.isfinite()):
                turned_back = upper.flip(0, 1)
                del upper
                return Factor(order, turned_back.float().contiguous())
    return None


def rounded(weight: torch.Tensor, scales: torch.Tensor, grid: Grid, known: Factor) -> torch.Tensor:
    """Codes, float32 [N, K].

    Args:
        weight: float32 [N, K].
        scales: [N, K/g].
    """
    blocks = []
    step = rows_at_once(weight.shape[1], weight.device.type)
    for rows, own in zip(weight.split(step), scales.split(step), strict=True):  # type: ignore[no-untyped-call]
        blocks.append(_rows(rows, own, grid, known))
    return torch.cat(blocks)


def _rows(weight: torch.Tensor, scales: torch.Tensor, grid: Grid, known: Factor) -> torch.Tensor:
    order, upper = known
    size = weight.shape[1]
    left = weight[:, order].T.contiguous()  # [K, N]: a column is contiguous
    codes = torch.empty_like(left)
    groups = order // grid.group
    columns = _kernel() if weight.device.type == "cuda" else _columns
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        block, steps = left[first:last], scales[:, groups[first:last]].T.contiguous()
        errors = torch.empty_like(block)
        columns(block, steps, upper[first:last, first:last], codes[first:last], errors)
        if last < size:
            left[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(size, device=order.device)
    return codes[back].T.contiguous()


def _columns(block: torch.Tensor, steps: torch.Tensor, upper: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor) -> None:
    """Round the columns of a block, one after another.

    Args:
        block: float32 [B, N]; what it holds afterwards is nobody's.
        steps: float32 [B, N], the scale of each.
        upper: float32 [B, B].
        codes, errors: float32 [B, N], written.
    """
    diagonal = upper.diagonal()
    for at, (column, step) in enumerate(zip(block, steps, strict=True)):
        codes[at] = (column / step).round_().clamp_(-8, 7)
        errors[at] = (column - codes[at] * step) / diagonal[at]
        if at + 1 < len(block):
            block[at + 1 :].addr_(upper[at, at + 1 :], errors[at], alpha=-1)


def _kernel() -> Callable[..., None]:
    """All columns of a block in one launch, where there is Triton."""
    try:
        from streamconv.calibration.gptq_kernel import columns
    except ImportError:
        return _columns
    return columns
