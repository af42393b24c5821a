"""The weight formats, found by being in this folder.

Each file that defines formats has a tuple QUANTS of objects with the attributes of `Quant`. An import error is fatal.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from streamconv.errors import UsageError
from streamconv.targets.trtllm.recipes.base import Module, Quant, QuantInfo
from streamconv.targets.trtllm.unsupported import refuse

__all__ = ["Module", "Quant", "QuantInfo", "all_quants", "quant_of"]


@cache
def all_quants() -> dict[str, Quant]:
    """key -> quant, in the order of their keys' files."""
    found: dict[str, Quant] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for quant in getattr(loaded, "QUANTS", ()):
            found[quant.info.key] = quant
    return found


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
