"""The smoother of SmoothQuant, the maxima it is made from, and the scales.

Each weight is read once for its column maxima. They give the smoother, and, where one scale serves the whole matrix, the
largest smoothed weight too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.checkpoint.dtypes import FLOATS, DType
from streamconv.errors import DataError, printable
from streamconv.kernels.launch import input_channel_amax_kernel
from streamconv.lazy import Array, np, torch
from streamconv.quants.base import Codec, EncodeStats, FinishedReductions, ReduceKernel, Reduction


@dataclass(frozen=True)
class InputChannelAmax(Reduction):
    """float16 [cols]: the largest absolute value of each column of the float16 copies of one weight."""

    key: str
    bytes_per_element = 16
    bytes_per_column = 12

    def tile(self, block: torch.Tensor, known: FinishedReductions) -> torch.Tensor:
        return block.to(torch.float16).abs().amax(0)

    def kernel(self, source: DType) -> ReduceKernel | None:
        return input_channel_amax_kernel(source) if source.name in FLOATS else None


_LEAST = 1e-5
"""Of a smoother and, in 1.x, of a weight maximum."""

COLUMN_BYTES = 64
"""Working memory that finding a smoother takes for each input channel, whatever the rows are."""


@dataclass(frozen=True)
class Smoother:
    """Finds s [cols] of the weights that share an input.

    Attributes:
        keys: of the InputChannelAmax of each of them.
        weights: what they are, for errors.
        module: whose input range counts; all of them see the same input.
        wide: the powers of the weight maxima in float64, of at least 1e-5 (TensorRT-LLM 1.x); else in float16 (0.16).
    """

    keys: tuple[str, ...]
    weights: str
    ranges: Ranges
    module: str
    alpha: float
    wide: bool

    def find(self, known: FinishedReductions, exact: bool = False) -> Bound:
        """s, and sx = 127 / the largest smoothed input.

        Args:
            exact: torch's powers in any case; else only where they decide a byte of a weight, a norm or a smoother.

        Raises:
            DataError: NaN or infinity in a column, or (unless `wide`) zeros alone: its smoother would be infinite.
        """
        largest = known.get(self.keys[0])
        for key in self.keys[1:]:
            largest = np.maximum(largest, known.get(key))
        bad = ~np.isfinite(largest) | ((largest == 0) & (not self.wide))
        if bool(bad.any()):
            column = int(bad.argmax())
            what = "holds zeros only in float16" if largest[column] == 0 else "holds NaN or what float16 cannot hold"
            raise DataError(
                f"{printable(self.weights)}: input channel {column} {what}, SmoothQuant has no smoother for it",
                hint="use another --quant, for example int8",
            )
        inputs = self.ranges.vector(self.module + ".x").astype(np.float64)
        if self.wide:
            largest = np.maximum(largest.astype(np.float64), _LEAST)
        if not self.loads_torch and not exact:
            from streamconv.kernels.root import half_power_smoother

            factors = half_power_smoother(inputs, largest)
            if factors is not None:
                smoother, top, doubt = factors
                least, greatest = 127.0 / doubt[1], 127.0 / doubt[0]
                with np.errstate(over="ignore"):  # an infinite one is refused when it is written
                    settled = np.float32(least) == np.float32(greatest)
                if settled:
                    return Bound(smoother, 127.0 / top, doubt=(least, greatest))
        smoother = np.maximum(power(inputs, self.alpha) / power(largest, 1 - self.alpha), _LEAST)
        sx = 127.0 / float((inputs / smoother).max())
        return Bound(smoother, sx, doubt=(sx, sx))

    def cause(self, outputs: float | None) -> str:
        """The ranges that its values follow from, for errors.

        Args:
            outputs: the largest output of the weights, None where it does not count.
        """
        inputs = self.ranges.vector(self.module + ".x")
        reason = f"{printable(self.module)}.x in {printable(self.ranges.path)} is {inputs.min():g} to {inputs.max():g}"
        return reason + (f", the largest output (.y) {outputs:g}" if outputs is not None else "") + "; measure the ranges again"

    @property
    def loads_torch(self) -> bool:
        """`find` needs torch's powers (for alpha 1/2 only in a case that nobody has met)."""
        return self.alpha != 0.5

    def prepare(self) -> None:
        """Load what `find` will need."""
        if not self.loads_torch:
            from streamconv.kernels.root import half_power_smoother

            half_power_smoother(np.ones(1), np.ones(1, np.float64 if self.wide else np.float16))
        else:
            power(np.ones(1), self.alpha)


def power(values: Array, exponent: float) -> Array:
    """values ** exponent as torch computes it, in the dtype of the values."""
    if exponent == 0.5 and values.dtype == np.float16:
        return np.sqrt(values)  # the same for every value
    powers: Array = torch.from_numpy(values).pow(exponent).numpy()
    return powers


