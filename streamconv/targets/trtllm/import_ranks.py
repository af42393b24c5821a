"""Codes of a TensorRT-LLM checkpoint that is cut anew: they stay what they are, laid out for another generation or on other ranks.

What a direct conversion would have measured over other inputs than the source's ranks have is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import I8
from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.source_tensors import Changed
from streamconv.errors import printable
from streamconv.planning.draft import Draft
from streamconv.quants.gptq import PackedWeight
from streamconv.quants.laid_out import LAID_OUT
from streamconv.quants.plain import Plain
from streamconv.quants.weight_only import WeightOnly
from streamconv.targets.trtllm.import_scales import Scales, Stored
from streamconv.targets.trtllm.rank_views import SCALE

if TYPE_CHECKING:
    from streamconv.checkpoint.dtypes import DType
    from streamconv.quants.base import Encoding
    from streamconv.targets.trtllm.options import TensorRTLLM
    from streamconv.targets.trtllm.recipes import Module, Quant
    from streamconv.targets.trtllm.recipes.base import QuantInfo


@dataclass(frozen=True, slots=True)
class LaidOutQuant:
    """--quant int8 and int4 from integers: `quant` says which weights have them, and how they are laid out."""

    quant: Quant
    packings: tuple[str, ...] = (LAID_OUT,)

    @property
    def info(self) -> QuantInfo:
        return self.quant.info

    def encoding(self, module: Module, options: TensorRTLLM, dtype: DType) -> Encoding | None:
        made = self.quant.encoding(module, options, dtype)
        return PackedWeight(I8, made.layout) if isinstance(made, WeightOnly) else made

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        return self.quant.problems(module, options, dtype)

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        return self.quant.reason(module, options)


def take_codes(tensors: Mapping[str, SourceTensor]) -> Stored:
    """The tensors of a checkpoint, the scales of codes apart."""
    stored = Stored(Changed(tensors))
    for name in tensors:
        if name.endswith(".weight" + SCALE):
            stored.scales[name.removesuffix(SCALE)] = Scales(stored.tensors.pop(name), None, None, 0)
    return stored


def add_channel_scales(builder: Draft, stored: Stored, experts: int) -> list[str]:
    """Describe the scales of every matrix that was fed with codes; gives what is wrong.

    Args:
        experts: on a rank, 0 for a dense model.
    """
    odd: list[tuple[str, int, int]] = []
    for matrix, feeds in builder.fed(stored.scales).items():
        file, name = builder.place(matrix)
        local = experts if ".mlp." in name else 0
        kind = stored.scales[feeds[0].source.name].scales.dtype
        vector = Plain(kind, vector=True, suffix="per_channel_scale")
        rows = sum(feed.stop - feed.start for feed in feeds)
        made = builder.matrix(file, name, rows // max(local, 1), 1, vector, experts=local)
        for feed in feeds:
            scales, (left, right) = stored.scales[feed.source.name].scales, feed.cols[0]
            each = feed.source.cols // scales.cols
            if right - left != each or left % each:
                odd.append((feed.source.name, each, right - left))
            builder.feed(made, scales, feed.start, feed.stop, cols=[(left // each, left // each + 1)])
    if not odd:
        return []
    (name, each, now), count = odd[0], len({name for name, _, _ in odd})
    more = f" (and {count - 1} more)" if count > 1 else ""
    told = f"a scale in the source is that of the {each} inputs of a rank, which would now have {now}, with another scale"
    return [f"{printable(name)}{more}: {told}; keep --tp-size, or decode the source (--to hf) and convert that"]
