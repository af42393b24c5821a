"""The flags that several commands share, and what they become."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection
from typing import Any

import click

from streamconv.errors import UsageError
from streamconv.options import Resources
from streamconv.targets import DEFAULT, TARGETS
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

CONVERSION: tuple[_Decorator, ...] = (
    click.option("--tp-size", type=int, default=1, show_default=True, help="Tensor parallel size."),
    click.option("--pp-size", type=int, default=1, show_default=True, help="Pipeline parallel size."),
    click.option("--cp-size", type=int, default=1, show_default=True, help="Context parallel size (1.2 only)."),
    click.option("--moe-tp-size", type=int, default=-1, help="Tensor parallel size inside experts."),
    click.option("--moe-ep-size", type=int, default=-1, help="Expert parallel size."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
        default="auto",
        show_default=True,
        help="Type of what is not quantized; auto is the source's (float16 for float32).",
    ),
    click.option("--quant", default="none", show_default=True, help="Weight format; `streamconv list quants` shows all."),
    click.option("--target-sm", type=int, help="GPU generation the bytes are for: 80, 86, 89, 90, ..."),
    click.option("--target-version", default="1.2", show_default=True, help="TensorRT-LLM line: 0.16, 1.0 (any 1.x) or 1.2."),
    click.option(
        "--encoding",
        type=click.Choice(["processed", "raw"]),
        default="processed",
        show_default=True,
        help="--quant int8 and int4: laid out for --target-sm, or left for trtllm-build to quantize when it loads.",
    ),
    click.option("--kv-cache", type=click.Choice(["fp8", "int8"]), help="Quantize the KV cache."),
    click.option("--activation-ranges", metavar="FILE", help="Ranges that `calibrate` measured (smoothquant, fp8, KV cache)."),
    click.option("--smoothquant", type=float, default=0.5, show_default=True, help="Alpha of --quant smoothquant."),
    click.option("--per-channel", is_flag=True, help="SmoothQuant: a weight scale for each output channel."),
    click.option("--per-token", is_flag=True, help="SmoothQuant: activation scales for each token, at run time."),
    click.option(
        "--group-size", type=int, default=128, show_default=True, help="Weights that share a scale, in the formats with groups (GPTQ, AWQ)."
    ),
    click.option("--use-parallel-embedding", is_flag=True, help="Split the embedding over ranks."),
    click.option(
        "--embedding-sharding-dim",
        type=click.IntRange(0, 1),
        default=0,
        show_default=True,
        help="--use-parallel-embedding: split the vocabulary (0) or the hidden size (1).",
    ),
    click.option("--use-embedding-sharing", is_flag=True, help="Leave lm_head out where that is legal (0.16)."),
    click.option("--remove-duplicated-kv-heads", is_flag=True, help="The source holds every KV head twice: keep one of each pair."),
    click.option("--disable-weight-only-quant-plugin", is_flag=True, help="Recorded in config.json for the engine builder."),
    click.option(
        "--use-meta-fp8-rowwise-recipe",
        is_flag=True,
        help="--quant fp8_rowwise: as Meta does, attention and the first and last layer stay unquantized.",
    ),
    click.option("--rope-tables", is_flag=True, help="Also write the rotary tables NVIDIA's converter leaves behind."),
    click.option("--allow-nonfinite", is_flag=True, help="Quantize NaN (as 0) and infinity (as the channel's maximum)."),
    click.option("--max-position-embeddings", type=int, help="Override the source's value."),
)
TO: tuple[_Decorator, ...] = (
    click.option("--to", type=click.Choice([*TARGETS]), default=DEFAULT, show_default=True, help="What to write."),
)
_KNOWN = ("quant", "dtype", "group_size", "allow_nonfinite", "activation_ranges", "kv_cache")
"""Options of both targets, whose flags stand above."""


def _hf_flag(field: dataclasses.Field[Any]) -> _Decorator:
    """The flag of an option that only Hugging Face directories have; what it holds if it is not typed is the option's own default."""
    name, facts = "--" + field.name.replace("_", "-"), field.metadata
    text = f"--to hf: {facts['help']}."
    if facts["type"] is tuple:
        return click.option(name, multiple=True, metavar="MODULE", help=f"{text} May be repeated, and takes several.")
    if facts["choices"]:
        default = field.default
        return click.option(name, type=click.Choice([*facts["choices"]]), default=default, show_default=default is not None, help=text)
    return click.option(name, metavar="SIZE" if facts["size"] else None, help=text)


HF: tuple[_Decorator, ...] = tuple(_hf_flag(field) for field in dataclasses.fields(HuggingFace) if field.name not in _KNOWN)


def target(to: str, values: dict[str, Any], typed: Collection[str]) -> TensorRTLLM | HuggingFace:
    """The target that flags ask for.

    Args:
        values: every flag of every target.
        typed: names of those on the command line, or in a recipe.

    Raises:
        UsageError: flags of another target were typed, or a value is none.
    """
    from streamconv.memory import parse_size

    own = {field.name: field for field in dataclasses.fields(HuggingFace if to == "hf" else TensorRTLLM)}
    other = [name for name in values if name in typed and name not in own]
    if other:
        flags = ", ".join("--" + name.replace("_", "-") for name in other)
        raise UsageError(f"{flags}: not for --to {to}", hint=f"`streamconv list targets` says what each target is, --to {to} is asked for")
    held = {name: value for name, value in values.items() if name in own}
    if to == "trtllm":
        return TensorRTLLM(**held)
    if isinstance(held.get("max_shard_size"), str):
        held["max_shard_size"] = parse_size(held["max_shard_size"])
    for name in ("ignore", "only"):
        held[name] = tuple(held[name])
    return HuggingFace(**held)


RESOURCES: tuple[_Decorator, ...] = (
    click.option("--memory-budget", help="Ceiling of this process's memory, e.g. 2GiB. Default: from what is free."),
    click.option("--workers", default="auto", show_default=True, help="Worker threads, or auto."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0 or cuda:0,cuda:1."),
    click.option("--device-memory-budget", help="Device memory to use, e.g. 2GiB."),
)
SAMPLES: tuple[_Decorator, ...] = (
    click.option("--text", metavar="FILE", help="Calibrate on this: a .txt or .jsonl file, a folder of them, or a data set on the Hub."),
    click.option("--samples", type=int, default=512, show_default=True, help="Calibration samples, -1 for all."),
    click.option("--max-length", type=int, default=512, show_default=True, help="Tokens of a calibration sample."),
    click.option("--batch-size", type=int, default=1, show_default=True, help="Calibration samples of equal length at once."),
)


def options(*groups: tuple[_Decorator, ...]) -> _Decorator:
    """Groups of flags as one decorator, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


def resources(
    memory_budget: str | None, workers: str | int | None, device: str, device_memory_budget: str | None = None
) -> Resources:
    """Resources from the spelling of the command line.

    Raises:
        UsageError: a value that is none.
    """
    from streamconv.memory import parse_size

    count = None
    if workers not in (None, "auto"):
        try:
            count = int(str(workers))
        except ValueError:
            raise UsageError(f"--workers {workers!r} is neither a number nor auto") from None
    rows = os.environ.get("STREAMCONV_TILE_ROWS")
    return Resources(
        memory_budget=parse_size(memory_budget) if memory_budget else None,
        workers=count,
        device=device,
        device_memory_budget=parse_size(device_memory_budget) if device_memory_budget else None,
        tile_rows=int(rows) if rows else None,
    )
