"""The weight formats, found by being in this folder.

Each file that defines formats has a tuple QUANTS of objects with the attributes of `Quant`. An import error is fatal.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from streamconv.errors import RefusedError, UsageError
from streamconv.targets.trtllm.recipes.base import Module, Quant, QuantInfo

__all__ = ["Module", "Quant", "QuantInfo", "all_quants", "quant_of", "refuse", "refused"]


@cache
def all_quants() -> dict[str, Quant]:
    """key -> quant, in the order of their keys' files."""
    quants: dict[str, Quant] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for quant in getattr(loaded, "QUANTS", ()):
            quants[quant.info.key] = quant
    return quants


def quant_of(key: str) -> Quant:
    """The quant for a --quant value.

    Raises:
        UsageError: no such key; the message lists those there are.
        RefusedError: a format that only another tool can make; the hint says which.
    """
    quants = all_quants()
    if key not in quants:
        refuse(key)
        raise UsageError(f"unknown --quant {key!r}", hint=f"one of {', '.join(quants)}")
    return quants[key]


_EXAMPLE = "examples/quantization/quantize.py --qformat"

REFUSED: dict[str, tuple[str, str]] = {
    "nvfp4": (
        "NVFP4 needs activation ranges that only a calibration run gives",
        f"ModelOpt makes it ({_EXAMPLE} nvfp4)",
    ),
    "w4a8_awq": (
        "W4A8_AWQ needs a calibrated scale search",
        f"ModelOpt makes it ({_EXAMPLE} w4a8_awq); without calibration use --quant int4",
    ),
    "qserve": (
        "W4A8_QSERVE starts from a DeepCompressor checkpoint",
        "use DeepCompressor and NVIDIA's converter of 0.16 (--use_qserve); without calibration use --quant int4",
    ),
    "int8_sq": (
        "W8A8_SQ_PER_CHANNEL (without _PLUGIN) needs activation ranges that only ModelOpt measures",
        f"ModelOpt makes it ({_EXAMPLE} int8_sq); or --quant smoothquant",
    ),
    "fp8_block_scales": (
        "FP8_BLOCK_SCALES is no engine checkpoint format",
        "serve the Hugging Face folder with the PyTorch backend, or use --quant fp8_rowwise",
    ),
    "mixed_precision": (
        "MIXED_PRECISION is chosen layer by layer by ModelOpt's search",
        "ModelOpt makes it (auto_quantize)",
    ),
}
"""Formats that only NVIDIA ModelOpt can make: key -> (why, what to do)."""

ALIASES = {
    "fp4": "nvfp4",
    "w4a8": "w4a8_awq",
    "w4a8_qserve_per_group": "qserve",
    "w4a8_qserve_per_channel": "qserve",
    "w8a8_sq_per_channel": "int8_sq",
    "fp8_pb_wo": "fp8_block_scales",
}


def refused(key: str) -> tuple[str, str] | None:
    """Why a format is not made here and how to get it, None for a format that is not in the table."""
    low = key.lower().replace("-", "_")
    return REFUSED.get(ALIASES.get(low, low))


def refuse(key: str, flag: str = "--quant") -> None:
    """Stop if the format is in the table.

    Raises:
        RefusedError: it is; the hint says how to get it.
    """
    known = refused(key)
    if known:
        raise RefusedError([f"{flag} {key}: {known[0]}"], hint=known[1])
