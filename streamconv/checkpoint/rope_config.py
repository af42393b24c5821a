"""What a config says of rotary embedding: the base, the scaling, and the part of each head that is rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamconv.checkpoint.untrusted import shown_value

_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def is_number(value: object, least: float, most: float) -> bool:
    """No bool, and in a range."""
    return not isinstance(value, bool) and isinstance(value, int | float) and least <= value <= most


def rotated_part(raw: Mapping[str, Any], problems: list[str]) -> Any:
    """`partial_rotary_factor`, beside the other keys or (transformers 5) inside `rope_parameters`; its spelling is kept."""
    new = raw.get("rope_parameters")
    value = new.get("partial_rotary_factor") if isinstance(new, dict) else None
    value = raw.get("partial_rotary_factor") if value is None else value
    if value is None:
        return 1.0
    if is_number(value, 0, 1) and value:
        return value
    problems.append(f"partial_rotary_factor is {shown_value(value)}, not a number above 0 and at most 1")
    return 1.0


_ADDS_ROPE_TYPE = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
"""Classes of transformers that add `rope_type` to an object with `type` alone while loading; others leave it as it is."""


def rope(raw: dict[str, Any], architecture: str, problems: list[str], notes: list[str], number: Any) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from either spelling; type "default" means no scaling.

    A base inside an object counts before the one at the top level, where a release that does not know the object writes its
    default; of two scalings the old key's counts, as in transformers, unless it is "default".
    """
    objects = {key: raw.get(key) for key in ("rope_parameters", "rope_scaling")}
    for key, value in objects.items():
        if value is not None and not isinstance(value, dict):
            problems.append(f"{key} is {shown_value(value)}, not an object")
            return number("rope_theta", 10000.0), None
        if any(isinstance(inner, dict) for inner in (value or {}).values()):
            problems.append(f"{key} is different for different layers, which TensorRT-LLM does not have")
            return number("rope_theta", 10000.0), None
    bases = {f"{key}.rope_theta": (value or {}).get("rope_theta") for key, value in objects.items()}
    thetas = {key: value for key, value in (bases | {"rope_theta": raw.get("rope_theta")}).items() if value is not None}
    if thetas:
        first, raw["rope_theta"] = next(iter(thetas.items()))
        notes += [
            f"config.json: {first} is {shown_value(thetas[first])} and {key} is {shown_value(value)}: {first} counts"
            for key, value in thetas.items()
            if value != thetas[first]
        ]
    theta = number("rope_theta", 10000.0)
    scalings = {
        key: {inner: setting for inner, setting in value.items() if inner not in ("rope_theta", "partial_rotary_factor")}
        for key, value in objects.items()
        if value
    }
    new, old = scalings.get("rope_parameters"), scalings.get("rope_scaling")
    scaling = old if old and (_kind(old) != "default" or not new) else new
    if not scaling:
        return theta, None
    if new and old and {**new, "type": _kind(new), "rope_type": ""} != {**old, "type": _kind(old), "rope_type": ""}:
        which = "rope_scaling" if scaling is old else "rope_parameters"
        notes.append(f"config.json: rope_parameters and rope_scaling differ: {which} counts")
    if _kind(scaling) == "default":
        return theta, None
    scaling = dict(scaling)
    problems += scaling_problems(scaling)
    if "type" in scaling and architecture in _ADDS_ROPE_TYPE:
        scaling["rope_type"] = scaling["type"]
    return theta, scaling


def _kind(scaling: Mapping[str, Any]) -> str:
    return shown_value(scaling.get("type", scaling.get("rope_type"))).strip("'")


def scaling_problems(scaling: Mapping[str, Any]) -> list[str]:
    """Factors that are calculated with and are no numbers, or would be divided by."""
    kind, problems = scaling.get("type", scaling.get("rope_type")), []
    if not isinstance(kind, str | None):
        problems.append(f"rope_scaling.type is {shown_value(kind)}, not a name")
    for key in ("factor", *(_LLAMA3 if kind == "llama3" else ())):
        value = scaling.get(key, 1.0)
        if not is_number(value, 1e-30, 1e30):
            problems.append(f"rope_scaling.{key} is {shown_value(value)}, not a positive number")
    if not problems and kind == "llama3" and scaling.get("low_freq_factor", 1.0) >= scaling.get("high_freq_factor", 4.0):
        problems.append("rope_scaling.low_freq_factor is not below high_freq_factor")
    return problems
