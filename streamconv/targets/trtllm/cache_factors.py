"""The factors of a quantized KV cache: measured, brought along by the source, or one."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.checkpoint.dtypes import F32, DType

if TYPE_CHECKING:
    from streamconv.targets.trtllm.rank_layout import RankLayout

Constant = tuple[str, DType, tuple[int, ...], bytes]
"""Name, dtype, shape and bytes of a tensor that is known when a plan is made."""
_LARGEST = 448.0
_ONE = struct.pack("<f", 1.0)


def cache_constants(layout: RankLayout, layer: int) -> list[Constant]:
    """Factor of a layer's KV cache, and its reciprocal, which 1.x keeps beside that of an FP8 KV cache; names begin at the layer."""
    options, known, made = layout.options, layout.cache_factors, list[Constant]()
    if options.kv_cache == "fp8" or (options.kv_cache and layer in known):
        factor = known[layer] if layer in known else _fp8_factor(layout, layer)
        made.append(("attention.kv_cache_scaling_factor", F32, (1,), factor))
        if options.kv_cache == "fp8" and options.target_version != "0.16":
            reciprocal = struct.pack("<f", 1 / struct.unpack("<f", factor)[0])
            made.append(("attention.kv_cache_rcp_scaling_factor", F32, (1,), reciprocal))
    if options.kv_cache == "int8" and layout.ranges is not None:
        model, tensors = layout.model, layout.family.tensors
        size, heads, kv = model.head_size, model.num_attention_heads, model.num_key_value_heads
        rows = {"q": heads * size, "k": kv * size, "v": kv * size}
        fused = [role for role in ("qkv", "qkv_grouped") if role in tensors]
        outputs = _names(layout, {fused[0]: (heads + 2 * kv) * size} if fused else rows, layer)
        if outputs is not None:
            factor = struct.pack("<f", _largest_output(layout.ranges, outputs) / 127)  # before rotary embedding, the queries' too
            made.append(("attention.kv_cache_scaling_factor", F32, (1,), factor))
    return made


def _fp8_factor(layout: RankLayout, layer: int) -> bytes:
    """float32: that of the source, max(y_k, y_v) / 448 but at least 1, which ModelOpt writes, or 1 without calibration."""
    if layer in layout.kv_scales:
        return struct.pack("<f", layout.kv_scales[layer])
    rows = layout.model.num_key_value_heads * layout.model.head_size
    outputs = _names(layout, {"k": rows, "v": rows}, layer)
    if layout.ranges is None or outputs is None:
        return _ONE
    return struct.pack("<f", max(1.0, _largest_output(layout.ranges, outputs) / _LARGEST))


def _names(layout: RankLayout, rows: Mapping[str, int], layer: int) -> dict[str, int] | None:
    """Weight name -> its rows; None if one is missing, which the roles report."""
    found = {layout.roles.found.get((role, layer, -1)): count for role, count in rows.items()}
    return None if None in found else {name: count for name, count in found.items() if name is not None}


def _largest_output(ranges: Ranges, outputs: Mapping[str, int]) -> float:
    wanted = {name.removesuffix(".weight") + ".y": rows for name, rows in outputs.items()}
    ranges.check(wanted)
    return ranges.amax(list(wanted))
