"""The family tables, found by being in this folder. A file that cannot be imported is an error, never skipped."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from streamconv.errors import CheckpointError, printable
from streamconv.families.base import Family

__all__ = ["Family", "all_families", "family_of"]


@cache
def all_families() -> tuple[Family, ...]:
    """Every family, sorted by name."""
    families: list[Family] = []
    for module in pkgutil.iter_modules(__path__):
        if module.name != "base":
            families.extend(getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILIES", ()))
    return tuple(sorted(families, key=lambda family: family.name))


def family_of(architecture: str) -> Family:
    """The family of a config.json `architectures[0]`.

    Raises:
        CheckpointError: no table names this architecture; the message lists those that are known.
    """
    for family in all_families():
        if architecture in family.architectures:
            return family
    import difflib

    known = sorted(a for family in all_families() for a in family.architectures)
    near = max((a for a in known if a in architecture), key=len, default=None)
    near = near or next(iter(difflib.get_close_matches(architecture[:300], known, n=1)), None)
    hint = f"known: {', '.join(known)}"
    hint = f"if it is a {near} under another name, say so in config.json; {hint}" if near else hint
    raise CheckpointError(f"unknown architecture {printable(architecture)!r} in config.json", hint=hint)
