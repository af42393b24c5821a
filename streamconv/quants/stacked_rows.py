"""The experts of a layer, which a source stores apart, as one tensor.

Where it holds [in, out] of each expert, a row takes one input feature of every output feature: stored weights are read a stripe of
columns at a time, and the wider a stripe, the fewer bytes are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.rows import Extent, PackedTensor, RowSource, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.lazy import Bytes
from streamconv.quants.decoded_rows import STRIPE, DecodedTensor

Expert = SourceTensor | DecodedTensor


@dataclass(frozen=True, slots=True)
class Stacked(RowSource):
    """Weights [N, K] of `parts` matrices of each of E experts, as [E, parts * N, K], or as [E, K, parts * N] where they are turned.

    Attributes:
        shape: as it is recorded; a bias [E, N] is one of K = 1.
        of: expert * parts + part -> its weight.
        outs, ins: N and K.
        alternating: the rows of the parts take turns; else one part follows the other.
        row_align, stored_row_bytes, scratch_row_bytes: as of every source of rows, for the weight that takes the most.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    of: Callable[[int], Expert] = field(compare=False, repr=False)
    parts: int
    outs: int
    ins: int
    turned: bool
    alternating: bool
    row_align: int = field()
    stored_row_bytes: int = field()
    scratch_row_bytes: int = field()

    @property
    def cols(self) -> int:
        return self.parts * self.outs if self.turned else self.ins

    @property
    def rows(self) -> int:
        return self.shape[0] * self._inner

    @property
    def _inner(self) -> int:
        return self.ins if self.turned else self.parts * self.outs

    @property
    def pieces(self) -> tuple[Extent, ...]:
        return tuple(chain.from_iterable(self.of(number).pieces for number in range(self.shape[0] * self.parts)))

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        while start < stop:
            expert, first = divmod(start, self._inner)
            numbers = range(expert * self.parts, (expert + 1) * self.parts)
            if self.turned:
                last = min(self.ins, first + stop - start)
                target = out[: (last - first) * self.cols * self.dtype.itemsize]
                for number in numbers:
                    self._turn(shards, number, first, last, target, scratch)
            else:
                part, first = divmod(first, self.outs)
                last = min(self.outs, first + stop - start)
                target = out[: (last - first) * self.cols * self.dtype.itemsize]
                self.of(numbers[part]).read(shards, first, last, target, scratch)
            out, start = out[target.size :], start + last - first

    def _turn(self, shards: Sequence[Shard], number: int, first: int, last: int, target: Bytes, scratch: Bytes) -> None:
        """Input features [first, last) of a weight, put where its output features belong."""
        weight, part, kind = self.of(number), number % self.parts, self.dtype.storage
        outs = slice(part, None, self.parts) if self.alternating else slice(part * self.outs, (part + 1) * self.outs)
        whole = target.view(kind).reshape(last - first, self.cols)
        for low, high in _runs(weight, first, last):
            stripe = scratch[: self.outs * (high - low) * self.dtype.itemsize]
            columns(weight, low, high).read(shards, 0, self.outs, stripe, scratch[stripe.size :])
            whole[low - first : high - first, outs] = stripe.view(kind).reshape(self.outs, high - low).T


def stacked(name: str, shape: tuple[int, ...], of: Callable[[int], Expert], parts: int, turned: bool, alternating: bool) -> Stacked | None:
    """`of` the weights, which are alike in shape and dtype; None if they are stored in a way that is not cut into stripes.

    Args:
        shape: [E, ...], as it is recorded.
    """
    weights = [of(number) for number in range(shape[0] * parts)]
    first = weights[0]
    outs, ins, item = first.rows, first.cols, first.dtype.itemsize
    if not turned:
        align = math.lcm(*(weight.row_align for weight in weights))
        if outs % align:
            return None
        stored, scratch = (max(getattr(weight, which) for weight in weights) for which in ("stored_row_bytes", "scratch_row_bytes"))
        return Stacked(name, first.dtype, shape, of, parts, outs, ins, turned, alternating, align, stored, scratch)
    units = [unit for unit in map(_unit, weights) if unit]
    unit = math.lcm(*units)
    if len(units) < len(weights) or ins % unit:
        return None
    count, fit = ins // unit, max(1, STRIPE // (unit * parts * outs * item))
    align = unit * max(n for n in range(1, min(count, fit) + 1) if count % n == 0)
    stored = parts * outs * max(weight.stored_row_bytes for weight in weights) // ins
    scratch = outs * item + max(_scratch(weight, align) for weight in weights)
    return Stacked(name, first.dtype, shape, of, parts, outs, ins, turned, alternating, align, stored, scratch)


def columns(weight: Expert, first: int, last: int) -> Expert:
    """Columns [first, last) of a weight, multiples of its unit; of scales in groups they begin with a group, or lie in one."""
    if isinstance(weight, SourceTensor):
        return _cut(weight, first, last)
    each, grouped = weight.cols // weight.codes.cols, weight.scales.cols > 1
    groups = first // weight.per_col, -(-last // weight.per_col)
    inputs = weight.inputs
    if inputs is not None:
        piece = inputs.pieces[0]
        at = Extent(piece.shard, piece.begin + first * inputs.dtype.itemsize, last - first, 1)
        inputs = SourceTensor(inputs.name, inputs.dtype, (last - first,), (at,))
    return replace(
        weight,
        shape=(weight.rows, last - first),
        codes=_cut(weight.codes, first // each, last // each),
        scales=_cut(weight.scales, *groups) if grouped else weight.scales,
        zeros=_cut(weight.zeros, *groups) if grouped and weight.zeros is not None else weight.zeros,
        per_col=weight.per_col if grouped else last - first,
        inputs=inputs,
    )


def _cut(tensor: SourceTensor, first: int, last: int) -> SourceTensor:
    piece, item = tensor.pieces[0], tensor.dtype.itemsize
    at = Extent(piece.shard, piece.begin + first * item, piece.rows, last - first, tensor.cols * item)
    return replace(tensor, shape=(tensor.rows, last - first), pieces=(at,))


def _unit(weight: Expert) -> int:
    """Columns that are read together; 0 if the weight is not cut into stripes."""
    tensors = [weight] if isinstance(weight, SourceTensor) else [weight.codes, weight.scales, *([weight.zeros] if weight.zeros else [])]
    for tensor in tensors:
        paired = type(tensor) is PackedTensor and tensor.packing == "modelopt" and tensor.bits == 4
        if not (paired or tensor.as_stored) or len(tensor.pieces) > 1:
            return 0
    return 1 if isinstance(weight, SourceTensor) else weight.cols // weight.codes.cols


def _runs(weight: Expert, first: int, last: int) -> Iterator[tuple[int, int]]:
    """[first, last) cut at the beginning of a group of columns."""
    if isinstance(weight, DecodedTensor) and weight.scales.cols > 1 and first % weight.per_col:
        middle = min(last, first - first % weight.per_col + weight.per_col)
        yield first, middle
        first = middle
    if first < last:
        yield first, last


def _scratch(weight: Expert, width: int) -> int:
    """Bytes for each of `width` columns, beside the stripe."""
    if isinstance(weight, SourceTensor):
        return 0
    rows = columns(weight, 0, width).scratch_row_bytes * weight.rows
    return -(-rows // width)
