"""Match the tensor names of a source against a family table."""

from __future__ import annotations

import re
from collections.abc import Iterable

from streamconv.families.base import Family

Key = tuple[str, int, int]
"""(role, layer, expert); -1 where the role has none."""


_ROTARY = re.compile(
    r"(?:^|\.)(?:rotary_emb|rotary_pos_emb|rotary|rope)\.(?!.*weight$)|(?:^|[._])(?:inv_freq|freqs|freqs_cis|cos_cached|sin_cached|cos_sin_cache)$"
)
"""Rotary buffers under the names that releases of transformers and others have given them; they follow from config.json."""
_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")


def _split(name: str) -> tuple[str, tuple[int, ...]]:
    """ "a.3.b" -> ("a.#.b", (3,)); only plain decimal components count as numbers."""
    numbers = _NUMBER.findall(name)
    return _NUMBER.sub("#", name) if numbers else name, tuple(map(int, numbers))


def match(family: Family, names: Iterable[str]) -> tuple[dict[Key, str], list[str]]:
    """Sort source names into roles.

    Args:
        names: source tensor names, as `naming.settle` gives them.

    Returns:
        (role, layer, expert) -> name, and the names that nothing matches, in order. A second name for one role counts as
        unmatched.
    """
    table: dict[str, tuple[str, str]] = {}
    for role, patterns in family.tensors.items():
        for pattern in patterns:
            table[_canonical(pattern)] = (role, pattern)
    for pattern in family.ignored:
        table[_canonical(pattern)] = ("", pattern)
    tensors: dict[Key, str] = {}
    unmatched: list[str] = []
    for name in names:
        shape, numbers = _split(name)
        hit = table.get(shape)
        if hit is None:
            if not _ROTARY.search(name):
                unmatched.append(name)
            continue
        role, pattern = hit
        if not role:
            continue
        layer = numbers[0] if "{layer}" in pattern else -1
        expert = numbers[-1] if "{expert}" in pattern else -1
        key = (role, layer, expert)
        if key in tensors:
            unmatched.append(name)
        else:
            tensors[key] = name
    return tensors, unmatched


def _canonical(pattern: str) -> str:
    return pattern.replace("{layer}", "#").replace("{expert}", "#")


def example(family: Family, role: str, layer: int, expert: int) -> str:
    """The name that the family expects for a role."""
    return family.tensors[role][0].replace("{layer}", str(layer)).replace("{expert}", str(expert))
