"""The smoother of SmoothQuant, the maxima it is made from, and the scales (quantization spec §6.4, §6.5).

Passes over a weight: its column maxima give the smoother; where one scale serves the whole matrix, the largest smoothed weight
is needed before any integer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamconv.errors import DataError, printable
from streamconv.quants.base import Known, Reduction
from streamconv.ranges import Ranges

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ColumnMaxima(Reduction):
    """float16 [cols]: the largest absolute value of each column of the float16 copies; m of §6.4."""

    key: str
    bytes_per_element = 16
    bytes_per_column = 8

    def tile(self, block: torch.Tensor, known: Known) -> torch.Tensor:
        import torch

        return block.to(torch.float16).abs().amax(0)


COLUMN_BYTES = 64
"""Working memory that finding a smoother takes for each input channel, whatever the rows are."""


@dataclass(frozen=True)
class Smoother:
    """Finds s [cols] of the weights that share an input.

    Attributes:
        key: of their ColumnMaxima.
        weights: what they are, for errors.
        module: whose input range counts; all of them see the same input.
    """

    key: str
    weights: str
    ranges: Ranges
    module: str
    alpha: float

    def find(self, known: Known) -> torch.Tensor:
        """float64 [cols], on the CPU.

        Raises:
            DataError: a column of zeros (its smoother would be infinite), NaN or infinity.
        """
        import torch

        largest = known.get(self.key)
        bad = (largest == 0) | ~torch.isfinite(largest)
        if bool(bad.any()):
            column = int(bad.nonzero()[0])
            what = "holds zeros only in float16" if largest[column] == 0 else "holds NaN or what float16 cannot hold"
            raise DataError(
                f"{printable(self.weights)}: input channel {column} {what}, SmoothQuant has no smoother for it",
                hint="use another --quant, for example int8",
            )
        inputs = self._inputs()
        return (inputs.pow(self.alpha) / largest.pow(1 - self.alpha)).clamp(min=1e-5)

    def activation_scale(self, smoother: torch.Tensor) -> float:
        """sx = 127 / the largest smoothed input, float64 (§6.5)."""
        return 127.0 / float((self._inputs() / smoother).max())

    def _inputs(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.ranges.vector(self.module + ".x")).double()


def smoothed(block: torch.Tensor, smoother: torch.Tensor) -> torch.Tensor:
    """W * s, one float64 product rounded once to float16."""
    import torch

    return (block.to(torch.float16).double() * smoother.to(block.device)).to(torch.float16)


@dataclass(frozen=True)
class SmoothedMaximum(Reduction):
    """float16 scalar: AW, the largest absolute smoothed weight (§6.5)."""

    key: str
    smoother: Smoother
    bytes_per_element = 28
    bytes_per_column = COLUMN_BYTES

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.smoother.key,)

    def tile(self, block: torch.Tensor, known: Known) -> torch.Tensor:
        return smoothed(block, self.smoother.find(known)).abs().max()


def weight_scale(largest: torch.Tensor) -> torch.Tensor:
    """float16 h(127 * h(1 / aw)): two roundings; infinite for tiny rows."""
    return (127.0 * (1.0 / largest.float()).half().float()).half()


def inverse(scale: torch.Tensor) -> torch.Tensor:
    return (1.0 / scale.float()).half()


def output_scale(largest: float) -> torch.Tensor:
    """sy = f(127 * f(1 / ay)), float32 scalar."""
    import torch

    return 127.0 * (1.0 / torch.tensor(largest, dtype=torch.float32))


@dataclass(frozen=True, eq=False)
class Bound:
    """What one tile's encoding is told: the smoother s, sx, and AW where one scale serves the whole matrix."""

    smoother: torch.Tensor
    activation: float
    largest: torch.Tensor | None = None

    def accumulator(self, scale: torch.Tensor, outputs: float) -> torch.Tensor:
        """accum of a vector of scales, all in float32."""
        import torch

        return output_scale(outputs).to(scale.device) / (torch.tensor(self.activation).float().to(scale.device) * scale.float())


def bound_to(smoother: Smoother, known: Known, largest: str | None) -> Bound:
    found = smoother.find(known)
    return Bound(found, smoother.activation_scale(found), known.get(largest) if largest is not None else None)
