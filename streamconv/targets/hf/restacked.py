"""Experts that a quantizer stored apart, stacked again as the model's own code holds them: the inverse of `stacked.unstack`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from streamconv.checkpoint.rows import SourceTensor
from streamconv.quants.decoded_rows import DecodedTensor
from streamconv.quants.stacked_rows import Expert, Stacked, stacked
from streamconv.targets.hf.model_types import Sizes, text_config
from streamconv.targets.hf.stacked import StackedForm, stacked_form
from streamconv.targets.hf.stored import Stored

_APART = re.compile(r"(.*?\bexperts)(?:\.experts)?\.(\d+)\.((?:gate|up|down)_proj\.(?:weight|bias))")
_TENSORS = {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)}
_BIASES = {"gate_up_proj_bias": ("gate_proj.bias", "up_proj.bias"), "down_proj_bias": ("down_proj.bias",)}


def restack(stored: Stored, config: Mapping[str, Any]) -> list[str]:
    """`X.experts.{e}.gate_proj.weight`, `.up_proj.weight` -> `X.experts.gate_up_proj`, and so on; one that is not proven stays apart.

    Returns:
        the names that stay apart although transformers reads stacked experts alone.
    """
    form = stacked_form(config)
    if form is None:
        return []
    layers: dict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for name in stored.order:
        if found := _APART.fullmatch(name):
            layers[found[1]][int(found[2]), found[3]] = name
    apart = list[str]()
    for module, held in layers.items():
        made = _layer(stored, config, form, module, held)
        if made is None:
            apart += held.values()
            continue
        file = stored.file(held[0, "gate_proj.weight"])
        for name in held.values():
            stored.take(name)
        for weight in made:
            stored.put(weight.name, weight, weight.shape, file)
    return apart


def _layer(
    stored: Stored, config: Mapping[str, Any], form: StackedForm, module: str, held: Mapping[tuple[int, str], str]
) -> list[Stacked] | None:
    """The stacked tensors of a layer's experts; None if these are not all of them, or not of the sizes that config.json means."""
    if form.transposed is None:
        return None
    count, tensors = 1 + max(expert for expert, _ in held), _TENSORS | (_BIASES if form.biased else {})
    leaves = [leaf for parts in tensors.values() for leaf in parts]
    sizes = Sizes(text_config(config))
    if held.keys() != {(expert, leaf) for expert in range(count) for leaf in leaves} or count != sizes.experts():
        return None
    shapes = {leaf: {stored.form(held[expert, leaf]).shape for expert in range(count)} for leaf in leaves}
    inner, hidden = stored.form(held[0, "gate_proj.weight"]).shape
    wanted = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    right = all(shapes[f"{name}.weight"] == {shape} for name, shape in wanted.items())
    right = right and all(shapes[f"{name}.bias"] == {shape[:1]} for name, shape in wanted.items() if form.biased)
    if not right or hidden != sizes.of("hidden_size"):
        return None
    made = [_stacked(stored, f"{module}.{name}", form, held, parts, count) for name, parts in tensors.items()]
    whole = [weight for weight in made if weight is not None]
    return whole if len(whole) == len(made) else None


def _ordered(weight: Expert) -> bool:
    return isinstance(weight, DecodedTensor) and weight.order is not None


def _stacked(
    stored: Stored, name: str, form: StackedForm, held: Mapping[tuple[int, str], str], parts: Sequence[str], count: int
) -> Stacked | None:
    places = [stored.order[held[expert, part]] for expert in range(count) for part in parts]
    first = stored.form(held[0, parts[0]])
    if any(not isinstance(place, int) for place in places):
        return None
    of = cast(Callable[[int], Expert], lambda number: stored.at(cast(int, places[number])))
    weights = [of(number) for number in range(len(places))]
    if any(not isinstance(weight, SourceTensor | DecodedTensor) or weight.dtype != first.dtype or _ordered(weight) for weight in weights):
        return None
    outs, turned = len(parts) * first.rows, bool(form.transposed)
    if name.endswith("_bias"):
        return stacked(name, (count, outs), of, len(parts), True, form.alternating)
    shape = (count, first.cols, outs) if turned else (count, outs, first.cols)
    return stacked(name, shape, of, len(parts), turned, form.alternating)