def smoothed(block: torch.Tensor, smoother: Array) -> torch.Tensor:
    """W * s, one float64 product as float16 (torch goes through float32)."""
    return (block.to(torch.float16).double() * torch.from_numpy(smoother).to(block.device)).to(torch.float16)


def largest_smoothed(columns: Array, smoother: Array) -> float:
    """AW, the largest absolute smoothed weight, from the weight's column maxima: products and roundings keep the order."""
    products = columns.astype(np.float64) * smoother
    with np.errstate(over="ignore"):
        return float(products.astype(np.float32).astype(np.float16).max())


def weight_scale(largest: torch.Tensor) -> torch.Tensor:
    """float16 h(127 * h(1 / aw)): two roundings; infinite for tiny rows."""
    return (127.0 * (1.0 / largest.float()).half().float()).half()


def inverse(scale: torch.Tensor) -> torch.Tensor:
    return (1.0 / scale.float()).half()


def output_scale(largest: float) -> float:
    """sy = f(127 * f(1 / ay)), a float32 value."""
    return float(np.float32(127) * (np.float32(1) / np.float32(largest)))


def one_scale(largest: float) -> tuple[float, float]:
    """The weight scale and its inverse of a matrix with one scale, float16 values: `weight_scale` and `inverse` in numpy."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = (np.float32(127) * (np.float32(1) / np.float32(largest)).astype(np.float16).astype(np.float32)).astype(np.float16)
        return float(scale), float((np.float32(1) / scale.astype(np.float32)).astype(np.float16))


@dataclass(frozen=True, eq=False)
class Bound:
    """What one tile's encoding is told.

    Attributes:
        smoother: s, float64 [cols].
        activation: sx, float64; `doubt`, the bounds of what it would be by torch's powers: the same as float32.
        largest: AW, where one scale serves the whole matrix.
    """

    smoother: Array
    activation: float
    largest: float | None = None
    doubt: tuple[float, float] = (1.0, 1.0)

    def accumulator(self, scale: torch.Tensor, outputs: float) -> torch.Tensor:
        """accum of a vector of scales, all in float32."""
        sy, sx = (torch.tensor(value, device=scale.device) for value in (output_scale(outputs), self.activation))
        return sy / (sx * scale.float())


class Smoothed(Codec):
    """What a smoother decides.

    Attributes:
        outputs: ay, the largest output; None per token.
        bound: what the reductions gave, None until `bind`.
    """

    smoother: Smoother
    outputs: float | None = None
    bound: Bound | None = None

    torch_bytes_per_column = COLUMN_BYTES

    def amax_of(self, source: str) -> str | None:
        """Key of the InputChannelAmax that give AW of the rows of a source tensor, where one scale serves a matrix."""
        return None

    @property
    def loads_torch(self) -> bool:  # type: ignore[override]
        return self.smoother.loads_torch

    def cause(self) -> str:
        return self.smoother.cause(self.outputs)

    def bind(self, known: FinishedReductions, source: str) -> Codec:
        return replace(self, bound=bound_to(self.smoother, known, self.amax_of(source)))  # type: ignore[type-var]

    @property
    def known(self) -> Bound:
        if self.bound is None:
            raise AssertionError(f"{self.smoother.weights}: encoded before its reductions")
        return self.bound


_recent: WeakKeyDictionary[Ranges, OrderedDict[object, tuple[Array, Bound]]] = WeakKeyDictionary()
_lock = threading.Lock()
_RECENT = 8
"""Bounds that are kept: those of the tiles at work."""


def bound_to(smoother: Smoother, known: FinishedReductions, largest: str | None, exact: bool = False) -> Bound:
    """What an encoding needs to know.

    Args:
        largest: key of the InputChannelAmax of its own weight, where one scale serves it.
        exact: as in `Smoother.find`.
    """
    mark = known.get(smoother.keys[0])  # finished maxima are one object: what was found from them before, still holds
    key = (smoother.keys, smoother.module, smoother.alpha, smoother.wide, largest, exact)
    with _lock:
        kept, bound = _recent.setdefault(smoother.ranges, OrderedDict()).get(key, (None, None))
    if bound is not None and kept is mark:
        return bound
    bound = smoother.find(known, exact)
    if largest is not None:
        bound = replace(bound, largest=largest_smoothed(known.get(largest), bound.smoother))
    with _lock:
        recent = _recent[smoother.ranges]
        recent[key] = (mark, bound)
        recent.move_to_end(key)
        while len(recent) > _RECENT:
            recent.popitem(last=False)
    return bound


def unbound(flat: Array, start: int, stride: int, rows: int, cols: int, outs: Sequence[Array]) -> EncodeStats:
    """In the place of a kernel while its reductions are not known."""
    raise AssertionError("encoded before its reductions")
