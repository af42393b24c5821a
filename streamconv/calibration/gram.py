"""What a search knows of the inputs of linear modules: their second moments, in a form that fits (`tiers`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from streamconv.calibration.tiers import Tier

_CHUNK = 8192
"""Tokens that are summed at a time."""
_LARGE = 1 << 26
"""Elements of a product [rows, K] that is made at once."""


class Gram:
    """Second moments of a site's inputs.

    Args:
        tier: what is kept.
        size: channels K.
        every: of so many tokens one goes into a sample.
    """

    def __init__(self, tier: Tier, size: int, group: int, device: torch.device, every: int = 1) -> None:
        self.tier, self.size, self.group, self._every = tier, size, group, every
        shape = {"full": (size, size), "block": (size // group, group, group), "sample": (0, size)}[tier]
        self.moments = torch.zeros(shape, device=device)
        self.absolute = torch.zeros(size, device=device)
        self._rows: list[torch.Tensor] = []
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Inputs [..., K] of some tokens. Products of 16-bit floats are exact in float32, and in TF32."""
        for rows in inputs.detach().reshape(-1, self.size).split(_CHUNK):  # type: ignore[no-untyped-call]
            values = rows.float()
            self.absolute += values.abs().sum(0)
            if self.tier == "sample":
                self._rows.append(values[-self.tokens % self._every :: self._every])
            else:
                with _tf32(rows.dtype != torch.float32):
                    if self.tier == "full":
                        self.moments.addmm_(values.T, values)
                    else:
                        grouped = values.reshape(len(values), -1, self.group).transpose(0, 1)
                        self.moments.baddbmm_(grouped.transpose(1, 2), grouped)
            self.tokens += len(values)

    def finish(self) -> None:
        """All tokens were added: sums become means."""
        if self.tier == "sample":
            self.moments, self._rows = torch.cat(self._rows) if self._rows else self.moments, []
            self.moments /= max(1, len(self.moments)) ** 0.5
        else:
            self.moments /= max(1, self.tokens)
        self.absolute /= max(1, self.tokens)

    @staticmethod
    def mean(grams: Sequence[Gram]) -> Gram:
        """Of all tokens of several finished Grams of one kind."""
        first = grams[0]
        result = Gram(first.tier, first.size, first.group, first.moments.device)
        result.tokens = sum(gram.tokens for gram in grams)
        if first.tier == "sample":
            rows = [gram.moments * (len(gram.moments) / max(1, result.tokens)) ** 0.5 for gram in grams]
            result.moments = torch.cat(rows)
        else:
            result.moments += sum(gram.moments * (gram.tokens / max(1, result.tokens)) for gram in grams)
        result.absolute += sum(gram.absolute * (gram.tokens / max(1, result.tokens)) for gram in grams)
        return result

    def finite(self) -> bool:
        """Whether all inputs were numbers."""
        return bool(self.absolute.isfinite().all()) and bool(self.moments.isfinite().all())

    def blocks(self) -> torch.Tensor:
        """[K/g, g, g]."""
        if self.tier == "block":
            return self.moments
        if self.tier == "sample":
            grouped = self.moments.reshape(len(self.moments), -1, self.group).permute(1, 2, 0)
            return grouped @ grouped.transpose(1, 2)
        count = self.size // self.group
        return self.moments.reshape(count, self.group, count, self.group).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def energies(self, error: torch.Tensor) -> torch.Tensor:
        """Mean square of each output of a change [N, K] of the weight, float32 [N]; of the blocks: without the terms across groups."""
        sums = []
        for rows in error.split(max(1, _LARGE // max(self.size, 1))):  # type: ignore[no-untyped-call]
            if self.tier == "full":
                sums.append(((rows @ self.moments) * rows).sum(1))
            elif self.tier == "sample":
                sums.append((rows @ self.moments.T).square().sum(1))
            else:
                grouped = rows.reshape(len(rows), -1, self.group).transpose(0, 1)
                sums.append(((grouped @ self.moments) * grouped).sum((0, 2)))
        return torch.cat(sums)


@contextmanager
def _tf32(exact: bool) -> Iterator[None]:
    """TF32 products where they are exact."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = exact
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
