"""The format that a config.json states, as a row of the formats table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.targets.hf.recipes import BLOCK, RECIPES, Recipe


def stated_recipe(stated: Mapping[str, Any]) -> tuple[Recipe, int] | None:
    """(row, group size) for a `quantization_config`; None if no row says just that: several schemes, a format of others."""
    method = stated.get("quant_method")
    if method == "fp8":
        own = stated.get("weight_block_size") == [BLOCK, BLOCK]
        return next(((row, BLOCK) for row in RECIPES if own and row.container == "hf"), None)
    if isinstance(method, str) and method.startswith("modelopt"):
        group = _size(stated.get("group_size")) or _size((_scheme(stated) or {}).get("weights")) or BLOCK
        return next(((row, group) for row in RECIPES if row.algo and row.algo == stated.get("quant_algo")), None)
    scheme = _scheme(stated)
    if method != "compressed-tensors" or scheme is None:
        return None
    form, weights = scheme.get("format") or stated.get("format"), scheme.get("weights")
    if not isinstance(weights, dict):
        return None
    for row in RECIPES:
        if row.form and row.form == form and _says(weights, row.weights) and _same_inputs(scheme.get("input_activations"), row.inputs):
            return row, _size(weights) or BLOCK
    return None


def _scheme(stated: Mapping[str, Any]) -> dict[str, Any] | None:
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        return None
    (only,) = groups.values()
    return only if isinstance(only, dict) else None


def _size(held: Any) -> int | None:
    size = held.get("group_size") if isinstance(held, dict) else held
    return size if isinstance(size, int) and 0 < size < 1 << 20 else None


def _says(told: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    defaults = {"symmetric": True, "dynamic": False}
    return all(told.get(key, defaults.get(key)) == value for key, value in wanted.items() if key != "scale_dtype")


def _same_inputs(told: Any, wanted: Mapping[str, Any] | None) -> bool:
    if wanted is None or not isinstance(told, dict):
        return wanted is None and told is None
    return _says(told, wanted)
