"""What SmoothQuant stores beside the integers: divided norms, scales and smoothers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamconv.checkpoint.dtypes import F32, FLOATS, DType
from streamconv.kernels.launch import divided_kernel
from streamconv.lazy import Array, np, torch
from streamconv.quants.base import Codec, EncodeStats, FinishedReductions, Kernel, Part
from streamconv.quants.computed import Computed
from streamconv.quants.rounding import half_ulp
from streamconv.quants.smoothing import COLUMN_BYTES, Bound, Smoother, bound_to, one_scale, output_scale, unbound


@dataclass(frozen=True)
class SmoothNorm(Codec):
    """A norm weight as one row [1, H]: fp16(w / s), then the model dtype."""

    smoother: Smoother
    dtype: DType
    bound: Bound | None = None

    computed = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.dtype.name}, divided by the smoother"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.smoother.keys

    @property
    def loads_torch(self) -> bool:  # type: ignore[override]
        return self.smoother.loads_torch

    def cause(self) -> str:
        return self.smoother.cause(None)

    def bind(self, known: FinishedReductions, source: str) -> SmoothNorm:
        return replace(self, bound=bound_to(self.smoother, known, None))

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("weight", self.dtype, (cols,), cols * self.dtype.itemsize),)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        made = self._divided(block).to(getattr(torch, self.dtype.torch))
        stats.overflow += int((torch.isinf(made) & ~torch.isinf(block)).sum())
        return (made.contiguous().reshape(-1).view(torch.uint8),)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        return parts[0].view(getattr(torch, self.dtype.torch)).reshape(rows, cols).float()

    def values(self, block: torch.Tensor) -> torch.Tensor:
        return self._divided(block).float()

    def error(self, block: torch.Tensor) -> torch.Tensor:
        return half_ulp(self.values(block), self.dtype)

    def kernel(self, source: DType) -> Kernel | None:
        if source.name not in FLOATS:
            return None
        return unbound if self.bound is None else divided_kernel(source, self.dtype, self.bound.smoother)

    def prepare(self, source: DType) -> None:
        kernel = replace(self, bound=Bound(np.ones(2), 1.0)).kernel(source)
        if kernel is None:
            super().prepare(source)
        else:
            kernel(np.zeros(2, source.storage), 0, 2, 1, 2, [np.empty(2 * self.dtype.itemsize, np.uint8)])

    def torch_bytes_per_column(self) -> int:
        return COLUMN_BYTES

    def _divided(self, block: torch.Tensor) -> torch.Tensor:
        if self.bound is None:
            raise AssertionError(f"{self.smoother.weights}: the norm was encoded before its reductions")
        return (block.half().double() / torch.from_numpy(self.bound.smoother).to(block.device)).half()


@dataclass(frozen=True)
class SmoothValue(Computed):
    """Float32 values that follow from the reductions alone; the source is a `NoSource`.

    Attributes:
        what: "activation" (sx), "scale" (accum_t or inv_t of a matrix with one scale) or "smoother".
        outputs: ay, None per token.
        largest: key of the InputChannelAmax that give AW.
        keep: part of the smoother to store.
        inputs: channels of the whole smoother.
    """

    smoother: Smoother
    what: str
    suffix: str
    shape: tuple[int, ...]
    outputs: float | None = None
    largest: str | None = None
    keep: tuple[int, int] = (0, 1)
    inputs: int = 1
    bound: Bound | None = None

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.smoother.keys, *([self.largest] if self.largest and self.largest not in self.smoother.keys else []))

    @property
    def loads_torch(self) -> bool:  # type: ignore[override]
        return self.smoother.loads_torch

    def cause(self) -> str:
        return self.smoother.cause(self.outputs)

    def bind(self, known: FinishedReductions, source: str) -> SmoothValue:
        bound = bound_to(self.smoother, known, self.largest)
        made = [replace(self, bound=replace(bound, activation=sx)).value() for sx in bound.doubt]
        if made[0].tobytes() != made[1].tobytes():
            bound = bound_to(self.smoother, known, self.largest, exact=True)
        return replace(self, bound=bound)

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part(self.suffix, F32, self.shape, 4 * (self.keep[1] - self.keep[0])),)

    def prepare(self, source: DType) -> None:
        self.smoother.prepare()

    def torch_bytes_per_element(self) -> int:
        return 32 * (self.keep[1] - self.keep[0]) + COLUMN_BYTES * self.inputs

    def torch_bytes_per_column(self) -> int:
        return 0

    def value(self) -> Array:
        """float32, 1-D."""
        bound = self.bound
        if bound is None:
            raise AssertionError(f"{self.smoother.weights}: a value was asked for before its reductions")
        if self.what == "smoother":
            return bound.smoother[self.keep[0] : self.keep[1]].astype(np.float32)
        if self.what == "activation":
            with np.errstate(over="ignore"):  # an infinite one is refused when it is written
                return np.array([bound.activation]).astype(np.float32)
        scale, inverted = one_scale(bound.largest) if bound.largest is not None else (1.0, 1.0)
        if self.outputs is None:
            return np.array([inverted], np.float32)
        # one scale: the official code computes in float64 with the unrounded sx
        with np.errstate(divide="ignore", over="ignore"):
            return (np.float64(output_scale(self.outputs)) / (np.array([bound.activation]) * scale)).astype(np.float32)
