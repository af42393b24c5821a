"""Formats that only NVIDIA ModelOpt can make: refused by name, with the way to get them."""

from __future__ import annotations

from streamconv.errors import RefusedError

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
"""key -> (why, what to do)."""

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
