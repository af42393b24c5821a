"""The mixed-GEMM weight layout: how signed integers become the bytes a GPU kernel reads, and how these are read back without torch.

Output channels come in groups of `interleave`; a group's record is contiguous, so rows can be laid out block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from streamconv.checkpoint.dtypes import I8
from streamconv.checkpoint.rows import PackedTensor, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import RefusedError
from streamconv.lazy import Bytes, np, torch
from streamconv.options import Version

FAMILIES = ("sm80", "sm70", "sm90-0.16", "sm90")
"""Layouts by a GPU that reads them: sm75 to sm89, sm100 and later, and experts on sm90; Volta; Hopper, whose order of bytes is
plain, with TensorRT-LLM 0.16; Hopper with later releases. Kernels know them by their place here."""
_INT8 = (0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)
_INT4 = tuple(8 * j + i for i in range(8) for j in range(4))
_HALF = (0, 2, 16, 18, 1, 3, 17, 19, 4, 6, 20, 22, 5, 7, 21, 23)
_INT4_FP8 = _HALF + tuple(i + 8 for i in _HALF)
_B_INT8 = (0, 2, 1, 3)
_B_INT4 = (0, 2, 4, 6, 1, 3, 5, 7)


LAID_OUT = "laid out"


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout family for one integer width.

    Attributes:
        family: one of `FAMILIES`.
        bits: 8 or 4.
        fp8_activations: the W4A8 variant.
    """

    family: str
    bits: int
    fp8_activations: bool = False

    @property
    def interleave(self) -> int:
        """Channels that share a record."""
        if self.family != "sm80":
            return 1
        return 2 if self.bits == 8 or self.fp8_activations else 4

    @property
    def tile(self) -> int:
        """Length of a run of one channel inside a record."""
        return 128 if self.fp8_activations else 64

    @property
    def biased(self) -> bool:
        """Stored as unsigned, offset by 2^(bits-1)."""
        return self.family != "sm90-0.16"

    @property
    def table(self) -> tuple[int, ...]:
        """Order inside a block: output element i is input element table[i]."""
        if self.family == "sm90-0.16":
            return (0,)
        if self.family == "sm70":
            return _B_INT8 if self.bits == 8 else _B_INT4
        if self.bits == 8:
            return _INT8
        return _INT4_FP8 if self.fp8_activations else _INT4

    def pack(self, q: torch.Tensor) -> torch.Tensor:
        """Signed integers int8 [n, K], n a multiple of `interleave` -> uint8 bytes [n*K*bits/8]."""
        n, k = q.shape
        block = len(self.table)
        order = torch.tensor(self.table, device=q.device)
        out = q.reshape(n, k // block, block)[:, :, order].reshape(n, k)
        if self.interleave > 1:
            out = out.reshape(n // self.interleave, self.interleave, k // self.tile, self.tile).transpose(1, 2)
        out = out.reshape(-1).to(torch.int16)
        if self.biased:
            out = out + (1 << (self.bits - 1))
        out = out & (255 if self.bits == 8 else 15)
        if self.bits == 4:
            out = out[0::2] | (out[1::2] << 4)
        return out.to(torch.uint8)

    def unpack(self, data: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """Inverse of `pack`: bytes -> int8 [n, K]."""
        values = data.to(torch.int16)
        if self.bits == 4:
            values = torch.stack([values & 15, values >> 4], 1).reshape(-1)
        half = 1 << (self.bits - 1)
        values = values - half if self.biased else (values ^ half) - half
        if self.interleave > 1:
            values = values.reshape(n // self.interleave, k // self.tile, self.interleave, self.tile).transpose(1, 2)
        block = len(self.table)
        order = torch.tensor(self.table, device=data.device)
        out = torch.empty(n, k // block, block, dtype=torch.int8, device=data.device)
        out[:, :, order] = values.reshape(n, k // block, block).to(torch.int8)
        return out.reshape(n, k)


def family_for(sm: int, version: Version, experts: bool) -> str:
    """Layout family for a GPU generation and release line.

    For SM 100 and above releases of the 1.x line differ; this is the state of the spec's "later" column.

    Raises:
        RefusedError: this release line does not know the generation.
    """
    if sm < 75:
        if version != "0.16":
            raise RefusedError(
                [f"--target-sm {sm}: TensorRT-LLM {version} begins at SM 75"],
                hint="--target-version 0.16",
            )
        return "sm70"
    if version == "0.16" and sm > 90:
        raise RefusedError(
            [f"--target-sm {sm}: TensorRT-LLM 0.16 does not know this GPU"],
            hint="--target-version 1.2, or --encoding raw",
        )
    if sm == 90 and not experts:
        return "sm90-0.16" if version == "0.16" else "sm90"
    return "sm80"


@dataclass(frozen=True, slots=True)
class LaidOut(PackedTensor):
    """Signed integers [N, K], one row for each output channel, from matrices that are laid out for a GPU generation.

    Attributes:
        pieces: matrices [rows, cols] one above the other (axis 0) or side by side (axis 1), each laid out by itself; `begin` is the
            first byte of the record of their first row.
    """

    layout: Layout = Layout("sm80", 8)

    @property
    def row_align(self) -> int:
        return self.layout.interleave

    @property
    def scratch_row_bytes(self) -> int:
        return self.stored_row_bytes

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        from streamconv.kernels.laid_out_code import unpack_rows

        row = col = 0
        for piece in self.pieces:
            low, high = (max(start, row), min(stop, row + piece.rows)) if self.axis == 0 else (start, stop)
            if low < high:
                stored = scratch[: (high - low) * piece.cols * self.bits // 8]
                begin = piece.begin + (low - row) * piece.cols * self.bits // 8
                shards[piece.shard].read_into(begin, stored.data)
                order, first = _order(self.layout, piece.cols), (low - start) * self.cols + col
                unpack_rows(stored, self.bits, self.layout.biased, order, piece.cols, out, first, self.cols)
            if self.axis == 0:
                row += piece.rows
            else:
                col += piece.cols


def laid_out(tensor: SourceTensor, layout: Layout) -> LaidOut:
    """Pieces of a weight whose integers are laid out."""
    module = tensor.name.removesuffix(".weight")
    return LaidOut(tensor.name, I8, tensor.shape, tensor.pieces, tensor.axis, layout.bits, LAID_OUT, module, layout)


@lru_cache(16)
def _order(layout: Layout, k: int) -> np.ndarray[Any, Any]:
    """For each element of a record's channels, one after the other, where it is stored in the record."""
    count, block = layout.interleave, len(layout.table)
    plain = np.arange(count * k)
    rows = plain.reshape(k // layout.tile, count, layout.tile).swapaxes(0, 1) if count > 1 else plain
    places = rows.reshape(count, k // block, block)
    order = np.empty_like(places)
    order[:, :, list(layout.table)] = places
    return order.reshape(-1)
