"""Sources that are decoded while their rows are read: codes of a quantized model times their scales, rounded once to a float type.

Torch casts none of these codes, so compiled kernels do. What is stored input-major, or wanted turned, is read a stripe of columns at
a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.derived_rows import read_stripe
from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.packed_rows import AWQ_POSITION
from streamconv.checkpoint.rows import Extent, PackedTensor, RowSource, SourceTensor, content
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.stored_codes import NIBBLES, Code, as_float, values
from streamconv.errors import CheckpointError, printable
from streamconv.lazy import Array, Bytes, np

if TYPE_CHECKING:
    Floats = Any  # float32 arrays: numpy types its own operations too widely

STRIPE = 8 << 20
"""Bytes of a decoded stripe of an expert: the wider, the fewer stored bytes are passed over."""


@dataclass(frozen=True, slots=True)
class _Decoded(RowSource):
    """A weight of `shape`, its leading dimensions flattened into rows; `dtype` is F32, F16 or BF16.

    Attributes:
        sound: scales that are NaN or infinite are refused, not decoded.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    codes: SourceTensor
    sound: bool = field(default=False, kw_only=True)

    @property
    def row_align(self) -> int:
        return self.codes.row_align

    @property
    def stored_row_bytes(self) -> int:
        return self.codes.stored_row_bytes

    def _check(self, shards: Sequence[Shard], scales: SourceTensor, values: Floats, signed: bool = True) -> None:
        """Refuse scales as they were read.

        Args:
            signed: AutoRound's are negative where the smallest weight is the farthest from zero.

        Raises:
            CheckpointError: one is NaN or infinite, or negative where no tool writes that.
        """
        if not self.sound or not values.size:
            return
        least, most = values.min(), values.max()
        if math.isfinite(least) and math.isfinite(most) and (signed or least >= 0):
            return
        finite = np.isfinite(values)
        what, odd = ("a negative number", values < 0) if finite.all() else ("NaN or infinity", ~finite)
        file = printable(shards[scales.pieces[0].shard].path.name)
        message = f"{file}: {printable(scales.name)} holds {what}, which is no scale ({int(odd.sum())} of {values.size} read)"
        raise CheckpointError(message, hint="the checkpoint is damaged: --allow-nonfinite decodes it all the same")


