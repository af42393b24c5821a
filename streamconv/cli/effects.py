"""Flags that were typed and would change nothing: said, not swallowed.

Only what stands on the command line counts. A recipe names every flag there is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from typing import Any

import click
from click.core import ParameterSource

from streamconv.errors import UsageError
from streamconv.targets.trtllm.options import TensorRTLLM

_SAMPLES = ("samples", "max_length", "batch_size")
_DEVICE = ("device_memory_budget", "on_device_loss")
_MOE = ("moe_tp_size", "moe_ep_size")
_SAID_ELSEWHERE = ("--activation-ranges",)
"""Planning refuses these by itself: a KV cache uses them too."""
_STATED = ("--target-sm",)
"""A fact about the GPU, which the manifest keeps and verify reads, whatever the format."""


def typed(context: click.Context) -> set[str]:
    """Names of the parameters that stand on the command line."""
    return {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def check(context: click.Context, model: str, options: TensorRTLLM) -> None:
    """Refuse flags of `convert` and `plan` that have no effect in this call.

    Args:
        context: of the command.
        model: the source; opened only if a flag was typed whose effect depends on it.

    Raises:
        UsageError: names every such flag and what it is for.
        StreamconvError: the source cannot be opened.
    """
    told = list(_without_effect(typed(context), context.params, model, options))
    if told:
        raise UsageError(told, hint="leave it out" if len(told) == 1 else "leave them out")


def needs(context: click.Context, other: str, flags: Collection[str]) -> None:
    """Refuse flags that were typed and have no effect without `other`.

    Raises:
        UsageError: names every such flag.
    """
    told = [f"{_flag(name)} has no effect without {_flag(other)}" for name in flags if name in typed(context)]
    if told:
        raise UsageError("; ".join(told), hint="leave it out" if len(told) == 1 else "leave them out")


def _without_effect(names: Collection[str], values: dict[str, Any], model: str, options: TensorRTLLM) -> Iterator[str]:
    if not values.get("text"):
        yield from (f"{_flag(name)} has no effect without --text" for name in _SAMPLES if name in names)
    if "hub_keep" in names and os.path.lexists(model):
        yield "--hub-keep has no effect with a local model"
    if "embedding_sharding_dim" in names and not options.use_parallel_embedding:
        yield "--embedding-sharding-dim has no effect without --use-parallel-embedding"
    asked = [name for name in _DEVICE if name in names]
    if asked and (why := _no_device(str(values["device"]))):
        yield from (f"{_flag(name)} has no effect {why}" for name in asked)
    if "read" in names and str(values["device"]).startswith("cuda"):
        yield f"--read has no effect with --device {values['device']}"
    users = _users()
    formats = [flag for flag in sorted(users) if flag[2:].replace("-", "_") in names]
    experts = [name for name in _MOE if name in names]
    if not formats and not experts:
        return
    quant, dense = _of_model(model, options, bool(experts))
    for flag in formats:
        if quant not in users[flag]:
            yield f"{flag} has no effect with --quant {quant}, it is for {', '.join(users[flag])}"
    if dense:
        yield from (f"{_flag(name)} has no effect, this model has no experts" for name in experts)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _users() -> dict[str, list[str]]:
    """Flags that only some formats use -> those formats, as each format says of itself."""
    from streamconv.quants import all_quants

    found: dict[str, list[str]] = {}
    quants = all_quants()
    for_all = {*quants["none"].info.flags, *_SAID_ELSEWHERE, *_STATED}
    for quant in quants.values():
        for flag in quant.info.flags:
            if flag not in for_all:
                found.setdefault(flag, []).append(quant.info.key)
    return found


def _no_device(asked: str) -> str | None:
    """Why nothing will run on a GPU, None if something may."""
    from streamconv import device

    names = device.parse(asked)
    if names == ("cpu",):
        return "with --device cpu"
    return "on a machine without a GPU" if names == ("auto",) and not device.visible() else None


def _of_model(model: str, options: TensorRTLLM, experts: bool) -> tuple[str, bool]:
    """(the format that the conversion will have, whether the model is dense); reads the source if that is needed to know.

    Args:
        experts: the second is asked for.
    """
    from streamconv.checkpoint.quantized import source_quantization
    from streamconv.hub import open_source
    from streamconv.quants import quant_of
    from streamconv.targets.trtllm.import_rules import take_over
    from streamconv.targets.trtllm.target import model_of

    key = quant_of(options.quant).info.key  # an unknown one is told as such
    if key != "none" and not experts:
        return key, False
    with contextlib.closing(open_source(model)) as index:
        key = take_over(options, source_quantization(index)).quant
        return key, experts and not model_of(index)[0].num_experts
