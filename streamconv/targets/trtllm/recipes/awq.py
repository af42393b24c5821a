"""--quant int4_awq (W4A16_AWQ): float weights rounded to nearest, or codes and scales taken over as they are."""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.checkpoint.dtypes import DType
from streamconv.errors import RefusedError
from streamconv.quants.base import Codec
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes.base import Module, Quant, QuantInfo
from streamconv.targets.trtllm.recipes.gptq import check_groups


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

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | str:
        from streamconv.quants.given_codes import GivenIntegers
        from streamconv.quants.int_group import round_to_nearest

        if dtype.itemsize == 2 and options.target_version == "0.16" and module.rows <= module.cols // max(options.group_size, 1):
            where = f"{module.name} [{module.full_rows}, {module.full_cols}]"
            problem = f"{where}: with fewer output channels than groups, releases 0.13 to 0.16 read the scales turned;"
            raise RefusedError([f"{problem} later ones do not: --target-version 1.2"])
        check_groups(self.info.key, module, options, dtype)
        if self.packings:
            return GivenIntegers("pairs", role="weight")
        return round_to_nearest(options.group_size, dtype, options.method == "mse")


QUANTS = (Awq(),)
