"""--quant int8 and int4: weights alone, one scale for each output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import DType
from streamconv.quants.layout import family_for
from streamconv.quants.weight_only import WeightOnly
from streamconv.targets.trtllm.recipes.base import QuantInfo

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


@dataclass(frozen=True)
class WeightOnlyQuant:
    """--quant int8, int4."""

    bits: int
    info: QuantInfo

    def encoding(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | None:
        if options.encoding == "raw":
            return None
        assert options.target_sm is not None
        return WeightOnly(self.bits, family_for(options.target_sm, options.target_version, module.experts > 0), dtype)

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        return size_problem(module.name, module.full_rows, module.full_cols, module.tp)

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        return "--encoding raw: trtllm-build quantizes it when it loads"


def _info(bits: int) -> QuantInfo:
    return QuantInfo(
        f"int{bits}",
        f"W{bits}A16",
        f"INT{bits} weights, one scale per channel",
        sm_dependent=True,
        flags=("--target-sm", "--encoding"),
        stores="I8" + ", two weights a byte" * (bits == 4) + "; scales in the model dtype",
    )


QUANTS = (
    WeightOnlyQuant(8, _info(8)),
    WeightOnlyQuant(4, _info(4)),
)
