"""Scales and factors: numbers that an engine multiplies with or divides by, so that one bad value ruins everything after it."""

from __future__ import annotations

from typing import Any

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.stored_codes import as_float
from streamconv.lazy import np
from streamconv.quants.rounding import LEAST_NORMAL

_DIVIDED_BY = (
    "smoother",
    "act_scale",
    "scale_to_int",
    "quantization_scaling_factor",
    "activation_scaling_factor",
    "kv_cache_scaling_factor",
    "clamp_val",
)
"""Whose reciprocals are used as well, or that leave nothing of an activation when they are 0."""
_FACTORS = frozenset({*_DIVIDED_BY, "per_channel_scale", "weights_scaling_factor", "zero", "prequant_scaling_factor"})
_BITS = {"F16": (0x7FFF, 0x7C00), "BF16": (0x7FFF, 0x7F80), "F32": (0x7FFFFFFF, 0x7F800000)}
"""What is not the sign, and infinity."""


def nonfinite(dtype: DType, data: np.ndarray[Any, Any]) -> int:
    """How many of these values are NaN or infinite; 0 for types that are not F16, BF16 or F32.

    Args:
        data: uint8, whole values.
    """
    if dtype.name not in _BITS or not data.size:
        return 0
    mask, infinity = _BITS[dtype.name]
    magnitude = data.view(dtype.storage) & mask
    return int(np.count_nonzero(magnitude >= infinity)) if magnitude.max() >= infinity else 0


def problem(tensor: str, dtype: DType, data: np.ndarray[Any, Any] | bytes, single: bool) -> str | None:
    """What is wrong with values of a tensor, if it holds factors at all: NaN, infinity, or zero where an engine divides.

    A scale of zero is right for a channel or group of zeros; one scale of a whole matrix is divided by.

    Args:
        data: uint8, whole values.
        single: the tensor has one value.
    """
    suffix = tensor.rsplit(".", 1)[-1]
    if suffix not in _FACTORS or dtype.name not in _BITS:
        return None
    stored, divided = np.frombuffer(data, np.uint8), suffix in _DIVIDED_BY or (suffix == "weights_scaling_factor" and single)
    if not divided and not nonfinite(dtype, stored):
        return None
    values = as_float(stored, dtype.name)
    bad = ~np.isfinite(values)
    if divided:
        bad |= np.abs(values) < LEAST_NORMAL[dtype.name]  # the smallest number whose reciprocal is finite
    if not bad.any():
        return None
    value = float(values[int(bad.argmax())])
    reason = "too small to divide by" if abs(value) < 1 else "no factor to calculate with"
    return f"{tensor}: {value:g} is {reason}"


def odd_scales(data: bytes, dtype: str, signed: bool = False, zero: bool = False) -> str:
    """What numbers are no scales, in words; "" if all are.

    Args:
        data: whole numbers of a type of safetensors; of other types than floats and U8 nothing is said.
        signed, zero: negative numbers, and zero, are right.
    """
    if dtype in ("U8", "F8_E8M0"):
        return "an exponent byte of 255, which is NaN" if 255 in data else ""
    if dtype not in (*_BITS, "F8_E4M3"):
        return ""
    values = as_float(np.frombuffer(data, np.uint8), dtype)
    nan, nothing, negative = ~np.isfinite(values), values == 0, values < 0
    for odd, text, right in ((nan, "NaN or infinity", False), (nothing, "0", zero), (negative, "a negative number", signed)):
        if not right and odd.any():
            return f"{text}, which is no scale ({int(odd.sum())} of {odd.size})"
    return ""
