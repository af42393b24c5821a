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
    codes: Codes, index: Index, stored: Stored, chosen: Mapping[str, Module], group: int, recipe: Recipe
) -> tuple[dict[str, Found], dict[str, ApartTensor]]:
    """(module -> its codes, norm or bias -> what takes its place); a search knows them by the names of the family tables.

    Args:
        chosen: linear modules that are quantized.

    Raises:
        UsageError: the codes are for another group size, container or choice of modules. TensorError: they are not those of the model.
    """
    named = settle(index)
    codes.check_model(named)
    known = {(r.shard, r.begin): name for name, r in named.tensors.items()}
    settled = {name: known.get((w.pieces[0].shard, w.pieces[0].begin), name) for name, w in stored.weights.items() if w.pieces}
    modules = {name: name if codes.has(name) else settled[f"{name}.weight"].removesuffix(".weight") for name in chosen}
    _check_folds(codes, set(modules.values()), recipe)
    codes_of = {}
    for name, module in chosen.items():
        codes_of[name] = codes.found(modules[name], (module.rows, module.cols), stored.weights[f"{name}.weight"].name)
        if codes_of[name].group != group:
            message = f"--group-size {group}: the codes of {printable(name)} have groups of {codes_of[name].group}"
            raise UsageError(message, hint=f"--group-size {codes_of[name].group}")
        multiplier = codes_of[name].multiplier
        if multiplier is not None and (not recipe.pre_scales or partners(name)):
            message = f"{printable(multiplier.name)} is in the codes, and a directory of {recipe.container} has no place for it"
            raise TensorError(f"{printable(codes.path)}: {message}", hint=HINT)
    changed = codes.changed()
    others = {name: changed[own] for name, own in settled.items() if own in changed}
    for name, tensor in others.items():
        if len(tensor.shape) > 1:
            raise TensorError(f"{printable(codes.path)}: {printable(name)} is neither a norm nor a bias", hint=HINT)
        if (tensor.shape, tensor.dtype) != (stored.form(name).shape, stored.form(name).dtype):
            raise TensorError(f"{printable(codes.path)}: {printable(name)} is not of the model's shape and type", hint=HINT)
    return codes_of, others


def _check_folds(codes: Codes, quantized: Collection[str], recipe: Recipe) -> None:
    """The pre-scales are where this container's readers look for them, and whatever has inputs that a fold changes has the codes for it."""
    if codes.method == "awq" and codes.folded not in (("all", "norms") if recipe.pre_scales else ("all",)):
        message = f"--codes: the pre-scales of these are not folded as a directory of {recipe.container} needs it"
        raise UsageError(message, hint="--text FILE finds others")
    left = min((name for name in codes.modules() if codes.folded and name not in quantized), key=natural, default=None)
    if left is not None:
        message = f"--method awq: {printable(left)} is to stay as it is, and its pre-scale is in the layer before it"
        raise UsageError(message, hint="leave out --ignore and --only, or take --method gptq")


def tensors_of(weight: Weight, form: Form, codec: Codec, recipe: Recipe, codes: Found | None) -> list[tuple[str, Codec, RowSource]]:
    """(role, codec, rows) of each tensor of a weight [N, K] whose codes were found, or whose container has a row for each input channel.

    Args:
        codec: of the weight's rows, or of its columns in such a container.

    Raises:
        UsageError: the source holds it in a form that is not read by columns.
    """
    if codes is None:
        if not (isinstance(weight, SourceTensor) and weight.as_stored and len(weight.pieces) == 1):
            module = printable(weight.name.removesuffix(".weight"))
            message = f"{module}: --format awq takes weights that are floats in a tensor of their own"
            raise UsageError(message, hint="--format compressed-tensors, or --quant none first")
        return [("", codec, turned(weight, WIDE))]
    if recipe.turned:
        return [("", GivenIntegers("awq"), codes.codes.turned()), ("", AwqScales(), replace(codes.scales, into=F16).turned())]
    packed = recipe.container == "compressed-tensors"
    kind = form.dtype if packed else F32
    scales = replace(codes.scales, into=kind)
    return [("", GivenIntegers("words" if packed else "pairs"), codes.codes), ("scale", Plain(kind), scales)]


def input_maxima(ranges: Ranges, modules: Mapping[str, Module]) -> dict[str, float]:
    """The largest absolute input of each module: partners share one, and an expert that no token reached takes its layer's.

    Raises:
        TensorError: ranges are missing or wrong; all of them are listed.
    """
    maxima: dict[str, float] = {}
    lines: list[str] = []
    layers: dict[str, list[str]] = {}
    for name, module in modules.items():
        if _EXPERT.search(name):
            first = (partners(name) or (name,))[0]
            layers.setdefault(_EXPERT.sub(".experts.*.", first), []).append(name)
            if ranges.silent(f"{name}.x"):
                continue
        line = ranges.problem(f"{name}.x", module.cols)
        if line is not None:
            lines.append(line)
        else:
            maxima[name] = ranges.amax([f"{name}.x"])
    for layer, names in layers.items():
        largest = max((maxima[name] for name in names if name in maxima), default=None)
        if largest is None:
            lines.append(f"{printable(ranges.path)}: no expert of {printable(layer)} was measured")
            continue
        for name in names:
            seen = [maxima[other] for other in partners(name) or (name,) if other in maxima]
            maxima[name] = max(seen, default=largest)
    if lines:
        raise TensorError(lines, hint=MEASURE)
    return {name: max(maxima[other] for other in partners(name) or (name,) if other in maxima) for name in maxima}


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
