"""--quant smoothquant: INT8 weights and activations, four variants; and what is stored beside them: divided norms, scales and smoothers.

The arithmetic is that of the official converter, bit for bit: a float16 model, a float64 smoother, powers of the weight
maxima in float16, weight scales rounded twice. Everything is computed over whole rows and then cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamconv.checkpoint.dtypes import F16, F32, FLOATS, I8, DType
from streamconv.kernels.launch import divided_kernel, fused
from streamconv.lazy import Array, np, torch
from streamconv.quants.base import Codec, EncodeStats, FinishedReductions, Kernel, Part
from streamconv.quants.computed import Computed
from streamconv.quants.rounding import half_ulp
from streamconv.quants.smoothing import (
    COLUMN_BYTES,
    Bound,
    Smoothed,
    Smoother,
    bound_to,
    inverse,
    one_scale,
    output_scale,
    smoothed,
    unbound,
    weight_scale,
)

HALF = F16
"""The type that SmoothQuant's model is loaded in, whatever source and target are."""


@dataclass(frozen=True)
class SmoothWeight(Smoothed):
    """int8 [rows, cols] and, for qkv and per channel, a scale for each row.

    Attributes:
        dtype: what the smoothed weight is cast to before it is quantized: float16 for qkv, else the model dtype.
        largest: source tensor -> key of its InputChannelAmax, which give AW; empty per channel.
        divide: per tensor, divide by the rounded inverse (qkv of GQA).
        single: per tensor, the product is rounded to `dtype` before it becomes an integer (all but qkv).
        keep: columns to store, None for all.
    """

    smoother: Smoother
    dtype: DType
    outputs: float | None
    largest: tuple[tuple[str, str], ...] = ()
    divide: bool = False
    single: bool = True
    keep: tuple[int, int] | None = None
    bound: Bound | None = None

    quantizes = True
    torch_bytes_per_element = 48

    @property
    def name(self) -> str:  # type: ignore[override]
        weights = "tensor" if self.largest else "channel"
        return f"int8, smoothed (per {weights} weights, per {'token' if self.outputs is None else 'tensor'} activations)"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.smoother.keys, *(key for _, key in self.largest if key not in self.smoother.keys))

    def amax_of(self, source: str) -> str | None:
        return dict(self.largest).get(source)

    @property
    def _vector(self) -> bool:
        return not (self.largest and self.single)

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        width = cols if self.keep is None else self.keep[1] - self.keep[0]
        weight = Part("weight", I8, (rows, width), width)
        return (weight, Part("per_channel_scale", F32, (1, rows), 4)) if self._vector else (weight,)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        bound = self.known
        stats.nonfinite += int((~torch.isfinite(block)).sum())
        weight = smoothed(block, bound.smoother)
        largest = weight.abs().amax(1) if bound.largest is None else torch.tensor([bound.largest], device=block.device).half()
        scale = weight_scale(largest)
        weight = weight.to(getattr(torch, self.dtype.torch))
        if bound.largest is not None and self.divide:
            value = (weight.float() / inverse(scale).float()).half()
        else:
            value = weight.float() * scale.float()[:, None]
            if bound.largest is not None and self.single:
                value = value.to(weight.dtype)
        if self.keep is not None:
            value = value[:, self.keep[0] : self.keep[1]]
        whole = torch.nan_to_num(value.float(), 0.0, 127.0, -127.0).round_().clamp_(-127, 127).to(torch.int8)
        stored = [whole.contiguous().reshape(-1).view(torch.uint8)]
        if self._vector:
            rows = inverse(scale).float() if self.outputs is None else bound.accumulator(scale, self.outputs)
            stored.append(rows.expand(block.shape[0]).contiguous().view(torch.uint8))
        return tuple(stored)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        bound = self.known
        if self._vector:
            scale = parts[1].view(torch.float32)
            if self.outputs is not None:  # accum = sy / (sx * sw)
                scale = scale * bound.activation / output_scale(self.outputs)
        else:
            scale = torch.tensor([one_scale(bound.largest)[1] if bound.largest is not None else 1.0])
        first, last = self.keep or (0, cols)
        values = parts[0].view(torch.int8).reshape(rows, cols).double() * scale.double()[:, None]
        return (values / torch.from_numpy(bound.smoother[first:last])).float()

    def values(self, block: torch.Tensor) -> torch.Tensor:
        half = block.half().float()
        return half if self.keep is None else half[:, self.keep[0] : self.keep[1]]

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """Half a step of the smoothed weight, the roundings of its value before, and those of the scale, undone by 1 / s."""
        bound = self.known
        weight = smoothed(block, bound.smoother).float()
        largest = weight.abs().amax(1) if bound.largest is None else torch.tensor([bound.largest])
        step = inverse(weight_scale(largest)).float()[:, None]
        rounded = half_ulp(weight, HALF) + 2 * half_ulp(weight, self.dtype) + 4 * half_ulp(weight, HALF)
        error = ((0.5 * step + rounded).double() / torch.from_numpy(bound.smoother)).float()
        return error if self.keep is None else error[:, self.keep[0] : self.keep[1]]

    def kernel(self, source: DType) -> Kernel | None:
        if source.name not in FLOATS:
            return None
        bound = self.bound
        if bound is None:
            return unbound
        mode = 0 if bound.largest is None else 1 if self.divide else 2 if self.single else 0
        outputs = 0.0 if self.outputs is None else output_scale(self.outputs)
        largest = -1.0 if bound.largest is None else bound.largest
        rule = bound.smoother, mode, largest, *(self.keep or (0, bound.smoother.size)), outputs, bound.activation
        return fused("smooth_code.smooth_rows", ["u1", "f4"], source, self.dtype, *rule)

    def supposed(self) -> Codec:
        return replace(self, bound=Bound(np.ones(16), 1.0, 1.0 if self.largest else None), keep=None)

    def prepare(self, source: DType) -> None:
        super().prepare(source)
        self.smoother.prepare()


