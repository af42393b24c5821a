"""--quant none, and the integers with a scale for each output channel or matrix: smoothquant, int8 and int4."""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.checkpoint.dtypes import I8, DType
from streamconv.errors import RefusedError
from streamconv.quants.base import Codec
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes.base import Module, Quant, QuantInfo


class _Unquantized(Quant):
    info = QuantInfo("none", None, "weights in the model dtype", flags=("--dtype",), stores="model dtype")

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | str:
        return "no quantization asked for"


class _SmoothQuant(Quant):
    """A layer is smoothed as a whole (targets/trtllm/smooth_layout.py), so that no module has a codec of its own."""

    info = QuantInfo(
        "smoothquant",
        "W8A8_SQ_PER_TENSOR_PLUGIN",
        "INT8 weights and activations, smoothed; needs activation ranges",
        flags=("--activation-ranges", "--smoothquant", "--per-channel", "--per-token"),
        stores="I8; F32 scales and smoothers",
    )

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | str:
        return "not smoothed"


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

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | str:
        from streamconv.quants.gptq import PackedWeight
        from streamconv.quants.layout import family_for
        from streamconv.quants.weight_only import WeightOnly

        problem = size_problem(module.name, module.full_rows, module.full_cols, module.tp)
        if problem:
            raise RefusedError([problem])
        if options.encoding == "raw":
            return "--encoding raw: trtllm-build quantizes it when it loads"
        assert options.target_sm is not None
        codec = WeightOnly(self.bits, family_for(options.target_sm, options.target_version, module.experts > 0), dtype)
        return PackedWeight(I8, codec.layout) if self.packings else codec


QUANTS = (_Unquantized(), _SmoothQuant(), WeightOnlyQuant(8), WeightOnlyQuant(4))
