"""Values that follow from reductions alone, such as the scale of a whole matrix: no row of a source decides them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from streamconv.checkpoint.dtypes import DType
from streamconv.lazy import Array, np, torch
from streamconv.quants.base import EncodeStats, ErrorKernel, Errors, Exact, Kernel, OfMaximum


class Computed(Exact):
    """Float32 values of one row, which are exact; the source is a `NoSource`."""

    name = "F32"

    @abstractmethod
    def value(self) -> Array:
        """float32, 1-D; asked for when the reductions are complete."""

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        return (torch.from_numpy(self.value()).view(torch.uint8).to(block.device),)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        return parts[0].view(torch.float32).reshape(rows, cols)

    def values(self, block: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.value()).reshape(1, -1)

    def kernel(self, source: DType) -> Kernel | None:
        def run(flat: Array, start: int, stride: int, rows: int, cols: int, outs: Sequence[Array]) -> EncodeStats:
            outs[0][:] = self.value().view("u1")
            return EncodeStats()

        return run

    def error_kernel(self, source: DType) -> ErrorKernel | None:
        def run(flat: Array, start: int, stride: int, rows: int, cols: int, parts: Sequence[Array]) -> Errors:
            want, got = self.value().astype(np.float64), parts[0].view(np.float32).astype(np.float64)
            gap = np.where(np.isfinite(want) & np.isfinite(got), got - want, 0.0)
            wrong = int(not np.array_equal(want, got, equal_nan=True))
            return Errors(float((gap**2).sum()), float((want**2).sum()), float(abs(gap).max()), float(abs(want).max()), wrong)

        return run

    def prepare(self, source: DType) -> None:
        """Nothing to load."""


class ComputedNumber(Computed, OfMaximum):
    """The number of a maximum itself."""

    def value(self) -> Array:
        return np.array([self.known], np.float32)
