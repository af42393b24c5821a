"""--quant fp8: one scale for each matrix, calibrated or taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import F8_E4M3, DType
from streamconv.quants.plain import Plain
from streamconv.targets.trtllm.recipes.base import Quant, QuantInfo

if TYPE_CHECKING:
    from streamconv.quants.base import Codec
    from streamconv.quants.fp8_given import Scales
    from streamconv.targets.trtllm.options import TensorRTLLM
    from streamconv.targets.trtllm.recipes.base import Module


@dataclass(frozen=True, slots=True)
class Fp8Quant(Quant):
    """ModelOpt's format: all linear layers; the scales are added once the sources are known (targets/trtllm/scales.py)."""

    info = QuantInfo(
        "fp8",
        "FP8",
        "FP8 weights and activations, one scale for each matrix: from activation ranges, or ModelOpt FP8 exports taken over",
        flags=("--activation-ranges",),
        stores="F8_E4M3, F32 scales",
        least_sm=89,
        evidence="specification",
    )

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | None:
        from streamconv.quants.fp8_tensor import Fp8Tensor

        return Fp8Tensor(f"largest weight of layer {module.layer} {module.name}")

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        if module.experts:
            return "--quant fp8: mixture-of-experts weights are not supported; use --quant int8 or int4"
        return None


@dataclass(frozen=True, slots=True)
class Fp8GivenQuant(Quant):
    """--quant fp8 from a source that is FP8 already.

    Attributes:
        scales: (layer, module) -> the scales of its sources; a module that is not named is not FP8 in the source either.
        left_out: (layer, module) of those.
    """

    info = Fp8Quant.info
    scales: Mapping[tuple[int, str], Scales] = field(default_factory=dict)
    left_out: tuple[tuple[int, str], ...] = ()

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | None:
        from streamconv.quants.fp8_given import Fp8Shared

        given = self.scales.get((module.layer, module.name))
        if given is None:
            return None
        return Plain(F8_E4M3) if len({scale for _, scale in given}) == 1 else Fp8Shared(given)

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        if module.experts:
            return "FP8 experts of a mixture-of-experts model cannot be taken over; convert the unquantized model"
        return None

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        return "not quantized in the source"


QUANTS = (Fp8Quant(),)
