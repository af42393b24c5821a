"""--quant none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import DType
from streamconv.targets.trtllm.recipes.base import QuantInfo

if TYPE_CHECKING:
    from streamconv.quants.base import Codec
    from streamconv.targets.trtllm.options import TensorRTLLM
    from streamconv.targets.trtllm.recipes.base import Module


class _Unquantized:
    info = QuantInfo("none", None, "weights in the model dtype", flags=("--dtype",), stores="model dtype")

    def encoding(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | None:
        return None

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        return None

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        return "no quantization asked for"


QUANTS = (_Unquantized(),)
