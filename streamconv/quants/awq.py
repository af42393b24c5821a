"""AWQ weights exported by ModelOpt, taken over as they are: W4A16_AWQ (quantization spec §5.3).

Written in ModelOpt's own orientation, which the loader lays out for the GPU it builds for: the same files for every GPU
generation and release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import I8, DType
from streamconv.quants.base import Encoding, Findings, Kernel, Part, QuantInfo
from streamconv.quants.gptq import group_problem

if TYPE_CHECKING:
    import torch

    from streamconv.quants import Module
    from streamconv.targets.trtllm.options import TensorRTLLM


@dataclass(frozen=True, slots=True)
class PairedWeight(Encoding):
    """Signed integers [N, K] (int8) -> int8 [N/2, K]: low nibble the even channel, high nibble the odd one."""

    name = "int4 per group, ModelOpt orientation"
    row_align = 2

    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        return (Part("weight", I8, (rows // 2, cols), cols // 2),)

    def encode(self, block: torch.Tensor, findings: Findings) -> tuple[torch.Tensor, ...]:
        import torch

        pairs = block.contiguous().view(torch.uint8).reshape(-1, 2, block.shape[1])
        return (((pairs[:, 0] & 15) | (pairs[:, 1] << 4)).reshape(-1),)

    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        import torch

        packed = parts[0].reshape(rows // 2, cols)
        nibbles = torch.stack([packed & 15, packed >> 4], 1).reshape(rows, cols)
        return ((nibbles ^ 8).to(torch.float32)) - 8.0

    def error(self, block: torch.Tensor) -> torch.Tensor:
        """None: integers."""
        return block.float() * 0.0

    def kernel(self, source: DType) -> Kernel | None:
        from streamconv.kernels.packed import paired_kernel

        return paired_kernel() if source == I8 else None


@dataclass(frozen=True, slots=True)
class Awq:
    """--quant int4_awq."""

    packings: tuple[str, ...] = ("modelopt",)

    @property
    def info(self) -> QuantInfo:
        summary = "ModelOpt AWQ exports taken over: int4 weights with a scale for each group"
        return QuantInfo(
            "int4_awq",
            "W4A16_AWQ",
            summary,
            flags=("--group-size",),
            stores="I8, two weights a byte; F32 scales",
            evidence="specification",
        )

    def encoding(self, module: Module, options: TensorRTLLM, dtype: DType) -> Encoding | None:
        return PairedWeight()

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        if dtype.itemsize != 2:
            return f"--quant int4_awq: group-wise weights need --dtype float16 or bfloat16, not {dtype.torch}"
        if options.target_version == "0.16" and module.rows <= module.cols // max(options.group_size, 1):
            where = f"{module.name} [{module.full_rows}, {module.full_cols}]"
            return (
                f"{where}: with fewer output channels than groups, releases 0.13 to 0.16 read the scales turned;"
                " later ones do not: --target-version 1.2"
            )
        return group_problem("int4_awq", module, options.group_size)

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        return "left as it is"


QUANTS = (Awq(),)
