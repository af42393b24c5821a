"""The factors of a quantized KV cache: measured, brought along by the source, or one."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import F32, DType

if TYPE_CHECKING:
    from streamconv.targets.trtllm.rank_layout import RankLayout

Constant = tuple[str, DType, tuple[int, ...], bytes]
"""Name, dtype, shape and bytes of a tensor that is known when a plan is made."""
_LARGEST = 448.0


def cache_constants(layout: RankLayout, layer: int) -> list[Constant]:
    """Factor of a layer's KV cache, and its reciprocal, which 1.x keeps beside that of an FP8 KV cache; names begin at the layer."""
    options = layout.options
    factor = layout.cache_factors.get(layer) if options.kv_cache else None
    if factor is None and options.kv_cache == "fp8":
        factor = _fp8_factor(layout, layer)
    elif factor is None and options.kv_cache == "int8" and layout.ranges is not None:
        size, heads, kv = layout.model.head_size, layout.model.num_attention_heads, layout.model.num_key_value_heads
        fused = [role for role in ("qkv", "qkv_grouped") if role in layout.family.tensors]
        rows = {fused[0]: (heads + 2 * kv) * size} if fused else {"q": heads * size, "k": kv * size, "v": kv * size}
        largest = _largest_output(layout, rows, layer)  # before rotary embedding, the queries' too
        factor = None if largest is None else struct.pack("<f", largest / 127)
    if factor is None:
        return []
    constants: list[Constant] = [("attention.kv_cache_scaling_factor", F32, (1,), factor)]
    if options.kv_cache == "fp8" and options.target_version != "0.16":
        reciprocal = struct.pack("<f", 1 / struct.unpack("<f", factor)[0])
        constants.append(("attention.kv_cache_rcp_scaling_factor", F32, (1,), reciprocal))
    return constants


def _fp8_factor(layout: RankLayout, layer: int) -> bytes:
    """float32: that of the source, max(y_k, y_v) / 448 but at least 1, which ModelOpt writes, or 1 without calibration."""
    rows = layout.model.num_key_value_heads * layout.model.head_size
    factor = layout.kv_scales.get(layer)
    if factor is None:
        factor = max(1.0, (_largest_output(layout, {"k": rows, "v": rows}, layer) or 0.0) / _LARGEST)
    return struct.pack("<f", factor)


def _largest_output(layout: RankLayout, rows: Mapping[str, int], layer: int) -> float | None:
    """Of weights with so many rows, by role; None without ranges, or if one is missing, which the roles report."""
    names = {layout.roles.found.get((role, layer, -1)): count for role, count in rows.items()}
    outputs = {name.removesuffix(".weight") + ".y": count for name, count in names.items() if name is not None}
    if layout.ranges is None or None in names:
        return None
    layout.ranges.check(outputs)
    return layout.ranges.amax(list(outputs))
