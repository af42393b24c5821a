"""Experts that a source stores as one tensor [E, ...], of which engines want one 2-D weight each; and the inverse: experts that a quantizer
stored apart, stacked again as the model's own code holds them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from streamconv.checkpoint.derived_rows import Turned, rows_of
from streamconv.checkpoint.rows import Extent, SourceTensor
from streamconv.quants.decoded_rows import DecodedTensor, TurnedMx
from streamconv.quants.stacked_rows import Expert, Stacked, stacked
from streamconv.targets.hf.model_types import Sizes, text_config
from streamconv.targets.hf.sources import Weight
from streamconv.targets.hf.stored import Stored

_APART = re.compile(r"(.*?\bexperts)(?:\.experts)?\.(\d+)\.((?:gate|up|down)_proj\.(?:weight|bias))")
_TENSORS = {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)}
_BIASES = {"gate_up_proj_bias": ("gate_proj.bias", "up_proj.bias"), "down_proj_bias": ("down_proj.bias",)}
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_TRANSPOSED = ("llama4", "llama4_text", "gpt_oss", "openai_privacy_filter", "qwen3_vl_moe", "qwen3_vl_moe_text")
"""Model types that store stacked experts as [E, in, out], where the sizes do not tell."""
_UPRIGHT = ("gemma4", "gemma4_text")
"""Model types that store them as [E, out, in], and of which transformers reads no others."""
_EITHER = ("qwen3_vl_moe_text",)
"""Model types that different versions of transformers store differently, where they are not the text model of a larger one."""
_BIASED = ("gpt_oss", "openai_privacy_filter")
_ALTERNATING = ("gpt_oss",)
"""Model types whose gate and up rows take turns; elsewhere the gate is the first half."""


class _Rows(NamedTuple):
    """Output features first, first + step, ... of an expert."""

    first: int
    step: int
    taken: int


class StackedForm(NamedTuple):
    """How transformers stores the unquantized experts of a model type: as stacked tensors, and it starts others with random values.

    Attributes:
        transposed: [E, in, out]; None: not known.
        alternating: gate and up rows take turns.
        biased: there are biases.
    """

    transposed: bool | None
    alternating: bool
    biased: bool


def stacked_form(config: Mapping[str, Any]) -> StackedForm | None:
    """The form of a model's stacked experts; None where transformers reads experts apart, or that is not known."""
    types = _model_types(config)
    if not types & {*_TRANSPOSED, *_UPRIGHT}:
        return None
    transposed = None if types <= set(_EITHER) else bool(types & set(_TRANSPOSED))
    return StackedForm(transposed, bool(types & set(_ALTERNATING)), bool(types & set(_BIASED)))


def _model_types(config: Mapping[str, Any]) -> set[str]:
    named = [part.get("model_type") for part in (config.get("text_config"), config) if isinstance(part, dict)]
    return {kind for kind in named if isinstance(kind, str)}


def unstack(stored: Stored, config: Mapping[str, Any]) -> None:
    """`X.experts.gate_up_proj` -> `X.experts.{e}.gate_proj.weight`, `.up_proj.weight`; `X.experts.down_proj`, and biases, likewise.

    What is neither [E, out, in] nor [E, in, out] by the config's hidden size stays as it is.
    """
    text = config.get("text_config")
    parts = [part for part in (text, config) if isinstance(part, dict)]
    hidden = next((part["hidden_size"] for part in parts if "hidden_size" in part), None)
    types = _model_types(config)
    alternating = bool(types & set(_ALTERNATING))
    names = [name for name in stored.order if len(stored.form(name).shape) == 3]
    turned = dict(_orientations(((name, stored.form(name).shape) for name in names), hidden))
    for name in names:
        stem = name.removesuffix(".weight")
        module, _, last = stem.rpartition(".")
        whole = stored.weights[name]
        if not module.endswith("experts") or last not in _PARTS or not isinstance(whole, SourceTensor | TurnedMx):
            continue
        if hidden is not None and hidden not in whole.shape[1:]:
            continue
        transposed = turned.get(module, bool(types & set(_TRANSPOSED)))
        _split(stored, name, module, last, "weight", alternating, transposed)
        if f"{stem}_bias" in stored.order:
            _split(stored, f"{stem}_bias", module, last, "bias", alternating, False)


def _orientations(shapes: Iterable[tuple[str, tuple[int, ...]]], hidden: object) -> Iterator[tuple[str, bool]]:
    """(experts, whether they are [E, in, out]), where the hidden size tells: of two tensors one may be square, and both lie alike."""
    for name, (_, first, second) in shapes:
        module, _, last = name.removesuffix(".weight").rpartition(".")
        if last in _PARTS and first != second and hidden in (first, second):
            yield module, hidden == (first if last == "gate_up_proj" else second)


