"""--quant fp8_rowwise: a scale for each output channel and for each token."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import F8_E4M3, F32, DType
from streamconv.quants.plain import Plain
from streamconv.targets.trtllm.recipes.base import Quant, QuantInfo

if TYPE_CHECKING:
    from streamconv.quants.base import Codec
    from streamconv.targets.trtllm.options import TensorRTLLM
    from streamconv.targets.trtllm.recipes.base import Module


CLAMP = 1200.0
"""The bound where the source states none."""


@dataclass(frozen=True, slots=True)
class Fp8RowwiseQuant(Quant):
    """All linear layers, or by Meta's Llama-3.1 recipe only the MLPs of all but the first and last layer.

    Attributes:
        bound: weights and activations are clamped to [-bound, bound].
        copied: (layer, module) that the source stores in FP8 already (fbgemm): taken over as they are.
        cast: weights are rounded to the model dtype first: Meta's files, as NVIDIA's loader of them does.
    """

    info = QuantInfo(
        "fp8_rowwise",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "FP8 weights with a scale for each output channel, activations for each token",
        flags=("--use-meta-fp8-rowwise-recipe",),
        stores="F8_E4M3, F32 scales",
        least_sm=89,
    )
    bound: float = CLAMP
    copied: frozenset[tuple[int, str]] = frozenset()
    cast: bool = False

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | None:
        from streamconv.quants.fp8_rowwise import Fp8Rowwise

        if self._left_out(module, options):
            return None
        if (module.layer, module.name) in self.copied:
            return Plain(F8_E4M3)
        return Fp8Rowwise(-self.bound, self.bound, dtype if self.cast else None)

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        if module.experts:
            return "--quant fp8_rowwise: TensorRT-LLM rejects it for mixture-of-experts; use --quant int8 or int4"
        return None

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        if module.layer in (0, module.layers - 1):
            return "Meta's recipe leaves the first and the last layer out"
        return "Meta's recipe leaves attention out"

    def constants(self, layer: int, layers: int, options: TensorRTLLM) -> list[tuple[str, DType, tuple[int, ...], bytes]]:
        """The activation clamps of a layer."""
        if not options.use_meta_fp8_rowwise_recipe:
            owners = ["input_layernorm", "post_layernorm", "attention", "mlp"]
        else:
            owners = [] if layer in (0, layers - 1) else ["post_layernorm", "mlp"]
        return [(f"{owner}.clamp_val", F32, (2,), struct.pack("<2f", -self.bound, self.bound)) for owner in owners]

    def _left_out(self, module: Module, options: TensorRTLLM) -> bool:
        if not options.use_meta_fp8_rowwise_recipe:
            return False
        return module.layer in (0, module.layers - 1) or module.name.startswith("attention")


QUANTS = (Fp8RowwiseQuant(),)
