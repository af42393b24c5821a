"""What a calibration run is asked for, and which formats need one. Imports nothing heavy: `--help` and `plan` read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamconv.options import Options

Loop = Literal["trtllm", "modelopt"]
DTYPES = ("float16", "bfloat16", "float32", "auto")


@dataclass(frozen=True, slots=True)
class Samples:
    """Which text goes through the model.

    Attributes:
        text: a file, a folder or a data set of the Hub (`texts.load_texts`).
        samples: how many, -1 for all.
        max_length: tokens of a sample at most.
        batch_size: samples of equal length that go through a layer together; 1 is what the official loops do.
    """

    text: str
    samples: int = 512
    max_length: int = 512
    batch_size: int = 1


def needs_ranges(options: Options) -> str | None:
    """The flag that cannot do without activation ranges, None if there is none."""
    if options.quant in ("smoothquant", "fp8"):
        return f"--quant {options.quant}"
    return "--kv-cache int8" if options.kv_cache == "int8" else None


def uses_ranges(options: Options) -> bool:
    """Whether ranges change the output: the FP8 KV cache can do without (its factors are then 1)."""
    return needs_ranges(options) is not None or options.kv_cache == "fp8"


def measured_in(options: Options) -> tuple[str, Loop]:
    """Computing type and loop that NVIDIA's tools measure this format with (quantization spec §16).

    SmoothQuant loads the model as float16, the INT8 KV cache alone in its own type; FP8 is ModelOpt's, whose samples have no suffix.
    """
    if options.quant == "smoothquant":
        return "float16", "trtllm"
    return "auto", "modelopt" if "fp8" in (options.quant, options.kv_cache) else "trtllm"
