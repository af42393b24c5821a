"""--quant none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamconv.targets.trtllm.recipes.base import Quant, QuantInfo

if TYPE_CHECKING:
    from streamconv.targets.trtllm.options import TensorRTLLM
    from streamconv.targets.trtllm.recipes.base import Module


class _Unquantized(Quant):
    info = QuantInfo("none", None, "weights in the model dtype", flags=("--dtype",), stores="model dtype")

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        return "no quantization asked for"


QUANTS = (_Unquantized(),)
