"""Options of a Hugging Face directory that change nothing in a call, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from streamconv.checkpoint.dtypes import BF16
from streamconv.targets.base import flag
from streamconv.targets.hf.recipes import RECIPES, CodecOptions, Recipe
from streamconv.targets.hf.target import ARITHMETICS, KEEP

_OF_FORMATS = ("group_size", "arithmetic", "method")
_OF_QUANTIZED = ("ignore", "only")
"""With --quant keep the plan refuses these by itself."""


def without_effect(quant: str, recipe: Recipe | None, given: Collection[str]) -> Iterator[str]:
    """A line for each of the options `given` that the format does not use.

    Args:
        recipe: the format of --quant; None: nothing is quantized here.
    """
    if recipe is None:
        names = _OF_FORMATS if quant == KEEP else (*_OF_FORMATS, *_OF_QUANTIZED)
        yield from (f"{flag(name)} has no effect with --quant {quant}" for name in names if name in given)
        return
    users: dict[str, Callable[[Recipe], bool]] = {
        "group_size": lambda row: row.grouped,
        "arithmetic": _rounds_otherwise,
        "method": lambda row: bool(row.methods),
    }
    for name, uses in users.items():
        if name in given and not uses(recipe):
            containers = [row.container for row in RECIPES if uses(row) and row.quant == recipe.quant]
            if containers:
                yield f"{flag(name)} has no effect with --format {recipe.container}, it is for {', '.join(containers)}"
            else:
                quants = dict.fromkeys(row.quant for row in RECIPES if uses(row))
                yield f"{flag(name)} has no effect with --quant {recipe.quant}, it is for {', '.join(quants)}"


def _rounds_otherwise(recipe: Recipe) -> bool:
    """Whether --arithmetic decides bytes of a format: whether its codecs differ (of a bfloat16 model; a float32 one rounds nothing)."""
    request = CodecOptions(dtype=BF16, group=128, arithmetic=ARITHMETICS[0], key="")
    codecs = [recipe.codec, *([recipe.shared[1]] if recipe.shared else [])]
    return any(codec(request) != codec(replace(request, arithmetic=other)) for codec in codecs for other in ARITHMETICS[1:])
