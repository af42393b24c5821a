"""--quant int4_awq (W4A16_AWQ): float weights rounded to nearest, or codes and scales taken over as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import DType
from streamconv.targets.trtllm.recipes.base import Quant, QuantInfo
from streamconv.targets.trtllm.recipes.gptq import group_problem

if TYPE_CHECKING:
    from streamconv.quants.base import Codec
    from streamconv.targets.trtllm.options import TensorRTLLM
    from streamconv.targets.trtllm.recipes.base import Module


@dataclass(frozen=True, slots=True)
class Awq(Quant):
    """--quant int4_awq.

    Attributes:
        packings: how the weights that are taken over are packed; None: float weights are rounded here.
    """

    packings: tuple[str, ...] | None = ("modelopt",)

    @property
    def info(self) -> QuantInfo:
        return QuantInfo(
            "int4_awq",
            "W4A16_AWQ",
            "int4 weights with a scale for each group; ModelOpt AWQ exports are taken over",
            flags=("--group-size", "--method"),
            stores="I8, two weights a byte; F32 scales",
            evidence="specification",
        )

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | None:
        from streamconv.quants.awq import PairedWeight, round_to_nearest

        return PairedWeight() if self.packings else round_to_nearest(options.group_size, dtype, options.method == "mse")

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        if dtype.itemsize != 2:
            return f"--quant int4_awq: group-wise weights need --dtype float16 or bfloat16, not {dtype.torch}"
        if options.target_version == "0.16" and module.rows <= module.cols // max(options.group_size, 1):
            where = f"{module.name} [{module.full_rows}, {module.full_cols}]"
            return (
                f"{where}: with fewer output channels than groups, releases 0.13 to 0.16 read the scales turned;"
                " later ones do not: --target-version 1.2"
            )
        return group_problem(module, options.group_size)


QUANTS = (Awq(),)
