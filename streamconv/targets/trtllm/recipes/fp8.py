"""--quant fp8: one scale for each matrix, calibrated or taken over; --quant fp8_rowwise: one for each output channel and token."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import F8_E4M3, F32, DType
from streamconv.errors import RefusedError
from streamconv.quants.base import Codec
from streamconv.quants.plain import Plain
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes.base import Module, Quant, QuantInfo

if TYPE_CHECKING:
    from streamconv.quants.fp8_tensor import Scales

CLAMP = 1200.0
"""The bound of fp8_rowwise where the source states none."""


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

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | str:
        from streamconv.quants.fp8_tensor import Fp8Tensor

        if module.experts:
            raise RefusedError(["--quant fp8: mixture-of-experts weights are not supported; use --quant int8 or int4"])
        return Fp8Tensor(f"largest weight of layer {module.layer} {module.name}")


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

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | str:
        from streamconv.quants.fp8_tensor import Fp8Shared

        if module.experts:
            raise RefusedError(["FP8 experts of a mixture-of-experts model cannot be taken over; convert the unquantized model"])
        given = self.scales.get((module.layer, module.name))
        if given is None:
            return "not quantized in the source"
        return Plain(F8_E4M3) if len({scale for _, scale in given}) == 1 else Fp8Shared(given)


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

    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | str:
        from streamconv.quants.fp8_rowwise import Fp8Rowwise

        if module.experts:
            raise RefusedError(["--quant fp8_rowwise: TensorRT-LLM rejects it for mixture-of-experts; use --quant int8 or int4"])
        if options.use_meta_fp8_rowwise_recipe and module.layer in (0, module.layers - 1):
            return "Meta's recipe leaves the first and the last layer out"
        if options.use_meta_fp8_rowwise_recipe and module.name.startswith("attention"):
            return "Meta's recipe leaves attention out"
        if (module.layer, module.name) in self.copied:
            return Plain(F8_E4M3)
        return Fp8Rowwise(-self.bound, self.bound, dtype if self.cast else None)

    def constants(self, layer: int, layers: int, options: TensorRTLLM) -> list[tuple[str, DType, tuple[int, ...], bytes]]:
        """The activation clamps of a layer."""
        if not options.use_meta_fp8_rowwise_recipe:
            owners = ["input_layernorm", "post_layernorm", "attention", "mlp"]
        else:
            owners = [] if layer in (0, layers - 1) else ["post_layernorm", "mlp"]
        return [(f"{owner}.clamp_val", F32, (2,), struct.pack("<2f", -self.bound, self.bound)) for owner in owners]


QUANTS = (Fp8Quant(), Fp8RowwiseQuant())