def _split(stored: Stored, name: str, module: str, last: str, leaf: str, alternating: bool, transposed: bool) -> None:
    """Put a weight, or a bias, of each part of each expert in the place of a tensor [E, ...]."""
    whole, file = stored.take(name)
    parts = _PARTS[last]
    each = whole.shape[2 if transposed else 1] // len(parts)
    for expert in range(whole.shape[0]):
        for number, part in enumerate(parts):
            rows = _Rows(number, len(parts), each) if alternating else _Rows(number * each, 1, each)
            weight = _expert(whole, f"{module}.{expert}.{part}.{leaf}", expert, rows, transposed)
            stored.put(weight.name, weight, (weight.rows, weight.cols) if leaf == "weight" else (weight.rows,), file)


def _expert(whole: Weight, name: str, expert: int, rows: _Rows, transposed: bool) -> Weight:
    """Some output features of an expert, [out, in]."""
    if isinstance(whole, TurnedMx):  # stored as [E, out, in / 32, ...]
        _, k, n = whole.shape
        first = expert * n + rows.first
        codes = rows_of(whole.codes, name, first, (rows.taken, k // 2), rows.step)
        scales = rows_of(whole.scales, name, first, (rows.taken, k // 32), rows.step)
        return DecodedTensor(name, whole.dtype, (rows.taken, k), codes, "e2m1", scales, 1, 32, sound=whole.sound)
    assert isinstance(whole, SourceTensor)
    if not transposed:
        outs, cols = (*whole.shape[1:], 1)[:2]  # a bias is [E, out]
        return rows_of(whole, name, expert * outs + rows.first, (rows.taken, cols), rows.step)
    cols, outs = whole.shape[1:]
    piece = whole.pieces[0]
    begin = piece.begin + (expert * cols * outs + rows.first) * whole.dtype.itemsize
    return Turned(name, whole.dtype, (rows.taken, cols), (Extent(piece.shard, begin, cols, outs),), 0, rows.step)


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
        if match := _APART.fullmatch(name):
            layers[match[1]][int(match[2]), match[3]] = name
    apart = list[str]()
    for module, tensors in layers.items():
        layer = _layer(stored, config, form, module, tensors)
        if layer is None:
            apart += tensors.values()
            continue
        file = stored.file(tensors[0, "gate_proj.weight"])
        for name in tensors.values():
            stored.take(name)
        for weight in layer:
            stored.put(weight.name, weight, weight.shape, file)
    return apart


def _layer(
    stored: Stored, config: Mapping[str, Any], form: StackedForm, module: str, names: Mapping[tuple[int, str], str]
) -> list[Stacked] | None:
    """The stacked tensors of a layer's experts; None if these are not all of them, or not of the sizes that config.json means."""
    if form.transposed is None:
        return None
    count, tensors = 1 + max(expert for expert, _ in names), _TENSORS | (_BIASES if form.biased else {})
    leaves = [leaf for parts in tensors.values() for leaf in parts]
    sizes = Sizes(text_config(config))
    if names.keys() != {(expert, leaf) for expert in range(count) for leaf in leaves} or count != sizes.experts():
        return None
    shapes = {leaf: {stored.form(names[expert, leaf]).shape for expert in range(count)} for leaf in leaves}
    inner, hidden = stored.form(names[0, "gate_proj.weight"]).shape
    expected = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    right = all(shapes[f"{name}.weight"] == {shape} for name, shape in expected.items())
    right = right and all(shapes[f"{name}.bias"] == {shape[:1]} for name, shape in expected.items() if form.biased)
    if not right or hidden != sizes.of("hidden_size"):
        return None
    stacks = [_stacked(stored, f"{module}.{name}", form, names, parts, count) for name, parts in tensors.items()]
    whole = [weight for weight in stacks if weight is not None]
    return whole if len(whole) == len(stacks) else None


def _whole_rows(weight: Expert) -> bool:
    """Neither act order nor integers that are stored input-major."""
    return isinstance(weight, SourceTensor) or (weight.order is None and (weight.zeros is None or weight.bits is None))


def _stacked(
    stored: Stored, name: str, form: StackedForm, names: Mapping[tuple[int, str], str], parts: Sequence[str], count: int
) -> Stacked | None:
    places = [stored.order[names[expert, part]] for expert in range(count) for part in parts]
    first = stored.form(names[0, parts[0]])
    if any(not isinstance(place, int) for place in places):
        return None
    of = cast(Callable[[int], Expert], lambda number: stored.at(cast(int, places[number])))
    weights = [of(number) for number in range(len(places))]
    if any(not isinstance(weight, Expert) or weight.dtype != first.dtype or not _whole_rows(weight) for weight in weights):
        return None
    outs, turned = len(parts) * first.rows, bool(form.transposed)
    if name.endswith("_bias"):
        return stacked(name, (count, outs), of, len(parts), True, form.alternating)
    shape = (count, first.cols, outs) if turned else (count, outs, first.cols)
    return stacked(name, shape, of, len(parts), turned, form.alternating)
