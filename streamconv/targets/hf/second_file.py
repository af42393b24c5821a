"""ModelOpt's hf_quant_config.json, which TensorRT-LLM reads before config.json: both must say the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streamconv.checkpoint.untrusted import read_json, shown_value
from streamconv.errors import CheckpointError
from streamconv.targets.hf.other_schemes import Modelopt
from streamconv.targets.hf.stated import Statement

NAME = "hf_quant_config.json"
_MOST = 64 << 20


def group_size(folder: Path) -> dict[str, Any]:
    """The group size that the file states, which ModelOpt's config.json does not repeat; empty if it cannot be read."""
    try:
        inner = read_json(folder / NAME, _MOST).get("quantization")
    except CheckpointError:
        return {}
    return {"group_size": inner["group_size"]} if isinstance(inner, dict) and "group_size" in inner else {}


def second_file(folder: Path, stated: Mapping[str, Any], statement: Statement) -> list[str]:
    """What is wrong with the file, or with its absence."""
    modelopt = str(stated.get("quant_method", "")).startswith("modelopt")
    there = os.path.lexists(folder / NAME)
    if modelopt != there:
        return [f"{NAME} {'is missing' if modelopt else 'is left over: TensorRT-LLM reads it first'}"]
    if not there:
        return []
    try:
        held = read_json(folder / NAME, _MOST)
    except CheckpointError as error:
        return [error.message]
    inner = held.get("quantization", held)
    if not isinstance(inner, dict):
        return [f"{NAME}: quantization is {shown_value(inner)}, no object"]
    return list(_differences(stated, inner, statement))


def _differences(stated: Mapping[str, Any], held: Mapping[str, Any], statement: Statement) -> Iterator[str]:
    algo, other = stated.get("quant_algo"), held.get("quant_algo")
    if str(algo).upper() != str(other).upper():
        yield f"{NAME}: quant_algo is {shown_value(other)}, and {shown_value(algo)} in config.json"
    schemes = [group.scheme for group in statement.groups]
    group = next((scheme.group for scheme in schemes if isinstance(scheme, Modelopt) and scheme.recipe.grouped), None)
    if group is not None and held.get("group_size") != group:
        yield f"{NAME}: group_size is {shown_value(held.get('group_size'))}, and {group} in config.json"
    if (held.get("kv_cache_quant_algo") is not None) != statement.cache:
        yield f"{NAME}: kv_cache_quant_algo is {shown_value(held.get('kv_cache_quant_algo'))}, and config.json says otherwise"
    listed = held.get("exclude_modules")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        yield f"{NAME}: exclude_modules is {shown_value(listed)}, no list of names"
    elif set(listed) != statement.ignore.listed:
        odd = sorted(set(listed) ^ statement.ignore.listed)
        yield f"{NAME}: exclude_modules and config.json's ignore list differ in {shown_value(odd[0])}"
