"""--quant int4_gptq and int8_gptq: GPTQ and AutoAWQ checkpoints, taken over as they are."""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.checkpoint.dtypes import DType
from streamconv.errors import RefusedError
from streamconv.quants.base import Codec
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes.base import Module, Quant, QuantInfo


@dataclass(frozen=True, slots=True)
class Gptq(Quant):
    """--quant int4_gptq, int8_gptq."""

    bits: int
    packings: tuple[str, ...] | None = ("gptq", "awq")
    row_bias_once: bool = True

    @property
    def info(self) -> QuantInfo:
        makers = "GPTQ and AutoAWQ" if self.bits == 4 else "8-bit GPTQ"
        summary = f"{makers} checkpoints taken over: int{self.bits} weights with a scale and a zero for each group"
        return QuantInfo(
            f"int{self.bits}_gptq",
            f"W{self.bits}A16_GPTQ",
            summary,
            sm_dependent=True,
            flags=("--target-sm", "--group-size"),
            stores=f"{self.bits} bits in the model dtype; scales and zeros in it",
        )

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | str:
        from streamconv.quants.gptq import PackedWeight
        from streamconv.quants.layout import Layout, family_for

        if options.encoding == "raw":
            raise RefusedError([f"--quant {self.info.key}: these weights are always stored processed; leave out --encoding raw"])
        check_groups(self.info.key, module, options, dtype)
        assert options.target_sm is not None
        family = family_for(options.target_sm, options.target_version, experts=False)
        return PackedWeight(dtype, Layout(family, self.bits))


GROUP_SIZES = (64, 128)
"""Input channels that share a scale, where TensorRT-LLM has kernels."""

EXPERTS = (
    "TensorRT-LLM has no group-wise scales (GPTQ, AWQ) for the experts of a mixture-of-experts model: convert the unquantized"
    " model, with --quant int8 or int4 if it is to be small"
)


def check_groups(key: str, module: Module, options: TensorRTLLM, dtype: DType) -> None:
    """Sizes that have no group-wise form are refused; they are those of the whole layer in the message.

    Raises:
        RefusedError: of this module; names the sizes, and what to do.
    """
    group, problem = options.group_size, ""
    step = max(64, group) * module.tp
    where = f"{module.name} [{module.full_rows}, {module.full_cols}]"
    if dtype.itemsize != 2:
        problem = f"--quant {key}: group-wise weights need --dtype float16 or bfloat16, not {dtype.torch}"
    elif module.experts:
        problem = EXPERTS
    elif group not in GROUP_SIZES:
        problem = f"--group-size {group}: TensorRT-LLM has kernels for groups of 64 and 128 only; requantize with one of these sizes"
    elif module.cols % group:
        problem = f"{where}: {module.cols} inputs of a rank are not whole groups of {group}; use a smaller --tp-size"
    elif module.full_rows % step or module.full_cols % step:
        problem = f"{where}: sizes must be multiples of {step} (group or 64, times --tp-size); use a smaller --tp-size"
    if problem:
        raise RefusedError([problem])


QUANTS = (Gptq(4), Gptq(8))
