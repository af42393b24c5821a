"""Codes of a quantized source that stay what they are and change their container: nothing is rounded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamconv.checkpoint.dtypes import F32, I8, I32, DType
from streamconv.checkpoint.packed_rows import AWQ_POSITION
from streamconv.errors import DataError, printable
from streamconv.kernels.launch import fused
from streamconv.lazy import np, torch
from streamconv.quants.base import Codec, EncodeStats, Exact, FinishedReductions, Kernel, Part, Reduction
from streamconv.quants.packing import Packing, pack, packed_part, unpack


@dataclass(frozen=True)
class ZeroPoints(Reduction):
    """float32 scalar: the largest distance of packed zero points (int32 words) from the one that means symmetric.

    Attributes:
        bits: 4 or 8.
        middle: what each must be, as it is stored.
    """

    key: str
    bits: int
    middle: int

    def tile(self, block: torch.Tensor, known: FinishedReductions) -> torch.Tensor:
        stored = block.contiguous().view(torch.uint8).to(torch.int16)
        if self.bits == 4:
            stored = torch.cat([stored & 15, stored >> 4])
        return (stored - self.middle).abs().max().float()


class _Proven(Exact):
    """What is stored as it is, if a maximum allows it.

    Attributes:
        key: of the maximum; "" if nothing needs to be known.
    """

    key: str

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.key,) if self.key else ()

    def bind(self, known: FinishedReductions, source: str) -> Codec:
        if self.key and (odd := self.odd(float(known.get(self.key)))):
            raise DataError(f"{printable(source)} {odd}", hint="--quant none decodes it")
        return replace(self, key="")  # type: ignore[type-var]

    @abstractmethod
    def odd(self, amax: float) -> str:
        """What forbids it, in words that follow the name of the source; "" if nothing does."""


@dataclass(frozen=True)
class GivenIntegers(_Proven):
    """Signed integers [N, K] (int8), packed.

    Attributes:
        bits: 4 or 8.
        role: "weight" in ranks of TensorRT-LLM, which have the pairs as I8.
        key: of the `ZeroPoints`, where the container has no place for them.
    """

    packing: Packing
    bits: int = 4
    key: str = ""
    role: str = "codes"

    kernel_bytes_per_column = 0

    @property
    def name(self) -> str:  # type: ignore[override]
        own = {"pairs": "int4 per group, ModelOpt orientation", "awq": "INT4, as found, AutoAWQ's words"}
        return own.get(self.packing, f"INT{self.bits}, as in the source")

    @property
    def row_align(self) -> int:  # type: ignore[override]
        return 2 if self.packing == "pairs" else 1

    def odd(self, amax: float) -> str:
        return "says that it is symmetric, and has zero points" if amax > 0 else ""

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        part = packed_part(self.role, self.packing, self.bits, rows, cols)
        return (replace(part, dtype=I8) if self.role == "weight" else part,)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        return (pack(block.contiguous(), self.packing, self.bits),)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        return unpack(parts[0], self.packing, self.bits, rows, cols).float()

    def kernel(self, source: DType) -> Kernel | None:
        if source != I8:
            return None
        if self.packing != "words":
            return fused("weight_only_code.paired_rows" if self.packing == "pairs" else "awq_words_code.awq_given_rows", ["u1"])

        def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> EncodeStats:
            block = np.lib.stride_tricks.as_strided(flat[start:], (rows, cols), (stride, 1))
            if self.bits == 8:
                np.bitwise_xor(block, 128, out=outs[0].reshape(rows, cols))
            else:
                packed = outs[0].reshape(rows, cols // 2)
                np.add(block[:, 1::2], 8, out=packed)
                np.left_shift(packed, 4, out=packed)
                np.bitwise_or(packed, block[:, 0::2] + np.uint8(8), out=packed)
            return EncodeStats()

        return run


@dataclass(frozen=True)
class GivenZeros(_Proven):
    """Zero points packed along N, int32 [N * bits / 32, groups] -> the same with the first channel in the lowest bits.

    Attributes:
        bits: 4 or 8.
        shuffled: the source has them in AutoAWQ's order.
        lacking: what the source's lack: 1 in GPTQ v1.
        key: of the largest of them (`ZeroPoints`), where something is added.
    """

    bits: int
    shuffled: bool = False
    lacking: int = 0
    key: str = ""
    name = "I32"

    def odd(self, amax: float) -> str:
        return f"has a zero point of {1 << self.bits}, which {self.bits} bits do not hold" if amax + self.lacking >= 1 << self.bits else ""

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("zero", I32, (rows, cols), 4 * cols),)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        return (torch.from_numpy(self._in_order(block.contiguous().view(torch.uint8).cpu().numpy())).to(block.device),)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        stored = parts[0].reshape(rows, -1)
        if self.bits == 8:
            return stored.float()
        return torch.stack([stored & 15, stored >> 4], 2).reshape(rows, 8 * cols).float()

    def values(self, block: torch.Tensor) -> torch.Tensor:
        return self.decode([torch.from_numpy(self._in_order(block.contiguous().view(torch.uint8).numpy()))], *block.shape)

    def kernel(self, source: DType) -> Kernel | None:
        if source != I32:
            return None

        def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> EncodeStats:
            block = np.lib.stride_tricks.as_strided(flat[start:], (rows, cols), (4 * stride, 4))
            outs[0][:] = self._in_order(np.ascontiguousarray(block).view(np.uint8))
            return EncodeStats()

        return run

    def _in_order(self, stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """uint8, four for each word -> flat, in the order of channels, with what they lack."""
        flat = stored.reshape(-1, 4)
        if self.shuffled:
            nibbles = np.stack([flat & 15, flat >> 4], 2).reshape(-1, 8)[:, AWQ_POSITION]
            flat = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        more = np.uint8(self.lacking * (17 if self.bits == 4 else 1))  # no carry: `bind` has seen the largest
        return np.ascontiguousarray(flat + more).reshape(-1)


@dataclass(frozen=True)
class Reciprocal(Codec):
    """1 / x in float32: the global scales of NVFP4, which one container multiplies with and the other divides by."""

    name = "F32"
    quantizes = True

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("scale", F32, (rows, cols), 4 * cols),)

    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        inverse = self.values(block)
        stats.nonfinite += int((~torch.isfinite(inverse) | (inverse <= 0)).sum())
        return (inverse.contiguous().reshape(-1).view(torch.uint8),)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        return parts[0].view(torch.float32).reshape(rows, cols)

    def values(self, block: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(block) / block

    def error(self, block: torch.Tensor) -> torch.Tensor:
        return self.values(block).abs() * 2.0**-23

    def kernel(self, source: DType) -> Kernel | None:
        if source != F32:
            return None

        def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> EncodeStats:
            block = np.lib.stride_tricks.as_strided(flat[start:], (rows, cols), (4 * stride, 4)).view(np.float32)
            with np.errstate(divide="ignore", invalid="ignore"):
                inverse = np.float32(1.0) / block
            outs[0].view(np.float32)[:] = inverse.reshape(-1)
            return EncodeStats(nonfinite=int((~np.isfinite(inverse) | (inverse <= 0)).sum()))

        return run
