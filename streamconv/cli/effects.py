"""Flags that were typed and would change nothing: what decides bytes is refused, what concerns resources alone is noted.

Only what stands on the command line counts. A recipe names every flag there is.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from streamconv.cli import output
from streamconv.errors import UsageError, printable
from streamconv.targets.base import flag

if TYPE_CHECKING:
    from streamconv.targets.base import Target

_SAMPLES = ("samples", "max_length", "batch_size")
_DEVICE = ("device_memory_budget", "on_device_loss")


def typed(context: click.Context) -> set[str]:
    """Names of the parameters that stand on the command line."""
    return {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def given(context: click.Context) -> set[str]:
    """Names of the parameters that stand on the command line or in a recipe."""
    return typed(context) | set(context.default_map or ())


def without_effect(target: Target, names: Collection[str], model: str) -> Iterator[str]:
    """Which of these options of a target change nothing; the source is opened only if that depends on it."""
    from streamconv.hub import open_source

    return target.without_effect(names, lambda: open_source(model))


def check(context: click.Context, model: str, target: Target | None) -> None:
    """Refuse options of `convert` and `plan` that have no effect in this call; note resources that have none.

    Args:
        target: of the one output; None for several, which say more for themselves.
        model: the source.

    Raises:
        UsageError: names every such option and what it is for.
        StreamconvError: the source cannot be opened.
    """
    names, values = typed(context), context.params
    idle = [] if values.get("text") else [f"{flag(name)} has no effect without --text" for name in _SAMPLES if name in names]
    refuse([*idle, *(without_effect(target, names, model) if target is not None else ())])
    for line in _resources(names, values, model):
        output.note(f"note: {line}")


def refuse(idle: list[str]) -> None:
    """What has no effect ends the command."""
    if idle:
        raise UsageError(idle, hint="leave it out" if len(idle) == 1 else "leave them out")


def _resources(names: Collection[str], values: dict[str, Any], model: str) -> Iterator[str]:
    if "hub_keep" in names and os.path.lexists(model):
        yield "--hub-keep has no effect with a local model"
    if "no_source_check" in names and os.path.isdir(model) and not os.path.lexists(os.path.join(model, "streamconv.json")):
        yield f"--no-source-check has no effect: {printable(model)} holds no streamconv.json"
    if asked := [name for name in _DEVICE if name in names]:
        from streamconv import device

        devices = device.parse(str(values["device"]))
        why = "with --device cpu" if devices == ("cpu",) else ""
        if devices == ("auto",) and not device.visible():
            why = "on a machine without a GPU"
        yield from (f"{flag(name)} has no effect {why}" for name in asked if why)
    if not (values.get("parts") or values.get("part")):
        yield from (f"{flag(name)} has no effect without --parts or --part" for name in ("wait", "private_parts") if name in names)
    if "read" in names and str(values["device"]).startswith("cuda"):
        yield f"--read has no effect with --device {values['device']}"
