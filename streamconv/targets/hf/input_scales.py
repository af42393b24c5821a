"""Scales of activations and of the KV cache, from a file of activation ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping

from streamconv.checkpoint.activation_ranges import HINT, Ranges
from streamconv.errors import RefusedError, TensorError, printable
from streamconv.targets.hf.rules import Module, partners

_EXPERT = re.compile(r"\.experts\.\d+\.")
_CACHED = re.compile(r"(.*)\.([kv])_proj\.weight")


def input_maxima(ranges: Ranges, wanted: Mapping[str, Module]) -> dict[str, float]:
    """The largest absolute input of each module: partners share one, and an expert that no token reached takes its layer's.

    Raises:
        TensorError: ranges are missing or wrong; all of them are listed.
    """
    found: dict[str, float] = {}
    lines: list[str] = []
    layers: dict[str, list[str]] = {}
    for name, module in wanted.items():
        if _EXPERT.search(name):
            first = (partners(name) or (name,))[0]
            layers.setdefault(_EXPERT.sub(".experts.*.", first), []).append(name)
            if ranges.silent(f"{name}.x"):
                continue
        line = ranges.problem(f"{name}.x", module.cols)
        if line is not None:
            lines.append(line)
        else:
            found[name] = ranges.amax([f"{name}.x"])
    for layer, names in layers.items():
        largest = max((found[name] for name in names if name in found), default=None)
        if largest is None:
            lines.append(f"{printable(str(ranges.path))}: no expert of {printable(layer)} was measured")
            continue
        for name in names:
            seen = [found[other] for other in partners(name) or (name,) if other in found]
            found[name] = max(seen, default=largest)
    if lines:
        raise TensorError(lines, hint=HINT)
    return {name: max(found[other] for other in partners(name) or (name,) if other in found) for name in found}


def cache_maxima(ranges: Ranges, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, str, float]]:
    """What the FP8 KV cache holds: weight of k_proj or v_proj -> (attention, "k" or "v", largest absolute output).

    Raises:
        RefusedError: this model has no such layers. TensorError: ranges are missing or wrong; all of them are listed.
    """
    cached = [(name, match, shapes[name][0]) for name in shapes if (match := _CACHED.fullmatch(name))]
    if not cached:
        raise RefusedError(["--kv-cache fp8: there is no k_proj and v_proj whose outputs could have been measured"])
    ranges.check({name.removesuffix("weight") + "y": rows for name, _, rows in cached})
    return {name: (match[1], match[2], ranges.amax([name.removesuffix("weight") + "y"])) for name, match, _ in cached}
