"""--quant int8 and int4: weights alone, one scale for each output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import I8, DType
from streamconv.targets.trtllm.recipes.base import Quant, QuantInfo

if TYPE_CHECKING:
    from streamconv.quants.base import Codec
    from streamconv.targets.trtllm.options import TensorRTLLM
    from streamconv.targets.trtllm.recipes.base import Module


def size_problem(name: str, full_rows: int, full_cols: int, tp: int) -> str | None:
    """Why a matrix cannot be stored: NVIDIA pads such sizes, wrongly for qkv; refused here."""
    step = 64 * tp
    bad = [f"{what} {size}" for what, size in (("outputs", full_rows), ("inputs", full_cols)) if size % step]
    if not bad:
        return None
    return f"{name}: {' and '.join(bad)} must be a multiple of 64 * tp = {step} for weight-only quantization"


@dataclass(frozen=True, slots=True)
class WeightOnlyQuant(Quant):
    """--quant int8, int4.

    Attributes:
        packings: of integers that a TensorRT-LLM checkpoint holds already, and that stay what they are.
    """

    bits: int
    packings: tuple[str, ...] | None = None

    @property
    def info(self) -> QuantInfo:
        return QuantInfo(
            f"int{self.bits}",
            f"W{self.bits}A16",
            f"INT{self.bits} weights, one scale per channel",
            sm_dependent=True,
            flags=("--target-sm", "--encoding"),
            stores="I8" + ", two weights a byte" * (self.bits == 4) + "; scales in the model dtype",
        )

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | None:
        from streamconv.quants.gptq import PackedWeight
        from streamconv.quants.layout import family_for
        from streamconv.quants.weight_only import WeightOnly

        if options.encoding == "raw":
            return None
        assert options.target_sm is not None
        made = WeightOnly(self.bits, family_for(options.target_sm, options.target_version, module.experts > 0), dtype)
        return PackedWeight(I8, made.layout) if self.packings else made

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        return size_problem(module.name, module.full_rows, module.full_cols, module.tp)

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        return "--encoding raw: trtllm-build quantizes it when it loads"


QUANTS = (WeightOnlyQuant(8), WeightOnlyQuant(4))
