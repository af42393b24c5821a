"""What stored codes and scales stand for: tables of values, and scales as float32. Numpy only, loaded when it is first needed."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from streamconv.lazy import np

if TYPE_CHECKING:
    Floats = Any  # float32 arrays: numpy types its own operations too widely

Code = Literal["e4m3", "int8", "uint8", "e2m1", "uint4"]
"""How a code is read: float8_e4m3fn; int8; uint8 around 128; FP4 or uint4 around 8, two in a byte, the even column in the low half."""

NIBBLES = ("e2m1", "uint4")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""FP4: the values of codes 0 to 7; 8 is added for their negatives."""


@cache
def values(code: Code) -> Floats:
    """float32 [256] or [16]: the value of each code."""
    number = np.arange(16 if code in NIBBLES else 256)
    if code == "e2m1":
        table = np.array(E2M1)[number & 7] * np.where(number & 8, -1.0, 1.0)
    elif code == "uint4":
        table = number - 8.0
    elif code == "uint8":
        table = number - 128.0
    elif code == "int8":
        table = number.astype(np.uint8).view(np.int8).astype(float)
    else:
        field, mantissa = (number >> 3) & 15, number & 7
        size = np.where(field == 0, np.ldexp(mantissa.astype(float), -9), np.ldexp(8.0 + mantissa, field - 10))
        table = np.where(number & 127 == 127, np.nan, size) * np.where(number & 128, -1.0, 1.0)
    return table.astype(np.float32)


def as_float(stored: np.ndarray[Any, Any], dtype: str) -> Floats:
    """Stored scales (uint8 bytes) -> float32. `dtype`: F32, F16, BF16, F8_E4M3, or U8 and F8_E8M0 for powers of two (bias 127)."""
    if dtype == "F32":
        return stored.view(np.float32)
    if dtype == "F16":
        return stored.view(np.float16).astype(np.float32)
    if dtype == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F8_E4M3":
        return values("e4m3")[stored]
    with np.errstate(over="ignore"):
        scales = np.ldexp(np.float32(1.0), stored.astype(np.int32) - 127).astype(np.float32)
    scales[stored == 255] = np.nan  # all ones stand for NaN
    return scales
