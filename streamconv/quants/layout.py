"""The mixed-GEMM weight layout: how signed integers become the bytes a GPU kernel reads.

Output channels come in groups of `interleave`; a group's record is contiguous, so rows can be laid out block by block.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.errors import RefusedError
from streamconv.lazy import torch
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