@dataclass(frozen=True, slots=True)
class DecodedTensor(_Decoded):
    """Codes [N, K] of a quantized source, multiplied with their scales and rounded once to a float type on the way.

    Attributes:
        codes: the stored codes; a row of it is a row of the weight.
        code: how a code is read.
        scales: the stored scales as a matrix.
        per_row, per_col: rows and columns of the weight that share a scale.
        factor: what every scale is multiplied by; the exact inverse is taken first where `divide`.
        zeros: of integers, int32 [N * bits / 32, columns of scales], the lowest row in the lowest bits, offset by half.
        shuffled, lacking: zeros of AutoAWQ's order; what they lack: 1 in GPTQ v1.
        inputs: [K], what an engine multiplies the input by before it meets the codes (ModelOpt's pre_quant_scale).
        order: int32 [K], the column of scales of each column (act order); None for groups one after the other.
    """

    code: Code
    scales: SourceTensor
    per_row: int
    per_col: int
    factor: float = 1.0
    divide: bool = False
    zeros: SourceTensor | None = None
    inputs: SourceTensor | None = None
    order: SourceTensor | None = None
    shuffled: bool = False
    lacking: int = 0

    @property
    def row_align(self) -> int:
        """Of integers that are stored input-major whole words of zero points are read."""
        return self.codes.row_align if self.zeros is None or self.bits is None else 32 // self.bits

    @property
    def bits(self) -> int | None:
        """Of integers that reading unpacks; None if rows are read as they are stored."""
        return self.codes.bits if isinstance(self.codes, PackedTensor) else None

    @property
    def pieces(self) -> tuple[Extent, ...]:
        more = [tensor.pieces for tensor in (self.zeros, self.inputs, self.order) if tensor is not None]
        return (*self.codes.pieces, *self.scales.pieces, *chain(*more))

    @property
    def scratch_row_bytes(self) -> int:
        codes, scale = self._code_bytes + self.codes.scratch_row_bytes, self.scales.stored_row_bytes + self.scales.scratch_row_bytes
        codes += 0 if self.order is None else 12 * self.cols  # a scale and a zero point for every column
        return codes + -(-(scale + (8 if self.zeros is None else 40) * self.scales.cols) // self.per_row)

    @property
    def _code_bytes(self) -> int:
        """Of a row of codes, as they are read."""
        return self.codes.cols * self.codes.dtype.itemsize

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        from streamconv.kernels import decode_code
        from streamconv.kernels.rows import CODES

        stored = scratch[: (stop - start) * self._code_bytes]
        self.codes.read(shards, start, stop, stored, scratch[stored.size :])
        scales, zeros, per_col = self.factors(shards, start, stop), self._zeros(shards, start, stop), self.per_col
        if self.order is not None:
            groups, per_col = groups_of(self.order, self.cols, self.scales.cols, shards), 1
            scales, zeros = scales.take(groups, 1), zeros.take(groups, 1) if zeros.size else zeros
        decode_code.decode_rows(
            stored, decode_code.CODES[self.code], scales, zeros, self._inputs(shards), start % self.per_row,
            self.per_row, per_col, stop - start, self.cols, CODES[self.dtype.name], out.view(self.dtype.storage),
        )  # fmt: skip

    def _zeros(self, shards: Sequence[Shard], start: int, stop: int) -> Floats:
        """float32 [rows, groups of columns], or empty."""
        if self.zeros is None:
            return np.empty((0, 0), np.float32)
        bits = self.bits or (4 if self.code in NIBBLES else 8)
        each = 32 // bits
        first, last = start // each, -(-stop // each)
        words = _rows(self.zeros, shards, first, last).view(np.uint32).reshape(-1, 1, self.zeros.cols)
        shifts = np.arange(0, 32, bits, dtype=np.uint32)[None, :, None]
        whole = (words >> shifts) & np.uint32((1 << bits) - 1)
        whole = (whole[:, AWQ_POSITION] if self.shuffled else whole).reshape(-1, self.zeros.cols)
        return whole[start - first * each : stop - first * each].astype(np.float32) - np.float32((1 << (bits - 1)) - self.lacking)

    def _inputs(self, shards: Sequence[Shard]) -> Floats:
        """float32 [K], or empty."""
        if self.inputs is None:
            return np.empty(0, np.float32)
        inputs = as_float(_rows(self.inputs, shards, 0, self.cols), self.inputs.dtype.name)
        self._check(shards, self.inputs, inputs)
        return inputs

    def factors(self, shards: Sequence[Shard], start: int, stop: int) -> Floats:
        """float32 [groups of rows, groups of columns]: what the codes of these rows are multiplied by."""
        first, last = start // self.per_row, -(-stop // self.per_row)
        scales = as_float(_rows(self.scales, shards, first, last), self.scales.dtype.name).reshape(last - first, -1)
        if self.factor != 1.0 or self.divide:
            factor = np.float32(self.factor)
            with np.errstate(over="ignore"):
                scales = scales / factor if self.divide else scales * factor
        self._check(shards, self.scales, scales, signed=self.zeros is not None or self.code in ("uint4", "uint8"))
        return scales

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        self.codes.drop_page_cache(shards, start, stop)


def _rows(tensor: SourceTensor, shards: Sequence[Shard], first: int, last: int) -> Bytes:
    """Rows [first, last) of a small tensor."""
    rows = np.empty((last - first) * tensor.stored_row_bytes, np.uint8)
    tensor.read(shards, first, last, rows, np.empty((last - first) * tensor.scratch_row_bytes, np.uint8))
    return rows


@dataclass(frozen=True, slots=True)
class DecodedAffine(_Decoded):
    """A group-wise weight [N, K] of a TensorRT-LLM checkpoint as floats: code * scale + zero.

    Attributes:
        codes: the integers, around zero.
        scales, zeros: [groups, N].
    """

    codes: PackedTensor
    scales: SourceTensor
    zeros: SourceTensor

    @property
    def pieces(self) -> tuple[Extent, ...]:
        return (*self.codes.pieces, *self.scales.pieces, *self.zeros.pieces)

    @property
    def scratch_row_bytes(self) -> int:
        return self.cols + self.codes.scratch_row_bytes + 2 * self.scales.rows * (self.scales.dtype.itemsize + 4)

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        from streamconv.kernels.integers_code import decode_affine
        from streamconv.kernels.rows import CODES

        codes = scratch[: (stop - start) * self.cols]
        self.codes.read(shards, start, stop, codes, scratch[codes.size :])
        numbers = []
        for tensor in (self.scales, self.zeros):
            numbers.append(columns_of(tensor, shards, start, stop))
            self._check(shards, tensor, numbers[-1])
        per_col = self.cols // self.scales.rows
        decode_affine(codes.view(np.int8), *numbers, per_col, CODES[self.dtype.name], out.view(self.dtype.storage))


def columns_of(tensor: SourceTensor, shards: Sequence[Shard], start: int, stop: int) -> Floats:
    """Columns [start, stop) of scales or zeros [groups, N], as float32."""
    stored = np.empty(tensor.rows * (stop - start) * tensor.dtype.itemsize, np.uint8)
    tensor.read_part(shards, (0, tensor.rows), (start, stop), stored)
    return as_float(stored, tensor.dtype.name).reshape(tensor.rows, stop - start)


@dataclass(frozen=True, slots=True)
class TurnedMx(_Decoded):
    """MXFP4 experts, codes [E, N, K / 32, 16] and scales [E, N, K / 32], decoded to floats [E, K, N].

    Attributes:
        dtype: F32, F16 or BF16; the product of a code and a power of two is exact.
        shape: (E, K, N).
    """

    scales: SourceTensor

    @property
    def row_align(self) -> int:
        """Whole blocks, the most of an expert's that make a moderate stripe."""
        blocks = self.shape[1] // 32
        fit = max(1, STRIPE // (32 * self.cols * self.dtype.itemsize))
        return 32 * max(n for n in range(1, min(blocks, fit) + 1) if blocks % n == 0)

    @property
    def pieces(self) -> tuple[Extent, ...]:
        return (*self.codes.pieces, *self.scales.pieces)

    @property
    def stored_row_bytes(self) -> int:
        return self.cols // 2 + self.cols // 32

    @property
    def scratch_row_bytes(self) -> int:
        return self.cols // 2 + self.cols // 32 + 2

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        from streamconv.kernels.integers_code import decode_turned
        from streamconv.kernels.rows import CODES

        _, k, n = self.shape
        while start < stop:
            expert, first = divmod(start, k)
            last = min(k, first + stop - start)
            codes = self._stripe(shards, self.codes, expert, k // 2, first // 2, last // 2, scratch)
            scales = self._stripe(shards, self.scales, expert, k // 32, first // 32, last // 32, scratch[codes.size :])
            if self.sound and scales.max() == 255:
                self._check(shards, self.scales, as_float(scales, "U8"))
            target = out[: (last - first) * n * self.dtype.itemsize]
            decode_turned(codes, values("e2m1"), scales, last - first, n, CODES[self.dtype.name], target.view(self.dtype.storage))
            out, start = out[target.size :], start + last - first

    def _stripe(self, shards: Sequence[Shard], tensor: SourceTensor, expert: int, width: int, first: int, last: int, out: Bytes) -> Bytes:
        """Bytes [first, last) of each of an expert's N rows of `width` bytes."""
        piece, n = tensor.pieces[0], self.shape[2]
        at = Extent(piece.shard, piece.begin + expert * n * width, n, width)
        return read_stripe(shards, at, first, last, out)


def groups_of(order: SourceTensor | None, cols: int, groups: int, shards: Sequence[Shard]) -> Array:
    """int32 [K]: the group of each input channel, by g_idx where groups do not come one after the other (act order).

    Raises:
        CheckpointError: the file names a group that there is not, or gives one more channels than another.
    """
    if order is None:
        return np.arange(cols, dtype=np.int32) // np.int32(cols // groups)
    groups_read = np.empty(cols, np.int32)
    order.read(shards, 0, cols, groups_read.view(np.uint8), groups_read.view(np.uint8)[:0])
    if groups_read.min() < 0 or groups_read.max() >= groups:
        raise CheckpointError(f"{printable(order.name)} names a group that there is not: there are {groups}")
    if (np.bincount(groups_read, minlength=groups) != cols // groups).any():
        raise CheckpointError(f"{printable(order.name)} does not give {cols // groups} input features to each group")
    return groups_read


def in_order(order: SourceTensor, shards: Sequence[Shard], group: int) -> bool:
    """Whether g_idx, int32 [K], says that groups come one after the other: K / group whole ones."""
    return content(order, shards) == np.repeat(np.arange(order.rows // group, dtype="<i4"), group).tobytes()
