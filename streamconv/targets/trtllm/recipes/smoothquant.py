"""--quant smoothquant: INT8 weights and activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamconv.targets.trtllm.recipes.base import Quant, QuantInfo

if TYPE_CHECKING:
    from streamconv.checkpoint.dtypes import DType
    from streamconv.targets.trtllm.options import TensorRTLLM
    from streamconv.targets.trtllm.recipes.base import Module


class _SmoothQuant(Quant):
    """A layer is smoothed as a whole (targets/trtllm/smooth_layout.py), so that no module has a codec of its own."""

    info = QuantInfo(
        "smoothquant",
        "W8A8_SQ_PER_TENSOR_PLUGIN",
        "INT8 weights and activations, smoothed; needs activation ranges",
        flags=("--activation-ranges", "--smoothquant", "--per-channel", "--per-token"),
        stores="I8; F32 scales and smoothers",
    )

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        if module.experts:
            return "--quant smoothquant: mixture-of-experts weights are not SmoothQuantized; use --quant int8 or int4"
        return None

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        return "not smoothed"


QUANTS = (_SmoothQuant(),)
