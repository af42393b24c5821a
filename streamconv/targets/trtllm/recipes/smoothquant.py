"""--quant smoothquant: INT8 weights and activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import DType
from streamconv.targets.trtllm.recipes.base import QuantInfo

if TYPE_CHECKING:
    from streamconv.quants.base import Codec
    from streamconv.targets.trtllm.options import TensorRTLLM
    from streamconv.targets.trtllm.recipes.base import Module


class _SmoothQuant:
    info = QuantInfo(
        "smoothquant",
        "W8A8_SQ_PER_TENSOR_PLUGIN",
        "INT8 weights and activations, smoothed; needs activation ranges",
        flags=("--activation-ranges", "--smoothquant", "--per-channel", "--per-token"),
        stores="I8; F32 scales and smoothers",
    )

    def encoding(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | None:
        return None  # a layer is smoothed as a whole: targets/trtllm/smooth_layer.py

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        if module.experts:
            return "--quant smoothquant: mixture-of-experts weights are not SmoothQuantized; use --quant int8 or int4"
        return None

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        return "not smoothed"


QUANTS = (_SmoothQuant(),)