@dataclass(frozen=True)
class SmoothNorm(Smoothed):
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

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("weight", self.dtype, (cols,), cols * self.dtype.itemsize),)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        divided = self._divided(block).to(getattr(torch, self.dtype.torch))
        stats.overflow += int((torch.isinf(divided) & ~torch.isinf(block)).sum())
        return (divided.contiguous().reshape(-1).view(torch.uint8),)

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

    def supposed(self) -> Codec:
        return replace(self, bound=Bound(np.ones(16), 1.0))

    def _divided(self, block: torch.Tensor) -> torch.Tensor:
        return (block.half().double() / torch.from_numpy(self.known.smoother).to(block.device)).half()


@dataclass(frozen=True)
class SmoothValue(Computed, Smoothed):
    """Float32 values that follow from the reductions alone; the source is a `NoSource`.

    Attributes:
        what: "activation" (sx), "scale" (accum_t or inv_t of a matrix with one scale) or "smoother".
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

    torch_bytes_per_column = 0

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.smoother.keys, *([self.largest] if self.largest and self.largest not in self.smoother.keys else []))

    def bind(self, known: FinishedReductions, source: str) -> SmoothValue:
        bound = bound_to(self.smoother, known, self.largest)
        values = [replace(self, bound=replace(bound, activation=sx)).value() for sx in bound.doubt]
        if values[0].tobytes() != values[1].tobytes():
            bound = bound_to(self.smoother, known, self.largest, exact=True)
        return replace(self, bound=bound)

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part(self.suffix, F32, self.shape, 4 * (self.keep[1] - self.keep[0])),)

    def prepare(self, source: DType) -> None:
        self.smoother.prepare()

    @property
    def torch_bytes_per_element(self) -> int:  # type: ignore[override]
        return 32 * (self.keep[1] - self.keep[0]) + COLUMN_BYTES * self.inputs

    def value(self) -> Array:
        bound = self.known
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
