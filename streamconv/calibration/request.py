"""What a calibration run is asked for. Imports nothing heavy: `--help` and `plan` read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from streamconv.targets.trtllm.options import TensorRTLLM

Loop = Literal["trtllm", "modelopt"]
Progress = Callable[[int, int, float], None]
"""Called after each layer with (done, all, seconds left)."""
Sampled = Callable[[int, int, int, int], None]
"""Called within a layer, at most once a second, with (layers done, all layers, samples through this one, all samples)."""
DTYPES = ("float16", "bfloat16", "float32", "auto")


@dataclass(frozen=True, slots=True)
class Samples:
    """Which text goes through the model.

    Attributes:
        text: a file, a folder or a data set of the Hub (`texts.load_texts`).
        samples: how many, -1 for all; None for 512 where ranges are measured and 128 where INT4 codes are found.
        max_length: tokens of a sample at most.
        batch_size: samples of equal length that go through a layer together; 1 is what the official loops do.
    """

    text: str
    samples: int | None = None
    max_length: int = 512
    batch_size: int = 1


def silent(*_: object) -> None:
    """Nobody listens."""


def measured_in(options: TensorRTLLM) -> tuple[str, Loop]:
    """Computing type and loop that NVIDIA's tools measure this format with.

    SmoothQuant loads the model as float16, the INT8 KV cache alone in its own type; FP8 is ModelOpt's, whose samples have no suffix.
    """
    if options.quant == "smoothquant":
        return "float16", "trtllm"
    return "auto", "modelopt" if "fp8" in (options.quant, options.kv_cache) else "trtllm"
