"""What was measured on text for the weights of a directory: scales of activations and of the KV cache, and codes that a search found."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from streamconv.checkpoint.activation_ranges import HINT as MEASURE
from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.checkpoint.codes_file import HINT, ApartTensor, Codes, Found
from streamconv.checkpoint.derived_rows import WIDE, turned
from streamconv.checkpoint.dtypes import F16, F32
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.rows import RowSource, SourceTensor
from streamconv.errors import RefusedError, TensorError, UsageError, printable
from streamconv.families.naming import settle
from streamconv.natural import natural
from streamconv.quants.awq_words import AwqScales
from streamconv.quants.base import Codec
from streamconv.quants.given_codes import GivenIntegers
from streamconv.quants.plain import Plain
from streamconv.targets.hf.recipes import Recipe
from streamconv.targets.hf.rules import Module, partners
from streamconv.targets.hf.sources import Weight
from streamconv.targets.hf.stored import Form, Stored

_EXPERT = re.compile(r"\.experts\.\d+\.")
_CACHED = re.compile(r"(.*)\.([kv])_proj\.weight")


def taken(
    codes: Codes, index: Index, stored: Stored, wanted: Mapping[str, Module], group: int, recipe: Recipe
) -> tuple[dict[str, Found], dict[str, ApartTensor]]:
    """(module -> its codes, norm or bias -> what takes its place); a search knows them by the names of the family tables.

    Args:
        wanted: linear modules that are quantized.

    Raises:
        UsageError: the codes are for another group size, container or choice of modules. TensorError: they are not those of the model.
    """
    named = settle(index)
    codes.check_model(named)
    known = {(r.shard, r.begin): name for name, r in named.tensors.items()}
    settled = {name: known.get((w.pieces[0].shard, w.pieces[0].begin), name) for name, w in stored.weights.items() if w.pieces}
    modules = {name: name if codes.has(name) else settled[f"{name}.weight"].removesuffix(".weight") for name in wanted}
    _check_folds(codes, set(modules.values()), recipe)
    found = {}
    for name, module in wanted.items():
        found[name] = codes.found(modules[name], (module.rows, module.cols), stored.weights[f"{name}.weight"].name)
        if found[name].group != group:
            told = f"--group-size {group}: the codes of {printable(name)} have groups of {found[name].group}"
            raise UsageError(told, hint=f"--group-size {found[name].group}")
        multiplier = found[name].multiplier
        if multiplier is not None and (not recipe.pre_scales or partners(name)):
            told = f"{printable(multiplier.name)} is in the codes, and a directory of {recipe.container} has no place for it"
            raise TensorError(f"{printable(str(codes.path))}: {told}", hint=HINT)
    changed = codes.changed()
    others = {name: changed[own] for name, own in settled.items() if own in changed}
    for name, tensor in others.items():
        if len(tensor.shape) > 1:
            raise TensorError(f"{printable(str(codes.path))}: {printable(name)} is neither a norm nor a bias", hint=HINT)
        if (tensor.shape, tensor.dtype) != (stored.form(name).shape, stored.form(name).dtype):
            raise TensorError(f"{printable(str(codes.path))}: {printable(name)} is not of the model's shape and type", hint=HINT)
    return found, others


def _check_folds(codes: Codes, quantized: Collection[str], recipe: Recipe) -> None:
    """The pre-scales are where this container's readers look for them, and whatever has inputs that a fold changes has the codes for it."""
    if codes.method == "awq" and codes.folded not in (("all", "norms") if recipe.pre_scales else ("all",)):
        told = f"--codes: the pre-scales of these are not folded as a directory of {recipe.container} needs it"
        raise UsageError(told, hint="--text FILE finds others")
    left = min((name for name in codes.modules() if codes.folded and name not in quantized), key=natural, default=None)
    if left is not None:
        told = f"--method awq: {printable(left)} is to stay as it is, and its pre-scale is in the layer before it"
        raise UsageError(told, hint="leave out --ignore and --only, or take --method gptq")


def tensors_of(weight: Weight, form: Form, codec: Codec, recipe: Recipe, found: Found | None) -> list[tuple[str, Codec, RowSource]]:
    """(role, codec, rows) of each tensor of a weight [N, K] whose codes were found, or whose container has a row for each input channel.

    Args:
        codec: of the weight's rows, or of its columns in such a container.

    Raises:
        UsageError: the source holds it in a form that is not read by columns.
    """
    if found is None:
        if not (isinstance(weight, SourceTensor) and weight.as_stored and len(weight.pieces) == 1):
            told = f"{printable(weight.name.removesuffix('.weight'))}: --format awq takes weights that are floats in a tensor of their own"
            raise UsageError(told, hint="--format compressed-tensors, or --quant none first")
        return [("", codec, turned(weight, WIDE))]
    if recipe.turned:
        return [("", GivenIntegers("awq"), found.codes.turned()), ("", AwqScales(), replace(found.scales, into=F16).turned())]
    packed = recipe.container == "compressed-tensors"
    kind = form.dtype if packed else F32
    scales = replace(found.scales, into=kind)
    return [("", GivenIntegers("words" if packed else "pairs"), found.codes), ("scale", Plain(kind), scales)]


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
        raise TensorError(lines, hint=MEASURE)
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
